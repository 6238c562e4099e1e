"""Dropless dispatch where a backend has a ragged all-to-all: devices send choices, not slots.

Every expert is sent exactly the rows that were routed to it, without padding. They arrive grouped
by expert, so nothing is sorted again: a piece of the all-to-all is what one device has for one
expert. The receive buffer has a fixed size. Rows that do not fit (overflow) are processed in chunks
by the all-gather / reduce-scatter transport of `dropless.py`; usually there are none.

On TPUs the experts' matmuls are the grouped kernels of megablox. They read and write the rows of
the groups only: rows past the last group contain anything, and nothing here reads them. Elsewhere
they are the blocks of `dropless.apply_experts`.

T tokens, K choices per token, E experts, n devices on the expert axis, L = E / n experts on a
device, N rows sent, R rows of the buffer, D features, F hidden features.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moekit.moe.capacity import DispatchIndices, combine, dispatch, gather_rows
from moekit.moe.dropless import (
    ExpertFunction,
    ExpertInputs,
    GroupedRows,
    add_gradients,
    apply_experts,
    choice_ids,
    group_rows,
    positions_in_expert,
    round_up,
    varying_zeros,
)
from moekit.moe.expert_parallel import ExpertParallel, RaggedSizes
from moekit.moe.routing import OptionalKey, Routing
from moekit.sharding import platform

KERNEL_TILE = (256, 1024, 1024)  # rows, input features, output features of a kernel's tiles
# The buffer holds a balanced load and BUFFER_MARGIN / sqrt(L) of it besides: relative load
# variance falls with the number of local experts.
BUFFER_MARGIN = 1 / 4


def is_preferred(mesh: Mesh | None) -> bool:
    """Whether this transport is supported, and faster, on the devices of a mesh.

    Without expert parallelism it is faster on TPUs only, for their kernels.
    """
    kind = platform(mesh)
    if kind == "tpu":
        return True
    return kind != "cpu" and mesh is not None and mesh.shape["expert"] > 1


@dataclass(frozen=True)
class Transport:
    """What is static about the dispatch of a layer."""

    function: ExpertFunction
    parallel: ExpertParallel
    buffer_rows: int  # R
    chunk_rows: int  # rows of a device's overflow that are processed at once
    tile_rows: int  # rows in a tile of a kernel; 0: blocks instead of kernels


class RaggedDispatch(NamedTuple):
    """Where the choices of a device are sent, and what it receives."""

    row: Int[Array, "T K"]  # row of each choice; N where it has none
    choice: Int[Array, "N"]  # choice of each row
    expert: Int[Array, "TK"]
    choice_id: Int[Array, "TK"]
    to_experts: RaggedSizes
    to_tokens: RaggedSizes
    received: GroupedRows  # rows of the buffer, as choices of their own
    overflow: Int[Array, "overflow"]  # choices that do not fit, then T * K
    num_chunks: Int[Array, ""]  # of overflow, on the device that has most


def dispatch_and_combine(
    function: ExpertFunction,
    inputs: ExpertInputs,
    routing: Routing,
    *,
    dropout_key: OptionalKey,
    parallel: ExpertParallel,
) -> Float[Array, "T D"]:
    """As `dropless.dispatch_and_combine`."""
    transport = _transport(function, inputs, parallel)
    plan = _ragged_dispatch(transport, routing, inputs.down.shape[0], dropout_key)
    if parallel.axis_size("expert") == 1:
        return _through_buffer(transport, inputs, plan)
    return _with_overflow(transport, inputs, plan)


def _transport(
    function: ExpertFunction, inputs: ExpertInputs, parallel: ExpertParallel
) -> Transport:
    num_choices, local_experts = inputs.weight.size, inputs.down.shape[0]
    margin = 0 if parallel.axis_size("expert") == 1 else BUFFER_MARGIN / math.sqrt(local_experts)
    buffer_rows = round((1 + margin) * num_choices)
    if parallel.platform == "tpu":
        tile_rows = min(KERNEL_TILE[0], round_up(num_choices, 8))
        buffer_rows = round_up(buffer_rows, tile_rows)
    else:
        tile_rows = 0
        gaps = local_experts * (function.block_rows - 1)
        buffer_rows = round_up(buffer_rows + gaps, function.block_rows)
    chunk_rows = max(8, math.ceil(num_choices / 64))
    return Transport(function, parallel, buffer_rows, chunk_rows, tile_rows)


def _ragged_dispatch(
    transport: Transport, routing: Routing, local_experts: int, dropout_key: OptionalKey
) -> RaggedDispatch:
    parallel, buffer_rows = transport.parallel, transport.buffer_rows
    num_devices, device = parallel.axis_size("expert"), parallel.axis_index("expert")
    position, group_sizes = positions_in_expert(routing, local_experts * num_devices)
    expert = routing.expert_index.reshape(position.shape)
    ids = choice_ids(expert, parallel)
    row, rows = group_rows(expert, position, group_sizes, ids)

    sent = parallel.all_gather(group_sizes[None])  # [sender, E]
    waiting = sent.reshape(num_devices, num_devices, local_experts)
    waiting = waiting.transpose(1, 2, 0)  # [receiver, L, sender]: the order in the buffer
    group_start = _group_starts(transport, waiting.sum(-1))
    offset = group_start[..., None] + jnp.cumsum(waiting, 2) - waiting
    fitting = jnp.clip(buffer_rows - offset, 0, waiting)
    received = _received_rows(transport, fitting[device].sum(-1), group_start[device])

    offset, fitting = _by_sender(offset), _by_sender(fitting)
    start = jnp.cumsum(sent, 1) - sent
    columns = functools.partial(_columns_of_device, device, local_experts)
    to_experts = RaggedSizes(
        input_offsets=start[device],
        send_sizes=fitting[device],
        output_offsets=offset[device],
        recv_sizes=columns(fitting),
    )
    to_tokens = RaggedSizes(
        input_offsets=columns(offset),
        send_sizes=columns(fitting),
        output_offsets=columns(start),
        recv_sizes=fitting[device],
    )
    if dropout_key is not None:
        sent_ids = rows.choice_id[:, None]
        received_ids = parallel.ragged_all_to_all(sent_ids, buffer_rows, to_experts)
        received = replace(received, choice_id=received_ids[:, 0], dropout_key=dropout_key)
    most_overflow = jnp.max(jnp.sum(sent - fitting, 1))
    return RaggedDispatch(
        row=row,
        choice=rows.choice,
        expert=expert.reshape(-1),
        choice_id=ids,
        to_experts=to_experts,
        to_tokens=to_tokens,
        received=received,
        overflow=_overflow_choices(transport, expert, position, fitting[device]),
        num_chunks=-(-most_overflow // transport.chunk_rows),
    )


def _group_starts(
    transport: Transport, group_sizes: Int[Array, "receiver L"]
) -> Int[Array, "receiver L"]:
    """The first row of each expert's group in the buffers."""
    unit = 1 if transport.tile_rows else transport.function.block_rows
    padded_sizes = round_up(group_sizes, unit)
    return jnp.cumsum(padded_sizes, 1) - padded_sizes


def _by_sender(pieces: Int[Array, "receiver L sender"]) -> Int[Array, "sender E"]:
    by_sender = pieces.transpose(2, 0, 1)
    return by_sender.reshape(by_sender.shape[0], -1)


def _columns_of_device(
    device: int | Int[Array, ""], local_experts: int, pieces: Int[Array, "sender E"]
) -> Int[Array, "E"]:
    """For each sender the pieces of the experts on this device."""
    first = device * local_experts
    return jax.lax.dynamic_slice_in_dim(pieces, first, local_experts, 1).reshape(-1)


def _received_rows(
    transport: Transport, group_sizes: Int[Array, "L"], group_start: Int[Array, "L"]
) -> GroupedRows:
    row = jnp.arange(transport.buffer_rows)
    start = group_start[:, None]
    filled = jnp.any((row >= start) & (row < start + group_sizes[:, None]), 0)
    choice = jnp.where(filled, row, transport.buffer_rows)
    return GroupedRows(choice, row, group_sizes, None)


def _overflow_choices(
    transport: Transport,
    expert: Int[Array, "T K"],
    position: Int[Array, "T K"],
    fitting: Int[Array, "E"],
) -> Int[Array, "overflow"]:
    num_choices = expert.size
    limit = jnp.pad(fitting, (0, 1), constant_values=num_choices)  # expert E: no choice
    does_not_fit = (position >= limit[expert]).reshape(-1)
    size = round_up(num_choices, transport.chunk_rows)
    (overflow,) = jnp.nonzero(does_not_fit, size=size, fill_value=num_choices)
    return overflow


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def exchange(
    parallel: ExpertParallel,
    buffer_rows: int,
    x: Float[Array, "sent D"],
    sizes: RaggedSizes,
    sizes_back: RaggedSizes,
) -> Float[Array, "received D"]:
    """A ragged all-to-all whose gradient is the ragged all-to-all back."""
    return parallel.ragged_all_to_all(x, buffer_rows, sizes)


def _exchange_forward(
    parallel: ExpertParallel,
    buffer_rows: int,
    x: Array,
    sizes: RaggedSizes,
    sizes_back: RaggedSizes,
) -> tuple[Array, tuple[int, RaggedSizes]]:
    received = exchange(parallel, buffer_rows, x, sizes, sizes_back)
    return received, (x.shape[0], sizes_back)


def _exchange_backward(
    parallel: ExpertParallel,
    buffer_rows: int,
    residuals: tuple[int, RaggedSizes],
    gradient: Array,
) -> tuple[Array, None, None]:
    sent_rows, sizes_back = residuals
    return parallel.ragged_all_to_all(gradient, sent_rows, sizes_back), None, None


exchange.defvjp(_exchange_forward, _exchange_backward)


def _through_buffer(
    transport: Transport, inputs: ExpertInputs, plan: RaggedDispatch
) -> Float[Array, "T D"]:
    """Dispatch, all-to-all, experts, all-to-all, combine, for the rows that fit."""
    x, weight, up, down = inputs
    token = plan.choice // weight.shape[1]
    indices = DispatchIndices(plan.row, token, plan.choice, weight)
    move = functools.partial(exchange, transport.parallel)

    sent = dispatch(x, indices)
    received = move(transport.buffer_rows, sent, plan.to_experts, plan.to_tokens)
    if transport.tile_rows:
        output = _apply_kernels(transport, received, up, down, plan.received)
    else:
        weight_one = jnp.ones((transport.buffer_rows, 1))
        received = ExpertInputs(received, weight_one, up, down)
        output = apply_experts(transport.function, received, plan.received)
    returned = move(plan.choice.size, output, plan.to_tokens, plan.to_experts)
    return combine(returned, indices)


def _apply_kernels(
    transport: Transport,
    x: Float[Array, "R D"],
    up: tuple[Array, ...],
    down: Float[Array, "L F D"],
    rows: GroupedRows,
) -> Float[Array, "R D"]:
    """Every row through its expert; rows past the last group contain anything."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    tile = (transport.tile_rows, *KERNEL_TILE[1:])

    def grouped_matmul(x: Float[Array, "R D"], matrices: Array) -> Float[Array, "R F"]:
        return gmm(x, matrices, rows.group_sizes, x.dtype, tile)

    hidden = [grouped_matmul(x, matrices) for matrices in up]
    activated = transport.function.activate(rows, rows.choice_id, *hidden)
    return grouped_matmul(activated, down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_overflow(
    transport: Transport, inputs: ExpertInputs, plan: RaggedDispatch
) -> Float[Array, "T D"]:
    """`_through_buffer`, and the overflow in chunks."""
    return _overflow_forward(transport, inputs, plan)[0]


def _overflow_forward(
    transport: Transport, inputs: ExpertInputs, plan: RaggedDispatch
) -> tuple[Array, tuple[Any, ...]]:
    y, transpose = jax.vjp(lambda inputs: _through_buffer(transport, inputs, plan), inputs)
    function = replace(transport.function, save_hidden=False)

    def add_chunk(index: Array, y: Array) -> Array:
        chunk = _overflow_chunk(transport, index, inputs, plan)
        output = apply_experts(function, chunk.inputs, chunk.rows)
        output = transport.parallel.psum_scatter(output)
        return y.at[chunk.token].add(output, mode="drop")

    y = jax.lax.fori_loop(0, plan.num_chunks, add_chunk, y)
    return y, (transpose, inputs, plan)


def _overflow_backward(
    transport: Transport, residuals: tuple[Any, ...], gradient: Array
) -> tuple[ExpertInputs, None]:
    transpose, inputs, plan = residuals
    parallel = transport.parallel
    function = replace(transport.function, save_hidden=False)

    def add_chunk(index: Array, sums: ExpertInputs) -> ExpertInputs:
        chunk = _overflow_chunk(transport, index, inputs, plan)
        chunk_gradient = parallel.all_gather(gather_rows(gradient, chunk.token))
        x, weight, _, _ = chunk.inputs
        zeros = ExpertInputs(
            x=varying_zeros(x.shape, x.dtype, x),
            weight=varying_zeros(weight.shape, weight.dtype, x),
            up=sums.up,
            down=sums.down,
        )
        added = add_gradients(function, (chunk.inputs, chunk.rows, []), chunk_gradient, zeros)
        x_added = parallel.psum_scatter(added.x)
        weight_added = parallel.psum_scatter(added.weight)[:, 0]
        flat_weight = sums.weight.reshape(-1).at[chunk.choice].add(weight_added, mode="drop")
        return ExpertInputs(
            x=sums.x.at[chunk.token].add(x_added, mode="drop"),
            weight=flat_weight.reshape(sums.weight.shape),
            up=added.up,
            down=added.down,
        )

    (gradients,) = transpose(gradient)
    return jax.lax.fori_loop(0, plan.num_chunks, add_chunk, gradients), None


_with_overflow.defvjp(_overflow_forward, _overflow_backward)


class _Chunk(NamedTuple):
    """A chunk of overflow: this device's choices, and all devices' rows for its experts."""

    choice: Int[Array, "chunk"]
    token: Int[Array, "chunk"]
    inputs: ExpertInputs
    rows: GroupedRows


def _overflow_chunk(
    transport: Transport, index: Int[Array, ""], inputs: ExpertInputs, plan: RaggedDispatch
) -> _Chunk:
    parallel = transport.parallel
    start = index * transport.chunk_rows
    choice = jax.lax.dynamic_slice_in_dim(plan.overflow, start, transport.chunk_rows)
    token = choice // inputs.weight.shape[1]
    weight = gather_rows(inputs.weight.reshape(-1), choice)
    all_inputs = inputs._replace(
        x=parallel.all_gather(gather_rows(inputs.x, token)),
        weight=parallel.all_gather(weight)[:, None],
    )
    ids = parallel.all_gather(gather_rows(plan.choice_id, choice))
    expert = plan.expert.at[choice].get(mode="fill", fill_value=-1)
    expert = parallel.all_gather(expert)

    local_experts = inputs.down.shape[0]
    local_expert = expert - parallel.axis_index("expert") * local_experts
    local_expert = jnp.where(expert < 0, local_experts, local_expert)[:, None]
    chosen = local_expert == jnp.arange(local_experts)
    position = jnp.sum((jnp.cumsum(chosen, 0) - 1) * chosen, 1)[:, None]
    _, rows = group_rows(
        local_expert,
        position,
        chosen.sum(0),
        ids,
        block_rows=transport.function.block_rows,
        dropout_key=plan.received.dropout_key,
    )
    return _Chunk(choice, token, all_inputs, rows)
