"""Dropless dispatch: every token reaches all its experts, at a cost proportional to the choices.

Choices are grouped by expert with a counting sort: a choice's position in its expert's queue is
known from routing. Each expert's rows are cut into blocks, and a loop runs over the blocks that
exist: it gathers a block's tokens, applies the expert and adds the result to the output, so no
array of all rows' features is moved. The number of blocks is known at run time only; the backward
pass is a second loop of the same kind (custom vjp).

On a mesh, tokens are all-gathered along the expert axis, every device computes its experts' part
for all of them, and the sums are reduce-scattered; every backend supports both. `ragged.py` does
better where a backend has a ragged all-to-all.

T tokens, K choices per token, E experts, N rows (grouped choices, with gaps), D features, F hidden
features, M rows in a block.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moekit.moe.capacity import gather_rows
from moekit.moe.expert_parallel import ExpertParallel
from moekit.moe.routing import OptionalKey, Routing
from moekit.sharding import cast_varying
from moekit.versions import varying_axes


@no_type_check  # a pytree: see Routing
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupedRows:
    """Choices grouped by expert; each group begins at a multiple of the block size."""

    choice: Int[Array, "N"]  # t * K + k, T * K where the row is empty
    choice_id: Int[Array, "N"]  # number of the choice among those of all devices
    group_sizes: Int[Array, "E"]  # rows of each expert
    dropout_key: OptionalKey  # of expert dropout


@no_type_check  # a function among its fields
@dataclass(frozen=True)
class ExpertFunction:
    """How an expert maps rows between its matrices."""

    activation: Callable[..., Array]  # (hidden[, gate]) -> hidden
    dropout_scale: Callable[..., Array]  # (key, choice ids [M]) -> [M F]; expert dropout
    block_rows: int
    save_hidden: bool  # for the backward pass, instead of computing them again

    def activate(
        self, rows: GroupedRows, choice_ids: Int[Array, "M"], *hidden: Float[Array, "M F"]
    ) -> Float[Array, "M F"]:
        """The activation of some rows, after expert dropout."""
        activated = self.activation(*hidden)
        if rows.dropout_key is None:
            return activated
        scale = self.dropout_scale(rows.dropout_key, choice_ids)
        return activated * scale.astype(activated.dtype)


def block_size(num_rows: int, num_experts: int, smallest: int = 8, largest: int = 128) -> int:
    """A power of two near an expert's expected rows, from `smallest` to `largest`.

    Larger blocks contain more padding. A matmul is efficient from about 128 rows.
    """
    expected = max(1, num_rows // num_experts)
    power_of_two = 1 << (expected - 1).bit_length()
    return min(largest, max(smallest, power_of_two))


def round_up(number: int | Array, multiple: int) -> int | Array:
    """The least multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def positions_in_expert(
    routing: Routing, num_experts: int
) -> tuple[Int[Array, "T K"], Int[Array, "E"]]:
    """Each choice's position in its expert's queue over all groups, and the length of each queue.

    For a routing of groups [G, S, K] from which nothing was dropped.
    """
    expert = routing.expert_index
    group_sizes = jnp.sum(expert[..., None] == jnp.arange(num_experts), (1, 2))  # [G, E]
    earlier_groups = jnp.cumsum(group_sizes, 0) - group_sizes
    earlier_groups = jnp.pad(earlier_groups, ((0, 0), (0, 1)))  # expert E: no choice
    in_group = routing.slot % routing.capacity
    position = jnp.take_along_axis(earlier_groups[:, None], expert, -1) + in_group
    return position.reshape(-1, expert.shape[-1]), group_sizes.sum(0)


def choice_ids(expert: Int[Array, "T K"], parallel: ExpertParallel) -> Int[Array, "TK"]:
    """The number of each of this device's choices among those of all devices."""
    first = parallel.axis_index("data", "expert") * expert.size
    return first + jnp.arange(expert.size)


def group_rows(
    expert: Int[Array, "T K"],
    position: Int[Array, "T K"],
    group_sizes: Int[Array, "E"],
    ids: Int[Array, "TK"],
    *,
    block_rows: int = 1,
    dropout_key: OptionalKey = None,
) -> tuple[Int[Array, "T K"], GroupedRows]:
    """The row of each choice (N where it has none), and the grouped rows.

    Only choices with 0 <= expert < E have a row. An expert's first row begins a block.
    """
    num_choices, num_experts = expert.size, group_sizes.shape[0]
    num_rows = round_up(num_choices + num_experts * (block_rows - 1), block_rows)
    num_blocks = -(-group_sizes // block_rows)
    first_row = (jnp.cumsum(num_blocks) - num_blocks) * block_rows
    has_row = (expert >= 0) & (expert < num_experts)
    row = first_row[jnp.clip(expert, 0, num_experts - 1)] + position
    row = jnp.where(has_row, row, num_rows)
    choice = jnp.full(num_rows, num_choices)
    choice = choice.at[row.reshape(-1)].set(jnp.arange(num_choices), mode="drop")
    return row, GroupedRows(choice, gather_rows(ids, choice), group_sizes, dropout_key)


class ExpertInputs(NamedTuple):
    """What experts compute with, or the gradients of that."""

    x: Float[Array, "T D"]
    weight: Float[Array, "T K"]  # combine weights
    up: tuple[Array, ...]  # first matrices, (wi,) or (wi, wg), each [E, D, F]
    down: Float[Array, "E F D"]


class _Block(NamedTuple):
    """One block of an expert's rows."""

    start: Int[Array, ""]  # its first row
    expert: Int[Array, ""]
    choice: Int[Array, "M"]
    choice_id: Int[Array, "M"]
    token: Int[Array, "M"]  # T where a row is empty: reads zeros, is added nowhere
    features: Float[Array, "M D"]
    weight: Float[Array, "M 1"]


def _blocks(
    function: ExpertFunction, inputs: ExpertInputs, rows: GroupedRows
) -> tuple[Int[Array, ""], Callable[..., _Block]]:
    """The number of blocks, and a function that reads a block by its index."""
    block_rows = function.block_rows
    ends = jnp.cumsum(-(-rows.group_sizes // block_rows))
    possible_blocks = jnp.arange(rows.choice.size // block_rows)
    expert_of_block = jnp.sum(possible_blocks[:, None] >= ends, 1)
    x, weight = inputs.x, inputs.weight.reshape(-1)

    def read(index: Int[Array, ""]) -> _Block:
        start = index * block_rows
        choice = _slice_rows(rows.choice, start, function)
        token = choice // inputs.weight.shape[1]
        return _Block(
            start=start,
            expert=expert_of_block[index],
            choice=choice,
            choice_id=_slice_rows(rows.choice_id, start, function),
            token=token,
            features=gather_rows(x, token),
            weight=gather_rows(weight, choice)[:, None].astype(x.dtype),
        )

    return ends[-1], read


def _slice_rows(array: Array, start: Int[Array, ""], function: ExpertFunction) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, start, function.block_rows)


def varying_zeros(shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> Array:
    """Zeros that vary over the same mesh axes as `like`, as a loop's carry must."""
    return cast_varying(jnp.zeros(shape, dtype), varying_axes(like))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_experts(
    function: ExpertFunction, inputs: ExpertInputs, rows: GroupedRows
) -> Float[Array, "T D"]:
    """y[t] = sum_k weight[t, k] * expert(x[t]) over the choices in `rows`."""
    return _forward(function, inputs, rows)[0]


def _forward(
    function: ExpertFunction, inputs: ExpertInputs, rows: GroupedRows
) -> tuple[Array, tuple[Any, ...]]:
    x, _, up, down = inputs
    num_blocks, read_block = _blocks(function, inputs, rows)

    def add_block(index: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        y, saved = carry
        block = read_block(index)
        hidden = [block.features @ matrix[block.expert] for matrix in up]
        activated = function.activate(rows, block.choice_id, *hidden)
        output = activated @ down[block.expert]
        if function.save_hidden:
            saved = [
                jax.lax.dynamic_update_slice_in_dim(all_rows, block_rows, block.start, axis=0)
                for all_rows, block_rows in zip(saved, hidden, strict=True)
            ]
        return y.at[block.token].add(block.weight * output, mode="drop"), saved

    saved_rows = rows.choice.shape[0] if function.save_hidden else 0
    saved = [varying_zeros((saved_rows, matrix.shape[-1]), x.dtype, x) for matrix in up]
    y = varying_zeros(x.shape, x.dtype, x)
    y, saved = jax.lax.fori_loop(0, num_blocks, add_block, (y, saved))
    return y, (inputs, rows, saved)


def add_gradients(
    function: ExpertFunction,
    residuals: tuple[Any, ...],
    gradient: Float[Array, "T D"],
    sums: ExpertInputs,
) -> ExpertInputs:
    """The gradients of `apply_experts`, added to `sums`."""
    inputs, rows, saved = residuals
    up, down = inputs.up, inputs.down
    num_blocks, read_block = _blocks(function, inputs, rows)

    def add_block(index: Array, sums: ExpertInputs) -> ExpertInputs:
        block = read_block(index)
        if function.save_hidden:
            hidden = [_slice_rows(all_rows, block.start, function) for all_rows in saved]
        else:
            hidden = [block.features @ matrix[block.expert] for matrix in up]
        activate = functools.partial(function.activate, rows, block.choice_id)
        activated, transpose = jax.vjp(activate, *hidden)
        output_gradient = gather_rows(gradient, block.token)
        unweighted = output_gradient @ down[block.expert].T
        # <expert(x), g> = <activated @ down, g> = <activated, g @ down^T> needs no expert(x)
        weight_gradient = jnp.sum(activated * unweighted, -1, dtype=jnp.float32)
        hidden_gradients = transpose(block.weight * unweighted)
        down_gradient = (block.weight * activated).T @ output_gradient

        x_gradient, up_sums = 0, []
        for matrix, up_sum, hidden_gradient in zip(up, sums.up, hidden_gradients, strict=True):
            x_gradient = x_gradient + hidden_gradient @ matrix[block.expert].T
            up_gradient = block.features.T @ hidden_gradient
            up_sums.append(up_sum.at[block.expert].add(up_gradient))
        return ExpertInputs(
            x=sums.x.at[block.token].add(x_gradient, mode="drop"),
            weight=sums.weight.at[block.choice].set(weight_gradient, mode="drop"),
            up=tuple(up_sums),
            down=sums.down.at[block.expert].add(down_gradient),
        )

    weight = inputs.weight
    sums = sums._replace(weight=sums.weight.reshape(-1))
    sums = jax.lax.fori_loop(0, num_blocks, add_block, sums)
    return sums._replace(weight=sums.weight.reshape(weight.shape))


def _backward(
    function: ExpertFunction, residuals: tuple[Any, ...], gradient: Array
) -> tuple[ExpertInputs, None]:
    inputs = residuals[0]
    zeros = jax.tree.map(lambda array: varying_zeros(array.shape, array.dtype, inputs.x), inputs)
    return add_gradients(function, residuals, gradient, zeros), None


apply_experts.defvjp(_forward, _backward)


def dispatch_and_combine(
    function: ExpertFunction,
    inputs: ExpertInputs,
    routing: Routing,
    *,
    dropout_key: OptionalKey,
    parallel: ExpertParallel,
) -> Float[Array, "T D"]:
    """The weighted sum of all experts' outputs for a device's tokens; it holds E of the experts.

    Args:
      function: how an expert maps rows.
      inputs: this device's tokens in the experts' compute type, and its experts.
      routing: of these tokens over the experts of all devices.
      dropout_key: of expert dropout; None for no dropout.
    """
    local_experts, num_devices = inputs.down.shape[0], parallel.axis_size("expert")
    position, group_sizes = positions_in_expert(routing, local_experts * num_devices)
    expert = routing.expert_index.reshape(position.shape)
    ids = choice_ids(expert, parallel)
    if num_devices > 1:
        device_sizes = parallel.all_gather(group_sizes[None])  # [device, all experts]
        earlier_devices = jnp.cumsum(device_sizes, 0) - device_sizes
        earlier = jnp.pad(earlier_devices[parallel.axis_index("expert")], (0, 1))
        position = parallel.all_gather(position + earlier[expert])
        ids = parallel.all_gather(ids)
        inputs = inputs._replace(
            x=parallel.all_gather(inputs.x), weight=parallel.all_gather(inputs.weight)
        )
        first_expert = parallel.axis_index("expert") * local_experts
        expert = parallel.all_gather(expert) - first_expert
        group_sizes = jax.lax.dynamic_slice_in_dim(device_sizes.sum(0), first_expert, local_experts)
    _, rows = group_rows(
        expert,
        position,
        group_sizes,
        ids,
        block_rows=function.block_rows,
        dropout_key=dropout_key,
    )
    y = apply_experts(function, inputs, rows)
    return y if num_devices == 1 else parallel.psum_scatter(y)
