"""Evaluation of suites: prompts, exemplars, metrics, settings."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import moekit as mk
from moekit.data.suites import Suite
from moekit.data.tasks import Example, Task, Template
from moekit.evaluation import evaluator

TEMPLATES = tuple(Template(f"{i} " + "{x}") for i in range(10))
TOKENIZER = mk.ByteTokenizer()


def task(name="pick", n=12, options=True, rationale="", **kwargs):
    def load(split):
        return [
            Example(
                f"{split}{i}",
                {"x": f"{split} {i} now"},
                answer=f"word{i % 3}",
                options=("word0", "word1", "word2") if options else (),
                rationale=rationale,
            )
            for i in range(n)
        ]

    return Task(name, "cluster", load, TEMPLATES, **kwargs)


@pytest.fixture
def prompted(monkeypatch):
    """The inputs that the model was prompted with; it always ranks the first option best, and
    generates one text."""
    inputs = []

    def rank(model, ids, prompts, tokenizer):
        inputs.extend(prompt.input for prompt in prompts)
        return [0 for _ in prompts]

    def generate(model, ids, *, max_new_tokens):
        inputs.extend(TOKENIZER.decode(row) for row in ids)
        text = TOKENIZER.encode("It is so. The answer is word1.")
        return [np.array(text) for _ in ids]

    monkeypatch.setattr(evaluator, "rank_encoded", rank)
    monkeypatch.setattr(evaluator, "generate_ids", generate)
    return inputs


def test_a_mesh_gives_the_same_answers(model):
    results = []
    for mesh in (None, mk.make_mesh(data=2, expert=4)):
        placed = mk.EncoderDecoder(model.cfg, seed=0, mesh=mesh)
        scores = mk.evaluate(placed, [task(), task("free", options=False)], max_new_tokens=4)
        results.append(np.concatenate([row.values for row in scores.rows]))
    np.testing.assert_array_equal(*results)


def test_scores_carry_chance_majority_and_intervals(model, prompted):
    free = task("free", options=False, metric="exact_match")
    scores = mk.evaluate(model, [task(n=13), free], split="valid")
    ranked, generated = scores.rows
    assert (ranked.metric, generated.metric, scores.mean.metric) == (
        *("accuracy", "exact_match"),
        "mixed",
    )
    assert ranked.score == pytest.approx(5 / 13) and ranked.majority == pytest.approx(5 / 13)
    assert ranked.low < ranked.score < ranked.high and ranked.n == 13
    assert ranked.chance == pytest.approx(1 / 3) and generated.chance == 0
    assert generated.score == 0  # the sentence is not the answer
    assert scores.split == "valid" and "valid 3 now" in prompted[3]


def test_limit_is_a_fixed_sample(model, prompted):
    for _ in range(2):
        assert mk.evaluate(model, [task(n=30)], limit=7).rows[0].n == 7
    assert prompted[:7] == prompted[7:] and len(set(prompted)) == 7


def test_exemplars_that_do_not_fit_are_dropped_and_counted(model, prompted):
    short = mk.with_config(model, model.cfg.replace(max_length=160))
    scores = mk.evaluate(short, [task(n=4)], shots=3)
    shown = [text.count("train") for text in prompted]
    assert scores.dropped_shots == sum(3 - count for count in shown) > 0
    with pytest.raises(ValueError, match=r"pick test0: the question alone is \d+ tokens"):
        mk.evaluate(mk.with_config(model, model.cfg.replace(max_length=8)), [task()])
    untrained = dataclasses.replace(task(), splits=("test",))
    with pytest.raises(ValueError, match="task pick has no exemplars"):
        mk.evaluate(model, [untrained], shots=1)


def test_few_exemplars_are_shown_in_their_order_and_the_shortfall_is_counted(model, prompted):
    few = task(n=3, options=False, metric="exact_match")
    scores = mk.evaluate(model, [few], shots=5)
    for text in prompted:
        assert [text.index(f"train {i} now") for i in range(3)] == sorted(
            text.index(f"train {i} now") for i in range(3)
        )
    assert scores.dropped_shots == 3 * (5 - 3)
    assert "6 of 15 exemplars were not shown" in scores.table()


@settings(deadline=None, max_examples=30)
@given(
    train=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    test=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    shots=st.integers(1, 4),
)
def test_a_question_is_never_among_its_own_exemplars(model, train, test, shots):
    """Both splits count their ids from 0, and share questions under different ids."""

    def load(split):
        numbers = train if split == "train" else test
        form = "Question {} ?" if split == "train" else "question  {} ?"
        return [Example(str(i), {"x": form.format(n)}, f"answer{n}") for i, n in enumerate(numbers)]

    own = Task("own", "c", load, (Template("{x}"),), metric="exact_match")
    suite = Suite("s", (own,), shots=shots)
    questions = evaluator._questions(own, suite, None, 0, TOKENIZER, 4096)
    for number, question in zip(test, questions, strict=True):
        text = question.prompt.input
        usable = {each for each in train if each != number}
        assert f"answer{number}" not in text
        assert question.prompt.shots == min(shots, len(usable)) == text.count("answer")


def test_a_suite_has_its_own_settings(model, prompted):
    thought = task(rationale="Think.")
    suite = Suite("s", (thought,), shots=2, chain_of_thought=True, first=6, missing=("gone",))
    scores = mk.evaluate(model, suite)
    assert (scores.name, scores.suite, scores.model) == ("st-nano on s", "s", "st-nano")
    row = scores.rows[0]
    assert (row.metric, row.n, row.score) == ("exact_match", 6, 2 / 6)
    assert row.chance == pytest.approx(1 / 3) and scores.missing == ("gone",)
    assert all(text.count("Think. The answer is word") == 2 for text in prompted)
    assert all(text.endswith("step by step.") for text in prompted)

    prompted.clear()
    decoded = Suite("d", (task(metric="rouge_l"),), options=False, ranked=False)
    row = mk.evaluate(model, decoded).rows[0]
    assert row.metric == "rouge_l" and row.chance == 0 and "word" not in prompted[0]
    assert "word" in (mk.evaluate(model, decoded, options=True), prompted[-1])[1]


def test_a_split_without_examples_is_skipped(model, prompted):
    empty = dataclasses.replace(task("empty"), load=lambda split: [])
    assert mk.evaluate(model, [task(), empty]).missing == ("empty",)
    with pytest.raises(ValueError, match="suite tasks has no questions in its split 'test'"):
        mk.evaluate(model, [empty])


def test_a_callback_logs_the_mean(model, prompted):
    callback = mk.evaluation_callback([task()], "held out", limit=6)
    assert callback(3, model) == {"held out": mk.evaluate(model, [task()], limit=6).mean.score}
