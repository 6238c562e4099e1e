"""Capacity dispatch: tokens to expert slots and back, by gathers in both directions.

Each expert has a fixed number of slots, so every shape is static and no one-hot tensor
[token, expert, slot] is built. A token knows its slots and a slot knows its token (`Routing`), so
the transpose of each gather is again a gather: `dispatch` and `combine` have a custom vjp. Where
tokens may have many more choices than there are slots (Expert Choice: K = E), the sum over a
token's choices is a scatter-add from the few slots instead.

G groups, S tokens in a group, T = G * S tokens, E experts, K choices per token, C slots per expert
and group, N = E * G * C slots, D features.
"""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from moekit.moe.routing import Routing


def slots_per_expert(
    group_tokens: int, num_experts: int, capacity_factor: float, *, choices: int, minimum: int
) -> int:
    """max(round(capacity_factor * choices * group_tokens / experts), minimum), at most all tokens.

    `choices` is 1 in flaxformer's convention (capacity without k: at top-2 and 1.25 only 62.5 % of
    the choices can fit) and k in Mesh-TensorFlow's and GShard's.
    """
    slots = max(round(capacity_factor * choices * group_tokens / num_experts), minimum)
    return min(slots, group_tokens)


def capacity_table(
    group_tokens: int, num_experts: int, capacity_factor: float, *, choices: int, minimum: int
) -> Int[np.ndarray, "counts"]:
    """`slots_per_expert` of 0, 1, .. S tokens: slots for the real tokens of a padded group."""
    counts = np.arange(group_tokens + 1)
    balanced = np.round(capacity_factor * choices * counts / num_experts)
    slots = np.minimum(np.maximum(balanced, minimum), counts)
    return slots.astype(np.int32)


def group_capacity(
    mask: Bool[Array, "G S"],
    num_experts: int,
    capacity_factor: float,
    *,
    choices: int,
    minimum: int,
) -> tuple[int, Int[Array, "G"]]:
    """Slots per expert and group (static), and how many of them each group's real tokens use."""
    table = capacity_table(
        mask.shape[1], num_experts, capacity_factor, choices=choices, minimum=minimum
    )
    return int(table[-1]), jnp.asarray(table)[mask.sum(-1)]


@no_type_check  # a pytree: see Routing
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DispatchIndices:
    """A `Routing` of all groups as flat indices into tokens [T] and slots [N]."""

    slot: Int[Array, "T K"]  # N where the choice was dropped
    token: Int[Array, "N"]  # T where the slot is empty
    choice: Int[Array, "N"]  # t * K + k, T * K where the slot is empty
    weight: Float[Array, "T K"]

    @property
    def few_choices(self) -> bool:
        """Whether to sum over the tokens' choices instead of scattering from the slots."""
        return self.slot.size <= 2 * self.token.size


def dispatch_indices(routing: Routing, num_experts: int) -> DispatchIndices:
    """Flat indices of a routing with a leading group axis; slots are ordered [E, G, C]."""
    num_groups, group_tokens, k = routing.slot.shape
    capacity = routing.capacity
    group = jnp.arange(num_groups)[:, None, None]

    expert, position = routing.slot // capacity, routing.slot % capacity
    no_slot = num_experts * num_groups * capacity
    slot = (expert * num_groups + group) * capacity + position
    slot = jnp.where(expert < num_experts, slot, no_slot)

    group_choices = group_tokens * k
    choice = routing.slot_to_choice.reshape(num_groups, num_experts, capacity)
    filled = choice < group_choices
    choice = jnp.where(filled, group * group_choices + choice, num_groups * group_choices)
    choice = choice.transpose(1, 0, 2).reshape(-1)

    return DispatchIndices(
        slot=slot.reshape(-1, k),
        token=choice // k,
        choice=choice,
        weight=routing.combine_weight.reshape(-1, k),
    )


def gather_rows(x: Shaped[Array, "rows *D"], index: Int[Array, "*N"]) -> Shaped[Array, "..."]:
    """Rows of x, zeros where the index is past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def dispatch(x: Float[Array, "T D"], indices: DispatchIndices) -> Float[Array, "N D"]:
    """The token of every slot; empty slots are zero whatever the padding contains."""
    return gather_rows(x, indices.token)


def _dispatch_forward(
    x: Float[Array, "T D"], indices: DispatchIndices
) -> tuple[Float[Array, "N D"], DispatchIndices]:
    return dispatch(x, indices), indices


def _dispatch_backward(
    indices: DispatchIndices, slot_gradient: Float[Array, "N D"]
) -> tuple[Float[Array, "T D"], None]:
    return _sum_over_choices(slot_gradient, indices), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


def _sum_over_choices(y: Float[Array, "N D"], indices: DispatchIndices) -> Float[Array, "T D"]:
    """For every token the sum of its slots' rows."""
    num_tokens, k = indices.slot.shape
    if indices.few_choices:
        return sum(gather_rows(y, indices.slot[:, choice]) for choice in range(k))
    zeros = jnp.zeros((num_tokens, y.shape[-1]), y.dtype)
    return zeros.at[indices.token].add(y, mode="drop")


@jax.custom_vjp
def combine(y: Float[Array, "N D"], indices: DispatchIndices) -> Float[Array, "T D"]:
    """For every token the weighted sum of its experts' outputs; dropped tokens get exactly 0."""
    if not indices.few_choices:
        return _sum_over_choices(y * _slot_weight(indices, y.dtype), indices)
    weight = indices.weight.astype(y.dtype)
    total = 0
    for choice in range(weight.shape[1]):
        expert_output = gather_rows(y, indices.slot[:, choice])
        total = total + weight[:, choice, None] * expert_output
    return total


def _slot_weight(indices: DispatchIndices, dtype: DTypeLike) -> Float[Array, "N 1"]:
    weight = gather_rows(indices.weight.reshape(-1), indices.choice)
    return weight[:, None].astype(dtype)


def _combine_forward(
    y: Float[Array, "N D"], indices: DispatchIndices
) -> tuple[Float[Array, "T D"], tuple[Float[Array, "N D"], DispatchIndices]]:
    return combine(y, indices), (y, indices)


def _combine_backward(
    residuals: tuple[Float[Array, "N D"], DispatchIndices], gradient: Float[Array, "T D"]
) -> tuple[Float[Array, "N D"], DispatchIndices]:
    y, indices = residuals
    slot_gradient = gather_rows(gradient, indices.token)
    # multiplied in the type of y: converting first would double the bytes and, on a TPU, change
    # the layout
    weight_gradient = jnp.sum(y * slot_gradient, -1, dtype=jnp.float32)
    weight_gradient = gather_rows(weight_gradient, indices.slot)
    indices_gradient = DispatchIndices(None, None, None, weight_gradient)
    return slot_gradient * _slot_weight(indices, y.dtype), indices_gradient


combine.defvjp(_combine_forward, _combine_backward)
