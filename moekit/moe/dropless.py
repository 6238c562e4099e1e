"""Dropless transport: every token reaches all its experts, at a cost that follows the tokens.

Choices are put in order of their experts by a counting sort (a choice's place in its expert's queue
is known from routing). Each expert's rows are cut into blocks and a loop runs over the blocks that
there are: a block reads its tokens, goes through the expert, and is added to the output, so nothing
of the size of all rows is moved. The number of blocks is known only at run time; the gradient is a
second loop of the same kind (custom vjp).

Across devices (`Place`) tokens are gathered along the expert axis, every device adds up what its
own experts make of them, and the sums are scattered back: an all-gather and a reduce-scatter, which
every backend has. `ragged.py` does better where a backend can.

T tokens, K choices per token, E experts, N rows (choices in order, with gaps), D features, F hidden
features, M rows in a block.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from moekit.moe.parallel import Place
from moekit.moe.routing import Routing
from moekit.sharding import cast_varying, varying_axes


@no_type_check  # a pytree: see Routing
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Choices in order of their experts, whose rows begin at a multiple of the block."""

    choice: Int[Array, "N"]  # t * K + k, T * K where there is none
    id: Int[Array, "N"]  # number of the choice among those of all devices
    size: Int[Array, "E"]  # rows of each expert
    key: Key[Array, ""] | None  # of expert dropout


@no_type_check  # a function among its fields
@dataclass(frozen=True)
class Network:
    """An expert as functions: its activation, and what expert dropout keeps of some rows."""

    act: Callable  # (hidden[, gate]) -> activation
    keep: Callable  # (key, ids [M]) -> [M F] or None
    block: int
    save: bool  # keep the hidden features for the backward pass instead of computing them again

    def activate(self, rows: Rows, ids: Int[Array, "M"], *hidden: Float[Array, "M F"]):
        """The activation of some rows, after dropout."""
        a = self.act(*hidden)
        return a if rows.key is None else a * self.keep(rows.key, ids).astype(a.dtype)


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
    ids: Int[Array, "TK"],
    *,
    block: int = 1,
    key: Key[Array, ""] | None = None,
) -> tuple[Int[Array, "T K"], Rows]:
    """The row of each choice (N where it has none), and the rows.

    Only choices with 0 <= expert < E get one; an expert's first row begins a block.
    """
    choices, experts = expert.size, size.shape[0]
    total = -(-(choices + experts * (block - 1)) // block) * block
    blocks = -(-size // block)
    start = (jnp.cumsum(blocks) - blocks) * block
    here = (expert >= 0) & (expert < experts)
    row = jnp.where(here, start[jnp.clip(expert, 0, experts - 1)] + rank, total)
    numbers = jnp.arange(choices)
    choice = jnp.full(total, choices).at[row.reshape(-1)].set(numbers, mode="drop")
    return row, Rows(choice, take(ids, choice), size, key)


def take(x: Shaped[Array, "rows *S"], index: Int[Array, "N"]) -> Shaped[Array, "N *S"]:
    """Rows of x, zeros where the index is past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


def zeros(shape: tuple[int, ...], dtype, like: Array) -> Array:
    """Zeros that vary over the devices as `like` does, for a loop to start from."""
    return cast_varying(jnp.zeros(shape, dtype), varying_axes(like))


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


def _blocks(how, x, weight, rows):
    """How many blocks there are, and a function of their number: its first row, expert, choices,
    tokens, their features and weights."""
    ends = jnp.cumsum(-(-rows.size // how.block))
    owner = jnp.sum(jnp.arange(rows.choice.size // how.block)[:, None] >= ends, 1)

    def block(i):
        choice = jax.lax.dynamic_slice_in_dim(rows.choice, i * how.block, how.block)
        token = choice // weight.shape[1]  # T where there is none: reads zeros, adds nowhere
        scale = take(weight.reshape(-1), choice)[:, None].astype(x.dtype)
        return i * how.block, owner[i], choice, token, take(x, token), scale

    return ends[-1], block


def _cut(array, at, how):
    return jax.lax.dynamic_slice_in_dim(array, at, how.block)


def _forward(how, x, weight, up, down, rows):
    count, block = _blocks(how, x, weight, rows)

    def body(i, carry):
        y, saved = carry
        at, expert, _, token, xs, scale = block(i)
        hidden = [xs @ w[expert] for w in up]
        out = how.activate(rows, _cut(rows.id, at, how), *hidden) @ down[expert]
        if how.save:
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
            saved = [put(s, h, at) for s, h in zip(saved, hidden, strict=True)]
        return y.at[token].add(scale * out, mode="drop"), saved

    stored = rows.choice.shape[0] if how.save else 0
    saved = [zeros((stored, w.shape[-1]), x.dtype, x) for w in up]
    y, saved = jax.lax.fori_loop(0, count, body, (zeros(x.shape, x.dtype, x), saved))
    return y, (x, weight, up, down, rows, saved)


def backward(how, x, weight, up, down, rows, saved, g, dup, ddown):
    """Gradients of x and weight, and `dup` and `ddown` with the weights' gradients added."""
    count, block = _blocks(how, x, weight, rows)

    def body(i, carry):
        dx, dweight, dup, ddown = carry
        at, expert, choice, token, xs, scale = block(i)
        hidden = [_cut(s, at, how) for s in saved] if how.save else [xs @ w[expert] for w in up]
        activate = functools.partial(how.activate, rows, _cut(rows.id, at, how))
        a, transpose = jax.vjp(activate, *hidden)
        gs = take(g, token)
        da = gs @ down[expert].T
        # <expert(x), g> = <a down, g> = <a, g down^T>: the output itself is not needed
        dweight = dweight.at[choice].set(jnp.sum(a * da, -1, dtype=jnp.float32), mode="drop")
        dhidden = transpose(scale * da)
        back = sum(d @ w[expert].T for d, w in zip(dhidden, up, strict=True))
        dup = [acc.at[expert].add(xs.T @ d) for acc, d in zip(dup, dhidden, strict=True)]
        ddown = ddown.at[expert].add((scale * a).T @ gs)
        return dx.at[token].add(back, mode="drop"), dweight, dup, ddown

    start = (zeros(x.shape, x.dtype, x), zeros((weight.size,), jnp.float32, x), [*dup], ddown)
    dx, dweight, dup, ddown = jax.lax.fori_loop(0, count, body, start)
    return dx, dweight.reshape(weight.shape).astype(weight.dtype), tuple(dup), ddown


def _backward(how, residuals, g):
    x, _, up, down, *_ = residuals
    dup, ddown = jax.tree.map(lambda w: zeros(w.shape, w.dtype, x), (up, down))
    return *backward(how, *residuals, g, dup, ddown), None


apply.defvjp(_forward, _backward)


def numbers(expert: Int[Array, "T K"], place: Place) -> Int[Array, "TK"]:
    """Of this device's choices, among those of all devices."""
    first = place.index("data", "expert") * expert.size
    return first + jnp.arange(expert.size)


def send(
    how: Network,
    x: Float[Array, "T D"],
    weight: Float[Array, "T K"],
    up: tuple[Float[Array, "E D F"], ...],
    down: Float[Array, "E F D"],
    routing: Routing,
    *,
    key: Key[Array, ""] | None,
    place: Place,
) -> Float[Array, "T D"]:
    """The tokens of a device through all experts of its row of the mesh; it holds E of them.

    Args:
      key: of expert dropout.
    """
    local, n = down.shape[0], place.size("expert")
    rank, size = queue(routing, local * n)
    expert = routing.expert_index.reshape(rank.shape)
    ids = numbers(expert, place)
    if n > 1:
        sizes = place.gather(size[None])  # [n, E]
        before = jnp.cumsum(sizes, 0) - sizes
        mine = jnp.pad(before[place.index("expert")], (0, 1))  # the last: no expert
        rank = rank + mine[expert]
        x, weight, expert, rank, ids = map(place.gather, (x, weight, expert, rank, ids))
        begin = place.index("expert") * local
        size = jax.lax.dynamic_slice_in_dim(sizes.sum(0), begin, local)
        expert = expert - begin
    _, rows = order(expert, rank, size, ids, block=how.block, key=key)
    y = apply(how, x, weight, up, down, rows)
    return y if n == 1 else place.scatter(y)
