"""Multi-head attention and the masks that keep packed examples apart.

B batch, L query length, M key length, D d_model, N heads, H head dimension.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moekit.model.relative_bias import Bias, add_bias
from moekit.sharding import param, with_gathered_parameters

MASKED = -1e9  # finite: the softmax of a fully masked row (padding) stays finite


def segment_mask(
    queries: Int[Array, "B L"],
    keys: Int[Array, "B M"],
    *,
    causal: bool = False,
) -> Bool[Array, "B 1 L M"]:
    """True where query and key belong to the same example.

    Segment 0 is padding: never a key, and as a query it attends to all keys of its row (what it
    becomes matters only where padding is routed, as with `expert_capacity`).
    """
    queries = queries[:, None, :, None]
    keys = keys[:, None, None, :]
    mask = ((queries == keys) | (queries == 0)) & (keys > 0)
    if causal:
        mask &= jnp.tril(jnp.ones(mask.shape[2:], bool))
    return mask


class Attention(nnx.Module):
    """Multi-head attention without biases.

    Logits are not divided by sqrt(H): the initial queries are smaller instead (T5).

    Args:
      dtype: compute type of the projections.
      stack: leading axes of all parameters, which the caller scans over.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        *,
        dtype: DTypeLike,
        stack: tuple[int, ...] = (),
        rngs: nnx.Rngs,
    ):
        layers = ("layers",) * len(stack)
        shape = (*stack, d_model, num_heads, head_dim)
        axes = (*layers, "embed", "heads", None)
        self.wq_dnh = param(rngs, shape, axes, fan_in=d_model * head_dim)
        self.wk_dnh = param(rngs, shape, axes, fan_in=d_model)
        self.wv_dnh = param(rngs, shape, axes, fan_in=d_model)
        output_shape = (*stack, num_heads, head_dim, d_model)
        output_axes = (*layers, "heads", None, "embed")
        self.wo_nhd = param(rngs, output_shape, output_axes, fan_in=num_heads * head_dim)
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "B L D"],
        memory: Float[Array, "B M D"],
        mask: Bool[Array, "#B 1 #L M"],
        bias: Bias | None = None,
    ) -> Float[Array, "B L D"]:
        """Attend from x to memory (x itself in self-attention)."""
        keys, values = self.keys_values(memory)
        return self.attend(x, keys, values, mask, bias)

    def keys_values(
        self, memory: Float[Array, "B M D"]
    ) -> tuple[Float[Array, "B M N H"], Float[Array, "B M N H"]]:
        """Keys and values of the states to attend to."""
        keys = self._project("bmd,dnh->bmnh", memory, self.wk_dnh)
        values = self._project("bmd,dnh->bmnh", memory, self.wv_dnh)
        return keys, values

    def attend(
        self,
        x: Float[Array, "B L D"],
        keys: Float[Array, "B M N H"],
        values: Float[Array, "B M N H"],
        mask: Bool[Array, "#B 1 #L M"],
        bias: Bias | None = None,
    ) -> Float[Array, "B L D"]:
        """Attend from x to projected keys and values.

        The softmax is float32. Its logits, the largest arrays of a step, are computed in the
        compute type, as in T5X.
        """
        queries = self._project("bld,dnh->blnh", x, self.wq_dnh)
        logits = jnp.einsum("blnh,bmnh->bnlm", queries, keys)
        if bias is not None:
            logits = add_bias(logits, bias)
        weights = self._softmax(logits, mask)
        attended = jnp.einsum("bnlm,bmnh->blnh", weights, values)
        return self._project("blnh,nhd->bld", attended, self.wo_nhd)

    def attend_cached(
        self,
        x: Float[Array, "B L D"],
        keys: Float[Array, "B N M H"],
        values: Float[Array, "B N M H"],
        mask: Bool[Array, "#B 1 #L M"],
        bias: Float[Array, "N L M"] | None = None,
    ) -> Float[Array, "B L D"]:
        """`attend` to keys and values whose heads precede their positions, as in a cache."""
        queries = self._project("bld,dnh->bnlh", x, self.wq_dnh)
        logits = jnp.einsum("bnlh,bnmh->bnlm", queries, keys)
        if bias is not None:
            logits = logits + bias
        weights = self._softmax(logits, mask)
        attended = jnp.einsum("bnlm,bnmh->bnlh", weights, values)
        return self._project("bnlh,nhd->bld", attended, self.wo_nhd)

    def _softmax(
        self,
        logits: Float[Array, "B N L M"],
        mask: Bool[Array, "#B 1 #L M"],
    ) -> Float[Array, "B N L M"]:
        exact = logits.astype(jnp.float32)
        weights = jax.nn.softmax(jnp.where(mask, exact, MASKED))
        return weights.astype(self.dtype)

    def _project(
        self,
        equation: str,
        x: Float[Array, "B *in"],
        weight: nnx.Param,
    ) -> Float[Array, "B *out"]:
        x = x.astype(self.dtype)
        einsum = partial(jnp.einsum, equation)
        return with_gathered_parameters(einsum, self.dtype, x, weight)
