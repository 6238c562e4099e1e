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
    for axes, name in zip(grid, routings, strict=True):
        routing = routings[name]
        probs = np.asarray(routing.probs)
        num_tokens, num_experts = probs.shape
        image = axes.imshow(probs, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        _write_slots(axes, routing, probs)
        axes.set_title(f"{name} (capacity {routing.capacity})")
        axes.set_xlabel("expert")
        axes.set_ylabel("token")
        axes.set_xticks(range(num_experts))
        rows = range(num_tokens)
        row_labels = tokens or rows
        axes.set_yticks(rows, row_labels)
    figure.colorbar(image, ax=grid, label="router probability")
    return figure


def _write_slots(axes: Axes, routing: Routing, probs: ndarray) -> None:
    """Write the slot of every choice, or a cross, at its token and expert."""
    num_experts = probs.shape[1]
    num_slots = num_experts * routing.capacity
    expert_index = np.asarray(routing.expert_index)
    is_choice = expert_index < num_experts
    for token, choice in np.argwhere(is_choice):
        expert = int(expert_index[token, choice])
        slot = int(routing.slot[token, choice])
        text = "x"
        if slot < num_slots:
            slot_in_queue = slot % routing.capacity
            text = str(slot_in_queue)
        color = "black"
        if probs[token, expert] > 0.5:
            color = "white"
        axes.text(expert, token, text, ha="center", va="center", color=color, fontsize=9)


def plot_sharding(parameters: Mapping[str, nnx.Variable]) -> Figure:
    """Each parameter divided along its sharded dimensions, with the devices of each part."""
    figure, grid = panels(len(parameters), width=3.8, height=3.0, columns=3)
    for axes, name in zip(grid, parameters, strict=True):
        parameter = parameters[name]
        devices_of_part = _devices_of_parts(parameter)
        parts = devices_of_part.shape
        sharded = []
        for dimension, count in enumerate(parts):
            if count > 1:
                sharded.append(dimension)
        num_rows = 1
        if sharded:
            first_sharded = sharded[0]
            num_rows = parts[first_sharded]
        cells = devices_of_part.reshape(num_rows, -1)
        _write_devices(axes, cells)
        labels = []
        for dimension in sharded:
            axis = parameter.axes[dimension]
            size = parameter.shape[dimension]
            count = parts[dimension]
            labels.append(f"{axis}, {size} in {count} parts")
        row_label = "whole"
        if labels:
            row_label = labels[0]
        column_label = " x ".join(labels[1:])
        axes.set_title(f"{name} {list(parameter.shape)}")
        axes.set_ylabel(row_label)
        axes.set_xlabel(column_label or "whole")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle("Which devices hold which part")
    return figure


def _write_devices(axes: Axes, cells: ndarray) -> None:
    """Write the ids of the devices of every part, which is the darker the larger its first id."""
    first_device = []
    for row in cells:
        first_of_row = [min(devices) for devices in row]
        first_device.append(first_of_row)
    axes.imshow(first_device, cmap="Greys", vmin=-1, vmax=14, aspect="auto")
    for (row, column), devices in np.ndenumerate(cells):
        names = [str(device) for device in devices]
        text = ", ".join(names)
        axes.text(column, row, text, ha="center", va="center")


def _devices_of_parts(parameter: nnx.Variable) -> ndarray:
    """Ids of the devices that hold each part of a parameter, [parts of each dimension]."""
    shape = parameter.shape
    sharding = parameter[...].sharding
    shard_shape = sharding.shard_shape(shape)
    parts = []
    for size, shard_size in zip(shape, shard_shape, strict=True):
        parts.append(size // shard_size)
    devices = np.empty(parts, object)
    slices_of_device = sharding.devices_indices_map(shape)
    for device, slices in slices_of_device.items():
        position = []
        for dimension_slice, shard_size in zip(slices, shard_shape, strict=True):
            start = dimension_slice.start or 0
            position.append(start // shard_size)
        part = tuple(position)
        earlier = devices[part] or []
        devices[part] = [*earlier, device.id]
    return devices
