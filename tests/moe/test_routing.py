"""Routers against hand-written literals and against what must hold for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moekit.moe.routing import (
    ROUTERS,
    ExpertChoice,
    GShard,
    Hash,
    LossFree,
    Random,
    Switch,
    TopK,
    router,
    top_k,
)

ALL = [
    Switch(),
    TopK(k=2),
    TopK(k=2, normalise=True, priority="choice"),
    TopK(k=3, priority="batch"),
    GShard(),
    GShard(priority="token"),
    ExpertChoice(),
    LossFree(k=2),
    Hash(),
    Random(),
]


def logits_of(probs):
    return jnp.log(jnp.asarray(probs))


def real(n):
    return jnp.ones(n, bool)


def test_switch_overflow_and_ties():
    # tokens 0, 1 and 2 want expert 0, which has two slots; token 3 is a tie and takes the lowest
    probs = [[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.5, 0.5]]
    r = Switch()(logits_of(probs), real(4), capacity=2)
    np.testing.assert_array_equal(r.expert_index[:, 0], [0, 0, 0, 0])
    np.testing.assert_array_equal(r.slot[:, 0], [0, 1, 4, 4])
    np.testing.assert_allclose(r.combine_weight[:, 0], [0.9, 0.6, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(r.slot_to_choice, [0, 1, 4, 4])


def test_choice_order_serves_all_first_choices_first():
    # both tokens want both experts, one slot each: in token order token 0 takes both
    probs = logits_of([[0.6, 0.4], [0.3, 0.7]])
    token = TopK(k=2)(probs, real(2), capacity=1)
    np.testing.assert_array_equal(token.slot, [[0, 1], [2, 2]])
    choice = TopK(k=2, priority="choice")(probs, real(2), capacity=1)
    np.testing.assert_array_equal(choice.slot, [[0, 2], [1, 2]])
    np.testing.assert_array_equal(choice.slot_to_choice, [0, 2])


def test_batch_order_serves_confident_tokens_first():
    probs = logits_of([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]])
    r = TopK(k=1, priority="batch")(probs, real(3), capacity=1)
    np.testing.assert_array_equal(r.slot[:, 0], [2, 0, 2])
    np.testing.assert_array_equal(r.slot_to_choice, [1, 3])


def test_gshard_weights_and_random_second_expert():
    probs = logits_of([[0.6, 0.3, 0.1]])
    r = GShard()(probs, real(1), capacity=1)
    np.testing.assert_allclose(r.combine_weight[0], [2 / 3, 1 / 3], rtol=1e-6)
    assert r.balance_choices == 1
    # g2 = 1/3 of threshold 1 is used in a third of draws
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = jax.vmap(lambda key: GShard(threshold=1.0)(probs, real(1), capacity=1, key=key))(keys)
    used = np.asarray(draw.expert_index)[:, 0, 1] < 3
    assert abs(used.mean() - 1 / 3) < 0.04
    np.testing.assert_allclose(draw.combine_weight[:, 0, 0], 2 / 3, rtol=1e-6)


def test_expert_choice_takes_the_best_tokens():
    probs = logits_of([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]])
    r = ExpertChoice()(probs, real(3), capacity=2)
    np.testing.assert_array_equal(r.slot_to_choice, [1 * 2, 0 * 2, 2 * 2 + 1, 0 * 2 + 1])
    np.testing.assert_allclose(r.combine_weight, [[0.6, 0.4], [0.9, 0.0], [0.0, 0.8]], rtol=1e-6)


def test_loss_free_chooses_by_bias_and_weighs_without():
    probs = logits_of([[0.6, 0.4]])
    r = LossFree()(probs, real(1), capacity=1, bias=jnp.array([0.0, 0.3]))
    np.testing.assert_array_equal(r.expert_index, [[1]])
    np.testing.assert_allclose(r.combine_weight, [[0.4]], rtol=1e-6)


def test_one_expert_and_all_experts():
    one = TopK(k=1)(jnp.zeros((3, 1)), real(3), capacity=3)
    np.testing.assert_array_equal(one.slot[:, 0], [0, 1, 2])
    every = TopK(k=3)(jnp.zeros((2, 3)), real(2), capacity=2)
    np.testing.assert_array_equal(every.expert_index, [[0, 1, 2]] * 2)
    np.testing.assert_array_equal(every.slot, [[0, 2, 4], [1, 3, 5]])


@pytest.mark.parametrize("route", ALL, ids=str)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), capacity=st.integers(1, 9), padding=st.integers(0, 9))
def test_slots_and_tokens_are_each_others_inverse(route, seed, capacity, padding):
    s, e = 9, 4
    k_logits, k_ids, key = jax.random.split(jax.random.key(seed), 3)
    mask = jnp.arange(s) < s - padding
    r = route(
        jax.random.normal(k_logits, (s, e)),
        mask,
        capacity=capacity,
        limit=jnp.asarray(max(1, capacity - 1)),
        key=key,
        token_ids=jax.random.randint(k_ids, (s,), 0, 100),
    )
    slot, slot_to_choice = np.asarray(r.slot), np.asarray(r.slot_to_choice)
    k, none = slot.shape[1], e * capacity
    for choice, where in enumerate(slot.reshape(-1)):
        if where < none:
            assert slot_to_choice[where] == choice
            assert where // capacity == np.asarray(r.expert_index).reshape(-1)[choice]
            assert where % capacity < max(1, capacity - 1)  # never past the limit
    assert (slot_to_choice < s * k).sum() == (slot < none).sum()
    kept = slot < none
    assert not kept[~np.asarray(mask)].any(), "padding took a slot"
    assert (np.asarray(r.expert_index)[~np.asarray(mask)] == e).all()
    assert (np.asarray(r.combine_weight)[~kept] == 0).all()
    np.testing.assert_allclose(np.asarray(r.probs).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("route", [Switch(), TopK(k=2), GShard(), ExpertChoice()], ids=str)
def test_the_router_gets_a_gradient(route):
    logits = jax.random.normal(jax.random.key(0), (6, 4))
    values = jax.random.normal(jax.random.key(1), (4,))

    def loss(logits):
        r = route(logits, real(6), capacity=3)
        return jnp.sum(r.combine_weight * jnp.append(values, 0.0)[r.expert_index])

    assert np.abs(jax.grad(loss)(logits)).max() > 1e-3


def test_normalised_top_1_has_no_gradient():
    """Why no preset renormalises a single choice: its weight is always one."""

    def loss(logits):
        return TopK(k=1, normalise=True)(logits, real(6), capacity=6).combine_weight.sum()

    np.testing.assert_allclose(jax.grad(loss)(jnp.ones((6, 4))), 0, atol=1e-7)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_top_k_equals_a_sort(seed, k):
    scores = jax.random.randint(jax.random.key(seed), (5, 4), 0, 3).astype(jnp.float32)
    index, onehot = top_k(scores, k)
    np.testing.assert_array_equal(index, jax.lax.top_k(scores, k)[1])
    np.testing.assert_array_equal(onehot, jax.nn.one_hot(index, 4).astype(bool))


def test_hash_is_fixed_and_spread():
    ids = jnp.arange(4000)
    r = Hash()(jnp.zeros((4000, 8)), real(4000), capacity=4000, token_ids=ids)
    load = np.bincount(np.asarray(r.expert_index)[:, 0], minlength=8)
    assert load.min() > 400
    with pytest.raises(ValueError, match="token_ids"):
        Hash()(jnp.zeros((2, 2)), real(2), capacity=1)


def test_names():
    assert router("switch") == Switch() and set(ROUTERS) >= {"gshard", "expert-choice"}
    with pytest.raises(ValueError, match="did you mean 'switch'"):
        router("swich")
    with pytest.raises(ValueError, match="priority"):
        TopK(k=2, priority="tokens")
    with pytest.raises(ValueError, match="1 or more"):
        TopK(k=0)


@pytest.mark.parametrize("route", [TopK(k=3), GShard(), LossFree(k=2)], ids=str)
def test_no_expert_is_chosen_twice(route):
    with pytest.raises(ValueError, match="cannot choose among 1 experts"):
        route(jnp.zeros((2, 1)), real(2), capacity=1)
