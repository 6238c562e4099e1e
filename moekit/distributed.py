"""One run on several hosts: starting it, sharding batches over processes, agreeing on values.

Every process runs the same program, as is usual in JAX. With one process all of this is trivial.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from moekit.sharding import BATCH_SPEC, batch_shards
from moekit.versions import coordination, join_processes

LOST_SECONDS = 30  # without a sign of life of a process
WATCH_SECONDS = 2
EXIT_SECONDS = 60  # how long a process that exits waits for the others
LOST_EXIT_CODE = 3


def start(
    coordinator: str = "",
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Join the other processes of a run, before any other use of jax.

    On a TPU slice (Cloud TPU VMs or GKE) jax finds the other processes and no argument is needed.
    Elsewhere, without arguments, the run has one process.

    Args:
      coordinator: host:port of process 0; default the environment's JAX_COORDINATOR_ADDRESS.
      processes, process_id: number of processes and the number of this one, from 0; jax reads them
        from the environment of Slurm and Open MPI.
      timeout: seconds to wait for the other processes.

    Raises:
      ValueError: the arguments are incomplete or contradict each other.
      TimeoutError: the other processes did not join.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    given = bool(coordinator) or processes is not None or process_id is not None
    if jax.distributed.is_initialized() or not (given or _on_tpu()):
        return
    if given and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"coordinator is {coordinator!r}: give the host:port of process 0")
    errors: list[Exception] = []

    def join() -> None:
        try:
            join_processes(
                coordinator or None,
                processes,
                process_id,
                start_seconds=timeout + 60,
                lost_seconds=LOST_SECONDS,
            )
        except Exception as error:
            errors.append(error)

    # jax aborts the process at its own timeout: we time out first, in a thread
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        address = f" at {coordinator}" if coordinator else ""
        raise TimeoutError(
            f"waited {timeout} s for the other processes of this run{address}: start the same "
            "command on every worker (--worker=all on Cloud TPU), each with the same number of "
            "processes and the same coordinator, which every worker must be able to reach"
        )
    if errors and given:
        raise ValueError(
            f"cannot join a run at {coordinator} as process {process_id} of {processes}: "
            f"{errors[0]}; give coordinator, processes and process_id (from 0) to each"
        )
    if not errors and coordination().num_processes > 1:
        _watch_processes()
    # a TPU without the metadata of a slice is driven by one process: these errors are expected
    if errors and not isinstance(errors[0], (ValueError, ConnectionError)):
        raise errors[0]


def _watch_processes() -> None:
    """Start a thread that ends this process if another one is lost; let all of them exit together.

    A collective operation without one of its processes waits forever on a TPU.
    """
    is_exiting = threading.Event()
    threading.Thread(target=_exit_if_one_is_lost, args=(is_exiting,), daemon=True).start()
    atexit.register(_wait_for_others_at_exit, is_exiting)  # runs before jax's own exit handler


def _exit_if_one_is_lost(is_exiting: threading.Event) -> None:
    """Ask the service of process 0 every few seconds which processes are alive."""
    numbers = list(range(coordination().num_processes))
    client = coordination().client
    while not is_exiting.wait(WATCH_SECONDS):
        try:
            alive = client.get_live_nodes(numbers)
        except Exception:  # jax.errors.JaxRuntimeError of a service that is gone
            alive = numbers[1:]
        lost = [number for number in numbers if number not in alive]
        if lost and not is_exiting.is_set():
            _exit_because_of(lost)


def _exit_because_of(lost: list[int]) -> None:
    """End at once: other threads may wait for the lost processes, forever."""
    names = ", ".join(map(str, lost))
    subject = f"processes {names} are" if len(lost) > 1 else f"process {names} is"
    state = coordination()
    print(
        f"error: {subject} gone (no sign of life for {LOST_SECONDS} s): process "
        f"{state.process_id} of {state.num_processes} ends as well; start the same command on all "
        "hosts to resume from the newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST_EXIT_CODE)


def _wait_for_others_at_exit(is_exiting: threading.Event) -> None:
    """Wait until all processes exit: process 0 runs the service that the others need."""
    is_exiting.set()
    state = coordination()
    numbers = list(range(state.num_processes))
    with contextlib.suppress(Exception):
        state.client.wait_at_barrier("moekit_end", EXIT_SECONDS * 1000)
        if state.process_id == 0:
            state.client.get_live_nodes(numbers)  # returns when the others have left


@contextlib.contextmanager
def lost_processes_named() -> Iterator[None]:
    """Let a failed operation between processes end with the name of the process that is lost.

    On CPUs and GPUs such an operation fails before it is known which process is lost.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if jax.process_count() > 1 and _is_failed_operation(error):
            # the process ends in the meantime; on a busy machine the loss is noticed late
            time.sleep(2 * LOST_SECONDS)
        raise


def _is_failed_operation(error: Exception) -> bool:
    """Whether an operation on devices failed, in contrast to settings that are refused.

    On CPUs, jax raises what gloo reports as a ValueError where dispatch is not asynchronous.
    """
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def _on_tpu() -> bool:
    """Whether jax found TPU chips when it was imported, and may use them."""
    on_gke = "TPU_WORKER_HOSTNAMES" in os.environ or "TPU_PROCESS_ADDRESSES" in os.environ
    has_chips = on_gke or "TPU_SKIP_MDS_QUERY" not in os.environ  # jax sets it without chips
    platforms = jax.config.jax_platforms or "tpu"
    return has_chips and "tpu" in platforms.split(",")


def is_first() -> bool:
    """True on process 0, which logs."""
    return jax.process_index() == 0


def allgather_objects(value: Any) -> list[Any]:
    """The JSON-ready values of all processes, by process number."""
    if jax.process_count() == 1:
        return [value]
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(encoded.size))
    padded = np.pad(encoded, (0, sizes.max() - encoded.size))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def run_on_first(action: Callable[[], Any]) -> None:
    """Call a function on process 0 only; an OSError there is raised on every process."""
    error = None
    if is_first():
        try:
            action()
        except OSError as raised:
            error = raised
    message = allgather_objects(None if error is None else str(error))[0]
    if error is not None:
        raise error
    if message is not None:
        raise OSError(message)


def to_host(tree: Any) -> Any:
    """Global arrays as whole numpy arrays, on every process."""

    def fetch(array: jax.Array) -> Any:
        if array.is_fully_addressable:
            return jax.device_get(array)
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(fetch, tree)


def process_shard(mesh: Mesh | None) -> tuple[int, int]:
    """(i, n): the devices of this process hold shard i of n of a batch's rows.

    Processes that differ only along the model axis hold the same shard.

    Raises:
      ValueError: the processes hold different numbers of rows.
    """
    if mesh is None:
        return 0, 1
    num_shards = batch_shards(mesh)
    sharding = NamedSharding(mesh, BATCH_SPEC)
    held: dict[int, set[int]] = defaultdict(set)  # numbers of the rows of each process
    for device, (rows,) in sharding.devices_indices_map((num_shards,)).items():
        held[device.process_index].add(rows.start or 0)
    distinct = sorted({tuple(sorted(rows)) for rows in held.values()})
    sizes = [len(rows) for rows in distinct]
    if len(set(sizes)) > 1 or sum(sizes) != num_shards:
        raise ValueError(
            f"{len(held)} processes cannot share data={mesh.shape['data']} times "
            f"expert={mesh.shape['expert']} evenly: choose a multiple or a divisor of {len(held)}"
        )
    own = tuple(sorted(held[jax.process_index()]))
    return distinct.index(own), len(distinct)


def make_global_batch(batch: Any, mesh: Mesh | None) -> Any:
    """A batch on the devices, of all rows, from the rows of each process."""
    if mesh is None:
        return jax.device_put(batch)
    sharding = NamedSharding(mesh, BATCH_SPEC)

    def make_global(rows: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree.map(make_global, batch)
