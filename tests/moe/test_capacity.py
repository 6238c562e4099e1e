"""Slots, and the gathers that fill and read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moekit.moe.capacity import (
    capacity_table,
    combine,
    dispatch,
    dispatch_indices,
    slots_per_expert,
)
from moekit.moe.routing import ExpertChoice, TopK

E = 4


def test_capacity_conventions():
    assert slots_per_expert(4096, 64, 1.25, choices=1, minimum=4) == 80  # flaxformer
    assert slots_per_expert(4096, 64, 1.25, choices=2, minimum=4) == 160  # Mesh-TensorFlow
    assert slots_per_expert(16, 64, 1.25, choices=1, minimum=4) == 4
    assert slots_per_expert(3, 1, 8.0, choices=1, minimum=4) == 3  # never more than tokens
    table = capacity_table(4096, 64, 1.25, choices=1, minimum=4)
    assert table[4096] == 80 and table[0] == 0 and (np.diff(table) >= 0).all()


@given(
    group_tokens=st.integers(0, 300),
    num_experts=st.integers(1, 64),
    capacity_factor=st.floats(0.01, 8),
    choices=st.integers(1, 4),
    minimum=st.integers(1, 8),
)
@settings(max_examples=50, deadline=None)
def test_the_table_holds_the_slots_of_every_number_of_tokens(
    group_tokens, num_experts, capacity_factor, choices, minimum
):
    table = capacity_table(
        group_tokens, num_experts, capacity_factor, choices=choices, minimum=minimum
    )
    expected = [
        slots_per_expert(tokens, num_experts, capacity_factor, choices=choices, minimum=minimum)
        for tokens in range(group_tokens + 1)
    ]
    np.testing.assert_array_equal(table, expected)


@pytest.mark.parametrize("route", [TopK(k=2), ExpertChoice()], ids=str)
def test_dispatch_is_linear_and_its_transpose_is_its_gradient(route):
    logits = jax.random.normal(jax.random.key(0), (2, 6, E))
    mask = jnp.arange(12).reshape(2, 6) < 10
    routing = jax.vmap(lambda logits, mask: route(logits, mask, capacity=3))(logits, mask)
    indices = dispatch_indices(routing, E)
    x, y = jax.random.normal(jax.random.key(1), (12, 8)), jnp.ones((E * 2 * 3, 8))
    slots, transpose = jax.vjp(lambda x: dispatch(x, indices), x)
    np.testing.assert_allclose(jnp.vdot(slots, y), jnp.vdot(x, transpose(y)[0]), rtol=1e-5)
    filled = np.asarray(indices.token) < 12
    assert (np.asarray(slots)[~filled] == 0).all() and filled.any()
    poisoned = jnp.where(filled[:, None], y, jnp.nan)
    assert np.isfinite(combine(poisoned, indices)).all()
