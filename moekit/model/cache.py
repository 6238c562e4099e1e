"""The KV cache of incremental decoding.

Q questions, W rows decoded for each (beams, or options to score), L input length, T longest
output, S new tokens of a row, N heads, H head dimension.
"""

from dataclasses import dataclass, replace
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@no_type_check  # pytrees: tree.map rebuilds them around leaves of any shape
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """A layer's keys and values of decoded tokens, and those of the encoder states ("memory").

    The rows of a question share its memory. Heads precede positions: on a CPU, products with keys
    in the other order cost six times as much.
    """

    keys: Float[Array, "Q N W T H"]
    values: Float[Array, "Q N W T H"]
    memory_keys: Float[Array, "Q N L H"]
    memory_values: Float[Array, "Q N L H"]

    def append(
        self,
        keys: Float[Array, "Q WS N H"],
        values: Float[Array, "Q WS N H"],
        step: Int[Array, ""],
    ) -> "LayerCache":
        """The cache with S more tokens of every row, the first one at position `step`."""
        questions, num_heads, rows, _, head_dim = self.keys.shape

        def write(cached: Array, new: Array) -> Array:
            by_row = new.reshape(questions, rows, -1, num_heads, head_dim)
            heads_first = by_row.transpose(0, 3, 1, 2, 4)
            return jax.lax.dynamic_update_slice_in_dim(cached, heads_first, step, axis=3)

        return replace(self, keys=write(self.keys, keys), values=write(self.values, values))

    def flat_rows(self) -> tuple[Float[Array, "Q N WT H"], Float[Array, "Q N WT H"]]:
        """Keys and values of all rows of a question, one after the other."""
        questions, num_heads, rows, length, head_dim = self.keys.shape
        shape = (questions, num_heads, rows * length, head_dim)
        return self.keys.reshape(shape), self.values.reshape(shape)


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """State of a decoder between two tokens.

    `owner[q, w, t]` is the row whose keys at position t belong to row w: a beam that continues
    another one shares the keys of its past, which are never moved.
    """

    layers: tuple[LayerCache, ...]
    segments: Int[Array, "Q L"]  # of the inputs; 0 is padding
    owner: Int[Array, "Q W T"]
    step: Int[Array, ""]  # number of tokens decoded so far

    def self_mask(self, num_tokens: int) -> Bool[Array, "Q 1 WS WT"]:
        """True where one of S new tokens of a row attends to a key of its own past or to itself."""
        questions, rows, length = self.owner.shape
        positions = jnp.arange(length)
        query_positions = self.step + jnp.arange(num_tokens)
        is_past = positions <= query_positions[:, None]  # [S, T]
        is_own = self.owner[..., None, :] == jnp.arange(rows)[:, None]  # [Q, W, W, T]
        mask = is_past[None, None, :, None, :] & is_own[:, :, None]  # [Q, W, S, W, T]
        return mask.reshape(questions, 1, rows * num_tokens, rows * length)

    def reorder(self, parents: Int[Array, "Q W"]) -> "Cache":
        """The cache whose row w continues the row `parents[:, w]`."""
        _, rows, length = self.owner.shape
        inherited = jnp.take_along_axis(self.owner, parents[..., None], axis=1)
        is_past = jnp.arange(length) < self.step
        own_row = jnp.arange(rows)[:, None]
        return replace(self, owner=jnp.where(is_past, inherited, own_row))
