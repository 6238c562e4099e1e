"""Answers: normalisation, exact match, extraction from chains of thought, ROUGE-L."""

import string
import unicodedata

import pytest
from hypothesis import given, settings, strategies as st

from moekit.evaluation.answers import (
    exact_match,
    extract_answer,
    is_number,
    most_frequent,
    normalise,
    rouge_l,
)

MINUS = "\u2212"


def written(value: int, decimals: int) -> list[str]:
    """A number in the ways of GSM8K, SVAMP and their solvers: value / 10 ** decimals."""
    whole, rest = divmod(abs(value), 10**decimals)
    tail = f".{rest:0{decimals}}" if decimals else ""
    signs = [""] if value >= 0 else ["-", MINUS]
    forms = []
    for sign in signs:
        for separator in ("", ",", " ", "\u00a0", "\u202f"):
            digits = f"{whole:,}".replace(",", separator)
            forms += [f"{sign}{digits}{tail}", f"{sign}${digits}{tail}", f"{sign}{digits}{tail}%"]
            forms += [f"{sign}{digits}{tail}.", f"${sign}{digits}{tail}", f"{sign}{digits}{tail} €"]
    if not decimals:
        forms += [f"{value}.0", f"{value}.00"]
    return forms


numbers = st.tuples(
    st.one_of(st.integers(-10_000, 10_000), st.integers(-(10**30), 10**30)), st.integers(0, 3)
)


@settings(deadline=None)
@given(numbers)
def test_a_number_equals_itself_in_every_notation_and_no_neighbour(number):
    value, decimals = number
    forms = written(value, decimals)
    assert {normalise(form) for form in forms} == {normalise(forms[0])}
    for neighbour in (value + 1, value - 1, value + 10**decimals, -value or 1, value * 10 or 10):
        others = written(neighbour, decimals)
        assert not {normalise(form) for form in forms} & {normalise(other) for other in others}


@settings(deadline=None)
@given(numbers, st.sampled_from(["The answer is {}.", "So 1 + 2 = {}", "#### {}", "{}"]))
def test_a_number_is_read_out_of_a_solution_as_it_was_written(number, frame):
    value, decimals = number
    forms = written(value, decimals)
    for form in forms:
        if not form.endswith("."):
            found = extract_answer(frame.format(form), like=forms[0])
            assert exact_match(found, [forms[0]]), (form, found)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("1450001", "1450000"),
        ("19950101", "19950102"),
        ("- 5", "5"),
        ("$-5", "5"),
        ("5", "-5"),
        ("1/2", "12"),
        ("1,2", "12"),
        ("1:30", "130"),
        ("3.5 kg", "35 kg"),
        ("10-3", "103"),
        ("2*3", "23"),
        ("2^3", "23"),
        ("10²", "102"),
        ("½", "1/2"),
        ("x < 5", "x > 5"),
        ("x = 5", "x 5"),
        ("a - b", "a b"),
        ("C++", "C"),
        ("72001", "72000"),
        ("22090604", "2.20906e+07"),
        ("01/02/2003", "1022003"),
        ("1.20.3", "1.2.3"),
        ("] > )", "] > ]"),
        ("vitamin A", "vitamin"),
        ("A, B", "B"),
        ("pari", "paris"),
        ("1e400", "1e399"),
    ],
)
def test_different_answers_do_not_match(answer, reference):
    assert not exact_match(answer, [reference])
    assert not exact_match(reference, [answer])


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("72.0", "72"),
        ("$1,234.50", "1234.5"),
        ("1,200 dollars", "1200 dollars."),
        ("12,34,567", "1234567"),
        ("22090600", "2.20906e+07"),
        ("- 5", "-5"),
        ("-$5", "$-5"),
        ("+5", "5"),
        ("= 5", "5"),
        (".5", "0.50"),
        ("-0", "0"),
        ("x<5", "x < 5"),
        ("\uff11\uff12", "12"),
        ("] )", "] )"),
        ("the Paris.", "paris"),
        ("U.S.", "us"),
        ("don't", "dont"),
        ("well-known", "wellknown"),
        ("- cat", "cat"),
        ("**bold**", "bold"),
        ("“Paris”", '"paris"'),
        ("北京。", "北京"),
    ],
)
def test_notations_of_one_answer_match(answer, reference):
    assert exact_match(answer, ["other", reference])
    assert exact_match(reference, [answer, "other"])


@pytest.mark.parametrize("letter", string.ascii_uppercase)
def test_a_letter_matches_in_every_frame_and_no_other_letter(letter):
    frames = ("{}", "{}.", "({})", "{})", "**{}**", "{}:", '"{}"')
    forms = [frame.format(letter) for frame in frames]
    assert {normalise(form) for form in forms} == {letter.lower()}
    other = "B" if letter == "A" else "A"
    assert not exact_match(f"({letter})", [f"({other})"])


@given(st.text())
def test_unicode_forms_of_a_text_match(text):
    composed = unicodedata.normalize("NFC", text)
    decomposed = unicodedata.normalize("NFD", text)
    assert exact_match(composed, [decomposed])
    assert normalise(f"  {text}\n") == normalise(text)


def test_normalise_follows_squad():
    assert normalise("The  Answer, is: 42!") == "answer is 42"
    assert normalise("an apple and the dog") == "apple and dog"
    assert normalise("%") == "%" and normalise("") == ""
    assert is_number("40%") and is_number("6.") and not is_number("6 apples")
    assert most_frequent(["a", "b", "b", "a"]) == "a"


COLOURS = ("red", "blue", "dark blue")
LETTERS = ("x", "y", "z")


@pytest.mark.parametrize(
    ("text", "options", "answer"),
    [
        ("I think not entailment", ("entailment", "not entailment"), "not entailment"),
        ("The answer is not entailment.", ("entailment", "not entailment"), "not entailment"),
        ("not entailment? No: entailment", ("entailment", "not entailment"), "entailment"),
        ("it must be dark blue", COLOURS, "dark blue"),
        ("dark blue? no, blue", COLOURS, "blue"),
        ("the answer is new york", ("york", "new york"), "new york"),
        ("The answer is **B**", COLOURS, "blue"),
        ("**Answer:** (c)", COLOURS, "dark blue"),
        ("The answer is B because red is not a colour of the sky", COLOURS, "blue"),
        ("(b)", COLOURS, "blue"),
        ("B", COLOURS, "blue"),
        ("option B", COLOURS, "blue"),
        ("I choose option b.", COLOURS, "blue"),
        ("the best option is a dog", ("cat", "dog"), "dog"),
        ("two apple(s)", ("apple(s)", "pear"), "apple(s)"),
        ("The answer is B cells", ("T cells", "B cells"), "B cells"),
        ("So the answer is: (B).", ("(A)", "(B)"), "(B)"),
        ("The answer is B", LETTERS, "y"),
        ("The answer is A dog", ("cat", "dog"), "dog"),
        ("Not (A). I take (C)", LETTERS, "z"),
        ("The answer is yes, as no one said", ("no", "yes"), "yes"),
        ("no wait, yes", ("no", "yes"), "yes"),
        ("The answer is not (A); the answer is (C)", LETTERS, "z"),
        ("The answer is 5 + 10 = 15", ("5", "15"), "15"),
        ("The answer is (B).\n\nWhich is next?\nThe answer is (A).", COLOURS, "blue"),
    ],
)
def test_options_are_read_by_letter_or_in_words(text, options, answer):
    assert extract_answer(text, answer, options) == answer


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize(
    "frame",
    ["({})", "The answer is ({}).", "The answer is {}.", "the answer is **{}**", "option {}", "{}"],
)
def test_every_letter_names_its_option(index, frame):
    options = ("cat", "dog", "bird", "fish")
    for letter in ("ABCD"[index], "abcd"[index]):
        assert extract_answer(frame.format(letter), "", options) == options[index]


@pytest.mark.parametrize(
    ("text", "like", "answer"),
    [
        ("So it is 3 * 2 = 6. The answer is 6.", "6", "6"),
        ("The answer is 6 * 7 = 42 eggs of 50.", "42", "42"),
        ("The answer is 5 apples. Then 9.", "5", "5"),
        ("First 10 - 3, so 7", "7", "7"),
        ("10-3", "3", "3"),
        ("work\n#### -1,200", "-1200", "-1,200"),
        ("answer: $3.50.", "3.5", "$3.50"),
        ("Then 3.5. The answer is 3.5", "3.5", "3.5"),
        (f"The answer is {MINUS} 3", "-3", "-3"),
        ("1 000 000", "1000000", "1000000"),
        ("The answer is 1/2.", "1", "1/2"),
        ("The answer is forty.", "40", "forty"),
        ("The answer is what we need: the answer is 8.", "8", "8"),
        ("So the answer is ] ).", "] )", "] )"),
        (" just this ", "", "just this"),
    ],
)
def test_free_answers_are_read_by_their_kind(text, like, answer):
    assert exact_match(extract_answer(text, like), [answer])


@pytest.mark.parametrize("own", ["2 and 4 make 6. The answer is 6.", "2 + 4 = 6", "#### 6"])
@pytest.mark.parametrize(
    "next_question",
    [
        "\n\nQ: next one\nA: The answer is 9.",
        "\n\nQuestion: 4 + 5?\nAnswer: 9",
        "\nQ: 4 + 5?\nA: 4 + 5 = 9. The answer is 9.",
    ],
)
def test_a_model_that_runs_on_gives_its_first_answer(own, next_question):
    assert extract_answer(own + next_question, like="6") == "6"
    assert extract_answer("Q: What is 2 + 4?\nA: " + own + next_question, like="6") == "6"


def test_without_line_breaks_a_next_question_still_ends_the_answer():
    text = "2 and 4 make 6. The answer is 6. Q: next one A: The answer is 9."
    assert extract_answer(text, like="6") == "6"
    assert extract_answer("The answer is 6.\n\nTom has 9. The answer is 9.", like="6") == "6"
    assert extract_answer("The answer is Paris\n\nQ: and Italy?", like="Paris") == "Paris"


def test_rouge_l():
    assert rouge_l("a b c d", ["a b c d"]) == 1
    # longest common subsequence 3 of 4 and 5 words: P 3/4, R 3/5
    assert rouge_l("one two nine three", ["one two three four five"]) == pytest.approx(2 / 3)
    assert rouge_l("x", ["y", "x"]) == 1
    # characters of a script without spaces: 3 of 4 and 4
    assert rouge_l("我爱北京", ["我爱南京"]) == pytest.approx(3 / 4)
    assert rouge_l("я люблю Москву", ["я люблю Киев"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "text",
    [
        "Привет, мир",
        "สวัสดีครับ",
        "你好世界",
        "नमस्ते दुनिया",
        "こんにちは",
        "안녕 세상",
        "سلام",
        "?",
        "é",
        "٣",
    ],
)
def test_rouge_l_of_a_text_and_itself_is_one_in_every_script(text):
    assert rouge_l(text, [text]) == 1
    assert rouge_l(text, [f"{text} {text}"]) < 1 and rouge_l(text, ["other words"]) == 0


@settings(deadline=None)
@given(*[st.text(st.characters(max_codepoint=0x24F) | st.sampled_from("running dogs "))] * 2)
def test_rouge_l_of_latin_text_is_that_of_rouge_score(answer, reference):
    from rouge_score.rouge_scorer import RougeScorer

    own = RougeScorer(["rougeL"], use_stemmer=True)
    wanted = own.score(reference, answer)["rougeL"].fmeasure
    has_words = all(own._tokenizer.tokenize(text) for text in (answer, reference))
    if has_words:
        assert rouge_l(answer, [reference]) == wanted
    else:
        assert rouge_l(answer, [answer]) == (1.0 if answer.strip() else 0.0)
