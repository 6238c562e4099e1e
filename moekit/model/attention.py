"""T5 attention: relative position bias, packing-correct masks, a KV cache.

B batch, L query length, M key length, D d_model, N heads, H head dimension, K buckets of distances,
R devices that split the rows of a batch.
"""

from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moekit.sharding import current_batch_shards, param, platform, with_gathered_parameters

MASKED = -1e9  # finite: a row with nothing to attend to (padding) stays finite


def relative_bucket(
    distance: Int[np.ndarray, "*shape"] | Int[Array, "*shape"],
    *,
    bidirectional: bool,
    buckets: int = 32,
    max_distance: int = 128,
) -> Int[Array, "*shape"]:
    """T5's bucket of `key position - query position` (Raffel 2020).

    Half of the buckets hold exact distances, the other half grow logarithmically up to
    `max_distance`; the encoder spends half of each on either direction.
    """
    distance = jnp.asarray(distance)
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    scale = (buckets - exact) / np.log(max_distance / exact)
    log = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    far = jnp.minimum(exact + (log * scale).astype(jnp.int32), buckets - 1)
    return offset + jnp.where(distance < exact, distance, far)


@no_type_check  # a pytree: tree.map rebuilds it around leaves of any shape
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bias:
    """What is added to a stack's attention logits, and where it was looked up."""

    values: Float[Array, "N L M"]  # no gradient goes through these, it goes through `added`
    table: Float[Array, "R K N"]  # a copy for each of the devices that split rows
    bucket: Int[Array, "L M"]


@jax.custom_vjp
def added(logits: Float[Array, "B N L M"], bias: Bias) -> Float[Array, "B N L M"]:
    """logits + bias.

    The table's gradient is taken at once, as a product with the buckets' one-hot rows: left to
    autodiff, all layers' cotangents of the logits would wait in memory to be summed.
    """
    return logits + bias.values


def _added_backward(bias, g):
    copies, buckets = bias.table.shape[:2]
    copies = 1 if g.shape[0] % copies else copies
    rows = g.reshape(copies, -1, *g.shape[1:])
    # a sum over leading axes, which XLA for CPU takes 20 times as long for when it is called one
    of_device = jnp.einsum("rbnlm,b->rnlm", rows, jnp.ones(rows.shape[1], g.dtype))
    onehot = bias.bucket[..., None] == jnp.arange(buckets)
    table = jnp.einsum(
        "rnlm,lmk->rkn", of_device, onehot.astype(g.dtype), preferred_element_type=jnp.float32
    )
    whole = jnp.zeros_like(bias.table).at[:copies].set(table)
    return g, Bias(None, whole, None)


added.defvjp(lambda logits, bias: (added(logits, bias), bias), _added_backward)


class RelativeBias(nnx.Module):
    """One bias per bucket and head, shared by all layers of a stack."""

    def __init__(
        self, num_heads: int, *, bidirectional: bool, buckets: int, max_distance: int, dtype, rngs
    ):
        shape, axes = (buckets, num_heads), (None, "heads")
        self.bias_bn = param(rngs, shape, axes, fan_in=num_heads)
        self.bidirectional, self.buckets = bidirectional, buckets
        self.max_distance, self.dtype = max_distance, dtype

    def __call__(self, queries: Int[Array, "L"], keys: Int[Array, "M"]) -> Bias:
        """Indices may stand for positions: packed examples are contiguous, so inside one example
        their differences are the same, and attention across examples is masked."""
        bucket = relative_bucket(
            keys[None, :] - queries[:, None],
            bidirectional=self.bidirectional,
            buckets=self.buckets,
            max_distance=self.max_distance,
        )
        copies = jnp.zeros(current_batch_shards())
        table = with_gathered_parameters(
            lambda _, bias_bn: bias_bn[None], jnp.float32, copies, self.bias_bn
        )
        values = jax.lax.stop_gradient(self.bias_bn[...]).astype(self.dtype).T[:, bucket]
        return Bias(values, table, bucket)


def segment_mask(
    queries: Int[Array, "B L"], keys: Int[Array, "B M"], *, causal: bool = False
) -> Bool[Array, "B 1 L M"]:
    """True where query and key lie in the same example; segment 0 is padding."""
    same = (queries[:, :, None] == keys[:, None, :]) & (keys[:, None, :] > 0)
    if causal:
        same &= jnp.tril(jnp.ones((queries.shape[1], keys.shape[1]), bool))
    return same[:, None]


def product(x: Float[Array, "*B D"], w: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """x @ w, flat on a CPU: XLA takes twice as long there for the same product in three dimensions,
    and up to twice for its gradient as it comes."""
    if platform() != "cpu":
        return x @ w
    return _flat_product(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _flat_product(x, w):
    return x @ w


def _flat_backward(residuals, g):
    x, w = residuals
    keep = jax.lax.optimization_barrier
    # the smaller operand is transposed in memory: then no product sums over leading axes
    dw = keep(keep(x.T) @ g) if x.shape[1] <= g.shape[1] else keep(keep(g.T) @ x).T
    return g @ w.T, dw


_flat_product.defvjp(lambda x, w: (x @ w, (x, w)), _flat_backward)


class Attention(nnx.Module):
    """Multi-head attention without biases; logits are not scaled (the query init is)."""

    def __init__(self, d_model: int, num_heads: int, head_dim: int, *, dtype, stack=(), rngs):
        layers = ("layers",) * len(stack)
        inner, axes = (*stack, d_model, num_heads, head_dim), (*layers, "embed", "heads", None)
        self.wq_dnh = param(rngs, inner, axes, fan_in=d_model * head_dim)
        self.wk_dnh = param(rngs, inner, axes, fan_in=d_model)
        self.wv_dnh = param(rngs, inner, axes, fan_in=d_model)
        self.wo_nhd = param(
            rngs,
            (*stack, num_heads, head_dim, d_model),
            (*layers, "heads", None, "embed"),
            fan_in=num_heads * head_dim,
        )
        self.dtype = dtype

    def keys_values(
        self, x: Float[Array, "B M D"]
    ) -> tuple[Float[Array, "B M N H"], Float[Array, "B M N H"]]:
        return self._project(x, self.wk_dnh), self._project(x, self.wv_dnh)

    def _project(self, x, w):
        return self._product("bld,dnh->blnh", x, w)

    def _product(self, equation: str, x, w: nnx.Param):
        return with_gathered_parameters(
            partial(jnp.einsum, equation), self.dtype, x.astype(self.dtype), w
        )

    def attend(
        self,
        x: Float[Array, "B L D"],
        keys: Float[Array, "B M N H"],
        values: Float[Array, "B M N H"],
        mask: Bool[Array, "#B 1 #L M"],
        bias: Bias | None = None,
    ) -> Float[Array, "B L D"]:
        """Attend to projected keys and values; softmax in float32 (of logits in the compute type,
        as T5X has them: the largest arrays of a step are these)."""
        q = self._project(x, self.wq_dnh)
        logits = jnp.einsum("blnh,bmnh->bnlm", q, keys)
        if bias is not None:
            logits = added(logits, bias)
        masked = jnp.where(mask, logits.astype(jnp.float32), MASKED)
        weights = jax.nn.softmax(masked).astype(self.dtype)
        mixed = jnp.einsum("bnlm,bmnh->blnh", weights, values)
        return self._product("blnh,nhd->bld", mixed, self.wo_nhd)

    def __call__(self, x, memory, mask, bias=None) -> Float[Array, "B L D"]:
        """Attend from x to memory (x itself in self-attention)."""
        return self.attend(x, *self.keys_values(memory), mask, bias)
