"""The KV cache of incremental decoding.

B batch, L input length, T longest output, N heads, H head dimension; in a `Cache`, arrays have two
leading axes: blocks of the decoder and layers of a block.
"""

from dataclasses import dataclass, replace
from typing import no_type_check

import jax
from jaxtyping import Array, Float, Int


@no_type_check  # pytrees: tree.map rebuilds them around leaves of any shape
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of the decoded tokens, and those of the encoder states ("memory")."""

    keys: Float[Array, "*layers B T N H"]
    values: Float[Array, "*layers B T N H"]
    memory_keys: Float[Array, "*layers B L N H"]
    memory_values: Float[Array, "*layers B L N H"]

    def __getitem__(self, index: int) -> "LayerCache":
        """The cache of one layer out of several."""
        return jax.tree.map(lambda array: array[index], self)

    def append(
        self, keys: Float[Array, "B 1 N H"], values: Float[Array, "B 1 N H"], step: Int[Array, ""]
    ) -> "LayerCache":
        """The cache of a layer with the keys and values of one more token, number `step`."""
        write = jax.lax.dynamic_update_slice_in_dim
        return replace(
            self,
            keys=write(self.keys, keys, step, axis=1),
            values=write(self.values, values, step, axis=1),
        )


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """State of a decoder between two tokens."""

    layers: LayerCache  # arrays [blocks, layers of a block, ..]
    segments: Int[Array, "B L"]  # of the inputs; 0 is padding
    step: Int[Array, ""]  # number of tokens decoded so far
