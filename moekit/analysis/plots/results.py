"""Figures of training and evaluation: bars, learning curves, scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from moekit.analysis.plots.style import LINES, grouped_bars
from moekit.training.metrics import Metrics

FEW_POINTS = 15  # curves of fewer points show them


def plot_bars(
    groups: Mapping[str, Mapping[str, float]],
    label: str,
    title: str,
    line: tuple[str, float] | None = None,
) -> Figure:
    """Grouped bars.

    Args:
      groups: heights by series and bar; every series has the same bars.
      label: of the vertical axis.
      line: name and height of a level to compare with.
    """
    names = list(next(iter(groups.values())))
    width = max(5, 2.5 + 1.1 * len(names))
    figure, axes = plt.subplots(figsize=(width, 3.4), layout="constrained")
    for index, (series, values) in enumerate(groups.items()):
        heights = [values[name] for name in names]
        grouped_bars(axes, heights, index, len(groups), series)
    if line:
        name, level = line
        axes.axhline(level, color="black", ls="--", lw=1, label=name)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel(label)
    axes.set_title(title)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=5)
    return figure


def plot_seeds(groups: Mapping[str, Sequence[float]], label: str, title: str) -> Figure:
    """One dot per seed, one row per group, with mean and standard error.

    Args:
      groups: values of the seeds by the group's name; the first group's mean is the dashed line.
      label: of the horizontal axis.
      title: of the figure.
    """
    height = 1.2 + 0.42 * len(groups)
    figure, axes = plt.subplots(figsize=(7, height), layout="constrained")
    for row, values in enumerate(groups.values()):
        mean = np.mean(values)
        standard_error = np.std(values, ddof=1) / np.sqrt(len(values))
        heights = np.full(len(values), row)
        axes.plot(values, heights, "o", color="0.55", markersize=5, alpha=0.7)
        axes.errorbar(mean, row, xerr=standard_error, fmt="|", color="black", ms=14, capsize=4)
    first = next(iter(groups.values()))
    axes.axvline(float(np.mean(first)), color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    figure.suptitle(title)
    return figure


def plot_learning_curves(
    runs: Mapping[str, Metrics],
    key: str = "loss",
    label: str = "",
    title: str = "",
    lines: Sequence[tuple[str, float]] = (),
) -> Figure:
    """One curve for each run.

    Args:
      key: the logged quantity.
      label: of the vertical axis; default: the key.
      lines: names and heights of levels to compare with.
    """
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for index, (name, metrics) in enumerate(runs.items()):
        color, style = LINES[index % len(LINES)]
        steps, values = metrics[key]
        marker = "o" if len(steps) < FEW_POINTS else None
        axes.plot(steps, values, color=color, ls=style, marker=marker, ms=3, label=name)
    for name, level in lines:
        axes.axhline(level, color="0.7", lw=1)
        place = (0.99, level)
        axes.annotate(name, place, xycoords=("axes fraction", "data"), ha="right", va="top")
    axes.set_xlabel("step")
    axes.set_ylabel(label or key)
    axes.set_title(title or key)
    axes.legend(frameon=False)
    return figure


def plot_scores(groups: Mapping[str, Sequence[Mapping[str, Any]]], title: str = "") -> Figure:
    """Bars by suite and model; whiskers are 95 % intervals, lines are baselines.

    Args:
      groups: `Scores.to_dict()` of each suite, by model; the same suites for every model.
    """
    first = next(iter(groups.values()))
    suites = [scores["name"].split(" on ")[-1] for scores in first]
    width = max(6.0, 2 + 1.3 * len(suites))
    figure, axes = plt.subplots(figsize=(width, 4.2), layout="constrained")
    for index, (model, scores) in enumerate(groups.items()):
        means = [each["mean"] for each in scores]
        heights = [mean["score"] for mean in means]
        below = [mean["score"] - mean["low"] for mean in means]
        above = [mean["high"] - mean["score"] for mean in means]
        grouped_bars(axes, heights, index, len(groups), model, errors=[below, above], cap_size=2.0)
    _draw_baseline(axes, first, "chance", "solid")
    _draw_baseline(axes, first, "majority", "dashed")
    axes.set_xticks(range(len(suites)), suites)
    axes.set_ylabel("mean score over tasks (95 % interval)")
    axes.set_title(title)
    axes.set_ylim(0, None)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    return figure


def _draw_baseline(
    axes: Axes, scores: Sequence[Mapping[str, Any]], baseline: str, style: str
) -> None:
    """A line for each suite across its bars; a white outline shows it on dark ones."""
    places = np.arange(len(scores))
    heights = [each["mean"][baseline] for each in scores]
    axes.hlines(
        heights,
        places - 0.42,
        places + 0.42,
        label=baseline,
        color="black",
        lw=1.2,
        linestyles=style,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )
