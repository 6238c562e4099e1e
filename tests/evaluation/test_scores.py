"""Scores: intervals, tables, the normalised average, comparisons."""

import dataclasses

import numpy as np
import pytest

from moekit.evaluation.scores import (
    Scores,
    TaskScore,
    bootstrap,
    compare,
    normalised_average,
    report,
)


def test_bootstrap_covers_the_mean_and_narrows():
    generator = np.random.default_rng(0)
    few, many = generator.random(30) < 0.5, generator.random(3000) < 0.5
    low, high = bootstrap([few.astype(float)])
    assert low < few.mean() < high and high - low == pytest.approx(0.36, abs=0.08)
    low, high = bootstrap([many.astype(float)])
    assert low < many.mean() < high and high - low < 0.05
    assert bootstrap([np.ones(9)]) == (1, 1)
    assert bootstrap([np.ones(9), np.zeros(9)], [0.25, 0.75]) == (0.25, 0.25)


def test_the_mean_weighs_tasks_alike_and_differences_are_paired():
    a = TaskScore.of("a", "c", "accuracy", [1, 0, 1, 0], 0.25, 0.5)
    b = TaskScore.of("b", "c", "exact_match", [1] * 100, 0.5, 0.5)
    scores = Scores("m on s", (a, b))
    mean = scores.mean
    assert (mean.score, mean.chance, mean.majority, mean.n) == (0.75, 0.375, 0.5, 104)
    assert (a.metric, mean.metric) == ("accuracy", "mixed")
    better = dataclasses.replace(a, values=np.ones(4))
    change = compare(scores, Scores("n on s", (better, b)))
    assert change.difference == 0.25 and change.low >= 0
    assert str(change).startswith("+25.0% (95 % interval ")
    with pytest.raises(ValueError, match="different examples"):
        compare(scores, Scores("n on s", (a,)))


def test_the_table_and_the_record_name_split_shots_and_what_is_missing():
    a = TaskScore.of("a", "c", "accuracy", [1, 0, 1, 0], 0.25, 0.5)
    scores = Scores("m on s", (a,), 2, dropped_shots=3, missing=("gone",), split="valid")
    assert (scores.model, scores.suite) == ("m", "s")
    table = scores.table()
    assert table.startswith("m on s, valid split, 2 shots")
    assert "3 of 8 exemplars were not shown" in table
    assert table.endswith("skipped (no data): gone")
    record = scores.to_dict()
    assert (record["split"], record["shots"], record["dropped_shots"]) == ("valid", 2, 3)
    assert record["tasks"][0]["score"] == 0.5 and "values" not in record["mean"]
    bars = scores.plot().axes[0].patches
    assert [bar.get_width() for bar in bars] == [0.5, 0.5]


def test_the_normalised_average_scales_between_chance_and_one():
    a = TaskScore.of("a", "c", "accuracy", [1.0] * 11 + [0.0] * 9, 0.5, 0.5)
    b = TaskScore.of("b", "c", "exact_match", [1.0, 0.0, 0.0, 0.0], 0.0, 0.0)
    below = TaskScore.of("c", "c", "accuracy", [1.0] * 9 + [0.0] * 11, 0.5, 0.5)
    results = [Scores("m on one", (a, b)), Scores("m on two", (below,))]
    average = normalised_average(results)
    # a right share of .55 at chance .5 is .1, one of .45 is -.1 (the example of Chung 2022)
    assert average.suites == pytest.approx({"one": (0.1 + 0.25) / 2, "two": -0.1})
    assert average.score == pytest.approx((0.175 - 0.1) / 2)
    assert average.low < average.score < average.high and "one 17.5%" in str(average)
    record = report(results)
    assert record["model"] == "m" and len(record["suites"]) == 2
    assert record["normalised_average"]["score"] == average.score
    for wrong in ([], results[:1] * 2):
        with pytest.raises(ValueError, match="different suites"):
            normalised_average(wrong)


def test_a_task_of_single_options_cannot_be_normalised():
    single = TaskScore.of("one choice", "c", "accuracy", [1.0, 1.0], 1.0, 1.0)
    with pytest.raises(ValueError, match="task one choice cannot be normalised"):
        normalised_average([Scores("m on s", (single,))])
