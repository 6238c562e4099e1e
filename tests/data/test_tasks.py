import pytest

from moekit.data.tasks import (
    OPTION_STYLES,
    Example,
    Task,
    Template,
    format_prompt,
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
ASKED = EXAMPLES["test"][0]


def test_zero_shot_with_and_without_options():
    prompt = format_prompt(TASK, ASKED)
    assert prompt.input == "What is 0 + 3?\nOptions:\n- 3\n- 4"
    assert (prompt.target, prompt.options, prompt.references) == ("3", ("3", "4"), ("3", "three"))
    bare = format_prompt(TASK, ASKED, template=1, options=False)
    assert bare.input == "0 + 3 =" and bare.options == ("3", "4")


def test_lettered_options_are_answered_by_letter():
    lettered = [i for i, style in enumerate(OPTION_STYLES) if style[2]]
    for style in lettered:
        prompt = format_prompt(TASK, ASKED, style=style, shots=EXAMPLES["train"])
        assert prompt.target == "(A)" and prompt.options == ("(A)", "(B)")
        assert prompt.references == ("(A)",)
        assert "\n(B)\n" in prompt.input  # the exemplars answer by letter as well


def test_few_shot_shows_the_same_wording():
    prompt = format_prompt(TASK, ASKED, template=1, shots=EXAMPLES["train"], options=False)
    assert prompt.input == "2 + 2 =\n4\n\n1 + 2 =\n3\n\n0 + 3 ="
    assert prompt.shots == 2


def test_chain_of_thought():
    prompt = format_prompt(TASK, ASKED, chain_of_thought=True, options=False)
    assert prompt.target == "Nothing and 3 are 3. The answer is 3."
    assert prompt.options == () and prompt.references == ("3", "three")


def test_inversion():
    prompt = format_prompt(TASK, ASKED, inverted=True)
    assert (prompt.input, prompt.target, prompt.options) == ("Ask for 3.", "0 + 3", ())
    plain = Task("plain", "c", lambda split: [], (Template("{q}"),))
    with pytest.raises(ValueError, match="no inverted templates"):
        format_prompt(plain, ASKED, inverted=True)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"sums, example 9: .*field 'q'"):
        format_prompt(TASK, Example("9", {"text": "x"}, "3"))
    with pytest.raises(ValueError, match="'5' is not an option"):
        Example("1", {}, "5", options=("3", "4"))
    with pytest.raises(ValueError, match="answer is empty"):
        Example("1", {}, " ")
    with pytest.raises(ValueError, match="did you mean 'accuracy'"):
        Task("t", "c", lambda split: [], (Template("{q}"),), metric="acuracy")
