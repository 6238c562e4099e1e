"""Our models and those of transformers, timed in turns, each side in a process of its own."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from moekit.bench.timing import interleaved_times

OURS = "ours"
BASELINE = "peer"

Work = TypeVar("Work")
Functions = dict[str, Callable[[], object]]

# the timed functions of the process that runs one side, by name
_FUNCTIONS: Functions = {}


def baseline_versions(benchmark: str) -> str:
    """Names and versions of what we compare with; ValueError where it is not installed."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(
            f"bench {benchmark} compares with transformers on torch ({error}): "
            'pip install -e ".[parity]"'
        ) from error
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def num_threads() -> int:
    """As many as XLA uses: every processor that the process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compare(
    make_ours: Callable[[Work], tuple[Functions, int]],
    make_baseline: Callable[[Work], tuple[Functions, int]],
    work: Work,
    repeats: int,
) -> tuple[dict[tuple[str, str], list[float]], dict[str, int]]:
    """Milliseconds by side and function, and by side the number that its maker counted.

    Args:
      make_ours: a function of a module that makes our compiled functions by name, and a count.
      make_baseline: the same for transformers, with the same names.
      work: what both sides compute.
      repeats: timed calls of each function.
    """
    spawn = multiprocessing.get_context("spawn")
    # separate processes: neither side's threads nor memory disturb the other's
    with ProcessPoolExecutor(1, spawn) as ours, ProcessPoolExecutor(1, spawn) as baseline:
        sides = {OURS: (ours, make_ours), BASELINE: (baseline, make_baseline)}
        counts = {}
        functions = {}
        for side, (pool, make) in sides.items():
            names, counts[side] = pool.submit(_prepare, make, work).result()
            for name in names:
                functions[side, name] = _remote_call(pool, name)
        interleaved_times(functions, 1)  # memory grows to its final size
        return interleaved_times(functions, repeats), counts


def _remote_call(pool: ProcessPoolExecutor, name: str) -> Callable[[], object]:
    def call() -> object:
        return pool.submit(_run, name).result()

    return call


def _prepare(
    make: Callable[[Work], tuple[Functions, int]], work: Work
) -> tuple[tuple[str, ...], int]:
    """Make one side's functions in this process; returns their names and what was counted."""
    functions, count = make(work)
    _FUNCTIONS.update(functions)
    return tuple(functions), count


def _run(name: str) -> None:
    _FUNCTIONS[name]()
