"""What a training run on a mixture will see, as a table and a picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.table import Table

if TYPE_CHECKING:
    import matplotlib.figure

LONGEST_NAME = 34  # characters of a task or cluster that a table shows


@dataclass(frozen=True)
class MixtureRow:
    """A task, a cluster or all of a mixture.

    Tokens are means of a sample of prompts, before any is truncated; `repeats` is how often each
    example is seen in the run.
    """

    submixture: str
    cluster: str
    task: str
    tasks: int
    examples: int
    valid: int
    rate: float
    input_tokens: float
    target_tokens: float
    repeats: float

    @property
    def tokens(self) -> float:
        """Of one prompt, input and target."""
        return self.input_tokens + self.target_tokens


@dataclass(frozen=True)
class Overview:
    """Rows of `Mixture.describe`; `repeats` refers to a run of `run_tokens`."""

    name: str
    rows: tuple[MixtureRow, ...]
    run_tokens: float
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> MixtureRow:
        return _total(self.rows, "all", "")

    @property
    def epoch_tokens(self) -> float:
        """Expected tokens of an epoch: as many prompts, drawn by rate, as there are examples."""
        return self.total.examples * self.total.tokens

    @property
    def clusters(self) -> list[MixtureRow]:
        """One row for each cluster of a sub-mixture, in the order of the tasks."""
        groups: dict[tuple[str, str], list[MixtureRow]] = {}
        for row in self.rows:
            groups.setdefault((row.submixture, row.cluster), []).append(row)
        return [_total(rows, submixture, cluster) for (submixture, cluster), rows in groups.items()]

    def for_run(self, tokens: int | float = 0) -> "Overview":
        """The summary for a run of `tokens` input and target tokens; default one epoch."""
        run_tokens = tokens or self.epoch_tokens
        num_prompts = run_tokens / self.total.tokens
        rows = []
        for row in self.rows:
            rows.append(replace(row, repeats=num_prompts * row.rate / row.examples))
        return replace(self, rows=tuple(rows), run_tokens=float(run_tokens))

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready: tasks, clusters, totals."""
        return {
            "name": self.name,
            "tasks": [asdict(row) for row in self.rows],
            "clusters": [asdict(row) for row in self.clusters],
            "total": asdict(self.total),
            "epoch_tokens": self.epoch_tokens,
            "run_tokens": self.run_tokens,
            "dropped": dict(self.dropped),
        }

    def table(self, by: str = "cluster") -> str:
        """One line for each "cluster" or "task"."""
        return str(self._table(by))

    def __repr__(self) -> str:
        return self.table()

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return self._table("cluster")._repr_html_()

    def _table(self, by: str) -> Table:
        rows = []
        for row in [*(self.rows if by == "task" else self.clusters), self.total]:
            name = row.task if by == "task" else row.cluster
            cells = (
                row.submixture,
                name[:LONGEST_NAME],
                str(row.tasks),
                f"{row.examples:,}",
                f"{row.valid:,}",
                f"{row.rate:.2%}",
                f"{row.input_tokens:.0f}",
                f"{row.target_tokens:.0f}",
                f"{row.repeats:.2f}",
            )
            rows.append(cells)
        columns = ("tasks", "examples", "valid", "rate", "in", "out", "repeats")
        return Table(("submixture", by, *columns), rows, notes=self._notes(), num_left=2)

    def _notes(self) -> list[str]:
        """What the columns mean, and what was left out."""
        notes = [
            f"expected tokens per epoch: {self.epoch_tokens:,.0f}; repeats are for a run of "
            f"{self.run_tokens:,.0f} tokens; in and out are mean tokens of a prompt"
        ]
        if self.dropped:
            notes.append(f"left out: {len(self.dropped)} tasks")
            notes += [f"  {name}: {reason}" for name, reason in self.dropped.items()]
        return notes

    def plot(self) -> "matplotlib.figure.Figure":
        """Rate of every cluster, shaded by sub-mixture, with numbers of tasks and repeats."""
        import matplotlib.pyplot as plt

        rows = sorted(self.clusters, key=lambda row: row.rate)
        submixtures = list(dict.fromkeys(row.submixture for row in self.rows))
        figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.26 * len(rows)), layout="constrained")
        for number, submixture in enumerate(submixtures):
            places = [place for place, row in enumerate(rows) if row.submixture == submixture]
            rates = [rows[place].rate for place in places]
            grey = 0.35 + 0.5 * number / max(1, len(submixtures))
            label = f"{submixture} ({sum(rates):.1%})"
            axes.barh(places, rates, color=str(grey), edgecolor="0.2", label=label)
        for place, row in enumerate(rows):
            text = f" {row.tasks} tasks, {row.examples:,} examples x {row.repeats:.2g}"
            axes.annotate(text, (row.rate, place), va="center", fontsize=7)
        axes.set_yticks(range(len(rows)), [row.cluster for row in rows], fontsize=8)
        axes.set(xlabel="share of all examples", title=f"Clusters and rates of {self.name}")
        axes.set_xlim(0, 1.45 * rows[-1].rate)
        axes.legend(frameon=False, loc="lower right", fontsize=8)
        return figure


def _total(rows: Sequence[MixtureRow], submixture: str, cluster: str) -> MixtureRow:
    """Many tasks as one row; tokens are means weighted by rate."""
    rates = [row.rate for row in rows]
    examples = sum(row.examples for row in rows)
    repeated_examples = sum(row.repeats * row.examples for row in rows)
    return MixtureRow(
        submixture=submixture,
        cluster=cluster,
        task="",
        tasks=len(rows),
        examples=examples,
        valid=sum(row.valid for row in rows),
        rate=sum(rates),
        input_tokens=float(np.average([row.input_tokens for row in rows], weights=rates)),
        target_tokens=float(np.average([row.target_tokens for row in rows], weights=rates)),
        repeats=repeated_examples / examples,
    )
