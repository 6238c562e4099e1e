"""A figure in a notebook that follows a training run."""

import io
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from moekit.analysis.plots.style import LINES

SECONDS_BETWEEN_DRAWINGS = 1.0
CURVES = (("loss", "training"), ("valid_loss", "validation"))
FEW_POINTS = 15  # curves of fewer points show them
logger = logging.getLogger(__name__)


class LivePlot:
    """For `train(on_log=..)`: the losses against tokens, drawn in place while the model trains.

    It is redrawn at most once a second; the last figure stays in the notebook. Outside a notebook
    nothing is drawn.

    Args:
      title: of the figure.
    """

    def __init__(self, title: str = "Training") -> None:
        self.title = title
        self.rows: list[dict[str, Any]] = []
        self._handle: Any = None
        self._drawn_at = 0.0
        self._in_notebook = in_notebook()
        if not self._in_notebook:
            logger.warning("LivePlot draws in a notebook only; Metrics.plot() works everywhere")

    def __call__(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._in_notebook and time.monotonic() - self._drawn_at >= SECONDS_BETWEEN_DRAWINGS:
            self._show()

    def close(self) -> None:
        """Draw the last rows; another run continues in a new figure."""
        if self._in_notebook and self.rows:
            self._show()
        self.rows = []
        self._handle = None

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """(tokens in millions, values) of the rows that have the key."""
        tokens = []
        values = []
        for row in self.rows:
            if key in row:
                tokens.append(row["step"] * self._step_tokens() / 1e6)
                values.append(row[key])
        return tokens, values

    def _step_tokens(self) -> float:
        """Tokens of a step, which only training rows state."""
        for row in self.rows:
            if "tokens" in row:
                return row["tokens"] / row["step"]
        return 0.0

    def figure(self) -> Figure:
        """The losses of the rows so far."""
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.subplots()
        for (key, label), (color, style) in zip(CURVES, LINES, strict=False):
            tokens, values = self.curve(key)
            marker = "o" if len(values) < FEW_POINTS else None
            if values:
                axes.plot(tokens, values, color=color, ls=style, marker=marker, ms=3, label=label)
        axes.set(xlabel="million tokens", ylabel="cross-entropy (nats a token)")
        axes.set_title(f"{self.title}: {latest(self.rows)}")
        axes.legend(frameon=False, fontsize=8)
        return figure

    def _show(self) -> None:
        from IPython.display import Image, display

        file = io.BytesIO()
        self.figure().savefig(file, format="png", dpi=110, metadata={"Software": None})
        image = Image(data=file.getvalue(), format="png")
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)
        self._drawn_at = time.monotonic()


def latest(rows: Sequence[dict[str, Any]]) -> str:
    """The newest values of the curves in words."""
    parts = []
    for key, label in CURVES:
        values = [row[key] for row in rows if key in row]
        if values:
            parts.append(f"{label} loss {values[-1]:.3f}")
    return ", ".join(parts)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")
