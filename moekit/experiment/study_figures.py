"""The figures of a study, drawn from its cells."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moekit.analysis.plots.style import COLORS, LINE_STYLES, panels, save_figure
from moekit.experiment.cells import CellFolder
from moekit.experiment.design import PRETRAINED
from moekit.experiment.findings import LOSS, UNITS, Finding, Outcomes, findings

FONT_SIZE = 11


def draw_findings(cells: CellFolder, pilot: CellFolder | None, folder: Path) -> list[Path]:
    """Draw all figures of a study; returns the files, whose names begin with its title.

    A figure for which there are no cells yet is left out.
    """
    found = findings(cells, pilot)
    outcomes = Outcomes(cells)
    drawn: dict[str, Figure] = {}
    with plt.rc_context({"font.size": FONT_SIZE}):
        for unit in UNITS.values():
            of_unit = [finding for finding in found if finding.unit == unit]
            if of_unit:
                drawn[f"findings-{unit}"] = plot_findings(of_unit)
        models = [name for name in cells.design.models if outcomes.seeds(name, PRETRAINED)]
        if models:
            drawn["pretraining"] = plot_pretraining(outcomes, models)
            drawn["losses"] = plot_losses(outcomes, models)
    prefix = str(folder / cells.design.title)
    return [save_figure(figure, f"{prefix}-{name}.png") for name, figure in drawn.items()]


def plot_findings(found: Sequence[Finding]) -> Figure:
    """The effects of one unit: a dot for each seed, the mean, and its 95 % interval.

    An effect is positive where the paper's finding holds.
    """
    unit = found[0].unit
    size = (9, 1.4 + 0.62 * len(found))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for row, finding in enumerate(found):
        result = finding.effect
        heights = np.full(len(result.per_seed), row + 0.2)
        axes.plot(result.per_seed, heights, "o", color=COLORS[1], markersize=4, alpha=0.55)
        axes.plot([result.low, result.high], [row, row], color="black", linewidth=2)
        axes.plot(result.mean, row, "D", color="black", markersize=6)
        axes.annotate(
            result.holds,
            (1.01, row),
            xycoords=("axes fraction", "data"),
            verticalalignment="center",
            weight="bold",
        )
    axes.axvline(0, color="black", linestyle="--", linewidth=1)
    labels = [f"{finding.sparse} - {finding.dense}\n{finding.question}" for finding in found]
    axes.set_yticks(range(len(found)), labels, fontsize=FONT_SIZE - 2)
    axes.invert_yaxis()
    per = "nats a token" if unit == UNITS[LOSS] else "points"
    axes.set_xlabel(f"effect ({per}); dots are seeds, bars 95 % intervals over seeds and tasks")
    figure.suptitle(_answers(found))
    return figure


def _answers(found: Sequence[Finding]) -> str:
    """The title: how many questions have which answer."""
    answers = [finding.effect.holds for finding in found]
    counts = [f"{answers.count(each)} {each}" for each in ("yes", "no", "unclear")]
    return f"{len(found)} questions: {', '.join(counts)}"


def plot_pretraining(outcomes: Outcomes, models: Sequence[str]) -> Figure:
    """Validation loss during pretraining: mean over the seeds, shaded by a standard deviation."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    last = {}
    for index, model in enumerate(models):
        steps, losses = outcomes.validation_curve(model)
        mean, sd = losses.mean(0), losses.std(0, ddof=min(1, len(losses) - 1))
        color, style = COLORS[index % len(COLORS)], LINE_STYLES[index % len(LINE_STYLES)]
        label = f"{model} ({len(losses)} seeds)"
        axes.plot(steps, mean, color=color, linestyle=style, linewidth=2, label=label)
        axes.fill_between(steps, mean - sd, mean + sd, color=color, alpha=0.2, linewidth=0)
        last[model] = mean[-1]
    best = min(last, key=lambda name: last[name])
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats a token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    figure.suptitle(f"Pretraining: {best} ends lowest, at {last[best]:.3f} nats")
    return figure


def plot_losses(outcomes: Outcomes, models: Sequence[str]) -> Figure:
    """The loss on held-out targets in each setup of each model: a dot for each seed."""
    shots = outcomes.shots
    figure, all_axes = panels(len(shots), width=6.5, height=3.2, columns=1)
    for axes, count in zip(all_axes, shots, strict=True):
        _draw_losses(axes, outcomes, models, count)
    figure.suptitle("Loss on the targets of held-out tasks")
    return figure


def _draw_losses(axes: Axes, outcomes: Outcomes, models: Sequence[str], shots: int) -> None:
    """A panel: setups side by side, models by colour."""
    setups = [PRETRAINED, *outcomes.tuned_setups]
    for index, model in enumerate(models):
        offset = 0.7 * ((index + 0.5) / len(models) - 0.5)
        color = COLORS[index % len(COLORS)]
        for place, setup in enumerate(setups):
            seeds = outcomes.seeds(model, setup)
            if not seeds:
                continue
            losses = outcomes.held_out(model, setup, seeds, shots, LOSS).mean(1)
            at = np.full(len(losses), place + offset)
            label = model if place == 0 else None
            axes.plot(at, losses, "o", color=color, markersize=4, alpha=0.6, label=label)
            axes.plot(place + offset, losses.mean(), "_", color="black", markersize=14, mew=2)
    axes.set_xticks(range(len(setups)), setups)
    axes.set_ylabel("nats a token")
    axes.set_title("zero-shot" if shots == 0 else f"{shots}-shot", fontsize=FONT_SIZE)
    axes.legend(fontsize=FONT_SIZE - 2)
