"""Measures of specialization on synthetic traces with known answers."""

import numpy as np
import pytest

import moekit as mk
from moekit.analysis import specialization as s


def test_domains_that_own_their_experts(one_choice):
    # forty examples of four tokens: domain a goes to experts 0 and 1, b to 2 and 3
    examples = np.repeat(np.arange(40), 4)
    domains = ["a" if i % 2 else "b" for i in range(40)]
    first = np.where(examples % 2 == 1, 0, 2)
    trace = one_choice(first + np.arange(160) % 2, domains=domains, example=examples)
    result = s.domain_specialization(trace)
    assert result.labels == ("a", "b") and result.chance[0] == 0.25
    np.testing.assert_allclose(result.share[0].T, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(result.low, result.share)
    assert result.p_value[0] < 0.02
    assert s.label_distance(result)[0, 0, 1] == pytest.approx(1)
    assert s.label_distance(result)[0, 0, 0] == 0


def test_labels_without_meaning_are_not_significant(one_choice):
    rng, p_values = np.random.default_rng(0), []
    for _ in range(12):
        examples = np.repeat(np.arange(30), 5)
        trace = one_choice(
            rng.integers(0, 4, 150), domains=list(rng.choice(["a", "b", "c"], 30)), example=examples
        )
        p_values.append(s.domain_specialization(trace, resamples=60).p_value[0])
    assert np.mean(np.array(p_values) < 0.1) < 0.4 and np.mean(p_values) > 0.25


def test_tokens_per_expert(one_choice):
    trace = one_choice([0] * 25 + [1] * 5 + [2] * 30 + [3] * 3, token=[7] * 30 + [8] * 30 + [9] * 3)
    result = s.token_specialization(trace, min_count=20)
    assert result.tokens.tolist() == [7, 8] and result.count.tolist() == [30, 30]
    np.testing.assert_allclose(result.share[0, :, 0], [25 / 30, 5 / 30, 0, 0])
    assert result.top(0, 2, 1) == [(8, 1.0)] and result.chance[0] == 0.25
    with pytest.raises(ValueError, match="no token occurs 99 times"):
        s.token_specialization(trace, min_count=99)


def test_coactivation_counts_all_pairs_whatever_their_rank(synthetic):
    expert = np.array([[[0, 1, 2], [2, 0, -1], [0, 3, -1]]])
    together = s.coactivation(synthetic(expert))[0]
    assert together[0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1 / 3])
    assert together[2].tolist() == pytest.approx([1, 1 / 2, 0, 0])
    assert np.diag(together).tolist() == [0] * 4


def test_repetition_stays_inside_an_example(one_choice):
    trace = one_choice([0, 0, 1, 1, 1, 1], example=[0, 0, 0, 1, 1, 1])
    same, chance = s.repetition(trace)
    assert same[0] == pytest.approx(3 / 4)  # the pair across the border does not count
    assert chance[0] == pytest.approx((2 / 6) ** 2 + (4 / 6) ** 2)


def test_saturation(synthetic):
    early = synthetic([[[0, 1], [2, 3], [0, 2], [1, 3]]])
    late = synthetic([[[1, 0], [2, 0], [1, 3], [1, -1]]])
    assert mk.saturation(early, early)[0] == 1
    assert mk.saturation(early, late)[0] == pytest.approx((2 + 1 + 0 + 1) / 7)
    other = synthetic([[[0, 1]] * 3], example=[0, 0, 1])
    with pytest.raises(ValueError, match="different prompts"):
        mk.saturation(early, other)
