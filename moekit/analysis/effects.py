"""Effects over seeds and tasks: the difference of two models' gains, with an interval.

S seeds, T tasks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from moekit.evaluation.scores import RESAMPLES

FEWEST_SEEDS = 5  # a bootstrap over fewer gives intervals that are too narrow
NORMAL_95 = 1.959964  # standard errors on each side of a 95 % interval
NORMAL_POWER_80 = 0.841621  # standard errors that an effect is beyond it in 80 % of all studies


@dataclass(frozen=True)
class Effect:
    """A mean over seeds and tasks.

    Args:
      mean: over the seeds, of the weighted sum over the tasks.
      low: lower end of the 95 % interval over seeds and tasks.
      high: upper end.
      sd: standard deviation over the seeds (of a sample: divided by S - 1).
      per_seed: the weighted sum over the tasks for each seed.
    """

    mean: float
    low: float
    high: float
    sd: float
    per_seed: tuple[float, ...]

    @property
    def holds(self) -> str:
        """Whether the effect is positive: "yes", "no" (it is negative) or "unclear".

        An interval over fewer than five seeds is too narrow to answer with.
        """
        if len(self.per_seed) < FEWEST_SEEDS:
            return "unclear"
        if self.low > 0:
            return "yes"
        return "no" if self.high < 0 else "unclear"


def difference_of_gains(
    sparse_before: Float[ndarray, "S T"],
    sparse_after: Float[ndarray, "S T"],
    dense_before: Float[ndarray, "S T"],
    dense_after: Float[ndarray, "S T"],
    weights: Sequence[float] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Effect:
    """How much more the loss of the sparse model falls than that of the dense one.

    (sparse before - sparse after) - (dense before - dense after), in the unit of the losses. Seeds
    are paired: a seed is the same data order for both models.

    Args:
      weights: of the tasks; they are scaled to a sum of 1. By default all are alike.

    Raises:
      ValueError: fewer than two seeds, values that are not finite, or weights that do not fit.
    """
    sparse_gain = sparse_before - sparse_after
    dense_gain = dense_before - dense_after
    return effect(sparse_gain - dense_gain, weights, resamples=resamples, seed=seed)


def effect(
    values: Float[ndarray, "S T"],
    weights: Sequence[float] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Effect:
    """The mean of values over seeds and tasks.

    The interval is that of a hierarchical bootstrap: every resample draws seeds and, independently,
    tasks with replacement; a task that is drawn is drawn for all seeds, because the same questions
    are put to all models.

    Args:
      weights: of the tasks; they are scaled to a sum of 1. By default all are alike.

    Raises:
      ValueError: fewer than two seeds, values that are not finite, or weights that do not fit.
    """
    num_seeds, num_tasks = values.shape
    if num_seeds < 2:
        raise ValueError(f"{num_seeds} seeds have no spread: run two or more")
    if not np.isfinite(values).all():
        raise ValueError("values are not finite: leave out the seeds whose training failed")
    task_weights = _weights(weights, num_tasks)
    per_seed = values @ task_weights
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for index in range(resamples):
        seeds = generator.integers(0, num_seeds, num_seeds)
        tasks = generator.integers(0, num_tasks, num_tasks)
        drawn_weights = task_weights[tasks]
        drawn = values[seeds][:, tasks] @ drawn_weights
        means[index] = drawn.mean() / drawn_weights.sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return Effect(
        mean=float(per_seed.mean()),
        low=float(low),
        high=float(high),
        sd=float(per_seed.std(ddof=1)),
        per_seed=tuple(per_seed.tolist()),
    )


def _weights(weights: Sequence[float] | None, num_tasks: int) -> Float[ndarray, "T"]:
    if weights is None:
        return np.full(num_tasks, 1 / num_tasks)
    array = np.asarray(weights, np.float64)
    if array.shape != (num_tasks,) or not (array > 0).all() or not np.isfinite(array).all():
        raise ValueError(f"weights: give {num_tasks} positive numbers, one for each task")
    return array / array.sum()


def seeds_needed(sd: float, difference: float) -> int:
    """Paired seeds that show an effect in 80 % of all studies, at a level of 5 % (two-sided).

    n = ((z_0.975 + z_0.8) sd / difference)^2, the usual formula for a paired comparison (Cohen
    1988, chapter 2) with normal quantiles.

    Args:
      sd: standard deviation of the effect over seeds, from a pilot.
      difference: the smallest effect of interest, in the same unit.

    Raises:
      ValueError: a value is not positive.
    """
    if not (sd > 0 and difference > 0):
        raise ValueError(f"sd is {sd:g} and difference {difference:g}: both must be positive")
    return math.ceil(((NORMAL_95 + NORMAL_POWER_80) * sd / difference) ** 2)


def precision_weights(pilot: Float[ndarray, "S T"]) -> list[float]:
    """Weights of tasks from a pilot: the inverse variance over its seeds, with a sum of 1.

    A task whose outcome is mostly noise counts little. The weights must come from other seeds than
    those of the results.

    Raises:
      ValueError: fewer than three seeds, or a task without any spread.
    """
    num_seeds = pilot.shape[0]
    if num_seeds < 3:
        raise ValueError(f"{num_seeds} pilot seeds give no variance to rely on: run three or more")
    variances = pilot.var(axis=0, ddof=1)
    if not (variances > 0).all():
        raise ValueError("a task has the same value for every pilot seed: leave it out")
    weights = 1 / variances
    return (weights / weights.sum()).tolist()
