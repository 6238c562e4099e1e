"""Figures of routing traces: expert load, specialization, co-activation."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from moekit.analysis.balance import expert_load
from moekit.analysis.plots.style import grouped_bars, panels
from moekit.analysis.specialization import (
    Specialization,
    coactivation,
    domain_specialization,
    label_distance,
    specialization,
    token_specialization,
)
from moekit.analysis.trace import RouterTrace
from moekit.data.tokenizer import EOS, PAD, Tokenizer


def plot_expert_load(trace: RouterTrace) -> Figure:
    """Load of every expert in every MoE layer, sorted, beside the balanced share."""
    loads = {stack: expert_load(trace, stack) for stack in trace.stacks}
    return plot_load(loads, trace.model)


def plot_load(loads: Mapping[str, Float[ndarray, "Y E"]], name: str) -> Figure:
    """`plot_expert_load` from the loads of each stack."""
    shown = []
    for stack, load_of_layer in loads.items():
        for layer, load in enumerate(load_of_layer):
            shown.append((stack, layer, load))
    figure, grid = panels(len(shown))
    for axes, (stack, layer, load) in zip(grid, shown, strict=True):
        num_experts = len(load)
        largest_first = np.sort(load)[::-1]
        places = np.arange(num_experts)
        axes.bar(places, largest_first, color="0.55", edgecolor="0.2")
        axes.axhline(1 / num_experts, color="black", ls="--", lw=1, label="balance")
        axes.set_title(f"{stack}, MoE layer {layer}")
        axes.set_xlabel("experts, by load")
        axes.set_ylabel("share")
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Expert load: {name}")
    return figure


def plot_domain_specialization(trace: RouterTrace, stack: str = "encoder") -> Figure:
    """Share of each domain's tokens by expert, with intervals and the chance line k / E."""
    result = domain_specialization(trace, stack)
    return plot_specialization(result, trace.model, stack)


def plot_specialization(
    result: Specialization,
    name: str,
    stack: str = "encoder",
    what: str = "domain",
) -> Figure:
    """Bars of N(e, p) / N(p) by expert and label, one panel for each layer.

    Args:
      name: of the model.
      what: kind of the labels.
    """
    layers, experts, labels = result.share.shape
    width = max(5.0, 0.16 * experts * labels)
    columns = 2 if experts < 12 else 1
    figure, grid = panels(layers, width=width, columns=columns)
    for layer, axes in enumerate(grid):
        for index, label in enumerate(result.labels):
            share = result.share[layer, :, index]
            below = share - result.low[layer, :, index]
            above = result.high[layer, :, index] - share
            grouped_bars(
                axes,
                share,
                index,
                labels,
                label,
                errors=[below, above],
                line_width=0.5,
                error_line_width=0.6,
            )
        axes.axhline(result.chance[layer], color="black", ls="--", lw=1, label="chance k/E")
        p_value = result.p_value[layer]
        axes.set_title(f"{stack}, MoE layer {layer} (shuffled labels: p = {p_value:.3f})")
        axes.set_xlabel("expert")
        axes.set_ylabel("share of its tokens")
        axes.set_xticks(range(experts))
    handles, names = grid[0].get_legend_handles_labels()
    legend_columns = min(6, len(names))
    place = "outside lower center"
    figure.legend(handles, names, loc=place, ncols=legend_columns, frameon=False)
    figure.suptitle(f"Which experts a {what} uses: {name}")
    return figure


def plot_task_specialization(
    trace: RouterTrace,
    stack: str = "encoder",
    by: str = "task",
) -> Figure:
    """Heat map of expert use over chance by task (or "cluster") in the last MoE layer."""
    result = specialization(trace, by, stack, resamples=20)
    last_share = result.share[-1]
    last_chance = result.chance[-1]
    ratio = (last_share / last_chance).T
    labels, experts = ratio.shape
    width = 3 + 0.3 * experts
    height = 1.4 + 0.22 * labels
    size = (width, height)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(ratio, cmap="Greys", aspect="auto", vmin=0)
    axes.set_yticks(range(labels), result.labels, fontsize=8)
    axes.set_title(f"Expert use by {by}: {trace.model}, {stack}, last MoE layer")
    axes.set_xlabel("expert")
    axes.set_xticks(range(experts))
    figure.colorbar(image, label="share over chance k/E")
    return figure


def plot_domain_distance(
    trace: RouterTrace,
    stack: str = "encoder",
    by: str = "domain",
) -> Figure:
    """Jensen-Shannon distances between domains' expert loads, one panel for each layer."""
    result = specialization(trace, by, stack, resamples=1)
    distance = label_distance(result)
    largest = max(distance.max(), 1e-6)
    places = range(len(result.labels))
    figure, grid = panels(len(distance), width=3.8, height=3.4)
    for layer, axes in enumerate(grid):
        image = axes.imshow(distance[layer], cmap="Greys", vmin=0, vmax=largest)
        axes.set_xticks(places, result.labels, rotation=90, fontsize=7)
        axes.set_yticks(places, result.labels, fontsize=7)
        axes.set_title(f"{stack}, MoE layer {layer}")
    figure.colorbar(image, ax=grid, label="Jensen-Shannon distance (0 to 1)")
    figure.suptitle(f"How differently {by}s are routed: {trace.model}")
    return figure


def plot_token_specialization(
    trace: RouterTrace,
    tokenizer: Tokenizer,
    stack: str = "encoder",
    layer: int = 0,
    n: int = 8,
) -> Figure:
    """For each expert, the frequent tokens that it receives most often, as a table with the share
    of all their occurrences.

    Args:
      n: tokens shown for each expert.
    """
    result = token_specialization(trace, stack)
    experts = trace.num_experts
    width = 1.1 * n + 1.5
    height = 0.3 * experts + 1
    size = (width, height)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.axis("off")
    for expert in range(experts):
        axes.text(0, expert, f"expert {expert}", fontsize=9, va="center", weight="bold")
        top_tokens = result.top(layer, expert, n)
        for column, (token, share) in enumerate(top_tokens, 1):
            token_text = _token_text(token, tokenizer)
            text = f"{token_text} {share:.0%}"
            _write_cell(axes, column, expert, text, share)
    axes.set_xlim(0, n + 1.5)
    axes.set_ylim(experts - 0.5, -0.7)
    chance = result.chance[layer]
    axes.set_title(
        f"Tokens that go to one expert: {trace.model}, {stack}, MoE layer {layer} "
        f"(chance {chance:.0%})",
        fontsize=10,
    )
    return figure


def _token_text(token: int, tokenizer: Tokenizer) -> str:
    """Text of a token in the table; special tokens decode to the empty string."""
    text = tokenizer.decode([token])
    if text:
        return repr(text)
    if token == PAD:
        return repr("pad")
    if token == EOS:
        return repr("eos")
    return str(token)


def _write_cell(axes: Axes, column: int, row: int, text: str, share: float) -> None:
    """A cell of a table, the darker the larger the share."""
    grey = str(1 - 0.5 * share)
    box = {"facecolor": grey, "edgecolor": "none", "pad": 2}
    axes.text(column, row, text, fontsize=8, va="center", family="monospace", bbox=box)


def plot_coactivation(trace: RouterTrace, stack: str = "encoder") -> Figure:
    """Experts that are chosen together, one panel for each layer."""
    together = coactivation(trace, stack)
    largest = max(together.max(), 1e-6)
    figure, grid = panels(len(together), width=3.6, height=3.2)
    for layer, axes in enumerate(grid):
        image = axes.imshow(together[layer], cmap="Greys", vmin=0, vmax=largest)
        axes.set_title(f"{stack}, MoE layer {layer}")
        axes.set_xlabel("also chose")
        axes.set_ylabel("chose")
    figure.colorbar(image, ax=grid, label="share of the row's tokens")
    figure.suptitle(f"Co-activation: {trace.model}")
    return figure
