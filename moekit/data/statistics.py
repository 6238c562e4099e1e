"""Statistics of packed batches: examples and tokens of each task and cluster, truncated examples,
how full the rows are."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class DataStatistics:
    """Sums over packed rows; those of several steps or processes add up.

    Args:
      labels: (task, cluster) of each row of the table.
      limits: input and target length.
      rows: number of packed rows.
      table: the `COLUMNS` of each task.
    """

    labels: tuple[tuple[str, str], ...]
    limits: tuple[int, int]
    rows: int
    table: Int[np.ndarray, "tasks columns"]
    COLUMNS: ClassVar[tuple[str, ...]] = (
        "examples",
        "input_tokens",
        "target_tokens",
        "truncated_examples",
        "truncated_tokens",
    )

    def __add__(self, other: "DataStatistics") -> "DataStatistics":
        return replace(self, rows=self.rows + other.rows, table=self.table + other.table)

    def row(self) -> dict[str, int | float]:
        """Totals, and for inputs and targets the share of positions that hold real tokens."""
        totals = self.table.sum(0)
        positions = self.rows * np.array(self.limits)
        input_fill, target_fill = (totals[1:3] / np.maximum(1, positions)).tolist()
        found: dict[str, int | float] = _named(totals)
        found["input_fill"] = input_fill
        found["target_fill"] = target_fill
        found["packing_efficiency"] = max(input_fill, target_fill)
        return found

    def to_dict(self) -> dict:
        """`row()` with "tasks" and "clusters": name to sums, of those that occurred."""
        tasks: dict[str, np.ndarray] = {}
        clusters: dict[str, np.ndarray] = {}
        for (task, cluster), sums in zip(self.labels, self.table, strict=True):
            if sums[0]:
                tasks[task] = tasks.get(task, 0) + sums
                clusters[cluster] = clusters.get(cluster, 0) + sums
        found: dict = self.row()
        found["tasks"] = {name: _named(sums) for name, sums in tasks.items()}
        found["clusters"] = {name: _named(sums) for name, sums in clusters.items()}
        return found

    def __str__(self) -> str:
        """A table of clusters, then the tasks with most truncated examples."""
        found = self.to_dict()
        lines = [
            f"{'cluster':32} {'examples':>9} {'inputs':>11} {'targets':>10} {'truncated':>9} "
            f"{'tokens':>9}"
        ]
        clusters = sorted(found["clusters"].items(), key=lambda item: -item[1]["examples"])
        for name, sums in clusters:
            lines.append(
                f"{name[:32]:32} {sums['examples']:9,} {sums['input_tokens']:11,} "
                f"{sums['target_tokens']:10,} {sums['truncated_examples']:9,} "
                f"{sums['truncated_tokens']:9,}"
            )
        lines.append(
            f"{found['examples']:,} examples in {self.rows:,} rows: inputs "
            f"{found['input_fill']:.1%} full, targets {found['target_fill']:.1%}; "
            f"{found['truncated_examples']:,} examples were truncated{self._worst(found['tasks'])}"
        )
        return "\n".join(lines)

    def _worst(self, tasks: dict[str, dict[str, int]]) -> str:
        """The tasks with most truncated examples, if there are any."""
        truncated = []
        for name, sums in tasks.items():
            if sums["truncated_tokens"]:
                truncated.append((-sums["truncated_examples"], name))
        worst = [f"{-count:,} of {name}" for count, name in sorted(truncated)[:5]]
        return f": {', '.join(worst)}, .." if worst else ""


def _named(sums: Int[np.ndarray, "columns"]) -> dict[str, int]:
    return dict(zip(DataStatistics.COLUMNS, sums.tolist(), strict=True))
