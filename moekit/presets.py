"""Named configurations: a table to look up.

Presets are named family-size. Sizes follow the public flaxformer and T5 v1.1 configurations, the
closest public description of the paper's models (its own table of architectures is not complete);
nano and mini are ours. "FLAN" is a stage of training, not a shape.
"""

from moekit.config import ModelConfig
from moekit.errors import unknown
from moekit.moe.routing import ExpertChoice, GShard, Switch, TopK

# ours: every family of a size spends the FLOPs of its dense twin on each token. Top-2 routers halve
# the experts' d_ff; ST-MoE spends half of d_ff on the extra FFN and a quarter on each of two
# experts; Expert Choice gives each token one expert on average.

T5_NANO = ModelConfig(
    name="t5-nano",
    encoder_layers=2,
    decoder_layers=2,
    d_model=64,
    d_ff=256,
    num_heads=2,
    head_dim=32,
    vocab_size=384,
    tokenizer="byte",
    max_length=4096,
)
SWITCH_NANO = T5_NANO.replace(
    name="switch-nano",
    num_experts=8,
    encoder_moe_layers=1,
    decoder_moe_layers=1,
)
GSHARD_NANO = SWITCH_NANO.replace(
    name="gshard-nano",
    expert_d_ff=128,
    capacity_counts_k=True,  # else half of the few tokens of a batch would be dropped
    router=GShard(),
    decoder_router=GShard(priority="token"),
)
EC_NANO = SWITCH_NANO.replace(
    name="ec-nano",
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    router=ExpertChoice(),
    decoder_router=Switch(),
    balance_loss=0.0,
)
ST_NANO = SWITCH_NANO.replace(
    name="st-nano",
    expert_d_ff=64,
    extra_d_ff=128,
    capacity_counts_k=True,
    router=TopK(k=2, normalise=True),
    router_z_loss=1e-3,
)

T5_MINI = ModelConfig(
    name="t5-mini",
    encoder_layers=4,
    decoder_layers=4,
    d_model=192,
    d_ff=512,
    num_heads=3,
    head_dim=64,
    vocab_size=8192,
    max_length=2048,
)
SWITCH_MINI = T5_MINI.replace(
    name="switch-mini",
    num_experts=16,
    encoder_moe_layers=2,
    decoder_moe_layers=2,
)
GSHARD_MINI = SWITCH_MINI.replace(
    name="gshard-mini",
    expert_d_ff=256,
    capacity_counts_k=True,
    router=GShard(),
    decoder_router=GShard(priority="token"),
)
EC_MINI = SWITCH_MINI.replace(
    name="ec-mini",
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    router=ExpertChoice(),
    decoder_router=Switch(),
    balance_loss=0.0,
)
ST_MINI = SWITCH_MINI.replace(
    name="st-mini",
    expert_d_ff=128,
    extra_d_ff=256,
    capacity_counts_k=True,
    router=TopK(k=2, normalise=True),
    router_z_loss=1e-3,
)

# published: T5 v1.1

T5_SMALL = ModelConfig(
    name="t5-small",
    encoder_layers=8,
    decoder_layers=8,
    d_model=512,
    d_ff=1024,
    num_heads=6,
    head_dim=64,
    dtype="bfloat16",
)
T5_BASE = ModelConfig(
    name="t5-base",
    encoder_layers=12,
    decoder_layers=12,
    d_model=768,
    d_ff=2048,
    num_heads=12,
    head_dim=64,
    dtype="bfloat16",
)
T5_LARGE = ModelConfig(
    name="t5-large",
    encoder_layers=24,
    decoder_layers=24,
    d_model=1024,
    d_ff=2816,
    num_heads=16,
    head_dim=64,
    dtype="bfloat16",
)
T5_XL = ModelConfig(
    name="t5-xl",
    encoder_layers=24,
    decoder_layers=24,
    d_model=2048,
    d_ff=5120,
    num_heads=32,
    head_dim=64,
    dtype="bfloat16",
)
T5_XXL = ModelConfig(
    name="t5-xxl",
    encoder_layers=24,
    decoder_layers=24,
    d_model=4096,
    d_ff=10240,
    num_heads=64,
    head_dim=64,
    dtype="bfloat16",
)

# published: GShard, top-2

GSHARD_SMALL = T5_SMALL.replace(
    name="gshard-small",
    num_experts=32,
    encoder_moe_layers=2,
    decoder_moe_layers=2,
    router=GShard(),
    decoder_router=GShard(priority="token"),
)
GSHARD_BASE = T5_BASE.replace(
    name="gshard-base",
    num_experts=64,
    encoder_moe_layers=3,
    decoder_moe_layers=3,
    router=GShard(),
    decoder_router=GShard(priority="token"),
)
GSHARD_LARGE = T5_LARGE.replace(
    name="gshard-large",
    num_experts=64,
    encoder_moe_layers=6,
    decoder_moe_layers=6,
    router=GShard(),
    decoder_router=GShard(priority="token"),
)
GSHARD_XL = T5_XL.replace(
    name="gshard-xl",
    num_experts=64,
    encoder_moe_layers=6,
    decoder_moe_layers=6,
    router=GShard(),
    decoder_router=GShard(priority="token"),
)
GSHARD_XXL = T5_XXL.replace(
    name="gshard-xxl",
    num_experts=64,
    encoder_moe_layers=6,
    decoder_moe_layers=6,
    router=GShard(),
    decoder_router=GShard(priority="token"),
)

# published: Expert Choice in the encoder, top-2 in the decoder

EC_SMALL = T5_SMALL.replace(
    name="ec-small",
    num_experts=32,
    encoder_moe_layers=4,
    decoder_moe_layers=4,
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    router=ExpertChoice(),
    decoder_router=TopK(k=2),
    balance_loss=0.0,
)
EC_BASE = T5_BASE.replace(
    name="ec-base",
    num_experts=64,
    encoder_moe_layers=6,
    decoder_moe_layers=6,
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    router=ExpertChoice(),
    decoder_router=TopK(k=2),
    balance_loss=0.0,
)
EC_LARGE = T5_LARGE.replace(
    name="ec-large",
    num_experts=64,
    encoder_moe_layers=12,
    decoder_moe_layers=12,
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    router=ExpertChoice(),
    decoder_router=TopK(k=2),
    balance_loss=0.0,
)
EC_XL = T5_XL.replace(
    name="ec-xl",
    num_experts=64,
    encoder_moe_layers=12,
    decoder_moe_layers=12,
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    router=ExpertChoice(),
    decoder_router=TopK(k=2),
    balance_loss=0.0,
)

# published: Switch Transformers; base, large and c are T5 v1.0 (ReLU, tied logits)

SWITCH_BASE = T5_BASE.replace(
    name="switch-base",
    d_ff=3072,
    activation="relu",
    tied_logits=True,
    num_experts=128,
    encoder_moe_layers=6,
    decoder_moe_layers=6,
    group_size=8192,
)
SWITCH_LARGE = T5_LARGE.replace(
    name="switch-large",
    d_ff=4096,
    activation="relu",
    tied_logits=True,
    num_experts=128,
    encoder_moe_layers=12,
    decoder_moe_layers=12,
)
SWITCH_XXL = T5_XXL.replace(
    name="switch-xxl",
    num_experts=128,
    encoder_moe_layers=12,
    decoder_moe_layers=12,
    eval_capacity_factor=4.0,
    min_capacity=2,
)
SWITCH_C = ModelConfig(
    name="switch-c",
    encoder_layers=15,
    decoder_layers=15,
    d_model=2080,
    d_ff=6144,
    num_heads=30,
    head_dim=64,
    activation="relu",
    tied_logits=True,
    num_experts=2048,
    encoder_moe_layers=15,
    decoder_moe_layers=15,
    capacity_factor=1.0,
    min_capacity=2,
    group_size=2048,
    dtype="bfloat16",
)

# published: ST-MoE, with raw top-2 probabilities and capacity without k, as flaxformer runs them

ST_BASE = T5_BASE.replace(
    name="st-base",
    extra_d_ff=2048,
    num_experts=16,
    encoder_moe_layers=3,
    decoder_moe_layers=3,
    router=TopK(k=2),
    router_z_loss=1e-4,
)
ST_XL = T5_XL.replace(
    name="st-xl",
    extra_d_ff=5120,
    num_experts=16,
    encoder_moe_layers=6,
    decoder_moe_layers=6,
    capacity_factor=2.0,
    eval_capacity_factor=4.0,
    group_size=1024,
    router=TopK(k=2),
    router_z_loss=1e-4,
)
ST_32B = ModelConfig(
    name="st-32b",
    encoder_layers=24,
    decoder_layers=24,
    d_model=5120,
    d_ff=20480,
    extra_d_ff=20480,
    num_heads=64,
    head_dim=128,
    num_experts=64,
    encoder_moe_layers=6,
    decoder_moe_layers=6,
    router=TopK(k=2),
    router_z_loss=1e-3,
    dtype="bfloat16",
)

PRESETS: dict[str, ModelConfig] = {
    cfg.name: cfg
    for cfg in (
        T5_NANO,
        SWITCH_NANO,
        GSHARD_NANO,
        EC_NANO,
        ST_NANO,
        T5_MINI,
        SWITCH_MINI,
        GSHARD_MINI,
        EC_MINI,
        ST_MINI,
        T5_SMALL,
        T5_BASE,
        T5_LARGE,
        T5_XL,
        T5_XXL,
        GSHARD_SMALL,
        GSHARD_BASE,
        GSHARD_LARGE,
        GSHARD_XL,
        GSHARD_XXL,
        EC_SMALL,
        EC_BASE,
        EC_LARGE,
        EC_XL,
        SWITCH_BASE,
        SWITCH_LARGE,
        SWITCH_XXL,
        SWITCH_C,
        ST_BASE,
        ST_XL,
        ST_32B,
    )
}


def preset(name: str) -> ModelConfig:
    """The configuration of that name; ValueError with near misses for an unknown one."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]
