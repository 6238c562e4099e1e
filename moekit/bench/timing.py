"""Timing of compiled functions side by side, and the batches that they run on.

B batch, L input length, T target length.
"""

import statistics
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from moekit.data.batch import Batch

Name = TypeVar("Name", bound=Hashable)


def interleaved_times(
    functions: dict[Name, Callable[[], object]], repeats: int
) -> dict[Name, list[float]]:
    """Milliseconds of every call of each function.

    The functions take turns, so that noise of the machine affects all of them alike.
    """
    times: dict[Name, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def median_ratio(times: list[float], baseline: list[float]) -> float:
    """The median time over the baseline's median."""
    return round(statistics.median(times) / statistics.median(baseline), 3)


def min_ratio(times: list[float], baseline: list[float]) -> float:
    """The least time over the baseline's least."""
    return round(min(times) / min(baseline), 3)


def full_batch(batch: int, input_length: int, target_length: int, vocab_size: int) -> Batch:
    """Random tokens, one example per row, no padding."""
    generator = np.random.default_rng(0)
    inputs = _random_tokens(generator, batch, input_length, vocab_size)
    targets = _random_tokens(generator, batch, target_length, vocab_size)
    return Batch(
        inputs=inputs,
        input_segments=jnp.ones_like(inputs),
        input_positions=_positions(inputs),
        targets=targets,
        target_segments=jnp.ones_like(targets),
        target_positions=_positions(targets),
        loss_weights=jnp.ones(targets.shape, jnp.float32),
    )


def _random_tokens(
    generator: np.random.Generator, batch: int, length: int, vocab_size: int
) -> Int[Array, "B L"]:
    first_word = 2  # ids 0 and 1 are padding and end of sequence
    return jnp.asarray(generator.integers(first_word, vocab_size, (batch, length), np.int32))


def _positions(tokens: Int[Array, "B L"]) -> Int[Array, "B L"]:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
