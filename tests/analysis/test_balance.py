"""Measures of balance on synthetic traces with known answers."""

import numpy as np
import pytest

from moekit.analysis import balance as b


def test_even_load(one_choice):
    trace = one_choice([0, 1, 2, 3] * 4)
    load = b.expert_load(trace)
    np.testing.assert_allclose(load, 0.25)
    assert b.load_entropy(load)[0] == pytest.approx(np.log(4))
    assert b.effective_experts(load)[0] == pytest.approx(4)
    assert b.coefficient_of_variation(load)[0] == 0 == b.max_violation(load)[0]


def test_collapse_and_opposite_collapses_do_not_cancel(synthetic):
    trace = synthetic(np.stack([np.zeros((8, 1), int), np.full((8, 1), 3)]))
    load = b.expert_load(trace)
    assert b.load_entropy(load).tolist() == [0, 0]
    np.testing.assert_allclose(b.max_violation(load), 3)
    np.testing.assert_allclose(b.coefficient_of_variation(load), np.sqrt(3))
    np.testing.assert_allclose(b.effective_experts(load), 1)


def test_uneven_load(one_choice):
    load = b.expert_load(one_choice([0, 0, 0, 1, 1, 1, 2, 2], experts=4))
    np.testing.assert_allclose(load, [[3 / 8, 3 / 8, 2 / 8, 0]])
    p = np.array([3 / 8, 3 / 8, 2 / 8])
    assert b.load_entropy(load)[0] == pytest.approx(-(p * np.log(p)).sum())
    assert b.max_violation(load)[0] == pytest.approx(0.5)


def test_drops_of_tokens_and_of_choices_differ(synthetic):
    expert = np.array([[[0, 1], [0, 1], [2, 3], [0, -1]]])  # the last has no second choice
    kept = np.array([[[True, False], [False, False], [True, True], [False, False]]])
    trace = synthetic(expert, kept=kept)
    assert b.dropped_tokens(trace)[0] == pytest.approx(2 / 4)
    assert b.dropped_assignments(trace)[0] == pytest.approx(4 / 7)
    np.testing.assert_allclose(b.expert_load(trace), [[3 / 7, 2 / 7, 1 / 7, 1 / 7]])


def test_confidence_counts_processed_tokens(synthetic):
    kept = np.array([[[True], [True], [False], [True]]])
    trace = synthetic(np.zeros((1, 4, 1), int), kept=kept, weight=[[[0.9], [0.5], [0.0], [0.7]]])
    assert b.router_confidence(trace)[0] == pytest.approx(0.7)
    assert b.router_entropy(trace)[0] == pytest.approx(0.25)
    row = b.balance_table(trace).rows[0]
    assert row["confidence"] == pytest.approx(0.7) and row["stack"] == "encoder"
    assert "effective experts" in str(b.balance_table(trace))
    assert "<table>" in b.balance_table(trace)._repr_html_()
