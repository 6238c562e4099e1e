"""Scores with confidence intervals, their tables and charts, averages and comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from moekit.table import Table

RESAMPLES = 1000  # bootstrap resamples of a 95 % interval


def bootstrap(
    groups: Sequence[Float[ndarray, "..."]],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """95 % interval of the weighted sum of the groups' means, by resampling within each group.

    Args:
      weights: one a group; default: all alike, which makes the sum a mean.
    """
    if weights is None:
        weights = [1 / len(groups)] * len(groups)
    generator = np.random.default_rng(seed)
    sums = np.zeros(resamples)
    for values, weight in zip(groups, weights, strict=True):
        size = len(values)
        picks = generator.integers(0, size, (resamples, size))
        sums += weight * values[picks].mean(1)
    low, high = np.quantile(sums, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class TaskScore:
    """A task's score in [0, 1] with its 95 % interval and baselines.

    Args:
      n: number of examples.
      chance: score of picking options at random; 0 for generated answers.
      majority: score of always giving the most frequent answer.
      values: score of each example.
    """

    task: str
    cluster: str
    metric: str
    score: float
    low: float
    high: float
    n: int
    chance: float
    majority: float
    values: Float[ndarray, "n"] = field(repr=False)

    @classmethod
    def of(
        cls,
        task: str,
        cluster: str,
        metric: str,
        values: Sequence[float | int],
        chance: float,
        majority: float,
    ) -> "TaskScore":
        """The score of a task from those of its examples."""
        array = np.asarray(values, np.float64)
        low, high = bootstrap([array])
        mean = float(array.mean())
        return cls(task, cluster, metric, mean, low, high, len(array), chance, majority, array)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the single examples."""
        record = asdict(self)
        del record["values"]
        return record


@dataclass(frozen=True)
class Scores:
    """A model's scores on a suite.

    Args:
      name: "<model> on <suite>".
      shots: exemplars requested for each prompt.
      dropped_shots: requested exemplars that were not shown, over all prompts: they made the
        input too long, or the task has too few.
      missing: tasks of the suite without data.
      split: split that the examples come from.
    """

    name: str
    rows: tuple[TaskScore, ...]
    shots: int = 0
    dropped_shots: int = 0
    missing: tuple[str, ...] = ()
    split: str = ""

    @property
    def model(self) -> str:
        return self.name.partition(" on ")[0]

    @property
    def suite(self) -> str:
        return self.name.partition(" on ")[2] or self.name

    @property
    def mean(self) -> TaskScore:
        """The mean over tasks with equal weights; the interval resamples examples in each."""
        groups = [row.values for row in self.rows]
        low, high = bootstrap(groups)
        metrics = {row.metric for row in self.rows}
        return TaskScore(
            task="mean",
            cluster="",
            metric=metrics.pop() if len(metrics) == 1 else "mixed",
            score=float(np.mean([row.score for row in self.rows])),
            low=low,
            high=high,
            n=sum(row.n for row in self.rows),
            chance=float(np.mean([row.chance for row in self.rows])),
            majority=float(np.mean([row.majority for row in self.rows])),
            values=np.concatenate(groups),
        )

    def table(self) -> str:
        """Percentages by task, with 95 % intervals and baselines."""
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        rows = []
        for row in (*self.rows, self.mean):
            cells = (
                row.task,
                row.metric,
                f"{row.score:.1%}",
                f"{row.low:.1%} - {row.high:.1%}",
                str(row.n),
                f"{row.chance:.1%}",
                f"{row.majority:.1%}",
            )
            rows.append(cells)
        split = f", {self.split} split" if self.split else ""
        return Table(
            headings=("task", "metric", "score", "95 % interval", "n", "chance", "majority"),
            rows=rows,
            title=[f"{self.name}{split}, {self.shots} shots"],
            notes=self._notes(),
            num_left=2,
        )

    def _notes(self) -> list[str]:
        """What is missing from the table, and from prompts."""
        notes = []
        if self.dropped_shots:
            requested = self.shots * sum(row.n for row in self.rows)
            notes.append(
                f"{self.dropped_shots} of {requested} exemplars were not shown: the input was too "
                "long, or the task has too few"
            )
        if self.missing:
            notes.append(f"skipped (no data): {', '.join(self.missing)}")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the single examples."""
        return {
            "name": self.name,
            "split": self.split,
            "shots": self.shots,
            "dropped_shots": self.dropped_shots,
            "missing": list(self.missing),
            "mean": self.mean.to_dict(),
            "tasks": [row.to_dict() for row in self.rows],
        }

    def plot(self):
        """Bars with intervals; a dot for chance, a line for the majority answer."""
        import matplotlib.pyplot as plt

        rows = (*self.rows, self.mean)
        heights = np.arange(len(rows))[::-1]
        scores = [row.score for row in rows]
        below = [abs(row.score - row.low) for row in rows]
        above = [abs(row.high - row.score) for row in rows]
        chance = [row.chance for row in rows]
        majority = [row.majority for row in rows]

        figure_height = 0.6 + 0.28 * len(rows)
        figure, axes = plt.subplots(figsize=(7, figure_height), layout="constrained")
        axes.barh(
            heights,
            scores,
            xerr=[below, above],
            color="0.75",
            edgecolor="0.3",
            height=0.7,
            capsize=2,
        )
        axes.plot(chance, heights, "o", color="black", ms=4, label="chance")
        axes.plot(majority, heights, "|", color="black", ms=10, label="majority")
        axes.set_yticks(heights, [row.task for row in rows], fontsize=8)
        axes.set_xlabel("score (share right, 95 % interval)")
        axes.set_xlim(0, 1)
        axes.set_title(self.name)
        axes.legend(frameon=False, loc="lower right")
        return figure


@dataclass(frozen=True)
class NormalisedAverage:
    """The mean over suites of each one's normalised score, with its 95 % interval.

    0 is chance and 1 is all right; below chance it is negative.
    """

    score: float
    low: float
    high: float
    suites: Mapping[str, float]

    def __str__(self) -> str:
        suites = ", ".join(f"{name} {score:.1%}" for name, score in self.suites.items())
        interval = f"95 % interval {self.low:.1%} to {self.high:.1%}"
        return f"normalised average {self.score:.1%} ({interval}): {suites}"


def normalised_average(results: Sequence[Scores]) -> NormalisedAverage:
    """The paper's single figure for a model.

    Every task's score is scaled between chance and 1, averaged over the tasks of a suite, then
    over suites (the "normalized average" of Chung 2022, section 2.3 and footnote 5, after
    BIG-bench's normalized preferred metric). The paper's suites are "mmlu", "bbh", "reasoning"
    and "qa".

    Raises:
      ValueError: there are no suites, a suite occurs twice, or the chance score of a task is 1.
    """
    names = [scores.suite for scores in results]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"an average needs different suites, not {names}")
    suites = {}
    groups = []
    weights = []
    for scores in results:
        scaled = [_above_chance(row) for row in scores.rows]
        means = [values.mean() for values in scaled]
        suites[scores.suite] = float(np.mean(means))
        groups += scaled
        weights += [1 / (len(results) * len(scaled))] * len(scaled)
    low, high = bootstrap(groups, weights)
    mean = float(np.mean(list(suites.values())))
    return NormalisedAverage(mean, low, high, suites)


def _above_chance(row: TaskScore) -> Float[ndarray, "n"]:
    """The scores of a task's examples, scaled so that chance is 0."""
    if row.chance >= 1:
        raise ValueError(
            f"task {row.task} cannot be normalised: every example has a single option, so chance "
            "is 100 %; leave the task out"
        )
    return (row.values - row.chance) / (1 - row.chance)


def report(results: Sequence[Scores]) -> dict[str, Any]:
    """A JSON-ready record of one model on several suites, which `moekit figures` draws."""
    return {
        "kind": "evaluation",
        "model": results[0].model,
        "suites": [scores.to_dict() for scores in results],
        "normalised_average": asdict(normalised_average(results)),
    }


@dataclass(frozen=True)
class Difference:
    """A mean difference of two models on the same examples, with its 95 % interval."""

    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.difference:+.1%} (95 % interval {self.low:+.1%} to {self.high:+.1%})"


def compare(before: Scores, after: Scores) -> Difference:
    """after - before, paired by example and averaged over tasks.

    Raises:
      ValueError: the scores are not of the same examples.
    """
    examples_before = [(row.task, row.n) for row in before.rows]
    examples_after = [(row.task, row.n) for row in after.rows]
    if examples_before != examples_after:
        raise ValueError(f"{before.name} and {after.name} are scores of different examples")
    differences = []
    for row_before, row_after in zip(before.rows, after.rows, strict=True):
        differences.append(row_after.values - row_before.values)
    low, high = bootstrap(differences)
    mean = float(np.mean([values.mean() for values in differences]))
    return Difference(mean, low, high)
