"""Configurations and presets: frozen dataclasses that check themselves.

Presets are named family-size. Sizes follow the public flaxformer and T5 v1.1 configurations, the
closest public description of the paper's models (its own table of architectures is not
complete); nano and mini are ours. "FLAN" is a stage of training, not a shape.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moekit.errors import unknown
from moekit.moe import routing
from moekit.moe.layer import ACTIVATIONS, check_dispatch
from moekit.moe.routing import ExpertChoice, GShard, Router, Switch, TopK

DTYPES = ("float32", "bfloat16")
FREEZABLE = ("router", "experts", "moe")
OPTIMIZERS = ("adafactor", "adamw")
REMATS = ("none", "dots", "full")
SCHEDULES = ("constant", "rsqrt", "cosine", "linear")


class Parameters(NamedTuple):
    total: int
    active: int  # used by one encoder plus one decoder token


@dataclass(frozen=True)
class ModelConfig:
    """An encoder-decoder T5 whose feed-forward layers may be sparse.

    With S sparse of L layers in a stack, layer i is sparse when i mod (L / S) == L / S - 1.
    Raises ValueError on construction for every combination that cannot be built.
    """

    name: str
    d_model: int
    d_ff: int
    num_heads: int
    head_dim: int
    encoder_layers: int
    decoder_layers: int
    vocab_size: int = 32_128
    activation: str = "gated_gelu"
    tied_logits: bool = False
    dropout: float = 0.0
    expert_dropout: float = 0.0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    num_experts: int = 0  # 0: dense
    encoder_moe_layers: int = 0
    decoder_moe_layers: int = 0
    expert_d_ff: int | None = None  # default d_ff
    extra_d_ff: int | None = None  # ST-MoE's dense FFN after every MoE block
    router: Router | str = Switch()  # noqa: RUF009  a frozen dataclass
    decoder_router: Router | str | None = None  # default: the encoder's
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    capacity_counts_k: bool = False  # flaxformer's convention; True: Mesh-TensorFlow, GShard
    min_capacity: int = 4
    group_size: int = 4096
    dispatch: str = "capacity"  # or "dropless": every token reaches its experts
    balance_loss: float = 1e-2
    router_z_loss: float = 0.0
    allow_future_leak: bool = False  # opt-in to routers that see later tokens in the decoder
    max_length: int = 2048  # longest input the model is asked to read, in tokens
    tokenizer: str | None = None  # "byte" or the path of a SentencePiece model
    dtype: str = "float32"

    def __post_init__(self):
        for field in ("router", "decoder_router"):
            if isinstance(getattr(self, field), str):
                object.__setattr__(self, field, routing.router(getattr(self, field)))
        self._check_ranges()
        if self.num_experts:
            self._check_experts()

    def _check_ranges(self):
        positive = ("d_model", "d_ff", "num_heads", "head_dim", "encoder_layers", "decoder_layers")
        for field in (*positive, "vocab_size", "group_size", "min_capacity", "max_length"):
            if getattr(self, field) < 1:
                raise self._bad(field, "use 1 or more")
        for field in ("capacity_factor", "eval_capacity_factor"):
            if not getattr(self, field) > 0:
                raise self._bad(field, "use a number above 0, for example 1.25")
        for field in ("dropout", "expert_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise self._bad(field, "use 0 or more and less than 1")
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.num_experts < 0:
            raise self._bad("num_experts", "use 0 for a dense model or a positive number")

    def _check_experts(self):
        for stack in ("encoder", "decoder"):
            layers, sparse = getattr(self, f"{stack}_layers"), getattr(self, f"{stack}_moe_layers")
            if sparse < 0 or (sparse and layers % sparse):
                fits = [n for n in range(1, layers + 1) if layers % n == 0]
                raise self._bad(f"{stack}_moe_layers", f"of {layers} layers, use one of {fits}")
        if not self.encoder_moe_layers + self.decoder_moe_layers:
            raise self._bad("num_experts", "give encoder_moe_layers or decoder_moe_layers as well")
        for router in {self.router, self.decoder_router or self.router}:
            choices = getattr(router, "num_choices", 1) or 1
            if choices > self.num_experts:
                raise self._bad("num_experts", f"{router} picks {choices} different experts")
            check_dispatch(self.dispatch, router)
        router = self.decoder_router or self.router
        leaks = self.decoder_moe_layers and not getattr(router, "causal", False)
        if leaks and not self.allow_future_leak:
            raise ValueError(
                f"{self.name}: in a decoder {router} would let a token's output depend on later "
                "tokens of its group; give a decoder_router that serves tokens in order (such as "
                'TopK(k=2) or GShard(priority="token"), or set `causal = True` on your own), or '
                "allow_future_leak=True to do it all the same"
            )

    def _bad(self, field: str, fix: str) -> ValueError:
        return ValueError(f"{self.name}: {field} is {getattr(self, field)}; {fix}")

    def replace(self, **changes) -> "ModelConfig":
        """A copy with changes; ValueError (with near misses) for a field that does not exist."""
        known = {f.name for f in dataclasses.fields(self)}
        for field in changes:
            if field not in known:
                raise unknown("field of ModelConfig", field, known)
        return dataclasses.replace(self, **changes)

    def moe_layers(self, stack: str) -> int:
        return getattr(self, f"{stack}_moe_layers") if self.num_experts else 0

    def stack_router(self, stack: str) -> Router:
        return self.decoder_router or self.router if stack == "decoder" else self.router

    def active_experts(self, stack: str) -> int:
        """Experts a token meets: its router's choices, as far as evaluation has slots for them."""
        choices = getattr(self.stack_router(stack), "num_choices", 1)
        slots = self.eval_capacity_factor
        if choices and self.capacity_counts_k:
            slots *= choices
        return max(1, min(choices or self.num_experts, int(slots)))

    def split_by_model(self) -> dict[str, int]:
        """The sizes that the model axis of a mesh must divide."""
        sizes = {"heads": self.num_heads, "d_ff": self.d_ff}
        if self.num_experts:
            sizes["expert_d_ff"] = self.expert_d_ff or self.d_ff
        return sizes | ({"extra_d_ff": self.extra_d_ff} if self.extra_d_ff else {})

    def num_parameters(self) -> Parameters:
        """Counted analytically; total equals the arrays of an `EncoderDecoder`."""
        total, active = 0, 0
        for stack in ("encoder", "decoder"):
            own = self._stack_parameters(stack)
            total, active = total + own.total, active + own.active
        embedding = self.vocab_size * self.d_model
        head = 0 if self.tied_logits else embedding
        return Parameters(total + embedding + head, active + embedding + head)

    def _stack_parameters(self, stack: str) -> Parameters:
        layers, sparse = getattr(self, f"{stack}_layers"), self.moe_layers(stack)
        d = self.d_model
        dense, expert = (
            self.ffn_parameters(self.d_ff),
            self.ffn_parameters(self.expert_d_ff or self.d_ff),
        )
        attentions = 2 if stack == "decoder" else 1
        shared = layers * attentions * (4 * d * self.num_heads * self.head_dim + d)
        shared += (layers - sparse) * dense + layers * d + d  # a norm before each FFN, one last
        shared += self.relative_buckets * self.num_heads
        if self.extra_d_ff:
            shared += sparse * (self.ffn_parameters(self.extra_d_ff) + d)
        gates = sparse * d * self.num_experts
        active = shared + gates + sparse * self.active_experts(stack) * expert
        return Parameters(shared + gates + sparse * self.num_experts * expert, active)

    def ffn_parameters(self, d_ff: int) -> int:
        """Of a feed-forward network with so many hidden features."""
        return (3 if self.activation == "gated_gelu" else 2) * self.d_model * d_ff

    def flops_per_token(self) -> tuple[float, float]:
        """Forward FLOPs of one encoder and one decoder token: 2 x active matrix parameters.

        The decoder's include the output head; attention scores and router logits are left out, as
        in the FLOPs per token that the papers print.
        """
        flops = []
        for stack in ("encoder", "decoder"):
            sparse, layers = self.moe_layers(stack), getattr(self, f"{stack}_layers")
            attentions = 2 if stack == "decoder" else 1
            matrices = layers * attentions * 4 * self.d_model * self.num_heads * self.head_dim
            matrices += (layers - sparse) * self.ffn_parameters(self.d_ff)
            matrices += (
                sparse
                * self.active_experts(stack)
                * self.ffn_parameters(self.expert_d_ff or self.d_ff)
            )
            matrices += sparse * self.ffn_parameters(self.extra_d_ff or 0)
            if stack == "decoder":
                matrices += self.vocab_size * self.d_model
            flops.append(2.0 * matrices)
        return flops[0], flops[1]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; routers as {"router": class name, field: value, ..}."""
        shallow = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for field in ("router", "decoder_router"):
            if shallow[field] is not None:
                shallow[field] = _router_to_dict(shallow[field])
        return shallow

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; a router of your own must be put back with `replace`."""
        values = dict(values)
        known = {f.name for f in dataclasses.fields(cls)}
        for field in values:
            if field not in known:
                raise unknown("field of ModelConfig", field, known)
        for field in ("router", "decoder_router"):
            if isinstance(values.get(field), Mapping):
                values[field] = _router_from_dict(values[field])
        return cls(**values)

    def digest(self) -> str:
        """Twelve hexadecimal digits that name the configuration."""
        return digest(self.to_dict())


def digest(values: Mapping[str, Any]) -> str:
    """A short, stable name of a JSON-ready mapping."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _router_to_dict(router: Router) -> dict[str, Any]:
    if dataclasses.is_dataclass(router):
        return {"router": type(router).__name__, **dataclasses.asdict(router)}
    return {"router": getattr(router, "__name__", repr(router))}


def _router_from_dict(values: Mapping[str, Any]) -> Router:
    known = {type(router).__name__: type(router) for router in routing.ROUTERS.values()}
    rest = dict(values)
    name = rest.pop("router")
    if name not in known:
        raise unknown("router", name, known)
    return known[name](**rest)


@dataclass(frozen=True)
class TrainConfig:
    """One training stage.

    A batch holds batch_tokens // (input_length + target_length) rows, from 8 on rounded down to a
    multiple of 8 so that the usual meshes divide it.

    Args:
      steps: Number of training steps.
      batch_tokens: Tokens of a batch, inputs and targets together.
      input_length: Tokens of an encoder row.
      target_length: Tokens of a decoder row.
      optimizer: adafactor or adamw.
      learning_rate: Peak rate; Adafactor multiplies it by each parameter's scale (T5).
      schedule: constant, rsqrt (1 / sqrt(max(step, warmup_steps)), scaled to the peak), cosine or
        linear.
      warmup_steps: Steps in which the rate rises linearly to its peak.
      weight_decay: Decay of the weights per step, times the learning rate.
      clip_norm: Maximum norm of the gradient; by default gradients are not clipped.
      z_loss: Coefficient of log(Z)^2 of the output logits.
      label_smoothing: Share of the target probability that is spread over the vocabulary.
      freeze: Parts that keep their parameters: router, experts or moe (both).
      remat: What the backward pass recomputes: none, dots (all but products with weights) or full
        (every layer from its input).
      seed: Seed of the parameters, the data order and dropout.
      log_every: Steps between rows of the log.
      eval_every: Steps between evaluations; 0 evaluates only at the end.
      save_every: Steps between checkpoints; 0 saves only at the end.
      keep: Number of checkpoints to keep.
      data_workers: Processes of a host that read ahead; 0 uses a thread.
    """

    steps: int = 1000
    batch_tokens: int = 16_384
    input_length: int = 512
    target_length: int = 128
    optimizer: str = "adafactor"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    freeze: tuple[str, ...] = ()
    remat: str = "none"
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    data_workers: int = 0

    def __post_init__(self):
        for field in ("steps", "batch_tokens", "input_length", "target_length", "log_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; use 1 or more")
        if not self.learning_rate > 0 or not math.isfinite(self.learning_rate):
            raise ValueError(f"learning_rate is {self.learning_rate}; use a number above 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; use 0 to below 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; use a number above 0, or None")
        if self.warmup_steps < 0 or self.weight_decay < 0 or self.z_loss < 0:
            raise ValueError("warmup_steps, weight_decay and z_loss cannot be negative")
        if min(self.eval_every, self.save_every, self.data_workers) < 0 or self.keep < 1:
            raise ValueError(
                "eval_every, save_every and data_workers cannot be negative; keep is at least 1"
            )
        if self.batch_tokens < self.input_length + self.target_length:
            raise ValueError(
                f"batch_tokens is {self.batch_tokens}, less than one row of {self.input_length} + "
                f"{self.target_length}; raise it or shorten the lengths"
            )
        for field, choices in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("remat", REMATS),
        ):
            if getattr(self, field) not in choices:
                raise unknown(field, getattr(self, field), choices)
        for part in self.freeze:
            if part not in FREEZABLE:
                raise unknown("part to freeze", part, FREEZABLE)

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        rows = self.batch_tokens // (self.input_length + self.target_length)
        return rows - rows % 8 if rows >= 8 else rows

    def replace(self, **changes) -> "TrainConfig":
        return dataclasses.replace(self, **changes)


# size: layers of each stack, d_model, d_ff, heads (of 64)
_SIZES = {
    "small": (8, 512, 1024, 6),
    "base": (12, 768, 2048, 12),
    "large": (24, 1024, 2816, 16),
    "xl": (24, 2048, 5120, 32),
    "xxl": (24, 4096, 10240, 64),
}
_GSHARD = {"router": GShard(), "decoder_router": GShard(priority="token")}
_EC = {"router": ExpertChoice(), "decoder_router": TopK(k=2), "balance_loss": 0.0}
# raw top-2 probabilities and capacity without k, as flaxformer runs them
_ST = {"router": TopK(k=2), "router_z_loss": 1e-4}


def _shape(layers: int, d_model: int, d_ff: int, heads: int, head_dim: int = 64, **rest) -> dict:
    stacks = {"encoder_layers": layers, "decoder_layers": layers}
    sizes = {"d_model": d_model, "d_ff": d_ff, "num_heads": heads, "head_dim": head_dim}
    return {**stacks, **sizes, **rest}


def _experts(count: int, sparse: int, **rest) -> dict:
    return {
        "num_experts": count,
        "encoder_moe_layers": sparse,
        "decoder_moe_layers": sparse,
        **rest,
    }


def _published() -> dict[str, dict]:
    relu = {"activation": "relu", "tied_logits": True}
    table = {f"t5-{size}": _shape(*shape) for size, shape in _SIZES.items()}
    for size, experts, sparse in (
        ("small", 32, 2),
        ("base", 64, 3),
        ("large", 64, 6),
        ("xl", 64, 6),
        ("xxl", 64, 6),
    ):
        table[f"gshard-{size}"] = _shape(*_SIZES[size]) | _experts(experts, sparse, **_GSHARD)
        if size != "xxl":
            table[f"ec-{size}"] = _shape(*_SIZES[size]) | _experts(
                experts, 2 * sparse, capacity_factor=1.0, eval_capacity_factor=1.0, **_EC
            )
    table |= {
        "switch-base": _shape(12, 768, 3072, 12, group_size=8192, **relu) | _experts(128, 6),
        "switch-large": _shape(24, 1024, 4096, 16, **relu) | _experts(128, 12),
        "switch-xxl": _shape(*_SIZES["xxl"])
        | _experts(128, 12, min_capacity=2, eval_capacity_factor=4.0),
        "switch-c": _shape(15, 2080, 6144, 30, group_size=2048, **relu)
        | _experts(2048, 15, capacity_factor=1.0, min_capacity=2),
        "st-base": _shape(*_SIZES["base"], extra_d_ff=2048) | _experts(16, 3, **_ST),
        "st-xl": _shape(*_SIZES["xl"], extra_d_ff=5120, group_size=1024)
        | _experts(16, 6, capacity_factor=2.0, eval_capacity_factor=4.0, **_ST),
        "st-32b": _shape(24, 5120, 20480, 64, 128, extra_d_ff=20480)
        | _experts(64, 6, **_ST | {"router_z_loss": 1e-3}),
    }
    return {name: {"dtype": "bfloat16", **values} for name, values in table.items()}


def _ours() -> dict[str, dict]:
    """nano and mini: every flavour spends the FLOPs of its dense twin on each token.

    Top-2 halves the experts' d_ff; ST-MoE spends half on the extra FFN and a quarter on each of two
    experts; Expert Choice gives each token one expert on average.
    """
    small = {
        "nano": (
            _shape(2, 64, 256, 2, 32, vocab_size=384, tokenizer="byte", max_length=4096),
            8,
            1,
        ),
        "mini": (_shape(4, 192, 512, 3, 64, vocab_size=8192, max_length=2048), 16, 2),
    }
    table = {}
    for size, (shape, experts, sparse) in small.items():
        half, quarter = shape["d_ff"] // 2, shape["d_ff"] // 4
        # Mesh-TensorFlow's capacity: with few tokens a batch, k must count or half of it is dropped
        counts = {"capacity_counts_k": True}
        table |= {
            f"t5-{size}": shape,
            f"switch-{size}": shape | _experts(experts, sparse),
            f"gshard-{size}": shape
            | _experts(experts, sparse, expert_d_ff=half, **counts, **_GSHARD),
            f"ec-{size}": shape
            | _experts(
                experts,
                sparse,
                capacity_factor=1.0,
                eval_capacity_factor=1.0,
                **_EC | {"decoder_router": Switch()},
            ),
            f"st-{size}": shape
            | _experts(experts, sparse, expert_d_ff=quarter, extra_d_ff=half, **counts)
            | _ST
            | {"router": TopK(k=2, normalise=True), "router_z_loss": 1e-3},
        }
    return table


PRESETS: dict[str, dict] = _ours() | _published()


def preset(name: str) -> ModelConfig:
    """The configuration of that name; ValueError with near misses for an unknown one."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return ModelConfig(name=name, **PRESETS[name])
