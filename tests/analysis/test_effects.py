"""Effects over seeds and tasks against known answers."""

import numpy as np
import pytest

from moekit.analysis.effects import (
    difference_of_gains,
    effect,
    precision_weights,
    seeds_needed,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_the_difference_of_gains_is_that_of_the_means():
    before, after = normal(2, 6, 4, seed=1), normal(2, 6, 4, seed=2)
    found = difference_of_gains(before[0], after[0], before[1], after[1])
    gains = (before - after).mean((1, 2))
    assert found.mean == pytest.approx(gains[0] - gains[1])
    assert found.low < found.mean < found.high
    assert found.sd == pytest.approx(np.std(found.per_seed, ddof=1))
    # whatever all models of a seed have in common cancels
    shift = normal(6, 4, seed=3)
    shifted = difference_of_gains(before[0] + shift, after[0], before[1] + shift, after[1])
    assert shifted.mean == pytest.approx(found.mean)


@pytest.mark.parametrize("num_tasks", [1, 8])
def test_intervals_cover_the_true_mean(num_tasks):
    """Seeds and tasks vary; about 95 of 100 intervals contain the mean."""
    covered = 0
    for study in range(200):
        generator = np.random.default_rng(study)
        seeds = generator.normal(size=(20, 1))
        tasks = generator.normal(size=(1, num_tasks)) if num_tasks > 1 else 0.0
        values = 3 + seeds + tasks + 0.5 * generator.normal(size=(20, num_tasks))
        found = effect(values, resamples=300)
        covered += found.low <= 3 <= found.high
    assert 170 <= covered <= 198


def test_a_verdict_needs_an_interval_on_one_side_of_zero():
    noise = 0.1 * normal(9, 3)
    assert [effect(noise + shift).holds for shift in (1, -1)] == ["yes", "no"]
    assert effect(noise - noise.mean()).holds == "unclear"
    # few seeds answer nothing, however clear they look
    assert effect(noise[:4] + 1).low > 0
    assert [effect(noise[:count] + 1).holds for count in (4, 5)] == ["unclear", "yes"]


def test_weights_scale_to_one_and_select_tasks():
    values = normal(5, 2)
    assert effect(values, [3.0, 3.0]).mean == pytest.approx(values.mean())
    assert effect(values, [1e9, 1.0]).mean == pytest.approx(values[:, 0].mean(), abs=1e-6)
    noisy = normal(400, 2) * [1, 3]
    assert precision_weights(noisy) == pytest.approx([0.9, 0.1], abs=0.03)


def test_the_number_of_seeds_is_that_of_a_paired_comparison():
    # sd 2.3 points, an effect of 1 point: (2.8016 * 2.3)^2 = 41.5
    assert seeds_needed(2.3, 1.0) == 42
    assert seeds_needed(1.0, 2.8015853) in (1, 2)
    found = 0
    for study in range(300):
        values = 1 + 2.3 * normal(42, 1, seed=study)
        error = values.std(ddof=1) / 42**0.5
        found += abs(values.mean()) > 2.02 * error
    assert 0.72 < found / 300 < 0.88


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effect(normal(1, 2)), "1 seeds have no spread"),
        (lambda: effect(np.array([[1.0], [np.nan]])), "not finite"),
        (lambda: effect(normal(3, 2), [1.0]), "give 2 positive numbers"),
        (lambda: effect(normal(3, 2), [1.0, -1.0]), "give 2 positive numbers"),
        (lambda: seeds_needed(0.0, 1.0), "both must be positive"),
        (lambda: precision_weights(normal(2, 2)), "run three or more"),
        (lambda: precision_weights(np.ones((3, 2))), "same value for every pilot seed"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
