"""Pictures of traces, metrics and scores. Each takes data and returns a matplotlib figure; greys
and hatches that survive printing, no dates, so the same data gives the same file."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from matplotlib.patheffects import withStroke

from moekit.analysis.balance import expert_load
from moekit.analysis.specialization import (
    Specialization,
    coactivation,
    domain_specialization,
    label_distance,
    task_specialization,
    token_specialization,
)
from moekit.analysis.trace import RouterTrace
from moekit.data.batch import Batch
from moekit.data.mixture import Mixture
from moekit.data.tokenizer import Tokenizer
from moekit.moe.routing import Routing
from moekit.training.metrics import Metrics

matplotlib.rcParams["svg.hashsalt"] = "moekit"
LINES = (("black", "-"), ("0.45", "--"), ("0.2", ":"), ("0.6", "-."), ("0.3", (0, (5, 1))))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "++")
GREYS = ("0.25", "0.85", "0.55", "0.95", "0.7", "0.4")


def save_figure(fig, path: str | Path) -> Path:
    """Write a figure (.png or .svg) without dates and versions, and close it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    quiet = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    fig.savefig(path, dpi=110, metadata=quiet)
    plt.close(fig)
    return path


def show(fig, name: str):
    """Save as {name}.png in the folder MOEKIT_FIGURES (default figures/); returns the figure, for
    a notebook to display as the last line of a cell."""
    save_figure(fig, Path(os.environ.get("MOEKIT_FIGURES", "figures")) / f"{name}.png")
    return fig


def plot_routing(routings: Mapping[str, Routing], tokens: Sequence[str] = ()):
    """Each router's probabilities by token and expert; a number is the slot that a choice got, a
    cross a choice that was dropped."""
    fig, axes = _grid(len(routings), width=3.4, height=3.2, columns=3)
    for ax, (name, routing) in zip(axes, routings.items(), strict=True):
        probs = np.asarray(routing.probs)
        size, experts = probs.shape
        image = ax.imshow(probs, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        for s, k in np.argwhere(np.asarray(routing.expert_index) < experts):
            expert, slot = int(routing.expert_index[s, k]), int(routing.slot[s, k])
            kept = slot < experts * routing.capacity
            color = "white" if probs[s, expert] > 0.5 else "black"
            text = str(slot % routing.capacity) if kept else "x"
            ax.text(expert, s, text, ha="center", va="center", color=color, fontsize=9)
        ax.set(title=f"{name} (capacity {routing.capacity})", xlabel="expert", ylabel="token")
        ax.set_xticks(range(experts))
        ax.set_yticks(range(size), tokens or range(size))
    fig.colorbar(image, ax=axes, label="router probability")
    return fig


def plot_rates(mixture: Mixture):
    """Share of every cluster in a mixture, with the number of its tasks."""
    rates: dict[str, list[float]] = {}
    for task in mixture.tasks:
        rates.setdefault(task.cluster, []).append(mixture.rates[task.name])
    order = sorted(rates, key=lambda cluster: sum(rates[cluster]))
    fig, ax = plt.subplots(figsize=(6.5, 0.8 + 0.28 * len(order)), layout="constrained")
    total = [sum(rates[cluster]) for cluster in order]
    ax.barh(order, total, color="0.6", edgecolor="0.2")
    for y, cluster in enumerate(order):
        ax.annotate(f" {len(rates[cluster])} tasks", (total[y], y), va="center", fontsize=8)
    ax.set(xlabel="share of all examples", title=f"Clusters of {mixture.name}")
    ax.set_xlim(0, max(total) * 1.2)
    return fig


def plot_packing(batch: Batch):
    """Which example each position of a packed batch belongs to; white is padding."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for ax, name in zip(axes, ("input", "target"), strict=True):
        segments = np.asarray(getattr(batch, f"{name}_segments"))
        used = (segments > 0).mean()
        shade = np.where(segments > 0, segments % 2 + 1, 0)  # neighbours differ
        ax.imshow(shade, cmap="Greys", vmin=0, vmax=3, aspect="auto", interpolation="nearest")
        title = f"{name}s: {used:.0%} of positions used"
        ax.set(title=title, xlabel="position (tokens)", ylabel="row of the batch")
    return fig


def plot_bars(groups: Mapping[str, Mapping[str, float]], label: str, title: str, line=None):
    """Grouped bars {series: {bar: value}} with an optional (name, level) to compare with."""
    names = list(next(iter(groups.values())))
    fig, ax = plt.subplots(figsize=(max(5, 2.5 + 1.1 * len(names)), 3.4), layout="constrained")
    width = 0.8 / len(groups)
    for i, (series, values) in enumerate(groups.items()):
        x = np.arange(len(names)) + (i - (len(groups) - 1) / 2) * width
        shade, hatch = GREYS[i % len(GREYS)], HATCHES[i % len(HATCHES)]
        heights = [values[name] for name in names]
        ax.bar(x, heights, width, color=shade, hatch=hatch, edgecolor="black", lw=0.6, label=series)
    if line:
        ax.axhline(line[1], color="black", ls="--", lw=1, label=line[0])
    ax.set_xticks(range(len(names)), names)
    ax.set(ylabel=label, title=title)
    fig.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=5)
    return fig


def _grid(panels: int, width: float = 3.6, height: float = 2.6, columns: int = 4):
    columns = min(columns, panels)
    rows = -(-panels // columns)
    fig, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[panels:]:
        ax.axis("off")
    return fig, list(axes.flat[:panels])


def plot_expert_load(trace: RouterTrace):
    """Load of every expert in every MoE layer, sorted, against the balanced share."""
    return plot_load({stack: expert_load(trace, stack) for stack in trace.stacks}, trace.model)


def plot_load(loads: Mapping[str, np.ndarray], name: str):
    """As `plot_expert_load`, from {stack: load [layers, experts]}."""
    panels = [(s, i) for s in loads for i in range(len(loads[s]))]
    fig, axes = _grid(len(panels))
    for ax, (stack, layer) in zip(axes, panels, strict=True):
        load = np.sort(loads[stack][layer])[::-1]
        ax.bar(np.arange(len(load)), load, color="0.55", edgecolor="0.2")
        ax.axhline(1 / len(load), color="black", ls="--", lw=1, label="balance")
        ax.set(title=f"{stack}, MoE layer {layer}", xlabel="experts, by load", ylabel="share")
        ax.legend(frameon=False, fontsize=8)
    fig.suptitle(f"Expert load: {name}")
    return fig


def plot_domain_specialization(trace: RouterTrace, stack: str = "encoder"):
    """Share of each domain's tokens per expert, with intervals and the chance line k / E."""
    return plot_specialization(domain_specialization(trace, stack), trace.model, stack)


def plot_specialization(
    result: Specialization, name: str, stack: str = "encoder", what: str = "domain"
):
    """Bars of N(e, p) / N(p) by expert and label, one panel a layer."""
    layers, experts, labels = result.share.shape
    fig, axes = _grid(layers, width=max(5.0, 0.16 * experts * labels), columns=1 + (experts < 12))
    width = 0.8 / labels
    for layer, ax in enumerate(axes):
        for p, label in enumerate(result.labels):
            share = result.share[layer, :, p]
            error = [share - result.low[layer, :, p], result.high[layer, :, p] - share]
            ax.bar(
                np.arange(experts) + (p - (labels - 1) / 2) * width,
                share,
                width,
                yerr=np.maximum(error, 0),
                color=GREYS[p % len(GREYS)],
                hatch=HATCHES[p % len(HATCHES)],
                edgecolor="black",
                lw=0.5,
                error_kw={"lw": 0.6},
                label=label,
            )
        ax.axhline(result.chance[layer], color="black", ls="--", lw=1, label="chance k/E")
        p_value = result.p_value[layer]
        ax.set(
            title=f"{stack}, MoE layer {layer} (shuffled labels: p = {p_value:.3f})",
            xlabel="expert",
            ylabel="share of its tokens",
            xticks=range(experts),
        )
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), frameon=False)
    fig.suptitle(f"Which experts a {what} uses: {name}")
    return fig


def plot_task_specialization(trace: RouterTrace, stack: str = "encoder", by: str = "task"):
    """Heat map of expert use by task (or "cluster") in the last MoE layer, over chance."""
    result = task_specialization(trace, stack, resamples=20)
    if by == "cluster":
        from moekit.analysis.specialization import specialization

        result = specialization(trace, by, stack, resamples=20)
    ratio = (result.share[-1] / result.chance[-1]).T
    fig, ax = plt.subplots(
        figsize=(3 + 0.3 * ratio.shape[1], 1.4 + 0.22 * ratio.shape[0]), layout="constrained"
    )
    image = ax.imshow(ratio, cmap="Greys", aspect="auto", vmin=0)
    ax.set_yticks(range(len(result.labels)), result.labels, fontsize=8)
    title = f"Expert use by {by}: {trace.model}, {stack}, last MoE layer"
    ax.set(title=title, xlabel="expert", xticks=range(ratio.shape[1]))
    fig.colorbar(image, label="share over chance k/E")
    return fig


def plot_domain_distance(trace: RouterTrace, stack: str = "encoder", by: str = "domain"):
    """Jensen-Shannon distances between domains' expert loads, one panel a layer."""
    from moekit.analysis.specialization import specialization

    result = specialization(trace, by, stack, resamples=1)
    distance = label_distance(result)
    fig, axes = _grid(len(distance), width=3.8, height=3.4)
    for layer, ax in enumerate(axes):
        image = ax.imshow(distance[layer], cmap="Greys", vmin=0, vmax=max(distance.max(), 1e-6))
        ax.set_xticks(range(len(result.labels)), result.labels, rotation=90, fontsize=7)
        ax.set_yticks(range(len(result.labels)), result.labels, fontsize=7)
        ax.set_title(f"{stack}, MoE layer {layer}")
    fig.colorbar(image, ax=axes, label="Jensen-Shannon distance (0 to 1)")
    fig.suptitle(f"How differently {by}s are routed: {trace.model}")
    return fig


def plot_token_specialization(
    trace: RouterTrace, tokenizer: Tokenizer, stack: str = "encoder", layer: int = 0, n: int = 8
):
    """Each expert's most faithful tokens, as a table with the share of their occurrences."""
    result = token_specialization(trace, stack)
    experts = trace.num_experts
    fig, ax = plt.subplots(figsize=(1.1 * n + 1.5, 0.3 * experts + 1), layout="constrained")
    ax.axis("off")
    for expert in range(experts):
        ax.text(0, expert, f"expert {expert}", fontsize=9, va="center", weight="bold")
        for i, (token, share) in enumerate(result.top(layer, expert, n)):
            text = repr(tokenizer.decode([token]) or {0: "pad", 1: "eos"}.get(token, token))
            shade = str(1 - 0.5 * share)
            box = {"facecolor": shade, "edgecolor": "none", "pad": 2}
            label = f"{text} {share:.0%}"
            ax.text(i + 1, expert, label, fontsize=8, va="center", family="monospace", bbox=box)
    ax.set(xlim=(0, n + 1.5), ylim=(experts - 0.5, -0.7))
    chance = result.chance[layer]
    ax.set_title(
        f"Tokens that go to one expert: {trace.model}, {stack}, MoE layer {layer} "
        f"(chance {chance:.0%})",
        fontsize=10,
    )
    return fig


def plot_coactivation(trace: RouterTrace, stack: str = "encoder"):
    """Which experts are chosen together, one panel a layer."""
    together = coactivation(trace, stack)
    fig, axes = _grid(len(together), width=3.6, height=3.2)
    for layer, ax in enumerate(axes):
        image = ax.imshow(together[layer], cmap="Greys", vmin=0, vmax=max(together.max(), 1e-6))
        ax.set(title=f"{stack}, MoE layer {layer}", xlabel="also chose", ylabel="chose")
    fig.colorbar(image, ax=axes, label="share of the row's tokens")
    fig.suptitle(f"Co-activation: {trace.model}")
    return fig


def plot_learning_curves(
    runs: Mapping[str, Metrics], key: str = "loss", label: str = "", title: str = "", lines=()
):
    """One curve a run; `lines` are (name, value) levels to compare with."""
    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for i, (name, metrics) in enumerate(runs.items()):
        color, style = LINES[i % len(LINES)]
        steps, values = metrics[key]
        marker = "o" if len(steps) < 15 else None
        ax.plot(steps, values, color=color, ls=style, marker=marker, ms=3, label=name)
    for name, value in lines:
        ax.axhline(value, color="0.7", lw=1)
        ax.annotate(name, (0.99, value), xycoords=("axes fraction", "data"), ha="right", va="top")
    ax.set(xlabel="step", ylabel=label or key, title=title or key)
    ax.legend(frameon=False)
    return fig


def plot_scores(groups: Mapping[str, Sequence[Mapping]], title: str = ""):
    """Bars by suite and model: groups {model: [Scores.to_dict(), ..]}, the same suites in each.

    Whiskers are 95 % intervals, lines chance (solid) and the majority answer (dashed).
    """
    suites = [scores["name"].split(" on ")[-1] for scores in next(iter(groups.values()))]
    fig, ax = plt.subplots(figsize=(max(6.0, 2 + 1.3 * len(suites)), 4.2), layout="constrained")
    width = 0.8 / len(groups)
    for i, (model, scores) in enumerate(groups.items()):
        means = [each["mean"] for each in scores]
        x = np.arange(len(means)) + (i - (len(groups) - 1) / 2) * width
        height = [m["score"] for m in means]
        error = [[m["score"] - m["low"] for m in means], [m["high"] - m["score"] for m in means]]
        ax.bar(
            x,
            height,
            width,
            yerr=np.maximum(error, 0),
            color=GREYS[i % len(GREYS)],
            hatch=HATCHES[i % len(HATCHES)],
            edgecolor="black",
            lw=0.6,
            capsize=2,
            label=model,
        )
    base = next(iter(groups.values()))
    at = np.arange(len(base))
    cased = [withStroke(linewidth=3, foreground="white")]  # seen on dark bars too
    for baseline, style in (("chance", "solid"), ("majority", "dashed")):
        heights = [scores["mean"][baseline] for scores in base]
        lines = {"color": "black", "lw": 1.2, "linestyles": style, "path_effects": cased}
        ax.hlines(heights, at - 0.42, at + 0.42, label=baseline, **lines)
    ax.set_xticks(at, suites)
    ax.set(ylabel="mean score over tasks (95 % interval)", title=title, ylim=(0, None))
    fig.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    return fig


def plot_sharding(parameters: Mapping[str, nnx.Variable]):
    """Each parameter cut along its split dimensions, with the devices that hold each part."""
    fig, axes = _grid(len(parameters), width=3.8, height=3.0, columns=3)
    for ax, (name, parameter) in zip(axes, parameters.items(), strict=True):
        shape, sharding = parameter.shape, parameter[...].sharding
        parts = [n // held for n, held in zip(shape, sharding.shard_shape(shape), strict=True)]
        cells = np.zeros(parts, object)
        for device, index in sharding.devices_indices_map(shape).items():
            at = tuple((s.start or 0) * n // d for s, n, d in zip(index, parts, shape, strict=True))
            cells[at] = [*(cells[at] or []), device.id]
        split = [d for d, n in enumerate(parts) if n > 1]
        cells = cells.reshape(parts[split[0]] if split else 1, -1)
        shades = [[min(devices) for devices in row] for row in cells]
        ax.imshow(shades, cmap="Greys", vmin=-1, vmax=14, aspect="auto")
        for (row, column), devices in np.ndenumerate(cells):
            ax.text(column, row, ", ".join(map(str, devices)), ha="center", va="center")
        labels = [f"{parameter.axes[d]}, {shape[d]} in {parts[d]} parts" for d in split]
        ax.set(title=f"{name} {list(shape)}", ylabel="".join(labels[:1]) or "whole")
        ax.set(xlabel=" x ".join(labels[1:]) or "whole", xticks=[], yticks=[])
    fig.suptitle("Which devices hold which part")
    return fig


def plot_plan(plan):
    """A `Plan`: memory of a chip by kind beside its limit, the step's time by what it is spent on,
    and what the collectives send."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), width_ratios=(1, 1.2, 1.8))
    kinds = {k: v for k, v in plan.hbm_gib_per_chip.items() if k != "total"}
    _stacked(left, kinds or {"requested": plan.hbm_gib_per_chip["total"]})
    left.axhline(plan.hbm_limit_gib, color="black", linestyle="--")
    left.text(0.5, plan.hbm_limit_gib, "limit", ha="right", va="bottom", fontsize=8)
    left.set(ylabel="GiB a chip", title="memory", xticks=[], xlim=(-0.5, 1.6))
    _stacked(middle, plan.split_seconds)
    for bound, seconds in zip(("overlapped", "in turn"), plan.step_seconds or (), strict=False):
        middle.axhline(seconds, color="black", linestyle=":", linewidth=1)
        middle.text(1.6, seconds, bound, ha="right", va="bottom", fontsize=8)
    middle.set(ylabel="seconds a step (estimate)", title="time", xticks=[], xlim=(-0.5, 1.6))
    names = [f"{c['op']}\nover {c['axis']}" for c in plan.collectives[:6]][::-1]
    sent = [c["bytes"] / 1e9 for c in plan.collectives[:6]][::-1]
    right.barh(names, sent, color=GREYS[2], edgecolor="black")
    right.tick_params(axis="y", labelsize=8)
    right.set(xlabel="GB sent a chip and step", title="collectives")
    fig.suptitle(f"{plan.preset} on {plan.topology}, remat {plan.remat}")
    fig.tight_layout()
    return fig


def _stacked(ax, parts: Mapping[str, float]) -> None:
    """One bar of parts on top of each other, with its legend."""
    bottom = 0.0
    for i, (name, value) in enumerate(parts.items()):
        ax.bar(
            0,
            value,
            bottom=bottom,
            color=GREYS[i],
            hatch=HATCHES[i],
            edgecolor="black",
            label=f"{name} {value:.3g}",
        )
        bottom += value
    ax.margins(y=0.1)
    if parts:  # of a plan that does not fit no time is known
        ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
