"""Figures of training and evaluation: bars, learning curves, scores."""

import itertools
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
    first = next(iter(groups.values()))
    names = list(first)
    num_places = len(names)
    width = max(5, 2.5 + 1.1 * num_places)
    size = (width, 3.4)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    num_series = len(groups)
    for index, series in enumerate(groups):
        values = groups[series]
        heights = [values[name] for name in names]
        grouped_bars(axes, heights, index, num_series, series)
    if line:
        name, level = line
        axes.axhline(level, color="black", ls="--", lw=1, label=name)
    axes.set_xticks(range(num_places), names)
    axes.set_ylabel(label)
    axes.set_title(title)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=5)
    return figure


def plot_seeds(
    groups: Mapping[str, Sequence[float]],
    label: str,
    title: str,
) -> Figure:
    """One dot per seed, one row per group, with mean and standard error.

    Args:
      groups: values of the seeds by the group's name; the first group's mean is the dashed line.
      label: of the horizontal axis.
      title: of the figure.
    """
    num_groups = len(groups)
    height = 1.2 + 0.42 * num_groups
    size = (7, height)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for row, values in enumerate(groups.values()):
        num_seeds = len(values)
        mean = np.mean(values)
        deviation = np.std(values, ddof=1)
        standard_error = deviation / np.sqrt(num_seeds)
        heights = np.full(num_seeds, row)
        axes.plot(values, heights, "o", color="0.55", markersize=5, alpha=0.7)
        axes.errorbar(mean, row, xerr=standard_error, fmt="|", color="black", ms=14, capsize=4)
    first = next(iter(groups.values()))
    first_mean = float(np.mean(first))
    axes.axvline(first_mean, color="black", linestyle="--", linewidth=1)
    places = range(num_groups)
    names = list(groups)
    axes.set_yticks(places, names)
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
    for name, line in zip(runs, itertools.cycle(LINES), strict=False):
        color, style = line
        steps, values = runs[name][key]
        is_short = len(steps) < FEW_POINTS
        marker = "o" if is_short else None
        axes.plot(steps, values, color=color, ls=style, marker=marker, ms=3, label=name)
    right_edge = ("axes fraction", "data")
    for name, level in lines:
        axes.axhline(level, color="0.7", lw=1)
        place = (0.99, level)
        axes.annotate(name, place, xycoords=right_edge, ha="right", va="top")
    axes.set_xlabel("step")
    value_label = label or key
    axes.set_ylabel(value_label)
    axes.set_title(title or key)
    axes.legend(frameon=False)
    return figure


def plot_scores(
    groups: Mapping[str, Sequence[Mapping[str, Any]]],
    title: str = "",
) -> Figure:
    """Bars by suite and model; whiskers are 95 % intervals, lines are baselines.

    Args:
      groups: `Scores.to_dict()` of each suite, by model; the same suites for every model.
    """
    first = next(iter(groups.values()))
    suites = []
    for scores in first:
        *_, suite = scores["name"].split(" on ")
        suites.append(suite)
    num_suites = len(suites)
    width = max(6.0, 2 + 1.3 * num_suites)
    size = (width, 4.2)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    num_models = len(groups)
    for index, model in enumerate(groups):
        heights, errors = _means(groups[model])
        grouped_bars(axes, heights, index, num_models, model, errors=errors, cap_size=2.0)
    _draw_baseline(axes, first, "chance", "solid")
    _draw_baseline(axes, first, "majority", "dashed")
    axes.set_xticks(range(num_suites), suites)
    axes.set_ylabel("mean score over tasks (95 % interval)")
    axes.set_title(title)
    axes.set_ylim(0, None)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    return figure


def _means(scores: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Mean score of each suite, and the distances of its interval's ends [2, suites]."""
    heights = []
    below = []
    above = []
    for suite in scores:
        mean = suite["mean"]
        score = mean["score"]
        heights.append(score)
        below.append(score - mean["low"])
        above.append(mean["high"] - score)
    return heights, [below, above]


def _draw_baseline(
    axes: Axes,
    scores: Sequence[Mapping[str, Any]],
    baseline: str,
    style: str,
) -> None:
    """A line for each suite across its bars; a white outline shows it on dark ones."""
    places = np.arange(len(scores))
    means = [suite["mean"] for suite in scores]
    heights = [mean[baseline] for mean in means]
    outline = withStroke(linewidth=3, foreground="white")
    left = places - 0.42
    right = places + 0.42
    axes.hlines(
        heights,
        left,
        right,
        label=baseline,
        color="black",
        lw=1.2,
        linestyles=style,
        path_effects=[outline],
    )
