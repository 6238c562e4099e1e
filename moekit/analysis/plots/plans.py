"""The figure of a compile-time plan."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moekit.analysis.plots.style import GREYS, HATCHES

MAX_COLLECTIVES = 6


def plot_plan(
    title: str,
    memory_gib: Mapping[str, float],
    memory_limit_gib: float,
    seconds: Mapping[str, float],
    step_seconds: Sequence[float],
    collectives: Sequence[Mapping[str, Any]],
) -> Figure:
    """Memory of a chip, time of a step and traffic of its collectives.

    Args:
      memory_gib: by kind, in GiB a chip.
      seconds: of a step, by what they are spent on.
      step_seconds: low and high estimate of the whole step; empty if unknown.
      collectives: "op", "axis" and "bytes" of each, the largest first.
    """
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(12, 3.4), width_ratios=(1, 1.2, 1.8)
    )
    _stacked_bar(left, memory_gib)
    left.axhline(memory_limit_gib, color="black", linestyle="--")
    left.text(0.5, memory_limit_gib, "limit", ha="right", va="bottom", fontsize=8)
    left.set_ylabel("GiB a chip")
    left.set_title("memory")
    left.set_xticks([])
    left.set_xlim(-0.5, 1.6)

    _stacked_bar(middle, seconds)
    for name, estimate in zip(("overlapped", "in turn"), step_seconds, strict=False):
        middle.axhline(estimate, color="black", linestyle=":", linewidth=1)
        middle.text(1.6, estimate, name, ha="right", va="bottom", fontsize=8)
    middle.set_ylabel("seconds a step (estimate)")
    middle.set_title("time")
    middle.set_xticks([])
    middle.set_xlim(-0.5, 1.6)

    shown = list(collectives[:MAX_COLLECTIVES])[::-1]
    names = [f"{collective['op']}\nover {collective['axis']}" for collective in shown]
    gigabytes = [collective["bytes"] / 1e9 for collective in shown]
    right.barh(names, gigabytes, color=GREYS[2], edgecolor="black")
    right.tick_params(axis="y", labelsize=8)
    right.set_xlabel("GB sent a chip and step")
    right.set_title("collectives")
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def _stacked_bar(axes: Axes, parts: Mapping[str, float]) -> None:
    """One bar of parts on top of each other, with its legend."""
    bottom = 0.0
    for index, (name, value) in enumerate(parts.items()):
        axes.bar(
            0,
            value,
            bottom=bottom,
            color=GREYS[index],
            hatch=HATCHES[index],
            edgecolor="black",
            label=f"{name} {value:.3g}",
        )
        bottom += value
    axes.margins(y=0.1)
    if parts:  # the time of a plan that does not fit is unknown
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
