"""Figures of routing and of parameters on devices."""

from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from moekit.analysis.plots.style import panels
from moekit.moe.routing import Routing


def plot_routing(routings: Mapping[str, Routing], tokens: Sequence[str] = ()) -> Figure:
    """Each router's probabilities by token and expert.

    A number is the slot of a choice in its expert's queue, a cross a choice that was dropped.

    Args:
      routings: of one group of tokens, by the router's name.
      tokens: labels of the tokens; default: their indices.
    """
    figure, grid = panels(len(routings), width=3.4, height=3.2, columns=3)
    for axes, (name, routing) in zip(grid, routings.items(), strict=True):
        probs = np.asarray(routing.probs)
        num_tokens, num_experts = probs.shape
        image = axes.imshow(probs, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        _write_slots(axes, routing, probs)
        axes.set_title(f"{name} (capacity {routing.capacity})")
        axes.set_xlabel("expert")
        axes.set_ylabel("token")
        axes.set_xticks(range(num_experts))
        axes.set_yticks(range(num_tokens), tokens or range(num_tokens))
    figure.colorbar(image, ax=grid, label="router probability")
    return figure


def _write_slots(axes: Axes, routing: Routing, probs: ndarray) -> None:
    """Write the slot of every choice, or a cross, at its token and expert."""
    num_experts = probs.shape[1]
    is_choice = np.asarray(routing.expert_index) < num_experts
    for token, choice in np.argwhere(is_choice):
        expert = int(routing.expert_index[token, choice])
        slot = int(routing.slot[token, choice])
        kept = slot < num_experts * routing.capacity
        text = str(slot % routing.capacity) if kept else "x"
        color = "white" if probs[token, expert] > 0.5 else "black"
        axes.text(expert, token, text, ha="center", va="center", color=color, fontsize=9)


def plot_sharding(parameters: Mapping[str, nnx.Variable]) -> Figure:
    """Each parameter divided along its sharded dimensions, with the devices of each part."""
    figure, grid = panels(len(parameters), width=3.8, height=3.0, columns=3)
    for axes, (name, parameter) in zip(grid, parameters.items(), strict=True):
        shape = parameter.shape
        devices_of_part = _devices_of_parts(parameter)
        parts = devices_of_part.shape
        sharded = [dimension for dimension, count in enumerate(parts) if count > 1]
        num_rows = parts[sharded[0]] if sharded else 1
        cells = devices_of_part.reshape(num_rows, -1)
        shades = [[min(devices) for devices in row] for row in cells]
        axes.imshow(shades, cmap="Greys", vmin=-1, vmax=14, aspect="auto")
        for (row, column), devices in np.ndenumerate(cells):
            text = ", ".join(map(str, devices))
            axes.text(column, row, text, ha="center", va="center")
        labels = []
        for dimension in sharded:
            axis, size = parameter.axes[dimension], shape[dimension]
            labels.append(f"{axis}, {size} in {parts[dimension]} parts")
        axes.set_title(f"{name} {list(shape)}")
        axes.set_ylabel(labels[0] if labels else "whole")
        axes.set_xlabel(" x ".join(labels[1:]) or "whole")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle("Which devices hold which part")
    return figure


def _devices_of_parts(parameter: nnx.Variable) -> ndarray:
    """Ids of the devices that hold each part of a parameter, [parts of each dimension]."""
    shape, sharding = parameter.shape, parameter[...].sharding
    shard_shape = sharding.shard_shape(shape)
    parts = [size // part for size, part in zip(shape, shard_shape, strict=True)]
    devices = np.empty(parts, object)
    for device, slices in sharding.devices_indices_map(shape).items():
        starts = [dimension_slice.start or 0 for dimension_slice in slices]
        part = tuple(start // size for start, size in zip(starts, shard_shape, strict=True))
        devices[part] = [*(devices[part] or []), device.id]
    return devices
