"""Capacity transport: tokens to expert slots and back, by gathers in both directions.

Each expert has a fixed number of slots, so every shape is static and no one-hot tensor
[token, expert, capacity] is ever built. A token knows its slots and a slot knows its token
(`Routing`), therefore the transpose of each gather is again a gather: both operations carry a
custom vjp. Where tokens may hold many more choices than there are slots (Expert Choice: K = E)
the sum over a token's choices is a scatter-add over the few slots instead.

G groups, S tokens in a group, E experts, K choices, C slots per expert and group, D features.
"""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moekit.moe.routing import Routing


def slots_per_expert(
    group_tokens: int, num_experts: int, capacity_factor: float, *, choices: int, minimum: int
) -> int:
    """max(round(capacity_factor * choices * group_tokens / experts), minimum), at most all tokens.

    `choices` is 1 in flaxformer's convention (capacity without k: at top-2 and 1.25 only 62.5 % of
    assignments can fit) and k in Mesh-TensorFlow's and GShard's.
    """
    slots = max(round(capacity_factor * choices * group_tokens / num_experts), minimum)
    return min(slots, group_tokens)


def capacity_table(
    group_tokens: int, num_experts: int, capacity_factor: float, *, choices: int, minimum: int
) -> Int[np.ndarray, "counts"]:
    """Slots in use for 0, 1, .. S real tokens, so that padding changes no capacity."""
    return np.array(
        [
            slots_per_expert(n, num_experts, capacity_factor, choices=choices, minimum=minimum)
            for n in range(group_tokens + 1)
        ],
        np.int32,
    )


@no_type_check  # a pytree: see Routing
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """A `Routing` of all groups as flat indices into tokens [G*S] and slots [E*G*C]."""

    slot: Int[Array, "G*S K"]  # E*G*C where there is none
    token: Int[Array, "E*G*C"]  # G*S where the slot is empty
    choice: Int[Array, "E*G*C"]  # g*S*K + s*K + k, G*S*K where the slot is empty
    weight: Float[Array, "G*S K"]


def plan(routing: Routing, num_experts: int) -> Plan:
    """Flat indices of a routing with a leading group axis; slots are laid out [E, G, C]."""
    g, s, k = routing.slot.shape
    c = routing.capacity
    group = jnp.arange(g)[:, None, None]
    expert, position = routing.slot // c, routing.slot % c
    none = num_experts * g * c
    slot = jnp.where(expert < num_experts, (expert * g + group) * c + position, none)
    flat = routing.assignment.reshape(g, num_experts, c)
    choice = jnp.where(flat < s * k, group * (s * k) + flat, g * s * k)
    choice = choice.transpose(1, 0, 2).reshape(-1)
    return Plan(
        slot.reshape(g * s, k), choice // k, choice, routing.combine_weight.reshape(g * s, k)
    )


def _rows(x: Float[Array, "rows D"], index: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows of x, zeros where the index is past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


def _sum_over_choices(y: Float[Array, "slots D"], p: Plan) -> Float[Array, "tokens D"]:
    """For every token the sum of its slots' rows."""
    tokens, k = p.slot.shape
    if tokens * k <= p.token.size * 2:
        return sum(_rows(y, p.slot[:, i]) for i in range(k))
    return jnp.zeros((tokens, y.shape[-1]), y.dtype).at[p.token].add(y, mode="drop")


@jax.custom_vjp
def dispatch(x: Float[Array, "tokens D"], p: Plan) -> Float[Array, "slots D"]:
    """The token of every slot; empty slots are zero whatever the padding holds."""
    return _rows(x, p.token)


def _dispatch_forward(x, p):
    return dispatch(x, p), p


def _dispatch_backward(p, g):
    return _sum_over_choices(g, p), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(y: Float[Array, "slots D"], p: Plan) -> Float[Array, "tokens D"]:
    """For every token the weighted sum of its experts' outputs; dropped tokens get exactly 0."""
    tokens, k = p.slot.shape
    if tokens * k <= p.token.size * 2:
        weight = p.weight.astype(y.dtype)
        return sum(weight[:, i, None] * _rows(y, p.slot[:, i]) for i in range(k))
    return _sum_over_choices(y * _slot_weight(p, y.dtype), p)


def _slot_weight(p: Plan, dtype) -> Float[Array, "slots 1"]:
    return p.weight.reshape(-1).at[p.choice].get(mode="fill", fill_value=0)[:, None].astype(dtype)


def _combine_forward(y, p):
    return combine(y, p), (y, p)


def _combine_backward(residuals, g):
    y, p = residuals
    returned = _rows(g, p.token)
    # products in the type of y: converted first, twice the bytes would change layout on a TPU
    per_slot = jnp.sum(y * returned, -1, dtype=jnp.float32)
    weight = per_slot.at[p.slot].get(mode="fill", fill_value=0)
    no_gradient = Plan(None, None, None, weight)
    return returned * _slot_weight(p, y.dtype), no_gradient


combine.defvjp(_combine_forward, _combine_backward)
