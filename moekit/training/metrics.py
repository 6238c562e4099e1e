"""The log of a run: rows of numbers, one JSON line each, and a picture of them."""

import json
import math
from pathlib import Path
from typing import Any

# keys of a row that are drawn, by panel, with units
_PANELS = (
    ("cross-entropy (nats a token)", ("loss", "valid_loss")),
    ("accuracy of next token", ("accuracy", "valid_accuracy")),
    ("auxiliary loss", ("balance", "router_z")),
    ("maximal violation of balance", ("encoder_max_violation", "decoder_max_violation")),
    ("share of tokens dropped", ("encoder_dropped", "decoder_dropped")),
    ("share of slots filled", ("input_fill", "target_fill")),
    ("score", ()),  # whatever callbacks add
)
_KNOWN = {key for _, keys in _PANELS for key in keys} | {
    *("step", "z_loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"),
    "packing_efficiency",  # the larger of the two
    *(f"{stack}_load_entropy" for stack in ("encoder", "decoder")),
}


class Metrics:
    """Rows with a step; kept in memory and, with a path, appended to a JSON-lines file."""

    def __init__(self, path: str | Path | None = None, rows: list[dict] | None = None):
        self.path, self.rows = Path(path) if path else None, list(rows or [])

    @classmethod
    def load(cls, path: str | Path) -> "Metrics":
        """The rows of a file; a last line cut short by a crash is left out."""
        rows = []
        for line in Path(path).read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return cls(path, rows)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def keep_until(self, step: int) -> None:
        """Forget rows after a step, as if the run had stopped there."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        if self.path and self.path.exists():
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            partial.replace(self.path)

    def __getitem__(self, key: str) -> tuple[list[int], list]:
        """(steps, values) of the rows that have the key."""
        pairs = [(row["step"], row[key]) for row in self.rows if key in row]
        if not pairs:
            known = sorted({k for row in self.rows for k in row})
            raise KeyError(f"{key}; this run logged {', '.join(known)}")
        return [p[0] for p in pairs], [p[1] for p in pairs]

    def last(self, key: str) -> Any:
        return self[key][1][-1]

    def plot(self, title: str = "Training"):
        """Curves of losses, accuracy, router balance and scores, one panel each."""
        import matplotlib.pyplot as plt

        logged = {key for row in self.rows for key in row}
        extra = tuple(sorted(k for k in logged - _KNOWN if isinstance(self.last(k), float)))
        panels = [(label, keys or extra) for label, keys in _PANELS]
        panels = [(label, [k for k in keys if k in logged]) for label, keys in panels]
        panels = [(label, keys) for label, keys in panels if keys]
        columns = min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        fig, axes = plt.subplots(
            rows, columns, figsize=(4 * columns, 2.8 * rows), squeeze=False, layout="constrained"
        )
        for ax, (label, keys) in zip(axes.flat, panels, strict=False):
            for key, style, grey in zip(keys, ("-", "--", ":", "-.") * 9, "0246" * 9, strict=False):
                steps, values = self[key]
                marker = "o" if len(steps) < 12 else None
                color = str(int(grey) / 10)
                ax.plot(steps, values, style, color=color, marker=marker, ms=3, label=key)
            ax.set(xlabel="step", ylabel=label)
            ax.legend(frameon=False, fontsize=8)
        for ax in list(axes.flat)[len(panels) :]:
            ax.axis("off")
        fig.suptitle(title)
        return fig
