"""The log of a run: rows of numbers, one JSON line each, and a figure of them."""

import contextlib
import functools
import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.checks import MAX_INTEGER
from moekit.data.paths import require_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG = "metrics.jsonl"
MAX_LINE = 1 << 20  # bytes of a row
LOSSES = ("loss", "valid_loss")
# what a panel of the figure shows: its label with units, and keys of rows
PANELS = {
    "cross-entropy (nats a token)": ("loss", "valid_loss"),
    "accuracy of next token": ("accuracy", "valid_accuracy"),
    "auxiliary loss": ("balance", "router_z"),
    "maximal violation of balance": ("encoder_max_violation", "decoder_max_violation"),
    "share of tokens dropped": ("encoder_dropped", "decoder_dropped"),
    "share of slots filled": ("input_fill", "target_fill"),
}
SCORES = "score"  # the panel of everything that callbacks add
NOT_DRAWN = (
    "step",
    "z_loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "tokens_per_second",
    "packing_efficiency",
    "encoder_load_entropy",
    "decoder_load_entropy",
)
LINE_STYLES = ("-", "--", ":", "-.")
GREYS = ("0.0", "0.2", "0.4", "0.6")
logger = logging.getLogger(__name__)


class Metrics:
    """Rows with a step; kept in memory and, with a path, appended to a JSON-lines file.

    Rows that cannot be written (a full disk) are warned of and written with the next row.
    """

    def __init__(
        self, path: str | Path | None = None, rows: list[dict[str, Any]] | None = None
    ) -> None:
        self.path = Path(path) if path else None
        self.rows = list(rows or [])
        self._unwritten: list[dict[str, Any]] = []

    @classmethod
    def load(cls, path: str | Path) -> "Metrics":
        """The rows of a file. Lines that are no rows (cut short by a crash) are left out."""
        rows, broken = read_rows(Path(path))
        if broken:
            numbers = ", ".join(map(str, broken))
            logger.warning("%s: line %s is broken and left out", path, numbers)
        return cls(path, rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, which has at least a step."""
        self.rows.append(row)
        if self.path is None:
            return
        self._unwritten.append(row)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            self._write_rows()
        except OSError as error:
            if len(self._unwritten) == 1:
                logger.warning("%s cannot be written (%s): trying again", self.path, error.strerror)
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # a part of a row
        else:
            self._unwritten = []

    def _write_rows(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self._unwritten)
        with self.path.open("ab") as file:
            if _ends_within_a_line(self.path):
                text = "\n" + text
            file.write(text.encode())

    def keep_until(self, step: int) -> None:
        """Remove the rows after a step, as if the run had stopped there."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        if self.path and self.path.exists():
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            partial.replace(self.path)
            self._unwritten = []

    def __getitem__(self, key: str) -> tuple[list[int], list[Any]]:
        """(steps, values) of the rows that have the key."""
        steps = [row["step"] for row in self.rows if key in row]
        values = [row[key] for row in self.rows if key in row]
        if not steps:
            raise KeyError(f"{key}; this run logged {', '.join(sorted(self.keys()))}")
        return steps, values

    def keys(self) -> set[str]:
        """Everything that some row has."""
        return {key for row in self.rows for key in row}

    def last(self, key: str) -> Any:
        """The newest value."""
        _, values = self[key]
        return values[-1]

    def plot(self, title: str = "Training") -> "Figure":
        """Curves of losses, accuracy, router balance and scores, one panel each."""
        import matplotlib.pyplot as plt

        panels = self._panels()
        num_columns = min(3, len(panels))
        num_rows = math.ceil(len(panels) / num_columns)
        figure, axes = plt.subplots(
            num_rows,
            num_columns,
            figsize=(4 * num_columns, 2.8 * num_rows),
            squeeze=False,
            layout="constrained",
        )
        for axis, (label, keys) in zip(axes.flat, panels.items(), strict=False):
            self._draw(axis, label, keys)
        for unused in axes.flat[len(panels) :]:
            unused.axis("off")
        figure.suptitle(title)
        return figure

    def _panels(self) -> dict[str, list[str]]:
        """Labels and logged keys of the panels that have any."""
        logged = self.keys()
        panels = {}
        for label, keys in PANELS.items():
            panels[label] = [key for key in keys if key in logged]
        known = {key for keys in PANELS.values() for key in keys} | set(NOT_DRAWN)
        others = sorted(logged - known)
        panels[SCORES] = [key for key in others if isinstance(self.last(key), float)]
        return {label: keys for label, keys in panels.items() if keys}

    def _draw(self, axis: "Axes", label: str, keys: list[str]) -> None:
        for index, key in enumerate(keys):
            steps, values = self[key]
            axis.plot(
                steps,
                values,
                linestyle=LINE_STYLES[index % len(LINE_STYLES)],
                color=GREYS[index % len(GREYS)],
                marker="o" if len(steps) < 12 else None,
                markersize=3,
                label=key,
            )
        axis.set(xlabel="step", ylabel=label)
        axis.legend(frameon=False, fontsize=8)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a log, and the numbers of its lines that are none, from 1."""
    rows = []
    broken = []
    require_file(path)
    with path.open("rb") as file:
        # the rest of a line that is longer counts as a broken line as well
        lines = iter(functools.partial(file.readline, MAX_LINE), b"")
        for number, line in enumerate(lines, 1):
            row = _parse_row(line)
            if row is None:
                broken.append(number)
            else:
                rows.append(row)
    return rows, broken


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """A row, or None for a line that is not one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # also bytes that are no text
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    for key in ("step", *LOSSES):
        value = row.get(key, 0.0)
        # JSON has integers of any size
        if not isinstance(value, int | float) or (type(value) is int and abs(value) > MAX_INTEGER):
            return None
    return row


def _ends_within_a_line(path: Path) -> bool:
    """Whether a file's last line was cut short, as by a crash."""
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
