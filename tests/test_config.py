import dataclasses
import json

import pytest

import moekit as mk
from moekit.config import TrainConfig, digest
from moekit.generation_config import GenerationSettings
from moekit.moe.routing import ExpertChoice, GShard, TopK

INFINITY = float("inf")
NAN = float("nan")
# billions of parameters and GFLOPs per encoder and decoder token, from flaxformer's configurations
SIZES = {
    "t5-small": (0.077, 0.038, 0.083),
    "t5-base": (0.248, 0.170, 0.276),
    "t5-large": (0.783, 0.617, 0.884),
    "t5-xl": (2.85, 2.32, 3.25),
    "t5-xxl": (11.1, 9.26, 12.7),
    "gshard-small": (0.27, 0.044, 0.090),
    "gshard-base": (2.03, 0.198, 0.304),
    "gshard-large": (7.32, 0.72, 0.99),
    "gshard-xl": (26.6, 2.69, 3.63),
    "gshard-xxl": (106, 10.8, 14.3),
    "ec-small": (0.47, 0.038, 0.083),
    "ec-base": (3.82, 0.170, 0.276),
    "ec-large": (13.9, 0.617, 0.884),
    "ec-xl": (50.4, 2.32, 3.25),
    "switch-base": (7.42, None, None),
    "switch-large": (26.3, None, None),
    "switch-xxl": (394.7, 9.26, 12.7),
    "st-base": (0.70, 0.226, 0.332),
    "st-xl": (8.89, 3.07, 4.01),
    "st-32b": (269.1, 30.7, 39.1),
}


def as_printed(value: float, printed: float) -> bool:
    digits = len(str(printed).partition(".")[2]) if isinstance(printed, float) else 0
    return abs(value - printed) <= 0.5001 * 10**-digits


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name):
    cfg, (total, encoder, decoder) = mk.preset(name), SIZES[name]
    assert as_printed(cfg.num_parameters().total / 1e9, total)
    for found, printed in zip(cfg.flops_per_token(), (encoder, decoder), strict=True):
        assert printed is None or as_printed(found / 1e9, printed)


@pytest.mark.parametrize("size", ["nano", "mini"])
def test_all_flavours_of_a_size_spend_their_dense_twins_flops(size):
    dense = mk.preset(f"t5-{size}")
    for flavour in ("switch", "gshard", "ec", "st"):
        sparse = mk.preset(f"{flavour}-{size}")
        assert sparse.flops_per_token() == dense.flops_per_token()
        assert sparse.num_parameters().total > dense.num_parameters().total


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0; use a finite number above 0"),
        ({"eval_capacity_factor": INFINITY}, "eval_capacity_factor is inf"),
        ({"balance_loss": -1e-2}, "balance_loss is -0.01; use 0 or a finite number"),
        ({"balance_loss": NAN}, "balance_loss is nan"),
        ({"router_z_loss": INFINITY}, "router_z_loss is inf"),
        ({"vocab_size": 10**29}, r"vocab_size is 10{29}; use at most 2147483647"),
        ({"num_experts": -1}, "num_experts is -1"),
        ({"d_model": 0}, "d_model is 0; use 1 or more"),
        ({"dropout": 1.0}, "dropout is 1.0; use 0 or more"),
        ({"encoder_moe_layers": 3}, r"of 2 layers, use one of \[1, 2\]"),
        ({"encoder_moe_layers": 0, "decoder_moe_layers": 0}, "give encoder_moe_layers"),
        ({"num_experts": 1}, "picks 2 different experts"),
        ({"router": "swich"}, "did you mean 'switch'"),
        ({"activation": "gated_glu"}, "did you mean 'gated_gelu'"),
        ({"dtype": "float16"}, "known: bfloat16, float32"),
        ({"num_expert": 4}, "did you mean 'num_experts'"),
        ({"router": ExpertChoice()}, "later tokens"),
        ({"router": TopK(k=2, priority="batch")}, "later tokens"),
        ({"decoder_router": GShard()}, 'GShard\\(priority="token"\\)'),
        ({"expert_capacity": 0}, "expert_capacity is 0: use 1 or more"),
        ({"expert_capacity": 4, "dispatch": "dropless"}, "has no slots"),
        ({"sparse_layer": 2}, "one of 2 encoder layers is sparse, so use 0 to 1"),
        ({"sparse_layer": -1}, "sparse_layer is -1"),
    ],
)
def test_what_cannot_be_built_says_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        mk.preset("st-nano").replace(**changes)


def test_the_opt_in_to_future_leaks():
    cfg = mk.preset("st-nano").replace(router=ExpertChoice(), allow_future_leak=True)
    assert cfg.stack_router("decoder") == ExpertChoice()


def test_unknown_preset_suggests():
    with pytest.raises(ValueError, match="unknown preset 'st-nanno': did you mean 'st-nano'"):
        mk.preset("st-nanno")


@pytest.mark.parametrize("name", sorted(mk.PRESETS))
def test_round_trip_and_digest(name):
    cfg = mk.preset(name)
    again = mk.ModelConfig.from_dict(cfg.to_dict())
    assert again == cfg and again.digest() == cfg.digest()
    assert cfg.replace(dropout=0.5).digest() != cfg.digest()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.d_model = 3


def test_fields_of_later_versions_are_stored_only_when_they_are_set():
    cfg = mk.preset("switch-nano")
    fields = {
        "scaled_logits": True,
        "sparse_layer": 0,
        "expert_capacity": 64,
        "generation": GenerationSettings(num_beams=4, length_normalization="transformers"),
    }
    assert not fields.keys() & cfg.to_dict().keys()  # equals what earlier versions stored
    changed = cfg.replace(**fields)
    stored = json.loads(json.dumps(changed.to_dict()))
    assert fields.keys() <= stored.keys()
    assert mk.ModelConfig.from_dict(stored) == changed


def test_the_sparse_layer_of_a_block():
    cfg = mk.preset("switch-nano").replace(encoder_layers=4, decoder_layers=1)
    assert cfg.sparse_layer_of("encoder") == 3 and cfg.sparse_layer_of("decoder") == 0
    second = cfg.replace(sparse_layer=1)
    assert second.sparse_layer_of("encoder") == 1 and second.sparse_layer_of("decoder") == 0
    assert cfg.replace(encoder_moe_layers=0).sparse_layer_of("encoder") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; use 1 or more"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"top_k": -1}, "top_k is -1; use 0 or more"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": NAN}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5; use a probability"),
        ({"length_penalty": INFINITY}, "length_penalty is inf"),
        ({"length_normalization": "T5"}, "did you mean 't5'"),
    ],
)
def test_generation_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**changes)
    with pytest.raises(ValueError, match="did you mean 'num_beams'"):
        GenerationSettings.from_dict({"num_beam": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"optimizer": "adam"}, "did you mean 'adamw'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"batch_tokens": 100}, "less than one row of 512"),
        ({"freeze": ("routers",)}, "did you mean 'router'"),
        ({"freeze": ("all_but_router", "moe")}, "which leaves nothing to train"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"clip_norm": INFINITY}, "clip_norm is inf"),
        ({"clip_norm": NAN}, "clip_norm is nan"),
        ({"z_loss": -1.0}, "z_loss is -1.0; use 0 or a finite number"),
        ({"z_loss": NAN}, "z_loss is nan"),
        ({"weight_decay": NAN}, "weight_decay is nan"),
        ({"weight_decay": INFINITY}, "weight_decay is inf"),
        ({"learning_rate": INFINITY}, "learning_rate is inf"),
        ({"learning_rate": NAN}, "learning_rate is nan"),
        ({"label_smoothing": NAN}, "label_smoothing is nan"),
        ({"steps": 10**29}, r"steps is 10{29}; use at most 2147483647"),
        ({"steps": 10**99}, r"steps is 10{19}.. \(100 characters\)"),
        ({"warmup_steps": -1}, "warmup_steps is -1; use 0 or more"),
        ({"seed": 99999999999999999999}, "seed is 99999999999999999999; use 0 to 4294967295"),
        ({"seed": -1}, "seed is -1"),
        ({"keep": 0}, "keep is 0; use 1 or more"),
        ({"step": 3}, "did you mean 'steps'"),
    ],
)
def test_training_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig().replace(**changes)


def test_training_settings_survive_json():
    config = TrainConfig(freeze=("router",), clip_norm=1.0, seed=2**32 - 1)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_digest_ignores_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
