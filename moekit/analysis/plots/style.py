"""What all figures share: greys and hatches, grids of panels, files."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

matplotlib.rcParams["svg.hashsalt"] = "moekit"
LINES = (("black", "-"), ("0.45", "--"), ("0.2", ":"), ("0.6", "-."), ("0.3", (0, (5, 1))))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "++")
GREYS = ("0.25", "0.85", "0.55", "0.95", "0.7", "0.4")
# Okabe and Ito's palette for colour-blind readers, in an order that also differs in grey
COLORS = ("#000000", "#D55E00", "#56B4E9", "#009E73", "#E69F00", "#0072B2", "#CC79A7")
LINE_STYLES = ("-", "--", "-.", ":")
GROUP_WIDTH = 0.8  # of the bars at one place of an axis


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure (.png or .svg) without date and version, and close it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    left_out = "Date" if path.suffix == ".svg" else "Software"
    figure.savefig(path, dpi=110, metadata={left_out: None})
    plt.close(figure)
    return path


def show(figure: Figure, name: str) -> Figure:
    """Save a figure as {name}.png in the folder MOEKIT_FIGURES (default figures/).

    Returns:
      The figure, which a notebook displays as the last line of a cell.
    """
    folder = Path(os.environ.get("MOEKIT_FIGURES", "figures"))
    save_figure(figure, folder / f"{name}.png")
    return figure


def panels(
    count: int, width: float = 3.6, height: float = 2.6, columns: int = 4
) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of panels, each of that width and height in inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        squeeze=False,
        layout="constrained",
    )
    for unused in grid.flat[count:]:
        unused.axis("off")
    return figure, list(grid.flat[:count])


def group_positions(places: int, series: int, num_series: int) -> Float[ndarray, "places"]:
    """Where the bars of one of several series are centred, side by side around each place."""
    offset = series - (num_series - 1) / 2
    return np.arange(places) + offset * GROUP_WIDTH / num_series


def grouped_bars(
    axes: Axes,
    heights: Sequence[float] | Float[ndarray, "places"],
    series: int,
    num_series: int,
    label: str,
    *,
    errors: Sequence | ndarray | None = None,
    line_width: float = 0.6,
    cap_size: float = 0.0,
    error_line_width: float | None = None,
) -> None:
    """Draw the bars of one of several series, side by side at each place of the axis.

    Args:
      errors: distances of the interval's ends [2, places] from the heights.
    """
    axes.bar(
        group_positions(len(heights), series, num_series),
        heights,
        GROUP_WIDTH / num_series,
        yerr=None if errors is None else np.maximum(errors, 0),
        color=GREYS[series % len(GREYS)],
        hatch=HATCHES[series % len(HATCHES)],
        edgecolor="black",
        lw=line_width,
        capsize=cap_size,
        error_kw={} if error_line_width is None else {"lw": error_line_width},
        label=label,
    )
