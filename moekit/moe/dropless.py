"""Dropless transport: every token reaches all its experts, at a cost that follows the tokens.

Choices are put in order of their experts by a counting sort (a choice's place in its expert's queue
is known from routing). Each expert's rows are cut into blocks and a loop runs over the blocks that
there are: a block reads its tokens, goes through the expert, and is added to the output, so nothing
of the size of all rows is moved. The number of blocks is known only at run time; the gradient is a
second loop of the same kind (custom vjp).

Across devices (`Place`) tokens are gathered along the expert axis, every device adds up what its
own experts make of them, and the sums are scattered back: an all-gather and a reduce-scatter, which
every backend has.

T tokens, K choices per token, E experts, N rows (choices in order, with gaps), D features, F hidden
features, M rows in a block.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moekit.moe.parallel import Place
from moekit.moe.routing import Routing


@no_type_check  # a pytree: see Routing
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Choices in order of their experts: expert e has the size[e] rows from start[e] on."""

    choice: Int[Array, "N"]  # t * K + k, T * K where there is none
    start: Int[Array, "E"]
    size: Int[Array, "E"]
    key: Key[Array, ""] | None  # of expert dropout
    first: Int[Array, ""]  # number of this device's choice 0 among those of all devices


@no_type_check  # a function among its fields
@dataclass(frozen=True)
class Network:
    """An expert as functions: its activation, and what expert dropout keeps of a block."""

    act: Callable  # (hidden[, gate]) -> activation
    keep: Callable  # (key, choices [M]) -> [M F] or None
    block: int
    save: bool  # keep the hidden features for the backward pass instead of computing them again


def block_size(rows: int, num_experts: int, largest: int = 128) -> int:
    """A power of two near the rows that an expert expects: larger blocks are padding, smaller ones
    waste the processor; 128 and more rows make a product efficient."""
    expected = max(1, rows // num_experts)
    return min(largest, max(8, 1 << (expected - 1).bit_length()))


def queue(routing: Routing, num_experts: int) -> tuple[Int[Array, "T K"], Int[Array, "E"]]:
    """Each choice's place among all choices of its expert, and how many there are, for a routing of
    groups [G, S, K] in which nothing was dropped."""
    index = routing.expert_index
    counts = jnp.sum(index[..., None] == jnp.arange(num_experts), (1, 2))  # [G, E]
    before = jnp.pad(jnp.cumsum(counts, 0) - counts, ((0, 0), (0, 1)))  # the last: no expert
    rank = jnp.take_along_axis(before[:, None], index, -1) + routing.slot % routing.capacity
    return rank.reshape(-1, index.shape[-1]), counts.sum(0)


def order(
    expert: Int[Array, "T K"],
    rank: Int[Array, "T K"],
    size: Int[Array, "E"],
    block: int,
    key: Key[Array, ""] | None,
    first: int | Int[Array, ""] = 0,
) -> Rows:
    """Rows for the choices with 0 <= expert < E; an expert's first row begins a block."""
    choices, experts = expert.size, size.shape[0]
    rows = -(-choices // block) * block + experts * block
    blocks = -(-size // block)
    start = (jnp.cumsum(blocks) - blocks) * block
    flat = expert.reshape(-1)
    here = (flat >= 0) & (flat < experts)
    row = jnp.where(here, start[jnp.clip(flat, 0, experts - 1)] + rank.reshape(-1), rows)
    choice = jnp.full(rows, choices).at[row].set(jnp.arange(choices), mode="drop")
    return Rows(choice, start, size, key, jnp.asarray(first))


def _rows(x, index):
    return x.at[index].get(mode="fill", fill_value=0)


def _zeros(shape, dtype, like):
    """Zeros that vary over the devices as `like` does, for a loop to start from."""
    zeros = jnp.zeros(shape, dtype)
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply(
    how: Network,
    x: Float[Array, "T D"],
    weight: Float[Array, "T K"],
    up: tuple[Float[Array, "E D F"], ...],
    down: Float[Array, "E F D"],
    rows: Rows,
) -> Float[Array, "T D"]:
    """y[t] = sum_k weight[t, k] * expert(x[t]) over the choices in `rows`.

    `up` holds the experts' first products: (wi,) or (wi, wg).
    """
    return _forward(how, x, weight, up, down, rows)[0]


def _block(how, x, weight, rows, at):
    """Tokens of a block, its inputs and weights, and what dropout keeps of it."""
    choice = jax.lax.dynamic_slice_in_dim(rows.choice, at, how.block)
    token = choice // weight.shape[1]  # T where there is none: reads zeros, adds nowhere
    scale = _rows(weight.reshape(-1), choice)[:, None].astype(x.dtype)
    keep = None if rows.key is None else how.keep(rows.key, rows.first + choice)
    return choice, token, _rows(x, token), scale, keep


def _activation(how, keep, *hidden):
    a = how.act(*hidden)
    return a if keep is None else a * keep.astype(a.dtype)


def _forward(how, x, weight, up, down, rows):
    stored = rows.choice.shape[0] if how.save else 0
    saved = [_zeros((stored, w.shape[-1]), x.dtype, x) for w in up]

    def expert(carry, operands):
        up, down, start, size = operands

        def body(i, carry):
            y, saved = carry
            at = start + i * how.block
            _, token, xs, scale, keep = _block(how, x, weight, rows, at)
            hidden = [xs @ w for w in up]
            out = _activation(how, keep, *hidden) @ down
            if how.save:
                put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
                saved = [put(s, h, at) for s, h in zip(saved, hidden, strict=True)]
            return y.at[token].add(scale * out, mode="drop"), saved

        return jax.lax.fori_loop(0, -(-size // how.block), body, carry), None

    start = (_zeros(x.shape, x.dtype, x), saved)
    (y, saved), _ = jax.lax.scan(expert, start, (up, down, rows.start, rows.size))
    return y, (x, weight, up, down, rows, saved)


def _backward(how, residuals, g):
    x, weight, up, down, rows, saved = residuals

    def expert(carry, operands):
        up, down, start, size = operands

        def body(i, carry):
            dx, dweight, dup, ddown = carry
            at = start + i * how.block
            choice, token, xs, scale, keep = _block(how, x, weight, rows, at)
            if how.save:
                cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=how.block)
                hidden = [cut(s, at) for s in saved]
            else:
                hidden = [xs @ w for w in up]
            a, transpose = jax.vjp(functools.partial(_activation, how, keep), *hidden)
            gs = _rows(g, token)
            da = gs @ down.T
            # <expert(x), g> = <a down, g> = <a, g down^T>: the output itself is not needed
            dscale = jnp.sum(a * da, -1, dtype=jnp.float32)
            dweight = dweight.at[choice].set(dscale, mode="drop")
            dhidden = transpose(scale * da)
            dx = dx.at[token].add(
                sum(d @ w.T for d, w in zip(dhidden, up, strict=True)), mode="drop"
            )
            dup = [acc + xs.T @ d for acc, d in zip(dup, dhidden, strict=True)]
            return dx, dweight, dup, ddown + (scale * a).T @ gs

        zeros = [_zeros(w.shape, w.dtype, x) for w in (*up, down)]
        carry = (*carry, zeros[:-1], zeros[-1])
        *carry, dup, ddown = jax.lax.fori_loop(0, -(-size // how.block), body, carry)
        return tuple(carry), (tuple(dup), ddown)

    start = (_zeros(x.shape, x.dtype, x), _zeros((weight.size,), jnp.float32, x))
    operands = (up, down, rows.start, rows.size)
    (dx, dweight), (dup, ddown) = jax.lax.scan(expert, start, operands)
    return dx, dweight.reshape(weight.shape).astype(weight.dtype), dup, ddown, None


apply.defvjp(_forward, _backward)


def send(
    x: Float[Array, "T D"],
    weight: Float[Array, "T K"],
    routing: Routing,
    num_experts: int,
    run: Callable,
    *,
    block: int,
    key: Key[Array, ""] | None,
    place: Place,
) -> Float[Array, "T D"]:
    """The tokens of a device through all experts of its row of the mesh.

    Args:
      run: (x, weight, rows) of many tokens -> what the experts that live here add to them.
      block: rows in a block.
      key: of expert dropout.
    """
    rank, size = queue(routing, num_experts)
    expert = routing.expert_index.reshape(rank.shape)
    first = place.index("data") * place.size("expert") * expert.size
    if place.size("expert") == 1:
        return run(x, weight, order(expert, rank, size, block, key, first))
    sizes = place.gather(size[None])  # [n, E]
    before = jnp.cumsum(sizes, 0) - sizes
    mine = jnp.pad(before[place.index("expert")], (0, 1))  # the last: no expert
    rank = rank + mine[expert]
    x, weight, expert, rank = (place.gather(a) for a in (x, weight, expert, rank))
    local = num_experts // place.size("expert")
    begin = place.index("expert") * local
    total = jax.lax.dynamic_slice_in_dim(sizes.sum(0), begin, local)
    rows = order(expert - begin, rank, total, block, key, first)
    return place.scatter(run(x, weight, rows))
