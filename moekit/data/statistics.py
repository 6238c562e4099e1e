"""What a stream of packed batches holds: examples and tokens by task and cluster, cut examples,
how full its rows are."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Counts:
    """Counts of packed rows; those of several times or hosts add up.

    Args:
      labels: (task, cluster) of each row of the table.
      limits: input and target length.
      rows: how many rows were packed.
      table: examples, input tokens, target tokens, cut examples, tokens cut off, by task.
    """

    labels: tuple[tuple[str, str], ...]
    limits: tuple[int, int]
    rows: int
    table: Int[np.ndarray, "tasks columns"]
    COLUMNS: ClassVar = ("examples", "input_tokens", "target_tokens", "cut_examples", "cut_tokens")

    def __add__(self, other: "Counts") -> "Counts":
        return replace(self, rows=self.rows + other.rows, table=self.table + other.table)

    def row(self) -> dict[str, int | float]:
        """Totals, and the shares of either side's slots that hold real tokens."""
        totals = self.table.sum(0)
        fills = (totals[1:3] / np.maximum(1, self.rows * np.array(self.limits))).tolist()
        return dict(zip(self.COLUMNS, totals.tolist(), strict=True)) | {
            "input_fill": fills[0],
            "target_fill": fills[1],
            "packing_efficiency": max(fills),
        }

    def to_dict(self) -> dict:
        """`row()` with "tasks" and "clusters": name to counts, of those that occurred."""
        groups: dict[str, dict] = {"tasks": {}, "clusters": {}}
        for names, counts in zip(self.labels, self.table, strict=True):
            for group, name in zip(groups.values(), names, strict=True):
                if counts[0]:
                    group[name] = group.get(name, 0) + counts
        return self.row() | {
            kind: {n: dict(zip(self.COLUMNS, c.tolist(), strict=True)) for n, c in group.items()}
            for kind, group in groups.items()
        }

    def __str__(self) -> str:
        """A table of clusters, then the tasks with most cut examples."""
        found = self.to_dict()
        lines = [
            f"{'cluster':32} {'examples':>9} {'inputs':>11} {'targets':>10} {'cut':>7} {'lost':>9}"
        ]
        for name, c in sorted(found["clusters"].items(), key=lambda x: -x[1]["examples"]):
            cells = zip(c.values(), (9, 11, 10, 7, 9), strict=True)
            lines.append(f"{name[:32]:32} " + " ".join(f"{n:{width},}" for n, width in cells))
        cut = sorted((-c["cut_examples"], n) for n, c in found["tasks"].items() if c["cut_tokens"])
        worst = ", ".join(f"{-count:,} of {name}" for count, name in cut[:5])
        return "\n".join(lines) + (
            f"\n{found['examples']:,} examples in {self.rows:,} rows: inputs "
            f"{found['input_fill']:.1%} full, targets {found['target_fill']:.1%}; "
            f"{found['cut_examples']:,} examples were cut" + (f": {worst}, .." if worst else "")
        )
