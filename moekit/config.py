"""The configuration of a model: a frozen dataclass that checks itself."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moekit.checks import (
    bad_field,
    check_choice,
    check_integers,
    check_not_negative,
    check_positive,
    check_rate,
)
from moekit.errors import unknown
from moekit.generation_config import GenerationSettings
from moekit.moe import routing
from moekit.moe.layer import ACTIVATIONS, check_dispatch, check_expert_capacity
from moekit.moe.routing import Router, Switch
from moekit.table import fields_table
from moekit.train_config import TrainConfig as TrainConfig

DTYPES = ("float32", "bfloat16")
# fields of later versions: at their default they are not stored, so that digests and checkpoints of
# earlier versions still compare equal
LATER_FIELDS = ("scaled_logits", "sparse_layer", "expert_capacity", "generation")


class Parameters(NamedTuple):
    """Parameters of a model, and those that one encoder plus one decoder token use."""

    total: int
    active: int


@dataclass(frozen=True)
class ModelConfig:
    """An encoder-decoder T5 whose feed-forward layers may be sparse.

    With S sparse of L layers in a stack, one layer of every L / S is sparse: the last, or the one
    that `sparse_layer` names.

    Args:
      scaled_logits: whether output logits are divided by sqrt(d_model); default: when they are tied
        to the embedding, as in T5 v1.0.
      num_experts: 0 is a dense model.
      sparse_layer: which of those L / S layers is sparse, counted from 0 (transformers: 1, and 0
        where every layer is sparse).
      expert_d_ff: hidden features of an expert; default d_ff.
      extra_d_ff: hidden features of ST-MoE's dense FFN after every MoE block; default none.
      decoder_router: default the encoder's.
      capacity_counts_k: True multiplies an expert's capacity by the router's choices (as
        Mesh-TensorFlow and GShard do), False does not (flaxformer).
      expert_capacity: a fixed number of slots of every expert for each row of a batch, in training
        and in evaluation, as in transformers' Switch (64 there); padding in a row is routed as well
        and takes slots. Default: slots by the capacity factors, without padding (the papers).
      dispatch: "capacity", or "dropless": every token reaches its experts.
      allow_future_leak: permits routers that look at later tokens in the decoder.
      max_length: longest input in tokens.
      tokenizer: "byte", or the path of a SentencePiece model or of a tokenizer.json.
      generation: default settings of `generate`.

    Raises:
      ValueError: a combination that cannot be built.
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
    scaled_logits: bool | None = None
    dropout: float = 0.0
    expert_dropout: float = 0.0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    num_experts: int = 0
    encoder_moe_layers: int = 0
    decoder_moe_layers: int = 0
    sparse_layer: int | None = None
    expert_d_ff: int | None = None
    extra_d_ff: int | None = None
    router: Router | str = Switch()  # noqa: RUF009  a frozen dataclass
    decoder_router: Router | str | None = None
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    capacity_counts_k: bool = False
    min_capacity: int = 4
    group_size: int = 4096
    expert_capacity: int | None = None
    dispatch: str = "capacity"
    balance_loss: float = 1e-2
    router_z_loss: float = 0.0
    allow_future_leak: bool = False
    max_length: int = 2048
    tokenizer: str | None = None
    dtype: str = "float32"
    generation: GenerationSettings = GenerationSettings()  # noqa: RUF009  a frozen dataclass

    def __post_init__(self) -> None:
        for field in ("router", "decoder_router"):
            value = getattr(self, field)
            if isinstance(value, str):
                object.__setattr__(self, field, routing.router(value))
        self._check_fields()
        if self.num_experts > 0:
            self._check_moe_layers("encoder")
            self._check_moe_layers("decoder")
            self._check_routers()

    def _check_fields(self) -> None:
        check_integers(
            self,
            self.name,
            minimum=1,
            fields=(
                "d_model",
                "d_ff",
                "num_heads",
                "head_dim",
                "encoder_layers",
                "decoder_layers",
                "vocab_size",
                "group_size",
                "min_capacity",
                "max_length",
            ),
        )
        for field in ("capacity_factor", "eval_capacity_factor"):
            check_positive(self, self.name, field)
        for field in ("balance_loss", "router_z_loss"):
            check_not_negative(self, self.name, field)
        for field in ("dropout", "expert_dropout"):
            check_rate(self, self.name, field)
        check_choice(self, "activation", ACTIVATIONS)
        check_choice(self, "dtype", DTYPES)
        if self.num_experts < 0:
            fix = "use 0 for a dense model or a positive number"
            raise bad_field(self, self.name, "num_experts", fix)

    def _check_moe_layers(self, stack: str) -> None:
        layers = self.num_layers(stack)
        sparse = getattr(self, f"{stack}_moe_layers")
        if sparse < 0 or (sparse > 0 and layers % sparse != 0):
            divisors = [number for number in range(1, layers + 1) if layers % number == 0]
            fix = f"of {layers} layers, use one of {divisors}"
            raise bad_field(self, self.name, f"{stack}_moe_layers", fix)
        if sparse > 0 and self.sparse_layer is not None:
            block = layers // sparse
            if block > 1 and not 0 <= self.sparse_layer < block:
                fix = f"one of {block} {stack} layers is sparse, so use 0 to {block - 1}"
                raise bad_field(self, self.name, "sparse_layer", fix)

    def _check_routers(self) -> None:
        if self.encoder_moe_layers + self.decoder_moe_layers == 0:
            fix = "give encoder_moe_layers or decoder_moe_layers as well"
            raise bad_field(self, self.name, "num_experts", fix)
        decoder_router = self.stack_router("decoder")
        for router in (self.router, decoder_router):
            choices = getattr(router, "num_choices", 1) or 1
            if choices > self.num_experts:
                fix = f"{router} picks {choices} different experts"
                raise bad_field(self, self.name, "num_experts", fix)
            check_dispatch(self.dispatch, router)
        check_expert_capacity(self.expert_capacity, self.dispatch)
        is_causal = getattr(decoder_router, "causal", False)
        if self.decoder_moe_layers and not is_causal and not self.allow_future_leak:
            raise ValueError(
                f"{self.name}: in a decoder {decoder_router} would let a token's output depend on "
                "later tokens of its group; give a decoder_router that serves tokens in order "
                '(such as TopK(k=2) or GShard(priority="token"), or set `causal = True` on your '
                "own), or allow_future_leak=True to permit it"
            )

    def _repr_html_(self) -> str:
        return fields_table(self)._repr_html_()

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with changes; ValueError (with near misses) for a field that does not exist."""
        known = {field.name for field in dataclasses.fields(self)}
        for field in changes:
            if field not in known:
                raise unknown("field of ModelConfig", field, known)
        return dataclasses.replace(self, **changes)

    @property
    def logits_scale(self) -> float:
        """What the output logits are multiplied by."""
        is_scaled = self.tied_logits if self.scaled_logits is None else self.scaled_logits
        return self.d_model**-0.5 if is_scaled else 1.0

    def num_layers(self, stack: str) -> int:
        """Number of layers of "encoder" or "decoder"."""
        return getattr(self, f"{stack}_layers")

    def num_blocks(self, stack: str) -> int:
        """Number of equal blocks of layers that "encoder" or "decoder" repeats."""
        return self.moe_layers(stack) or self.num_layers(stack)

    def moe_layers(self, stack: str) -> int:
        """Number of sparse layers of "encoder" or "decoder"."""
        return getattr(self, f"{stack}_moe_layers") if self.num_experts else 0

    def sparse_layer_of(self, stack: str) -> int | None:
        """The index in a block of the sparse layer of "encoder" or "decoder"; None when dense."""
        num_sparse = self.moe_layers(stack)
        if not num_sparse:
            return None
        last = self.num_layers(stack) // num_sparse - 1
        return last if self.sparse_layer is None else min(self.sparse_layer, last)

    def stack_router(self, stack: str) -> Router:
        """The router of "encoder" or "decoder"."""
        if stack == "decoder" and self.decoder_router is not None:
            return self.decoder_router
        return self.router

    def active_experts(self, stack: str) -> int:
        """Experts that process a token: its choices, as far as evaluation has slots for them."""
        choices = getattr(self.stack_router(stack), "num_choices", 1)
        if self.expert_capacity is not None and choices:
            return choices  # as far as tokens do not exceed the slots
        slots = self.eval_capacity_factor
        if choices and self.capacity_counts_k:
            slots *= choices
        return max(1, min(choices or self.num_experts, int(slots)))

    def split_by_model(self) -> dict[str, int]:
        """The sizes that the model axis of a mesh must divide."""
        sizes = {"heads": self.num_heads, "d_ff": self.d_ff}
        if self.num_experts:
            sizes["expert_d_ff"] = self.expert_d_ff or self.d_ff
        if self.extra_d_ff:
            sizes["extra_d_ff"] = self.extra_d_ff
        return sizes

    def num_parameters(self) -> Parameters:
        """Counted analytically; the total equals the arrays of an `EncoderDecoder`."""
        encoder = self._stack_parameters("encoder")
        decoder = self._stack_parameters("decoder")
        embedding = self.vocab_size * self.d_model
        shared = embedding if self.tied_logits else 2 * embedding
        return Parameters(
            total=encoder.total + decoder.total + shared,
            active=encoder.active + decoder.active + shared,
        )

    def _stack_parameters(self, stack: str) -> Parameters:
        layers = self.num_layers(stack)
        sparse = self.moe_layers(stack)
        attentions_per_layer = 2 if stack == "decoder" else 1
        attention = self.attention_parameters() + self.d_model  # with its norm
        ffn_norms = layers * self.d_model
        final_norm = self.d_model
        dense = layers * attentions_per_layer * attention + ffn_norms + final_norm
        dense += (layers - sparse) * self.ffn_parameters(self.d_ff)
        dense += self.relative_buckets * self.num_heads
        dense += sparse * self.d_model * self.num_experts  # routers
        if self.extra_d_ff:
            dense += sparse * (self.ffn_parameters(self.extra_d_ff) + self.d_model)
        expert = self.ffn_parameters(self.expert_d_ff or self.d_ff)
        return Parameters(
            total=dense + sparse * self.num_experts * expert,
            active=dense + sparse * self.active_experts(stack) * expert,
        )

    def attention_parameters(self) -> int:
        """Of the four kernels of an attention layer."""
        return 4 * self.d_model * self.num_heads * self.head_dim

    def ffn_parameters(self, d_ff: int) -> int:
        """Of a feed-forward network with `d_ff` hidden features."""
        matrices = 3 if self.activation == "gated_gelu" else 2
        return matrices * self.d_model * d_ff

    def flops_per_token(self) -> tuple[float, float]:
        """Forward FLOPs of one encoder and one decoder token: 2 x active matrix parameters.

        The decoder's include the output head. Attention scores and router logits are left out, as
        in the FLOPs per token that the papers print.
        """
        head = self.vocab_size * self.d_model
        encoder = self._active_matrix_parameters("encoder")
        decoder = self._active_matrix_parameters("decoder") + head
        return 2.0 * encoder, 2.0 * decoder

    def _active_matrix_parameters(self, stack: str) -> int:
        layers = self.num_layers(stack)
        sparse = self.moe_layers(stack)
        attentions_per_layer = 2 if stack == "decoder" else 1
        expert = self.ffn_parameters(self.expert_d_ff or self.d_ff)
        sparse_layer = self.active_experts(stack) * expert
        sparse_layer += self.ffn_parameters(self.extra_d_ff or 0)
        dense_layer = self.ffn_parameters(self.d_ff)
        attention = layers * attentions_per_layer * self.attention_parameters()
        return attention + sparse * sparse_layer + (layers - sparse) * dense_layer

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; routers as {"router": class name, field: value, ..}."""
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in LATER_FIELDS or value != field.default:
                values[field.name] = value
        for field in ("router", "decoder_router"):
            if values[field] is not None:
                values[field] = _router_to_dict(values[field])
        if "generation" in values:
            values["generation"] = self.generation.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], router: Router | None = None) -> "ModelConfig":
        """The inverse of `to_dict`.

        Args:
          router: a router of your own that the values name.

        Raises:
          ValueError: an unknown field or value, or a router that is neither moekit's nor `router`.
        """
        values = dict(values)
        known = {field.name for field in dataclasses.fields(cls)}
        for field in values:
            if field not in known:
                raise unknown("field of ModelConfig", field, known)
        for field in ("router", "decoder_router"):
            if isinstance(values.get(field), Mapping):
                values[field] = _router_from_dict(values[field], router)
        if isinstance(values.get("generation"), Mapping):
            values["generation"] = GenerationSettings.from_dict(values["generation"])
        return cls(**values)

    def digest(self) -> str:
        """Twelve hexadecimal digits that identify the configuration."""
        return digest(self.to_dict())


def digest(values: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that identify a JSON-ready mapping."""
    encoded = json.dumps(values, sort_keys=True).encode()
    return hashlib.sha256(encoded).hexdigest()[:12]


def _router_to_dict(router: Router) -> dict[str, Any]:
    if dataclasses.is_dataclass(router):
        return {"router": type(router).__name__, **dataclasses.asdict(router)}
    return {"router": getattr(router, "__name__", type(router).__name__)}


def _router_from_dict(values: Mapping[str, Any], own: Router | None = None) -> Router:
    if own is not None and _router_to_dict(own) == values:
        return own
    known = {type(router).__name__: type(router) for router in routing.ROUTERS.values()}
    fields = dict(values)
    name = fields.pop("router")
    if name not in known:
        given = "" if own is None else f", not {_router_to_dict(own)}"
        raise ValueError(
            f"the model was trained with a router of its author, {dict(values)}{given}: only its "
            "name is stored, so pass the router itself, as mk.load(path, router=..) or "
            "--router FILE.py:NAME"
        )
    return known[name](**fields)
