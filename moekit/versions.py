"""What differs between the supported versions of jax (0.7.2 and newer) and flax (0.11.2 and newer).

Colab's runtimes come with the oldest of these. No other module asks for a version.
"""

from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

# flax before 0.12 finds the modules in a plain list
ModuleList = nnx.List if hasattr(nnx, "List") else list


def varying_axes(x: Array) -> frozenset[str]:
    """The mesh axes over which an array inside shard_map differs between devices."""
    array_type = jax.typeof(x)
    if hasattr(array_type, "manual_axis_type"):
        return frozenset(array_type.manual_axis_type.varying)
    return frozenset(array_type.vma)


def to_varying(x: Array, axes: Iterable[str]) -> Array:
    """An array that is replicated over mesh axes, cast to one that may differ between devices."""
    names = tuple(axes)
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, names, to="varying")
    return jax.lax.pvary(x, names)


def psum(tree: Any, axes: tuple[str, ...]) -> Any:
    """The sum of every array of a tree over mesh axes.

    One call for each array: jax 0.7.2 fails to differentiate a single call for the tree if only
    some of its arrays are differentiated.
    """
    return jax.tree.map(lambda array: jax.lax.psum(array, axes), tree)


def join_processes(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    *,
    start_seconds: int,
    lost_seconds: int,
) -> None:
    """Join the other processes of a run (jax.distributed.initialize).

    Args:
      start_seconds: how long to wait for the other processes.
      lost_seconds: time without a sign of life after which a process counts as lost. Except for
        process 0, jax then leaves the others alive: `moekit.distributed` ends them.
    """
    jax.config.update("jax_enable_recoverability", True)
    # CPUs on jax 0.7.2: programs that are dispatched while others run may reach the collective
    # operations of two processes in different orders, and all of them wait
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(
        coordinator,
        processes,
        process_id,
        initialization_timeout=start_seconds,
        heartbeat_timeout_seconds=lost_seconds,
    )


def coordination() -> Any:
    """What jax knows of the run's processes, also before it has devices: client (the connection to
    the service of process 0), num_processes, process_id."""
    from jax._src import distributed

    return distributed.global_state
