"""One run on several hosts: how it starts, which rows are whose, how its processes agree.

Every process runs the same program (jax's way); with one process everything here is trivial.
"""

import json
import os
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from moekit.sharding import BATCH_SPEC, batch_shards


def start(
    coordinator: str = "",
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Join the other processes of a run, before any other use of jax.

    On a TPU slice (Cloud TPU VMs or GKE) jax finds them by itself and no argument is needed;
    elsewhere a run of one process goes on alone.

    Args:
      coordinator: host:port of process 0; default the environment's JAX_COORDINATOR_ADDRESS.
      processes, process_id: how many there are and which this is; Slurm and Open MPI tell jax.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: the arguments do not make a run.
      TimeoutError: the others did not come.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    given = bool(coordinator) or processes is not None or process_id is not None
    if jax.distributed.is_initialized() or not (given or _on_tpu()):
        return
    if given and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"coordinator is {coordinator!r}: give the host:port of process 0")
    errors: list[Exception] = []

    def join():
        try:
            jax.distributed.initialize(
                coordinator or None,
                processes,
                process_id,
                initialization_timeout=timeout + 60,
                shutdown_timeout_seconds=60,
            )
        except Exception as error:
            errors.append(error)

    # jax aborts the process when its own time is up: a thread of ours gives up before
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError(
            f"waited {timeout} s for the other processes of this run"
            + (f" at {coordinator}" if coordinator else "")
            + ": start the same command on every worker (--worker=all on Cloud TPU), each with the "
            "same coordinator, which they must be able to reach, and number of processes"
        )
    if errors and given:
        raise ValueError(
            f"cannot join a run at {coordinator} as process {process_id} of {processes}: "
            f"{errors[0]}; give coordinator, processes and process_id (from 0) to each"
        )
    if errors and not isinstance(errors[0], (ValueError, ConnectionError)):
        raise errors[0]  # else a TPU without a slice's metadata: one process drives it


def _on_tpu() -> bool:
    """Whether jax saw TPU chips when it was imported, and may use them."""
    on_gke = {"TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"} & os.environ.keys()
    chips = bool(on_gke) or "TPU_SKIP_MDS_QUERY" not in os.environ  # jax sets it without chips
    return chips and "tpu" in (jax.config.jax_platforms or "tpu").split(",")


def is_first() -> bool:
    """Whether this process speaks for the run."""
    return jax.process_index() == 0


def gathered(value: Any) -> list:
    """The JSON-ready values of all processes, in order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    texts = multihost_utils.process_allgather(np.pad(text, (0, sizes.max() - text.size)))
    return [json.loads(row[:n].tobytes()) for row, n in zip(texts, sizes, strict=True)]


def first_does(action: Callable[[], Any]) -> None:
    """Let the first process act; an OSError of its is raised on all."""
    error = None
    if is_first():
        try:
            action()
        except OSError as failure:
            error = failure
    if message := gathered(error and str(error))[0]:
        raise error or OSError(message)


def to_host(tree):
    """Global arrays, whole, as numpy arrays on every process."""
    return jax.tree.map(
        lambda x: (
            jax.device_get(x)
            if x.is_fully_addressable
            else multihost_utils.process_allgather(x, tiled=True)
        ),
        tree,
    )


def share_of_rows(mesh: Mesh | None) -> tuple[int, int]:
    """(i, n): the devices of this process hold part i of n of a batch's rows.

    Processes that only the model axis tells apart hold the same part.

    Raises:
      ValueError: the parts are not equal.
    """
    if mesh is None:
        return 0, 1
    shards, held = batch_shards(mesh), {}
    for device, (rows,) in NamedSharding(mesh, BATCH_SPEC).devices_indices_map((shards,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({tuple(sorted(part)) for part in held.values()})
    if len({*map(len, parts)}) > 1 or sum(map(len, parts)) != shards:
        raise ValueError(
            f"{len(held)} processes cannot share data={mesh.shape['data']} times "
            f"expert={mesh.shape['expert']} evenly: choose a multiple or a divisor of {len(held)}"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def join_rows(batch, mesh: Mesh | None):
    """A tree of arrays of all rows, on the devices, of each process's part of them."""
    if mesh is None:
        return jax.device_put(batch)
    rows = NamedSharding(mesh, BATCH_SPEC)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)
