"""Expert parallelism: what one device of a mesh computes, and what it communicates.

The layer runs inside one `jax.shard_map`. Each device routes its own tokens. An all-to-all over the
expert axis sends slots to the devices that hold the experts, and a second one returns the outputs;
autodiff adds one more of each. Fully sharded parameters are all-gathered in their compute type, so
that their gradients are reduce-scattered. Over the model axis all devices process the same tokens,
each with its shard of every expert's hidden features.

E experts, C slots per expert (of all groups), D features.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, Shaped

from moekit.sharding import (
    BATCH_SPEC,
    MESH_AXES,
    Sharding,
    cast_varying,
    gather_steps,
    is_variable,
    platform,
)
from moekit.versions import psum


class ParameterLayout(NamedTuple):
    """How a parameter is stored, and how a device gets what it uses of it."""

    spec: PartitionSpec  # mesh axes that shard it
    gathers: tuple[tuple[str, int], ...]  # mesh axis and dimension of each all-gather, in order
    dtype: DTypeLike  # compute type


def parameter_layouts(
    module: nnx.Module, mesh: Mesh, dtype: DTypeLike, num_stacked: int
) -> tuple[ParameterLayout, ...]:
    """The layout of every variable of a layer.

    Experts' parameters are all-gathered in `dtype`, except over the expert axis (and the model
    axis); all others are all-gathered completely, in float32. The layouts are those of one layer:
    without the first `num_stacked` axes of the parameters.
    """
    layouts = []
    for variable in jax.tree.leaves(nnx.state(module), is_leaf=is_variable):
        shape, axes = variable.shape[num_stacked:], variable.axes[num_stacked:]
        spec = Sharding().spec(shape, axes, mesh)
        if "expert" in axes:
            layout = ParameterLayout(spec, gather_steps(spec, ("data",)), dtype)
        else:
            layout = ParameterLayout(spec, gather_steps(spec), jnp.float32)
        layouts.append(layout)
    return tuple(layouts)


def _gather_parameter(shard: Array, layout: ParameterLayout) -> Array:
    value = shard.astype(layout.dtype)
    for axis, dimension in layout.gathers:
        value = jax.lax.all_gather(value, axis, axis=dimension, tiled=True)
    return value


class RaggedSizes(NamedTuple):
    """The arguments of `jax.lax.ragged_all_to_all`: an equal number of pieces for each device."""

    input_offsets: Int[Array, "pieces"]
    send_sizes: Int[Array, "pieces"]
    output_offsets: Int[Array, "pieces"]
    recv_sizes: Int[Array, "pieces"]


@dataclass(frozen=True)
class ExpertParallel:
    """The collectives of a layer on a mesh; without a mesh each of them is the identity.

    Args:
      layouts: see `parameter_layouts`.
      check_vma: whether shard_map tracks device-varying axes, which saves a psum over the model
        axis in the backward pass; False for kernels that do not support it.
    """

    mesh: Mesh | None = None
    layouts: tuple[ParameterLayout, ...] = ()
    check_vma: bool = True

    @property
    def platform(self) -> str:
        return platform(self.mesh)

    def shard(self, function: Callable[..., Any], module: nnx.Module) -> Callable[..., Any]:
        """function(module, inputs, key) -> (outputs, sums), run by every device on its shard.

        The inputs are arrays whose leading dimension is sharded over the batch axes, which must
        divide it; outputs are sharded in the same way, sums must be equal on all devices.
        """
        graphdef, state = nnx.split(module)
        parameters, structure = jax.tree.flatten(state)

        def per_device(shards: list[Array], inputs: Any, key: Key[Array, ""] | None) -> Any:
            gathered = map(_gather_parameter, shards, self.layouts)
            module = nnx.merge(graphdef, structure.unflatten(gathered))
            return function(module, inputs, key)

        specs = [layout.spec for layout in self.layouts]
        sharded = jax.shard_map(
            per_device,
            mesh=self.mesh,
            in_specs=(specs, BATCH_SPEC, PartitionSpec()),
            out_specs=(BATCH_SPEC, PartitionSpec()),
            check_vma=self.check_vma,
        )
        return functools.partial(sharded, parameters)

    def axis_size(self, *axes: str) -> int:
        """Number of devices along some mesh axes."""
        size = 1
        if self.mesh is not None:
            for axis in axes:
                size *= self.mesh.shape[axis]
        return size

    def axis_index(self, *axes: str) -> int | Int[Array, ""]:
        """This device's index along some mesh axes, of which the first is the slowest."""
        return 0 if self.axis_size(*axes) == 1 else jax.lax.axis_index(axes)

    def all_to_all(
        self, slots: Float[Array, "E C D"], *, split_axis: int, concat_axis: int
    ) -> Float[Array, "E_out C_out D"]:
        """`jax.lax.all_to_all` over the expert axis (tiled).

        Split over experts, it returns all devices' slots of the experts on this device; split over
        slots, it returns them. The exchange itself moves whole rows: one that also transposes
        costs a TPU several copies of its operand.
        """
        if self.mesh is None:
            return slots
        num_devices, shape = self.axis_size("expert"), slots.shape
        piece = (num_devices, shape[split_axis] // num_devices)
        pieces = slots.reshape(shape[:split_axis] + piece + shape[split_axis + 1 :])
        pieces = jnp.moveaxis(pieces, split_axis, 0)  # [receiver, ..]

        rows = pieces.reshape(-1, shape[-1])
        rows = jax.lax.all_to_all(rows, "expert", 0, 0, tiled=True)

        pieces = rows.reshape(pieces.shape)  # [sender, ..]
        pieces = jnp.moveaxis(pieces, 0, concat_axis)
        shape = pieces.shape
        merged = (num_devices * shape[concat_axis + 1],)
        return pieces.reshape(shape[:concat_axis] + merged + shape[concat_axis + 2 :])

    def ragged_all_to_all(
        self, x: Shaped[Array, "sent D"], buffer_rows: int, sizes: RaggedSizes
    ) -> Shaped[Array, "received D"]:
        """`jax.lax.ragged_all_to_all` over the expert axis, into a zeroed buffer."""
        if self.axis_size("expert") == 1:
            missing = max(0, buffer_rows - x.shape[0])
            return jnp.pad(x[:buffer_rows], ((0, missing), (0, 0)))
        buffer = self.cast_varying(jnp.zeros((buffer_rows, x.shape[1]), x.dtype), *MESH_AXES)
        return jax.lax.ragged_all_to_all(x, buffer, *sizes, axis_name="expert")

    def all_gather(self, rows: Shaped[Array, "rows *S"]) -> Shaped[Array, "all_rows *S"]:
        """The rows of all devices along the expert axis."""
        if self.mesh is None:
            return rows
        return jax.lax.all_gather(rows, "expert", tiled=True)

    def psum_scatter(self, rows: Float[Array, "all_rows D"]) -> Float[Array, "rows D"]:
        """This device's rows of the sum over all devices along the expert axis."""
        if self.mesh is None:
            return rows
        return jax.lax.psum_scatter(rows, "expert", tiled=True)

    def psum(self, tree: Any, *axes: str) -> Any:
        """The sum over all devices along some mesh axes."""
        return tree if self.mesh is None else psum(tree, axes)

    def cast_varying(self, tree: Any, *axes: str) -> Any:
        """Cast replicated arrays to device-varying; their gradients are psummed here.

        Nothing varies over a model axis of one device, so that axis is left out.
        """
        if self.axis_size("model") == 1:
            axes = tuple(set(axes) - {"model"})
        if self.mesh is None or not self.check_vma or not axes:
            return tree
        return jax.tree.map(functools.partial(cast_varying, axes=axes), tree)
