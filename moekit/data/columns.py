"""How the columns of a row become an example: one reader for hub copies and local files.

Nothing is guessed: a missing value (None, NaN), a number where a text is expected or a label that
is not listed makes the row unusable, and the error names the column.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moekit.data.files import BadRow
from moekit.data.tasks import LETTERS, Example

_CALCULATOR = re.compile(r"<<[^>]*>>|\n?####.*")  # marks in the solutions of GSM8K
PLACE = re.compile(r"\{([^{}]+?)(\?)?\}")
_OPTION_LINE = re.compile(r"(?:- )?(\([A-Z]\))?(.*)")


@dataclass(frozen=True)
class Columns:
    """The columns of a data set's rows; "a.b" is entry b of column a.

    In a text, {column} stands for the text of a column and {column?} for one that may be missing.

    Args:
      fields: the fields of an example, each a text with columns in it; one with a column that may
        be missing may be empty.
      answer: the column of the answer: a text or a list of accepted texts; with `labels` or
        `options` the index of one of these, or one of `keys`.
      labels: the options of every row.
      options: a column with the options of a row, or a list of such columns.
      keys: what the answer column holds in place of an index: a value (or several) for each option,
        or a column that lists them.
      rationale: a text with columns in it.
      domain: likewise.
      rationale_before: separates a rationale from the answer that follows it.
      answer_until: ends the answer.
      answer_separator: separates the parts of an answer, all of which are required.
      options_in_question: the question lists the options after "Options:".
      header: names for the cells of .csv and .tsv files.
    """

    fields: Mapping[str, str]
    answer: str
    labels: list[str] = field(default_factory=list)
    options: str | list[str] = ""
    keys: str | list = ""
    rationale: str = ""
    domain: str = ""
    rationale_before: str = ""
    answer_until: str = ""
    answer_separator: str = ""
    options_in_question: bool = False
    header: list[str] = field(default_factory=list)

    @property
    def has_options(self) -> bool:
        return bool(self.labels or self.options)

    @property
    def used(self) -> list[str]:
        """The columns that are needed, without what is inside them."""
        texts = [*self.fields.values(), self.rationale, self.domain]
        places = [place for text in texts for place in PLACE.findall(text)]
        options = self.options if isinstance(self.options, list) else [self.options]
        keys = [self.keys] if isinstance(self.keys, str) else []
        needed = [column for column, optional in places if not optional]
        names = [*needed, *options, *keys, self.answer]
        return list(dict.fromkeys(name.partition(".")[0] for name in names if name))

    def example(self, row: Mapping[str, Any], identity: str) -> Example:
        """A row as an example.

        Raises:
          ValueError: a missing column or value, a label that is not listed, an empty text.
        """
        fields = {name: fill(text, row).strip() for name, text in self.fields.items()}
        for name, text in fields.items():
            if not text and "?}" not in self.fields[name]:
                raise BadRow(f"{name} is empty")
        rationale = fill(self.rationale, row, separator=" ")
        options: tuple[str, ...] = ()
        if self.has_options:
            answers, options = self._chosen(row)
        else:
            answers = self._texts(row)
        if self.rationale_before:
            rationale, _, answers[0] = answers[0].rpartition(self.rationale_before)
        if self.answer_until or self.answer_separator:
            answers = self._parts(answers[0])
        if self.options_in_question:
            fields, answers[0], options = _without_options(fields, answers[0])
        return Example(
            id=identity,
            fields=fields,
            answer=answers[0],
            references=tuple(answers),
            options=options,
            rationale=_sentences(rationale),
            domain=fill(self.domain, row),
        )

    def _texts(self, row: Mapping[str, Any]) -> list[str]:
        """The accepted answers of a row without options."""
        value = value_of(row, self.answer)
        values = value if isinstance(value, list) else [value]
        if not values:
            raise BadRow(f"column {self.answer!r} holds no answer")
        return [text_of(each, self.answer).strip() for each in values]

    def _chosen(self, row: Mapping[str, Any]) -> tuple[list[str], tuple[str, ...]]:
        """The answer and the options of a row."""
        if isinstance(self.options, list):
            options = [text_of(value_of(row, name), name).strip() for name in self.options]
        elif self.options:
            listed = value_of(row, self.options)
            if not isinstance(listed, list):
                raise BadRow(f"column {self.options!r} is no list: {_shown(listed)}")
            options = [text_of(each, self.options).strip() for each in listed]
        else:
            options = self.labels
        options = _without_letters(options)
        index = self._index(row, len(options))
        return [options[index]], tuple(dict.fromkeys(options))

    def _index(self, row: Mapping[str, Any], count: int) -> int:
        """The position of the answer among the options."""
        value = value_of(row, self.answer)
        keys: Sequence = range(count)
        if self.keys:
            keys = value_of(row, self.keys) if isinstance(self.keys, str) else self.keys
        for index, key in enumerate(keys[:count]):
            for accepted in key if isinstance(key, list) else [key]:
                if type(accepted) is type(value) and accepted == value:
                    return index
        raise BadRow(f"answer {_shown(value)} is not one of {count} options")

    def _parts(self, text: str) -> list[str]:
        """An answer without what follows it; one of several parts in three ways to write it."""
        separator = self.answer_separator
        parts = text.split(separator) if separator else [text]
        if self.answer_until:
            parts = [part.partition(self.answer_until)[0] for part in parts]
        parts = [part.strip() for part in parts if part.strip()]
        ways = [f"{separator} ", ", ", " and "] if len(parts) > 1 else [""]
        return [way.join(parts) for way in ways]


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """The value of column "a" or of "a.b"; BadRow if it is missing."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise BadRow(f"column {column!r} is missing")
        value = value[name]
    return value


def text_of(value: Any, column: str, separator: str = ", ") -> str:
    """A text, a whole number, or a list of them, as text; BadRow for anything else."""
    if isinstance(value, list) and value:
        return separator.join(text_of(each, column) for each in value)
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise BadRow(f"column {column!r} holds no text: {_shown(value)}")


def fill(text: str, row: Mapping[str, Any], separator: str = ", ") -> str:
    """A text with the columns of a row in its places; lists are joined by the separator."""

    def column_text(place: re.Match) -> str:
        column, optional = place.groups()
        if f"{column}?" in row:
            column, optional = f"{column}?", ""
        if optional and row.get(column) in (None, "", []):
            return ""
        return text_of(value_of(row, column), column, separator)

    return PLACE.sub(column_text, text)


def _shown(value: Any) -> str:
    return f"{str(value)[:60]!r} ({type(value).__name__})"


def _without_letters(options: list[str]) -> list[str]:
    """Options "A)3", "B)4" as "3", "4"."""
    letters = [f"{letter})" for letter in LETTERS[: len(options)]]
    pairs = list(zip(options, letters, strict=False))
    if len(options) > 1 and all(option.startswith(letter) for option, letter in pairs):
        return [option.removeprefix(letter).strip() for option, letter in pairs]
    return options


def _without_options(
    fields: dict[str, str], answer: str
) -> tuple[dict[str, str], str, tuple[str, ...]]:
    """FLAN's questions with their options apart, where the answer is one of these."""
    question, _, listed = fields["question"].partition("\nOptions:\n")
    texts, chosen = [], answer
    for line in listed.splitlines():
        letter, text = _OPTION_LINE.fullmatch(line).groups()
        texts.append(text.strip())
        if letter == answer:
            chosen = text.strip()
    if chosen not in texts or len(set(texts)) < len(texts):
        return fields, answer, ()
    return dict(fields, question=question.strip()), chosen, tuple(texts)


def _sentences(rationale: str) -> str:
    """A rationale in one line that ends as a sentence."""
    text = " ".join(_CALCULATOR.sub("", rationale).split())
    return text if not text or text[-1] in ".!?" else f"{text}."
