"""Training tasks that overlap with suites are found by name, by source and by text."""

import logging

import pytest
from hypothesis import given, settings, strategies as st

from moekit.data.decontaminate import overlapping
from moekit.data.suites import Suite
from moekit.data.tasks import Example, Task, Template

WORDS = [f"word{letter}" for letter in "abcdefghijklmnopqr"]


def task(name, texts, options=(), sources=()):
    def load(split):
        return [
            Example(str(i), {"definition": "Do as told.", "input": text}, "yes", (), options)
            for i, text in enumerate(texts)
        ]

    return Task(name, "c", load, (Template("{input}"),), sources=sources)


def sentence(i, n=14):
    """Words of a sentence that no other number has."""
    return " ".join(f"{WORDS[(i + j) % len(WORDS)]}{i}" for j in range(n))


HELD_OUT = Suite("bbh", (task("bbh/a", [sentence(i) for i in range(50)]),), missing=("mmlu",))


@pytest.mark.parametrize(
    ("name", "sources", "overlaps"),
    [
        ("bbh/b", (), True),
        ("niv2/task685_mmmlu_answer_generation_clinical_knowledge", (), True),
        ("niv2/task9_x", ("big_bench",), True),
        ("niv2/task9_x", ("hendrycks_test",), True),
        ("niv2/task9_x", ("bbhx", "mmluish"), False),
        ("cot/gsm8k", ("gsm8k",), False),
    ],
)
def test_names_and_sources(name, sources, overlaps, caplog):
    with caplog.at_level(logging.WARNING, "moekit"):
        found = overlapping([task(name, ["other text altogether"], sources=sources)], [HELD_OUT])
    assert (name in found) == overlaps
    if overlaps:
        assert "made from" in found[name] and f"held out for bbh: {name}" in caplog.text


@settings(max_examples=40, deadline=None)
@given(seen=st.integers(0, 4), around=st.integers(0, 30), known=st.integers(0, 14))
def test_texts_overlap_by_the_share_of_questions_seen(seen, around, known):
    rows = [sentence(100 + i) for i in range(20)]
    rows += [f"{sentence(200, around)} {sentence(i).upper()}! tail" for i in range(seen)]
    # a part of a question alone is not the question: 70 % of its 7 n-grams are 5, in 12 words
    rows += [" ".join(sentence(30 + i).split()[:known]) for i in range(20)]
    found = overlapping([task("t", rows)], [HELD_OUT])
    count = seen + (20 if known >= 12 else 0)
    assert bool(found) == (count > 0)
    if found:
        assert found["t"] == f"its inputs show {count} of the 50 questions of bbh/a"


def test_stems_alone_do_not_count():
    stem = "Which of these statements is true?"
    held_out = Suite("s", (task("s", [stem] * 9, options=("yes", "one thing", "another")),))
    assert not overlapping([task("t", [stem], options=("yes", "a third", "a fourth"))], [held_out])
    assert overlapping([task("t", [stem], options=("yes", "one thing", "another"))], [held_out])


def test_long_tasks_are_read_evenly_spaced_to_their_end(monkeypatch):
    monkeypatch.setattr("moekit.data.decontaminate.ROWS", 10)
    rows = [sentence(1000 + i) for i in range(85)] + [sentence(0)] * 15
    found = overlapping([task("t", rows), task("u", rows[:85])], [HELD_OUT])
    assert set(found) == {"t"}
