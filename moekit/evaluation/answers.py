"""Answers of a model: read out of its text, compared with references, scored by ROUGE-L."""

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from itertools import groupby
from typing import Any

# Compatibility characters that are not folded: 10² is not 102, and ½ is not 1/2.
KEPT_FORMS = ("<super>", "<sub>", "<fraction>")
# The minus sign and special hyphens become the ASCII hyphen; dashes between words do not.
HYPHENS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\ufe63\uff0d", "-"))
DASH_AS_SIGN = re.compile(r"(?<![\w.)])\u2013(?=\d)")

CURRENCY = "$£€¥"
PUNCTUATION = re.escape(string.punctuation + CURRENCY + "“”‘’«»…–—¿¡、。「」،؟।≤≥≠×÷")  # noqa: RUF001
# A sign with a space belongs to the number only where nothing could be subtracted from.
SPACED_SIGN = r"(?:^|(?<=[=:(])|(?<=[=:(]\s)|(?<=\bis\s))[-+]\s"
NUMBER = re.compile(
    rf"""
    (?<![\w.])(?<!\d,)                       # not inside a word or another number
    (?:
        (?:{SPACED_SIGN}|[-+])?(?:[{CURRENCY}]\ ?)?
        |[{CURRENCY}]\ ?[-+]\ ?
    )
    (?:
        (?:
            \d{{1,3}}(?:,\d{{2,3}})*,\d{{3}} # 1,200,000
            |\d{{1,3}}(?:\ \d{{3}})+         # 1 200 000
            |\d+
        )(?:\.\d+)?
        |\.\d+
    )
    (?:e[-+]?\d{{1,3}}(?!\d))?
    (?!\d|[.,]\d)
    """,
    re.IGNORECASE | re.VERBOSE,
)
NUMBER_OR_FRACTION = re.compile(
    rf"(?:{NUMBER.pattern})(?:\s?/\s?[\d.,]*\d)?", re.IGNORECASE | re.VERBOSE
)

# What exact match compares. A word may contain marks: "u.s.", "don't", "well-known".
WORD = rf"[^\s{PUNCTUATION}]+"
CONTENT = re.compile(
    rf"""
    (?P<number>{NUMBER.pattern})
    |(?P<article>\b(?:a|an|the)\s+(?=[^\w\s]*(?:\w\w|\d)))
    |(?P<word>{WORD}(?:[.'’-]{WORD})*)
    |(?P<operator>[+<>^/≤≥≠×÷]|(?<!^)=|[-*](?=\s?[\d(])|(?<=\w\s)-(?=\s\w))
    """,  # noqa: RUF001
    re.IGNORECASE | re.VERBOSE,
)
MARK_IN_WORD = re.compile(r"(?<!\d)[.'’-]|[.'’-](?!\d)")  # noqa: RUF001

ANNOUNCEMENT = re.compile(r"(?:\banswer\**\s*(?:is|:|=)|####)\s*:?", re.IGNORECASE)
NEXT_QUESTION = re.compile(r"(?:(?<=\n)|(?<=[.!?]\s))\s*(?:Q|Question)\s*:")
SENTENCE_END = re.compile(r"\.(?:\s|$)|\n")

# The letter of an option at the start of an answer: "(b)", "B.", "**B**", "option B". A letter
# that could be a word ("A dog", "I think") counts only before punctuation or the end.
FIRST_LETTER = re.compile(
    r"""
    \W*(?:(?:option|choice)\s+)?
    (?:\(([a-z])\) | ([a-z])(?=\W*$|[).:,*]) | ((?-i:[B-HJ-Z]))\b)
    """,
    re.IGNORECASE | re.VERBOSE,
)
ANY_LETTER = re.compile(
    r"""
    (?<!\w)\(([a-z])\)
    | \*\*([a-z])\*\*
    | \b(?:option|choice)\s+(?:is\s+)?((?-i:[A-Z])\b|[a-z](?=\s*(?:[.,;:)]|$)))
    """,
    re.IGNORECASE | re.VERBOSE,
)
ONLY_LETTER = re.compile(r"\W*([a-z])\W*", re.IGNORECASE)

# Scripts that do not separate words by spaces, by the first word of their characters' names.
UNSPACED_SCRIPTS = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}
GREEK_BEGINS = "\u0370"  # characters before it are Latin letters, marks and symbols


def fold(text: str) -> str:
    """One form for the Unicode variants of a character.

    Accents are composed (NFC) and compatibility forms replaced (NFKC, except superscripts and
    fractions); minus signs become ASCII hyphens.
    """
    if text.isascii():
        return text
    folded = ""
    for character in unicodedata.normalize("NFC", text):
        form = unicodedata.decomposition(character)
        kept = form.startswith(KEPT_FORMS)
        folded += character if kept else unicodedata.normalize("NFKC", character)
    folded = unicodedata.normalize("NFC", folded).translate(HYPHENS)
    return DASH_AS_SIGN.sub("-", folded)


def normalise(text: str) -> str:
    """Lower-case words, numbers and operators of a text, as exact match compares them.

    After SQuAD's normalisation: articles before a word and punctuation are removed. Operators
    stay, and numbers are written in one way: "$1,200.50" is 1200.5 and "40%" is 40. A text that
    consists of punctuation is returned in lower case.
    """
    lowered = " ".join(fold(text).lower().split())
    parts = []
    kinds = set()
    for match in CONTENT.finditer(lowered):
        kind, part = match.lastgroup, match.group()
        if kind == "article":
            continue
        if kind == "number":
            part = _canonical_number(part)
        elif kind == "word":
            part = MARK_IN_WORD.sub("", part)
        kinds.add(kind)
        parts.append(part)
    only_punctuation = kinds <= {"operator"}
    return lowered if only_punctuation else " ".join(parts)


def _canonical_number(written: str) -> str:
    """A number that `NUMBER` matched, without separators, currency and trailing zeros."""
    value = Decimal(re.sub(rf"[\s,+{CURRENCY}]", "", written))
    if value == 0:
        return "0"
    digits = f"{value:f}"
    if "." not in digits:
        return digits
    return digits.rstrip("0").rstrip(".")


def is_number(text: str) -> bool:
    """Whether a text is a number and nothing else: "$1,200.50", "-3", "40%", "6."."""
    bare = fold(text).strip().rstrip(".%").strip()
    return NUMBER.fullmatch(bare) is not None


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the normalised answer equals a normalised reference, else 0; numbers are exact."""
    accepted = [normalise(reference) for reference in references]
    return float(normalise(answer) in accepted)


def most_frequent(answers: Sequence[str]) -> str:
    """The most frequent answer, the first one among equals."""
    return Counter(answers).most_common(1)[0][0]


def extract_answer(text: str, like: str = "", options: Sequence[str] = ()) -> str:
    """The answer that a chain of thought arrives at.

    It follows the first "answer is" (also "answer:", "####") with an answer of the expected kind.
    A text without such words is searched as a whole. A next question ("Q: ..") that the model
    generates after its answer is ignored.

    Args:
      text: the generated text.
      like: the expected answer. If it is a number, a number is read: the first one after the last
        "=" of the sentence, or the last one of a text without "answer is".
      options: the answer is one of these, given by its letter or in its words.

    Returns:
      An option, a number as written, or the sentence after "answer is".
    """
    own = _before_next_question(fold(text))
    passages = [passage.strip() for passage in ANNOUNCEMENT.split(own)[1:]]
    sentences = [SENTENCE_END.split(passage)[0].strip() for passage in passages]
    if options:
        return _extract_option(own, sentences, options, is_number(like))
    if not is_number(like):
        return sentences[0] if sentences else own.strip()
    for sentence in sentences:
        numbers = _numbers(sentence.split("=")[-1])
        if numbers:
            return numbers[0]
    if sentences:
        return sentences[0]
    numbers = _numbers(own)
    return numbers[-1] if numbers else own.strip()


def _before_next_question(text: str) -> str:
    """The text up to a question that follows it; a question at its start is the model's own."""
    start = len(text) - len(text.lstrip())
    question = NEXT_QUESTION.search(text, start + 1)
    return text[: question.start()] if question else text


def _numbers(text: str) -> list[str]:
    """The numbers of a text as written, fractions included."""
    return [found.group().strip() for found in NUMBER_OR_FRACTION.finditer(text.strip())]


def _extract_option(
    text: str, sentences: Sequence[str], options: Sequence[str], numeric: bool
) -> str:
    """The first option that a sentence after "answer is" names, or the last one of a text without
    such a sentence; the text itself if there is none."""
    for sentence in sentences:
        result = sentence.split("=")[-1].strip() if numeric else sentence
        found = _first_option(result, options)
        if found is not None:
            return found
    if sentences:
        return sentences[0]
    found = _last_option(text, options)
    return text.strip() if found is None else found


def _first_option(sentence: str, options: Sequence[str]) -> str | None:
    """The option of the letter at the start of a sentence, or the first one in words."""
    named = _options_in_words(sentence, options)
    words_come_first = bool(named) and normalise(sentence).startswith(normalise(named[0]))
    letter = FIRST_LETTER.match(sentence)
    if letter and not words_come_first:
        option = _option_of_letter(letter, options)
        if option is not None:
            return option
    return named[0] if named else None


def _last_option(text: str, options: Sequence[str]) -> str | None:
    """The option of the last letter in a text, such as "(B)", or the last one in words."""
    for option in options:
        if normalise(option) == normalise(text):
            return option
    letters = [_option_of_letter(letter, options) for letter in ANY_LETTER.finditer(text)]
    lettered = [option for option in letters if option is not None]
    if lettered:
        return lettered[-1]
    named = _options_in_words(text, options)
    if named:
        return named[-1]
    only_letter = ONLY_LETTER.fullmatch(text)
    return _option_of_letter(only_letter, options) if only_letter else None


def _option_of_letter(match: re.Match[str], options: Sequence[str]) -> str | None:
    """The option of the letter in a match, None where there are fewer options."""
    letter = next(group for group in match.groups() if group)
    index = string.ascii_uppercase.index(letter.upper())
    return options[index] if index < len(options) else None


def _options_in_words(text: str, options: Sequence[str]) -> list[str]:
    """The options that occur in a text as whole words, in the order of the text. Of options that
    overlap, such as "blue" and "dark blue", the longer one is found."""
    by_words = {normalise(option): option for option in reversed(options)}
    longest_first = sorted(filter(None, by_words), key=len, reverse=True)
    alternatives = "|".join(map(re.escape, longest_first))
    pattern = rf"(?<!\S)(?:{alternatives})(?!\S)"
    return [by_words[found] for found in re.findall(pattern, normalise(text))]


def _is_other_script(character: str) -> bool:
    """Whether a character is a letter, mark or digit of a script other than Latin."""
    if character < GREEK_BEGINS or "LATIN" in unicodedata.name(character, ""):
        return False
    category = unicodedata.category(character)
    return category[0] in "LM" or category == "Nd"


def _is_unspaced(character: str) -> bool:
    name = unicodedata.name(character, "")
    return name.split(" ")[0] in UNSPACED_SCRIPTS


class RougeTokenizer:
    """rouge-score's own tokens for Latin text, words of other scripts beside them.

    Scripts without spaces between words give characters; so does a text that has no word.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self.latin = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = []
        for other_script, characters in groupby(text.lower(), _is_other_script):
            run = "".join(characters)
            tokens += _other_tokens(run) if other_script else self.latin.tokenize(run)
        return tokens or [character for character in text if not character.isspace()]


def _other_tokens(run: str) -> list[str]:
    """Words of scripts with spaces, characters of scripts without, from letters and marks."""
    tokens: list[str] = []
    for unspaced, characters in groupby(unicodedata.normalize("NFC", run), _is_unspaced):
        letters = list(characters)
        tokens += letters if unspaced else ["".join(letters)]
    return tokens


@functools.cache
def _rouge_scorer() -> Any:
    # imported when first used: rouge-score imports nltk, which takes seconds
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=RougeTokenizer())


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Best ROUGE-L F-measure in [0, 1] of an answer against its references (Lin 2004)."""
    scorer = _rouge_scorer()
    scores = [scorer.score(reference, answer)["rougeL"] for reference in references]
    return float(max(score.fmeasure for score in scores))
