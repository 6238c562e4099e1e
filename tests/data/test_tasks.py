import random
from collections import Counter

import pytest
from hypothesis import given, strategies as st

from moekit.data.tasks import (
    OPTION_STYLES,
    Example,
    Task,
    Template,
    choose_exemplars,
    format_prompt,
    same_question,
)

EXAMPLES = {
    "train": [
        Example("0", {"q": "2 + 2"}, "4", options=("3", "4"), rationale="2 and 2 are 4."),
        Example("1", {"q": "1 + 2"}, "3", options=("3", "4"), rationale="1 and 2 are 3."),
    ],
    "test": [Example("2", {"q": "0 + 3"}, "3", ("three",), ("3", "4"), "Nothing and 3 are 3.")],
}
TASK = Task(
    "sums",
    "arithmetic",
    lambda split: EXAMPLES[split],
    (Template("What is {q}?"), Template("{q} =")),
    inverted=(Template("Ask for {answer}.", "{q}"),),
)
EXAMPLE = EXAMPLES["test"][0]


def test_zero_shot_with_and_without_options():
    prompt = format_prompt(TASK, EXAMPLE)
    assert prompt.input == "What is 0 + 3?\nOptions:\n- 3\n- 4"
    assert (prompt.target, prompt.options, prompt.references) == ("3", ("3", "4"), ("3", "three"))
    bare = format_prompt(TASK, EXAMPLE, template=1, options=False)
    assert bare.input == "0 + 3 =" and bare.options == ("3", "4")


def test_lettered_options_are_answered_by_letter():
    lettered = [i for i, style in enumerate(OPTION_STYLES) if style.lettered]
    for style in lettered:
        prompt = format_prompt(TASK, EXAMPLE, option_style=style, shots=EXAMPLES["train"])
        assert prompt.target == "(A)" and prompt.options == ("(A)", "(B)")
        assert prompt.references == ("(A)",)
        assert "\n(B)\n" in prompt.input  # the exemplars answer by letter as well


def test_exemplars_use_the_same_template():
    prompt = format_prompt(TASK, EXAMPLE, template=1, shots=EXAMPLES["train"], options=False)
    assert prompt.input == "2 + 2 =\n4\n\n1 + 2 =\n3\n\n0 + 3 ="
    assert prompt.shots == 2


def test_chain_of_thought():
    prompt = format_prompt(TASK, EXAMPLE, chain_of_thought=True, options=False)
    assert prompt.target == "Nothing and 3 are 3. The answer is 3."
    assert prompt.options == () and prompt.references == ("3", "three")


def test_inversion():
    prompt = format_prompt(TASK, EXAMPLE, inverted=True)
    assert (prompt.input, prompt.target, prompt.options) == ("Ask for 3.", "0 + 3", ())
    plain = Task("plain", "c", lambda split: [], (Template("{q}"),))
    with pytest.raises(ValueError, match="no inverted templates"):
        format_prompt(plain, EXAMPLE, inverted=True)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"sums, example 9: .*field 'q'"):
        format_prompt(TASK, Example("9", {"text": "x"}, "3"))
    with pytest.raises(ValueError, match="'5' is not an option"):
        Example("1", {}, "5", options=("3", "4"))
    with pytest.raises(ValueError, match="answer is empty"):
        Example("1", {}, " ")
    with pytest.raises(ValueError, match="did you mean 'accuracy'"):
        Task("t", "c", lambda split: [], (Template("{q}"),), metric="acuracy")


@pytest.mark.parametrize(
    "text",
    [
        "Answer as {} : {question}",
        "{0} {question}",
        "Write {question",
        "} {question}",
        "{question.text}",
        "{question[0]}",
        "{question!r}",
        "{question:>9}",
        "{ }",
    ],
)
def test_a_template_that_cannot_be_filled_in_is_refused_with_its_task(text):
    for template in (Template(text), Template("{question}", text)):
        for templates, inverted in (((template,), ()), ((Template("{q}"),), (template,))):
            with pytest.raises(ValueError, match="task quiz, template ") as error:
                Task("quiz", "c", lambda split: [], templates, inverted=inverted)
            assert repr(text) in str(error.value)


@given(before=st.text(), field=st.text(), answer=st.text(min_size=1).filter(str.strip))
def test_doubled_braces_and_braces_in_fields_stay_text(before, field, answer):
    escaped = before.replace("{", "{{").replace("}", "}}")
    task = Task("t", "c", lambda split: [], (Template(escaped + "{q}"),))
    prompt = format_prompt(task, Example("0", {"q": field}, answer))
    assert (prompt.input, prompt.target) == (before + field, answer)


def unchecked(**values):
    """An example of values that its annotations do not allow, as rows of files can have them."""
    example = object.__new__(Example)
    complete = {"references": (), "options": (), "rationale": "", "domain": ""} | values
    for name, value in complete.items():
        object.__setattr__(example, name, value)
    example.__post_init__()


@pytest.mark.parametrize("value", [None, float("nan"), 5, True])
def test_missing_texts_never_become_words(value):
    good = {"id": "7", "fields": {"q": "x"}, "answer": "y"}
    unchecked(**good)
    for broken in (
        {"fields": {"q": value}},
        {"fields": {"q": "x", "context": value}},
        {"answer": value},
        {"options": ("y", value)},
        {"references": (value,)},
        {"rationale": value},
    ):
        with pytest.raises(ValueError, match=f"example 7: {value!r} is not a text"):
            unchecked(**good | broken)


def pool_task(questions, splits=("train", "test")):
    """Questions of the train split; the test split has the question "asked"."""
    train = [Example(str(i), {"q": text}, f"answer {i}") for i, text in enumerate(questions)]
    load = {"train": train, "test": [Example("0", {"q": "asked"}, "z")]}.__getitem__
    return Task("pool", "c", load, (Template("{q}"),), splits=splits)


QUESTIONS = st.lists(st.sampled_from(["asked", " Asked", "a", "A ", "b", "c", "d", "e"]))


def normal(text):
    return text.strip().lower()


@given(questions=QUESTIONS, num_shots=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_exemplars_are_other_questions_and_all_that_were_asked_for(questions, num_shots, seed):
    task = pool_task(questions)
    (example,) = task.examples("test")
    chosen = choose_exemplars(task, example, num_shots, random.Random(seed))
    found = [normal(exemplar.fields["q"]) for exemplar in chosen]
    others = {normal(text) for text in questions} - {"asked"}
    assert set(found) <= others and len(set(found)) == len(found)
    assert len(chosen) == min(num_shots, len(others))
    assert chosen == choose_exemplars(task, example, num_shots, random.Random(seed))
    assert format_prompt(task, example, shots=chosen).shots == len(chosen)


def test_equal_ids_in_both_splits_exclude_nothing():
    task = pool_task(["first", "second"])
    (example,) = task.examples("test")  # its id is that of "first"
    assert len(choose_exemplars(task, example, 2, random.Random(0))) == 2


def test_a_published_list_keeps_its_order_and_a_pool_is_drawn_from_evenly():
    task = pool_task("abcdefgh")
    (example,) = task.examples("test")
    for seed in range(20):
        chosen = choose_exemplars(task, example, 8, random.Random(seed))
        assert [exemplar.id for exemplar in chosen] == list("01234567")
    draws = Counter()
    for seed in range(2000):
        draws.update(e.id for e in choose_exemplars(task, example, 2, random.Random(seed)))
    assert len(draws) == 8
    assert all(abs(count - 500) < 5 * 500**0.5 for count in draws.values())


def test_exemplars_of_a_chain_of_thought_have_rationales_where_there_are_any():
    def chosen(rationales):
        examples = [
            Example(str(i), {"q": str(i)}, "a", rationale=rationale)
            for i, rationale in enumerate(rationales)
        ]
        task = Task("t", "c", lambda split: examples, (Template("{q}"),))
        asked = Example("x", {"q": "x"}, "a")
        found = choose_exemplars(task, asked, 2, random.Random(1), chain_of_thought=True)
        return [exemplar.rationale for exemplar in found]

    assert chosen(["", "why", "", "because", "so"]).count("") == 0
    assert chosen(["", "why", ""]) == ["why"]
    assert chosen(["", ""]) == ["", ""]


def test_exemplars_need_a_train_split():
    task = pool_task([], splits=("test",))
    with pytest.raises(ValueError, match=r"task pool has no exemplars .* use shots=0"):
        choose_exemplars(task, task.examples("test")[0], 2, random.Random(0))


def test_the_same_words_with_other_options_are_another_question():
    def example(identity, answer, *options):
        return Example(identity, {"q": "Which is true?"}, answer, options=options)

    asked = example("0", "a", "a", "b")
    assert same_question(asked, example("1", "a", "b", "a"))
    assert same_question(asked, example("1", "b", "b", "a"))  # a second label of the same question
    assert same_question(asked, example("1", "a", "a", "c"))
    assert same_question(asked, example("1", "z"))
    assert not same_question(asked, example("1", "c", "c", "d"))


LONG = "Read the following passage about the river and answer. "


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (LONG + "Who?", LONG + "Who?", True),
        (LONG + "Who?", LONG + "Where?", False),
        (LONG + "Who?", LONG.upper().replace(" ", "  ") + "who ?", True),
        (" " * 300 + LONG, LONG, True),
        ("x" + LONG, LONG, False),
        ("ﬁ" * 60, "fi" * 60, True),  # a ligature is two letters
        ("e\u0301" * 60, "\u00e9" * 60, True),  # an accent by itself, and with its letter
        ("e\u0301" * 60, "\u00e9" * 61, False),
    ],
)
def test_long_questions_are_compared_whatever_their_writing(first, second, same):
    one = Example("0", {"definition": LONG, "input": first}, "a")
    other = Example("1", {"definition": LONG, "input": second}, "b")
    assert same_question(one, other) == same_question(other, one) == same
    assert (one.question == other.question) == same
