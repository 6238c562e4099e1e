"""T5's relative position bias: a learned number per head and bucket of distances.

L query length, M key length, N heads, K buckets of distances, B batch, R shards of the batch.
"""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moekit.sharding import current_batch_shards, param, with_gathered_parameters


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
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        offset = 0
        distance = jnp.maximum(-distance, 0)
    num_exact = buckets // 2
    num_logarithmic = buckets - num_exact
    buckets_per_log = num_logarithmic / np.log(max_distance / num_exact)
    ratio = jnp.maximum(distance, 1).astype(jnp.float32) / num_exact
    steps = (jnp.log(ratio) * buckets_per_log).astype(jnp.int32)
    logarithmic = jnp.minimum(num_exact + steps, buckets - 1)
    return offset + jnp.where(distance < num_exact, distance, logarithmic)


@no_type_check  # a pytree: tree.map rebuilds it around leaves of any shape
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bias:
    """A stack's bias of attention logits, with the table and the buckets of its gradient."""

    values: Float[Array, "N L M"]  # constant in autodiff: gradients go to `table` (see add_bias)
    table: Float[Array, "R K N"]  # one copy per shard of the batch
    bucket: Int[Array, "L M"]


@jax.custom_vjp
def add_bias(logits: Float[Array, "B N L M"], bias: Bias) -> Float[Array, "B N L M"]:
    """logits + bias, with a gradient for the bias table that needs little memory.

    The backward pass multiplies the cotangents with the one-hot buckets at once. Autodiff alone
    would keep the cotangents [B, N, L, M] of all layers in memory until it can sum them.
    """
    return logits + bias.values


def _add_bias_forward(
    logits: Float[Array, "B N L M"],
    bias: Bias,
) -> tuple[Float[Array, "B N L M"], Bias]:
    return add_bias(logits, bias), bias


def _add_bias_backward(
    bias: Bias,
    cotangent: Float[Array, "B N L M"],
) -> tuple[Float[Array, "B N L M"], Bias]:
    num_shards, num_buckets = bias.table.shape[:2]
    if cotangent.shape[0] % num_shards:
        num_shards = 1
    per_shard = cotangent.reshape(num_shards, -1, *cotangent.shape[1:])
    # summing over the batch as a product is 20 times faster than jnp.sum on CPU
    ones = jnp.ones(per_shard.shape[1], cotangent.dtype)
    summed = jnp.einsum("rbnlm,b->rnlm", per_shard, ones)
    one_hot = bias.bucket[..., None] == jnp.arange(num_buckets)
    table = jnp.einsum(
        "rnlm,lmk->rkn",
        summed,
        one_hot.astype(cotangent.dtype),
        preferred_element_type=jnp.float32,
    )
    table = jnp.zeros_like(bias.table).at[:num_shards].set(table)
    return cotangent, Bias(values=None, table=table, bucket=None)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


class RelativeBias(nnx.Module):
    """One bias per bucket and head, shared by all layers of a stack."""

    def __init__(
        self,
        num_heads: int,
        *,
        bidirectional: bool,
        buckets: int,
        max_distance: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.bias_bn = param(rngs, (buckets, num_heads), (None, "heads"), fan_in=num_heads)
        self.bidirectional = bidirectional
        self.buckets = buckets
        self.max_distance = max_distance
        self.dtype = dtype

    def __call__(self, queries: Int[Array, "L"], keys: Int[Array, "M"]) -> Bias:
        """The bias between query and key positions.

        Indices in a packed row serve as positions: an example is contiguous, so distances within
        it are the same, and attention between examples is masked.
        """
        bucket = relative_bucket(
            keys[None, :] - queries[:, None],
            bidirectional=self.bidirectional,
            buckets=self.buckets,
            max_distance=self.max_distance,
        )
        shards = jnp.zeros(current_batch_shards())
        table = with_gathered_parameters(_add_shard_axis, jnp.float32, shards, self.bias_bn)
        constant_bn = jax.lax.stop_gradient(self.bias_bn[...])
        values = constant_bn.astype(self.dtype).T[:, bucket]
        return Bias(values=values, table=table, bucket=bucket)


def _add_shard_axis(
    _: Float[Array, "R"],
    bias_bn: Float[Array, "K N"],
) -> Float[Array, "1 K N"]:
    return bias_bn[None]
