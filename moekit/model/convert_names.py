"""The table of names: which tensors of transformers make up each of our arrays.

It is read in both directions. Our array of a layer has a leading axis over the blocks of its stack,
that of experts a second one; transformers has a tensor for each layer and expert. A matrix of ours
is [inputs.., outputs..], one of torch [outputs, inputs].
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moekit.config import ModelConfig

Names = tuple[str | int, ...]  # the path of an array in a model
Shape = tuple[int, ...]

# {ffn} is the number of the feed-forward sublayer, {wi} is wi_1 beside a gate, else wi
TABLE = {
    "embedding_vd": "shared.weight",
    "head_dv": "lm_head.weight",
    "{stack}.bias.bias_bn": (
        "{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    "{stack}.norm.scale_d": "{stack}.final_layer_norm.weight",
    "self_norm.scale_d": "layer.0.layer_norm.weight",
    "self_attention.wq_dnh": "layer.0.SelfAttention.q.weight",
    "self_attention.wk_dnh": "layer.0.SelfAttention.k.weight",
    "self_attention.wv_dnh": "layer.0.SelfAttention.v.weight",
    "self_attention.wo_nhd": "layer.0.SelfAttention.o.weight",
    "cross_norm.scale_d": "layer.1.layer_norm.weight",
    "cross_attention.wq_dnh": "layer.1.EncDecAttention.q.weight",
    "cross_attention.wk_dnh": "layer.1.EncDecAttention.k.weight",
    "cross_attention.wv_dnh": "layer.1.EncDecAttention.v.weight",
    "cross_attention.wo_nhd": "layer.1.EncDecAttention.o.weight",
    "ffn_norm.scale_d": "layer.{ffn}.layer_norm.weight",
    "ffn.wi_df": "layer.{ffn}.{mlp}.{wi}.weight",
    "ffn.wg_df": "layer.{ffn}.{mlp}.wi_0.weight",
    "ffn.wo_fd": "layer.{ffn}.{mlp}.wo.weight",
    "moe.router.w_de": "layer.{ffn}.mlp.router.classifier.weight",
    "moe.experts.wi_edf": "layer.{ffn}.mlp.experts.expert_{expert}.wi.weight",
    "moe.experts.wo_efd": "layer.{ffn}.mlp.experts.expert_{expert}.wo.weight",
}
# copies that some versions of transformers store as well
COPIES = {
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
    "lm_head.weight": "shared.weight",  # of tied models
}
# stored by early versions of T5, and never used
UNUSED = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}
NOT_TRANSPOSED = ("embedding_vd", "bias_bn", "scale_d")
TWO_INPUT_AXES = ("wo_nhd",)


@dataclass(frozen=True)
class Layout:
    """An array of ours, and the tensors it is made of.

    Args:
      shape: of our array.
      names: tensors by their index on the leading axes.
      num_leading: leading axes over blocks and experts.
      transposed: whether tensors are transposed.
      num_inputs: of our other axes, how many belong to the inputs of the matrix.
    """

    shape: Shape
    names: dict[tuple[int, ...], str]
    num_leading: int
    transposed: bool
    num_inputs: int

    @property
    def piece_shape(self) -> Shape:
        """The part of our array that is one tensor."""
        return self.shape[self.num_leading :]

    @property
    def tensor_shape(self) -> Shape:
        """The shape of each tensor."""
        if not self.transposed:
            return self.piece_shape
        inputs = self.piece_shape[: self.num_inputs]
        outputs = self.piece_shape[self.num_inputs :]
        return (math.prod(outputs), math.prod(inputs))

    def tensor_index(self, piece: tuple[slice, ...]) -> tuple[slice, ...]:
        """The part of a tensor that is a part of its piece.

        Of heads and head dimensions, which are one axis of a tensor, only heads may be divided.
        """
        if not self.transposed:
            return piece
        inputs = _merge(piece[: self.num_inputs], self.piece_shape[: self.num_inputs])
        outputs = _merge(piece[self.num_inputs :], self.piece_shape[self.num_inputs :])
        return (outputs, inputs)


def _merge(parts: tuple[slice, ...], sizes: Shape) -> slice:
    """The part of an axis that several axes make up, of which only the first is divided."""
    start, stop, _ = parts[0].indices(sizes[0])
    numbers = math.prod(sizes[1:])
    return slice(start * numbers, stop * numbers)


def layout(names: Names, shape: Shape, cfg: ModelConfig) -> Layout | None:
    """The tensors that make up an array of a model; None if transformers has no such tensors."""
    last = str(names[-1])
    in_blocks = "blocks" in names
    if in_blocks:
        key = ".".join(map(str, names[3:]))
    elif names[0] in ("encoder", "decoder"):
        key = ".".join(("{stack}", *map(str, names[1:])))
    else:
        key = ".".join(map(str, names))
    if key not in TABLE:
        return None
    has_experts = "{expert}" in TABLE[key]
    num_leading = 2 if has_experts else int(in_blocks)
    tensors = {}
    for index in itertools.product(*map(range, shape[:num_leading])):
        tensors[index] = _tensor_name(TABLE[key], names, index, cfg)
    return Layout(
        shape=shape,
        names=tensors,
        num_leading=num_leading,
        transposed=last not in NOT_TRANSPOSED,
        num_inputs=2 if last in TWO_INPUT_AXES else 1,
    )


def _tensor_name(template: str, names: Names, index: tuple[int, ...], cfg: ModelConfig) -> str:
    stack = str(names[0])
    name = template.replace("{stack}", stack)
    if not index:
        return name
    layers_per_block = cfg.num_layers(stack) // cfg.num_blocks(stack)
    layer = index[0] * layers_per_block + int(names[2])
    values = {
        "{ffn}": "1" if stack == "encoder" else "2",
        "{mlp}": "mlp" if cfg.num_experts else "DenseReluDense",
        "{wi}": "wi_1" if cfg.activation == "gated_gelu" else "wi",
        "{expert}": str(index[-1]),
    }
    for placeholder, value in values.items():
        name = name.replace(placeholder, value)
    return f"{stack}.block.{layer}.{name}"


def layouts(shapes: Mapping[Names, Shape], cfg: ModelConfig) -> dict[Names, Layout]:
    """The layout of every array of a model.

    Raises:
      ValueError: arrays that transformers has no tensors for.
    """
    found: dict[Names, Any] = {names: layout(names, shape, cfg) for names, shape in shapes.items()}
    without_tensor = ["/".join(map(str, names)) for names, each in found.items() if each is None]
    if without_tensor:
        raise ValueError(
            f"{cfg.name} has parameters that transformers has no place for: "
            f"{', '.join(without_tensor)}"
        )
    return found
