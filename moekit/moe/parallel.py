"""What one device does in an expert-parallel layer, and what it sends.

The layer runs inside one `jax.shard_map`: each device routes its own tokens, the slots of experts
that live elsewhere travel over the expert axis (an all-to-all), their outputs travel back
(another), and autodiff makes one more of each. Weights that are fully sharded are gathered in the
type they are used in, so their gradients come home by reduce-scatter. Over the model axis all
devices do the same but for their part of every expert's hidden features.

E experts, C slots per expert (of all groups), D features, n devices on the expert axis.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from moekit.sharding import (
    BATCH_AXES,
    BATCH_SPEC,
    MESH_AXES,
    all_gather_parameter,
    cast_varying,
    gather_steps,
    platform,
    variable_spec,
)


class Slices(NamedTuple):
    """Pieces of a ragged all-to-all, the same number for each device (see jax.lax)."""

    start: Int[Array, "pieces"]  # of each piece, here
    size: Int[Array, "pieces"]
    offset: Int[Array, "pieces"]  # of each piece where it arrives
    received: Int[Array, "pieces"]  # sizes of those that arrive here


@dataclass(frozen=True)
class Place:
    """One device's view of its mesh; without a mesh every operation leaves things as they are.

    Args:
      typed: whether types say over which axes arrays vary (see `split_over_mesh`).
    """

    mesh: Mesh | None = None
    typed: bool = True

    @property
    def platform(self) -> str:
        return platform(self.mesh)

    def size(self, *axes: str) -> int:
        return 1 if self.mesh is None else jax.lax.axis_size(axes)

    def index(self, *axes: str) -> int | Int[Array, ""]:
        """This device's number along some axes, the first of them the slowest."""
        return 0 if self.mesh is None else jax.lax.axis_index(axes)

    def to_experts(self, slots: Float[Array, "E C D"]) -> Float[Array, "local_E all_C D"]:
        """All devices' slots of the experts that live here."""
        e, c, d = slots.shape
        n = self.size("expert")
        received = self._exchange(slots.reshape(e * c, d)).reshape(n, e // n, c, d)
        return received.transpose(1, 0, 2, 3).reshape(e // n, n * c, d)

    def to_tokens(self, slots: Float[Array, "local_E all_C D"]) -> Float[Array, "E C D"]:
        """The way back."""
        e, c, d = slots.shape
        n = self.size("expert")
        sent = slots.reshape(e, n, c // n, d).transpose(1, 0, 2, 3).reshape(-1, d)
        return self._exchange(sent).reshape(e * n, c // n, d)

    def _exchange(self, rows: Float[Array, "rows D"]) -> Float[Array, "rows D"]:
        """The i-th part of the rows goes to device i. On whole rows: an all-to-all that moves
        axes as well costs a TPU several copies of its operand."""
        if self.mesh is None:
            return rows
        return jax.lax.all_to_all(rows, "expert", 0, 0, tiled=True)

    def vary(self, tree, *axes: str):
        """Mark equal copies as the start of different work along some axes: here, and nowhere
        later, their cotangents are summed."""
        if self.mesh is None or not self.typed:
            return tree
        return jax.tree.map(lambda x: cast_varying(x, axes), tree)

    def gather(self, rows: Shaped[Array, "rows *S"]) -> Shaped[Array, "all_rows *S"]:
        """The rows of all devices along the expert axis."""
        if self.mesh is None:
            return rows
        return jax.lax.all_gather(rows, "expert", tiled=True)

    def scatter(self, rows: Float[Array, "all_rows D"]) -> Float[Array, "rows D"]:
        """The sum over devices along the expert axis of what each has for these rows."""
        if self.mesh is None:
            return rows
        return jax.lax.psum_scatter(rows, "expert", tiled=True)

    def exchange(
        self, x: Shaped[Array, "sent D"], rows: int, slices: Slices
    ) -> Shaped[Array, "received D"]:
        """Pieces of x from every device along the expert axis, in a buffer of zeros."""
        if self.size("expert") == 1:
            return jnp.pad(x[:rows], ((0, max(0, rows - x.shape[0])), (0, 0)))
        buffer = self.vary(jnp.zeros((rows, x.shape[1]), x.dtype), *MESH_AXES)
        return jax.lax.ragged_all_to_all(x, buffer, *slices, axis_name="expert")

    def sum(self, tree, *axes: str):
        return tree if self.mesh is None else jax.lax.psum(tree, axes)


def split_over_mesh(
    function: Callable, module: nnx.Module, mesh: Mesh, cast: Callable, *, typed: bool = True
) -> Callable:
    """function(module, rows, key) -> (rows, sums), run by every device on its share of the rows.

    Args:
      module: its parameters arrive whole but for the parts of the expert and model axes that split
        the work, each as cast(variable) makes it.
      typed: jax follows over which axes every array varies, so that no cotangent is summed twice;
        False for kernels that do not say it of their results, at the price of one more sum over
        the model axis backward.

    The rows (of any arrays) must be a multiple of the mesh's row shards; sums come out equal on
    all devices.
    """
    graphdef, state = nnx.split(module)
    is_variable = {"is_leaf": lambda leaf: isinstance(leaf, nnx.Variable)}
    specs = jax.tree.map(lambda v: variable_spec(v, mesh), state, **is_variable)

    def local(state, rows, key):
        def arrives(variable, spec):
            # experts stay where they are, all else is gathered
            kept = ("data",) if "expert" in variable.axes else BATCH_AXES
            return variable.replace(all_gather_parameter(cast(variable), gather_steps(spec, kept)))

        whole = jax.tree.map(arrives, state, specs, **is_variable)
        return function(nnx.merge(graphdef, whole), rows, key)

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, BATCH_SPEC, PartitionSpec()),
        out_specs=(BATCH_SPEC, PartitionSpec()),
        check_vma=typed,
    )
    return lambda rows, key: sharded(state, rows, key)
