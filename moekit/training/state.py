"""The state of training: one pytree that a step maps to the next and that a checkpoint saves."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Int, UInt32

from moekit.sharding import is_variable, variable_spec


@no_type_check  # a pytree: tree.map rebuilds it around leaves of any kind
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a run needs to continue.

    Args:
      step: number of steps done.
      params: the parameters, which gradients update.
      rest: other variables of the model (router biases).
      optimizer: optax's state.
      key_data: of the run's random key; every step folds its number in. It is the plain array of
        `jax.random.key_data`, which is saved and sharded as any other.
      position: state of the data stream, by shard of the global batch. It is text, so it is empty
        in the states that compiled programs take and return.
    """

    step: Int[Array, ""]
    params: nnx.State
    rest: nnx.State
    optimizer: Any
    key_data: UInt32[Array, "..."]
    position: dict[str, str] = field(default_factory=dict)


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Graph definition, parameters and other variables of a model."""
    return nnx.split(model, nnx.Param, ...)


def model_shardings(state: nnx.State, mesh: Mesh | None) -> Any:
    """A sharding for every variable of a model; without a mesh the default device."""
    if mesh is None:
        return replicated(None)

    def sharding(variable: nnx.Variable) -> NamedSharding:
        return NamedSharding(mesh, variable_spec(variable, mesh))

    return jax.tree.map(sharding, state, is_leaf=is_variable)


def replicated(mesh: Mesh | None) -> Sharding:
    """On every device of a mesh; without one on the default device."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, PartitionSpec())


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree with shardings, which may be given for whole subtrees."""
    shardings = jax.tree.broadcast(shardings, tree)

    def shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree, shardings)


def abstract_model(build: Callable[[], nnx.Module], mesh: Mesh | None) -> nnx.Module:
    """The model that `build` makes, of shapes, types and shardings: no array is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graphdef, with_shardings(state, model_shardings(state, mesh)))


def checkpoint_items(state: TrainState) -> dict[str, Any]:
    """The arrays of a state as named trees of plain dicts, which do not depend on flax or optax."""
    model = nnx.to_pure_dict(nnx.merge_state(state.params, state.rest))
    leaves = jax.tree.leaves(state.optimizer)
    optimizer = {str(number): leaf for number, leaf in enumerate(leaves)}
    return {
        "model": model,
        "optimizer": optimizer,
        "progress": {"step": state.step, "key": state.key_data},
    }


def state_from_items(
    abstract: TrainState, items: dict[str, Any], position: dict[str, str]
) -> TrainState:
    """The inverse of `checkpoint_items`; `abstract` gives the structure."""
    model = nnx.merge_state(abstract.params, abstract.rest)
    model = jax.tree.map(lambda leaf: leaf, model)  # a copy: its variables are replaced
    nnx.replace_by_pure_dict(model, items["model"])
    params, rest = nnx.split_state(model, nnx.Param, ...)
    leaves = [items["optimizer"][str(number)] for number in range(len(items["optimizer"]))]
    return TrainState(
        step=items["progress"]["step"],
        params=params,
        rest=rest,
        optimizer=jax.tree.unflatten(jax.tree.structure(abstract.optimizer), leaves),
        key_data=items["progress"]["key"],
        position=position,
    )


def copy_arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
