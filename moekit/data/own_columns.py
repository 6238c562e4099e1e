"""Which columns of a user's rows are the input, the target and the options.

They are chosen once for all rows, from the first ones: by the caller, else by their usual names.
"""

import functools
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moekit.data.column_names import (
    CONTEXTS,
    INSTRUCTIONS,
    OPTIONS,
    OWN_INPUTS,
    OWN_TARGETS,
    PAIRS,
    QUESTIONS,
)
from moekit.data.columns import PLACE, fill, text_of, value_of
from moekit.data.files import BadRow
from moekit.data.tasks import LETTERS, Example, Template
from moekit.errors import unknown

_LETTER = re.compile(r"\(?([A-Z])[).:]?")
# how a target may refer to one of the options
REFERENCES = ("name", "index", "letter")


@dataclass(frozen=True)
class OwnColumns:
    """How a row becomes an example.

    Args:
      fields: the fields of an example, each a text with columns in it (`columns.fill`).
      target: the column of the answer: a text, a whole number, or a list of accepted ones.
      options: the column that lists a row's options, or columns that hold one each.
      labels: the options of every row, in place of `options`.
      reference: how the target refers to an option: by "name", by "index" from 0 (False is 0,
        True 1), or by "letter".
    """

    fields: Mapping[str, str]
    target: str
    options: str | tuple[str, ...] = ""
    labels: tuple[str, ...] = ()
    reference: str = ""

    @functools.cached_property
    def required(self) -> list[str]:
        """The columns that must hold a value."""
        listed = [self.options] if isinstance(self.options, str) else self.options
        names = [*_required_places(self.fields.values()), self.target, *listed]
        return list(dict.fromkeys(name for name in names if name))

    def example(self, row: Mapping[str, Any], identity: str) -> Example:
        """A row as an example.

        Raises:
          ValueError: a missing column or value, a target that is not an option.
        """
        for column in self.required:
            if _is_missing(value_of(row, column)):
                raise BadRow(f"column {column!r} is empty")
        fields = {name: fill(text, row).strip() for name, text in sorted(self.fields.items())}
        empty = [name for name, text in fields.items() if not text and not name.endswith("?")]
        if empty:
            raise BadRow(f"{empty[0]} is empty")
        options = self.options_of(row)
        answers = self._chosen(row, options) if options else self._texts(row)
        return Example(
            id=identity,
            fields=fields,
            answer=answers[0],
            references=tuple(answers),
            options=tuple(dict.fromkeys(options)),
        )

    def options_of(self, row: Mapping[str, Any]) -> list[str]:
        """The options of a row; none if the task has none."""
        if self.labels:
            return list(self.labels)
        if isinstance(self.options, tuple):
            return [text_of(value_of(row, column), column).strip() for column in self.options]
        if not self.options:
            return []
        listed = value_of(row, self.options)
        if not isinstance(listed, list):
            raise BadRow(f"column {self.options!r} is no list of options: {str(listed)[:60]!r}")
        return [text_of(each, self.options).strip() for each in listed]

    def _chosen(self, row: Mapping[str, Any], options: Sequence[str]) -> list[str]:
        value = value_of(row, self.target)
        index = option_index(value, options, self.reference)
        if index is None:
            shown = ", ".join(map(repr, options[:8]))
            raise BadRow(f"target {value!r} is not the {self.reference} of an option: {shown}")
        return [options[index]]

    def _texts(self, row: Mapping[str, Any]) -> list[str]:
        """The accepted answers of a row without options."""
        value = value_of(row, self.target)
        values = value if isinstance(value, list) else [value]
        return [text_of(each, self.target).strip() for each in values]


def option_index(value: Any, options: Sequence[str], reference: str) -> int | None:
    """The position of the option that a target refers to; None if there is none."""
    text = str(value).strip()
    if reference == "name":
        return options.index(text) if text in options else None
    if reference == "letter":
        match = _LETTER.fullmatch(text)
        index = LETTERS.index(match[1]) if match else len(options)
    elif text in ("False", "True"):
        index = int(text == "True")
    else:
        index = int(text) if text.isascii() and text.isdecimal() else len(options)
    return index if index < len(options) else None


def choose_columns(
    head: Sequence[Mapping[str, Any]],
    *,
    source: str,
    input: str | None,
    target: str | None,
    options: str | Sequence[str] | None,
    templates: Sequence[Template],
    labels: Mapping[str, Sequence[str]],
) -> OwnColumns:
    """The columns of the examples, from the first rows.

    Args:
      source: what error messages call the data.
      labels: the names of classes that the data itself has, by column.

    Raises:
      ValueError: a column that does not exist, none with a usual name, or options that the target
        does not refer to.
    """
    chooser = _Chooser(head, source)
    target_column = chooser.target(target, input)
    fields = chooser.fields(input, target_column, templates)
    own_labels = tuple(labels.get(target_column, ()))
    option_columns, option_labels = chooser.options(options, own_labels)
    columns = OwnColumns(fields, target_column, option_columns, option_labels)
    return chooser.with_reference(columns)


class _Chooser:
    """The columns of the first rows, found by name."""

    def __init__(self, head: Sequence[Mapping[str, Any]], source: str) -> None:
        self.head = head
        self.source = source
        self.columns = list(dict.fromkeys(name for row in head for name in row))
        self.by_usual_name = {name.strip().lower(): name for name in reversed(self.columns)}

    def first_value(self, column: str) -> Any:
        """The first value of a column that is not missing, or None."""
        for row in self.head:
            value = row.get(column)
            if not _is_missing(value):
                return value
        return None

    def find(self, names: Iterable[str], kinds: tuple[type, ...], *without: str) -> str:
        """The first column of a usual name that holds values of these types, or ""."""
        for name in names:
            column = self.by_usual_name.get(name, "")
            usable = isinstance(self.first_value(column), kinds)
            if usable and column not in without:
                return column
        return ""

    def check(self, column: str) -> None:
        """ValueError unless there is such a column; "a.b" is entry b of column a."""
        if column in self.columns or column.partition(".")[0] in self.columns:
            return
        raise unknown(f"column of {self.source}", column, self.columns)

    def none_found(self, role: str) -> ValueError:
        shown = ", ".join(map(repr, self.columns))
        problem = f"{self.source} has the columns {shown}"
        if len(self.columns) == 1:
            hint = "an input and a target are needed (to pretrain on text alone: mk.corpus)"
            if re.search("[;\t|]", self.columns[0]):
                hint = "write it with commas between the columns"
            return ValueError(f"{problem} only: {hint}")
        first, *_, last = self.columns
        call = f"mk.task(.., input={first!r}, target={last!r})"
        return ValueError(
            f"{problem}, none with a usual name for the {role}: name it, as in {call}"
        )

    def target(self, named: str | None, input: str | None) -> str:
        """The column of the answer."""
        if named is not None:
            self.check(named)
            return named
        in_input = [place for place, _ in PLACE.findall(input or "")]
        kinds = (str, int, list, Mapping)
        column = self.find(OWN_TARGETS, kinds, input or "", *in_input)
        if not column:
            raise self.none_found("target")
        value = self.first_value(column)
        # SQuAD's answers are a dict of texts and positions
        return f"{column}.text" if isinstance(value, Mapping) and "text" in value else column

    def fields(
        self, named: str | None, target: str, templates: Sequence[Template]
    ) -> dict[str, str]:
        """The fields of an example, each a text with columns in it."""
        places = _template_places(templates, target, self.source)
        fields = {}
        needs_input = not places
        for place in places:
            column = place.removesuffix("?")
            is_column = place in self.columns or column in self.columns
            if place == "input" and (named is not None or not is_column):
                needs_input = True
            elif is_column:
                fields[place] = f"{{{place}}}"
            else:
                raise unknown(f"column of {self.source} in a template", column, self.columns)
        if needs_input:
            fields["input"] = self.input_text(named, target)
        return fields

    def input_text(self, named: str | None, target: str) -> str:
        """The text of the input, with columns in it."""
        if named is None:
            text = self.usual_input(target)
            if not text:
                raise self.none_found("input")
            return text
        if named in self.columns or not PLACE.search(named):
            self.check(named)
            return f"{{{named}}}"
        for column, _ in PLACE.findall(named):
            if f"{column}?" not in self.columns:
                self.check(column)
        return named

    def usual_input(self, target: str) -> str:
        """The text of an input in columns of usual names, or ""."""
        kinds = (str, int)
        instruction = self.find(INSTRUCTIONS, kinds, target)
        question = self.find(QUESTIONS, kinds, target)
        context = self.find(CONTEXTS, kinds, target)
        if instruction:
            return f"{{{instruction}}}\n{{{context}?}}" if context else f"{{{instruction}}}"
        if question:
            return f"{{{context}?}}\n\n{{{question}}}" if context else f"{{{question}}}"
        for first_name, second_name in PAIRS:
            first = self.find([first_name], kinds, target)
            second = self.find([second_name], kinds, target)
            if first and second:
                return f"{{{first}}}\n{{{second}}}"
        column = self.find(OWN_INPUTS, kinds, target)
        return f"{{{column}}}" if column else ""

    def options(
        self, named: str | Sequence[str] | None, labels: tuple[str, ...]
    ) -> tuple[str | tuple[str, ...], tuple[str, ...]]:
        """The column or columns of the options, and the options of every row."""
        if named is None:
            return ("", labels) if labels else (self.find(OPTIONS, (list,)), ())
        if isinstance(named, str):
            self.check(named)
            return named, ()
        are_columns = [each in self.columns for each in named]
        if all(are_columns):
            return tuple(named), ()
        if any(are_columns):
            other = named[are_columns.index(False)]
            raise unknown(f"column of {self.source} with an option", other, self.columns)
        return "", tuple(str(each).strip() for each in named)

    def with_reference(self, columns: OwnColumns) -> OwnColumns:
        """The columns with the reference to options that fits most of the first rows."""
        value = self.first_value(columns.target)
        if not columns.options and not columns.labels:
            if isinstance(value, bool):
                call = 'options=["no", "yes"]'
                raise ValueError(
                    f"column {columns.target!r} of {self.source} holds {value}: name the answers "
                    f"for False and True, as in {call}"
                )
            return columns
        counts = {reference: self.num_fitting(columns, reference) for reference in REFERENCES}
        best = max(REFERENCES, key=counts.__getitem__)
        if not counts[best]:
            kind = columns.options or columns.labels
            raise ValueError(
                f"column {columns.target!r} of {self.source} holds {value!r}, which is no name, "
                f"index from 0 or letter of the options {kind!r}: name other options, or "
                "options=[] for none"
            )
        return OwnColumns(columns.fields, columns.target, columns.options, columns.labels, best)

    def num_fitting(self, columns: OwnColumns, reference: str) -> int:
        """In how many of the first rows the target refers to an option in this way."""
        count = 0
        for row in self.head:
            try:
                options = columns.options_of(row)
                value = value_of(row, columns.target)
            except BadRow:
                continue
            count += option_index(value, options, reference) is not None
        return count


def _is_missing(value: Any) -> bool:
    is_blank = isinstance(value, str) and not value.strip()
    return is_blank or value is None or value == []


def _required_places(texts: Iterable[str]) -> list[str]:
    """The columns in texts that may not be missing."""
    found = [place for text in texts for place in PLACE.findall(text)]
    return [column for column, optional in found if not optional]


def _template_places(templates: Sequence[Template], target: str, source: str) -> list[str]:
    """The placeholders of templates, without {answer}.

    Raises:
      ValueError: a template that shows the target, or that cannot be filled in.
    """
    found = []
    for template in templates:
        template.check()
        prompt_places = _format_places(template.prompt)
        if "answer" in prompt_places or target in prompt_places:
            raise ValueError(
                f"template {template.prompt!r} for {source} shows the target in the prompt: leave "
                "it out"
            )
        found += prompt_places + _format_places(template.target)
    return [place for place in dict.fromkeys(found) if place != "answer"]


def _format_places(text: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
