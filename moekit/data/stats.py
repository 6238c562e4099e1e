"""What a stream of packed batches holds: examples and tokens by task and cluster, cut examples,
how full its rows are."""

from dataclasses import dataclass
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
    COLUMNS: ClassVar[int] = 5

    def __add__(self, other: "Counts") -> "Counts":
        table = self.table + other.table
        return Counts(self.labels, self.limits, self.rows + other.rows, table)

    def row(self) -> dict[str, int | float]:
        """Totals: examples, cut examples, shares of the slots that hold real tokens."""
        examples, inputs, targets, cut, lost = self.table.sum(0).tolist()
        fills = [
            tokens / max(1, self.rows * limit)
            for tokens, limit in zip((inputs, targets), self.limits, strict=True)
        ]
        return {
            "examples": examples,
            "cut_examples": cut,
            "cut_tokens": lost,
            "input_fill": fills[0],
            "target_fill": fills[1],
            "packing_efficiency": max(fills),
        }

    def to_dict(self) -> dict:
        """`row()` with "tasks" and "clusters": name to counts, of those that occurred."""
        found = {"tasks": {}, "clusters": {}} | self.row()
        names = ("examples", "input_tokens", "target_tokens", "cut_examples", "cut_tokens")
        for (task, cluster), counts in zip(self.labels, self.table.tolist(), strict=True):
            if counts[0]:
                found["tasks"][task] = dict(zip(names, counts, strict=True))
                former = found["clusters"].get(cluster, dict.fromkeys(names, 0))
                summed = {name: former[name] + n for name, n in zip(names, counts, strict=True)}
                found["clusters"][cluster] = summed
        return found

    def __str__(self) -> str:
        """A table of clusters, then the tasks with cut examples."""
        found = self.to_dict()
        lines = [f"{'cluster':32} {'examples':>9} {'inputs':>11} {'targets':>10} {'cut':>7}"]
        for name, c in sorted(found["clusters"].items(), key=lambda x: -x[1]["examples"]):
            lines.append(
                f"{name[:32]:32} {c['examples']:9,} {c['input_tokens']:11,} "
                f"{c['target_tokens']:10,} {c['cut_examples']:7,}"
            )
        lines.append(
            f"{found['examples']:,} examples in {self.rows:,} rows: inputs "
            f"{found['input_fill']:.1%} full, targets {found['target_fill']:.1%}; "
            f"{found['cut_examples']:,} examples were cut"
        )
        cut = {name: c["cut_examples"] for name, c in found["tasks"].items() if c["cut_examples"]}
        lines += [f"  {n:,} of {name}" for name, n in sorted(cut.items(), key=lambda x: -x[1])[:8]]
        return "\n".join(lines)
