"""Dropless transport where a backend has a ragged all-to-all: a device sends rows, not slots.

Every expert is sent the rows that there are for it and no padding. They arrive in the order of
experts, so nothing is sorted again: a slice is what one device has for one expert. The buffer that
takes them has a fixed size; what finds no place in it goes around the ring of `dropless.py`, some
rows at a time and as often as needed, usually never.

On TPUs the experts' products are the grouped kernels of megablox. They read the rows of each group
and no others: rows past the last group are left unwritten, and nothing here reads them. Elsewhere
they are `dropless.apply`'s blocks.

T tokens, K choices per token, E experts, n devices on the expert axis, L = E / n experts that live
on a device, N rows sent, R rows of the buffer, D features, F hidden features.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from moekit.moe.capacity import Plan, combine, dispatch
from moekit.moe.dropless import Network, Rows, apply, backward, numbers, order, queue, take
from moekit.moe.parallel import Place, Slices
from moekit.moe.routing import Routing
from moekit.sharding import platform

TILE = (256, 1024, 1024)  # rows, and the other two sides, of the products of a kernel
# A buffer has room for a balanced load and SPREAD / sqrt(L) of it besides: the more experts a
# device holds, the less their sum strays.
SPREAD = 1 / 4


def suits(mesh: Mesh | None) -> bool:
    """Whether the devices have the means; only a TPU gains from it without expert parallelism."""
    kind = platform(mesh)
    return kind == "tpu" or (kind != "cpu" and mesh is not None and mesh.shape["expert"] > 1)


@dataclass(frozen=True)
class Sizes:
    """What is fixed when compiling."""

    buffer: int  # R
    step: int  # late rows of a device that go around the ring at once
    tile: int  # rows in a tile of a kernel; 0: blocks, no kernels


class Trip(NamedTuple):
    """Where the choices of a device go, and what comes to it."""

    slot: Int[Array, "T K"]  # row of each choice; N where it has none
    choice: Int[Array, "N"]  # choice of each row
    expert: Int[Array, "TK"]
    ids: Int[Array, "TK"]
    there: Slices
    back: Slices
    arrived: Rows  # rows of the buffer as choices of their own
    late: Int[Array, "late"]  # choices that find no place, then T * K
    rounds: Int[Array, ""]  # around the ring, for the device that needs most


def send(
    how: Network,
    x: Float[Array, "T D"],
    weight: Float[Array, "T K"],
    up: tuple[Float[Array, "L D F"], ...],
    down: Float[Array, "L F D"],
    routing: Routing,
    *,
    key: Key[Array, ""] | None,
    place: Place,
) -> Float[Array, "T D"]:
    """As `dropless.send`."""
    n, choices = place.size("expert"), weight.size
    tile = min(TILE[0], _multiple(choices, 8)) if place.platform == "tpu" else 0
    room = 1 if n == 1 else 1 + SPREAD / math.sqrt(down.shape[0])
    gaps = 0 if tile else down.shape[0] * (how.block - 1)
    buffer = _multiple(round(room * choices) + gaps, tile or how.block)
    sizes = Sizes(buffer, max(8, -(-choices // 64)), tile)
    trip = _trip(routing, down.shape[0], sizes, how.block, key, place)
    if n == 1:
        return _through(how, place, sizes, x, weight, up, down, trip)
    return _send(how, place, sizes, x, weight, up, down, trip)


def _multiple(rows: int, of: int) -> int:
    return -(-rows // of) * of


def _trip(routing: Routing, local: int, sizes: Sizes, block: int, key, place: Place) -> Trip:
    n, me = place.size("expert"), place.index("expert")
    rank, size = queue(routing, local * n)
    expert = routing.expert_index.reshape(rank.shape)
    ids = numbers(expert, place)
    slot, rows = order(expert, rank, size, ids)
    counts = place.gather(size[None])  # [n, E]
    # at their receiver rows lie by expert, then by sender
    waiting = counts.reshape(n, n, local).transpose(1, 2, 0)
    unit = 1 if sizes.tile else block
    length = -(-waiting.sum(-1) // unit) * unit
    begin = (jnp.cumsum(length, 1) - length)[..., None]
    offset = begin + jnp.cumsum(waiting, 2) - waiting
    fits = jnp.clip(sizes.buffer - offset, 0, waiting)

    def by_sender(a):
        return a.transpose(2, 0, 1).reshape(n, n * local)

    def to_me(a):
        return jax.lax.dynamic_slice_in_dim(a, me * local, local, 1).reshape(-1)

    offset, fitting = by_sender(offset), by_sender(fits)
    start = jnp.cumsum(counts, 1) - counts
    there = Slices(start[me], fitting[me], offset[me], to_me(fitting))
    back = Slices(to_me(offset), to_me(fitting), to_me(start), fitting[me])
    arrived = _arrived(fits[me].sum(-1), begin[me], sizes.buffer)
    if key is not None:
        arriving = place.exchange(rows.id[:, None], sizes.buffer, there)
        arrived = replace(arrived, id=arriving[:, 0], key=key)
    behind = rank >= jnp.pad(fitting[me], (0, 1), constant_values=rank.size)[expert]
    (late,) = jnp.nonzero(
        behind.reshape(-1), size=_multiple(rank.size, sizes.step), fill_value=rank.size
    )
    rounds = -(-jnp.max(jnp.sum(counts - fitting, 1)) // sizes.step)
    return Trip(slot, rows.choice, expert.reshape(-1), ids, there, back, arrived, late, rounds)


def _arrived(size: Int[Array, "L"], begin: Int[Array, "L 1"], buffer: int) -> Rows:
    row = jnp.arange(buffer)
    filled = jnp.any((row >= begin) & (row < begin + size[:, None]), 0)
    return Rows(jnp.where(filled, row, buffer), row, size, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def move(
    place: Place, rows: int, x: Float[Array, "sent D"], there: Slices, back: Slices
) -> Float[Array, "received D"]:
    """Rows of x to where `there` says, in buffers of `rows`; their cotangents come `back`."""
    return place.exchange(x, rows, there)


def _move_forward(place, rows, x, there, back):
    return move(place, rows, x, there, back), (x.shape[0], back)


def _move_backward(place, rows, residuals, g):
    sent, back = residuals
    return place.exchange(g, sent, back), None, None


move.defvjp(_move_forward, _move_backward)


def kernels(
    how: Network,
    tile: int,
    x: Float[Array, "R D"],
    up: tuple[Float[Array, "L D F"], ...],
    down: Float[Array, "L F D"],
    rows: Rows,
) -> Float[Array, "R D"]:
    """Every row through its expert; rows past the last group come out as anything."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    def product(x, w):
        return gmm(x, w, rows.size, x.dtype, (tile, *TILE[1:]))

    hidden = [product(x, w) for w in up]
    return product(how.activate(rows, rows.id, *hidden), down)


def _through(how, place, sizes, x, weight, up, down, trip):
    """What finds its place."""
    plan = Plan(trip.slot, trip.choice // weight.shape[1], trip.choice, weight)
    arrived = move(place, sizes.buffer, dispatch(x, plan), trip.there, trip.back)
    if sizes.tile:
        made = kernels(how, sizes.tile, arrived, up, down, trip.arrived)
    else:
        made = apply(how, arrived, jnp.ones((sizes.buffer, 1)), up, down, trip.arrived)
    return combine(move(place, trip.choice.size, made, trip.back, trip.there), plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _send(how, place, sizes, x, weight, up, down, trip):
    return _send_forward(how, place, sizes, x, weight, up, down, trip)[0]


def _send_forward(how, place, sizes, x, weight, up, down, trip):
    through = functools.partial(_through, how, place, sizes, trip=trip)
    y, pullback = jax.vjp(through, x, weight, up, down)
    ring = replace(how, save=False)

    def late(i, y):
        _, token, operands, rows = _late(ring, place, sizes, i, x, weight, trip)
        out = apply(ring, *operands, up, down, rows)
        return y.at[token].add(place.scatter(out), mode="drop")

    return jax.lax.fori_loop(0, trip.rounds, late, y), (pullback, x, weight, up, down, trip)


def _send_backward(how, place, sizes, residuals, g):
    pullback, x, weight, up, down, trip = residuals
    ring = replace(how, save=False)

    def late(i, grads):
        dx, dweight, dup, ddown = grads
        choice, token, operands, rows = _late(ring, place, sizes, i, x, weight, trip)
        gs = place.gather(take(g, token))
        dxs, dws, dup, ddown = backward(ring, *operands, up, down, rows, [], gs, dup, ddown)
        dweight = dweight.reshape(-1).at[choice].add(place.scatter(dws)[:, 0], mode="drop")
        dx = dx.at[token].add(place.scatter(dxs), mode="drop")
        return dx, dweight.reshape(weight.shape), dup, ddown

    return *jax.lax.fori_loop(0, trip.rounds, late, pullback(g)), None


_send.defvjp(_send_forward, _send_backward)


def _late(ring: Network, place: Place, sizes: Sizes, i, x, weight, trip: Trip):
    """The i-th part of this device's late choices and their tokens; then the features and weights
    of all devices' parts, and of these the rows of the experts that live here."""
    local = trip.arrived.size.shape[0]
    choice = jax.lax.dynamic_slice_in_dim(trip.late, i * sizes.step, sizes.step)
    token = choice // weight.shape[1]
    here = trip.expert.at[choice].get(mode="fill", fill_value=-1)
    mine = (take(x, token), take(weight.reshape(-1), choice), here, take(trip.ids, choice))
    xs, ws, expert, ids = map(place.gather, mine)
    expert = jnp.where(expert < 0, local, expert - place.index("expert") * local)[:, None]
    chosen = expert == jnp.arange(local)
    rank = jnp.sum((jnp.cumsum(chosen, 0) - 1) * chosen, 1)[:, None]
    key, block = trip.arrived.key, ring.block
    _, rows = order(expert, rank, chosen.sum(0), ids, block=block, key=key)
    return choice, token, (xs, ws[:, None]), rows
