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
PER = {"nats": "nats a token", "points": "points"}


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
    """The effects of one unit, a panel for each question: each seed, the mean, its 95 % interval.

    An effect is positive where the paper's finding holds.
    """
    by_question: dict[str, list[Finding]] = {}
    for finding in found:
        by_question.setdefault(finding.question, []).append(finding)
    most = max(len(of_question) for of_question in by_question.values())
    height = 1.1 + 0.5 * most
    figure, all_axes = panels(len(by_question), width=6.0, height=height, columns=2)
    furthest = max(abs(effect) for finding in found for effect in finding.effect.per_seed)
    for axes, (question, of_question) in zip(all_axes, by_question.items(), strict=True):
        _draw_effects(axes, of_question)
        axes.set_title(question, fontsize=FONT_SIZE)
        axes.set_xlim(-1.1 * furthest, 1.1 * furthest)
    figure.supxlabel(f"effect ({PER[found[0].unit]})", fontsize=FONT_SIZE)
    figure.suptitle(_answers(found))
    return figure


def _draw_effects(axes: Axes, found: Sequence[Finding]) -> None:
    """A panel: pairs of models from top to bottom."""
    for row, finding in enumerate(found):
        result = finding.effect
        heights = np.full(len(result.per_seed), row + 0.22)
        axes.plot(result.per_seed, heights, "o", color=COLORS[1], markersize=4, alpha=0.5)
        axes.plot([result.low, result.high], [row, row], color="black", linewidth=2)
        axes.plot(result.mean, row, "D", color="black", markersize=6)
        axes.annotate(
            result.holds,
            (1.02, row),
            xycoords=("axes fraction", "data"),
            verticalalignment="center",
            weight="bold",
        )
    axes.axvline(0, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(found)), [f"{each.sparse} vs {each.dense}" for each in found])
    axes.set_ylim(len(found) - 0.4, -0.6)


def _answers(found: Sequence[Finding]) -> str:
    """The title: the answers for the first pair of models, which is the study's main one."""
    sparse, dense = found[0].sparse, found[0].dense
    main = [each for each in found if (each.sparse, each.dense) == (sparse, dense)]
    answers = [finding.effect.holds for finding in main]
    counts = ", ".join(f"{answers.count(each)} {each}" for each in ("yes", "no", "unclear"))
    seeds = len(main[0].effect.per_seed)
    explained = "dots are seeds, bars 95 % intervals over seeds and tasks"
    return f"{sparse} against {dense}, {seeds} seeds: {counts}\n{explained}"


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
    axes.legend(fontsize=FONT_SIZE - 2, loc="upper left", bbox_to_anchor=(1, 1))
