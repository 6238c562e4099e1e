"""Tasks of a user's own data: `mk.task`.

Every row is read and checked at once. The examples are then kept in a memory-mapped file (in the
folder for temporary files), so that many of them need no memory.
"""

import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from moekit.data.files import BadRow, check_on_error
from moekit.data.own_columns import OwnColumns, choose_columns
from moekit.data.own_rows import OwnData, RowSource, open_data
from moekit.data.tables import Rows, on_disk, rows_by_name, stored_example
from moekit.data.tasks import Example, Task, Template
from moekit.progress import ProgressBar

log = logging.getLogger("moekit")
HEAD = 100  # first rows, which decide on the columns
CLUSTER = "own"
SHORT_TARGET = 30  # characters
MEDIAN_OF = 1000  # targets
AS_IT_IS = (Template("{input}"),)


def task(
    rows: Any,
    *,
    input: str | None = None,
    target: str | None = None,
    options: str | Sequence[str] | None = None,
    name: str | None = None,
    templates: str | Template | Sequence[str | Template] | None = None,
    on_error: str = "stop",
) -> Task:
    """A task of your own rows, to train, evaluate and trace with.

    Usual column names are found by themselves, whatever their case: question and answer, input and
    target, prompt and completion, text and label, document and summary, instruction with input and
    output (Alpaca), question with context, and others. They are chosen once, from the first rows.

    Where the data has no validation split, 5 % of the rows validate, chosen by a hash of their
    input; a single row only trains. The metric is accuracy with options, else exact_match where
    the median target has at most 30 characters, else rouge_l.

    Args:
      rows: a list of dicts, a `datasets.Dataset` (or IterableDataset, DatasetDict), a pandas
        DataFrame, a dict of these by split, or the path of a .jsonl, .jsonl.gz, .json, .csv, .tsv
        (with a header) or .parquet file or of a folder of them. Files and subfolders named train,
        valid, dev or test (test.csv, train-00000.parquet) are splits.
      input: a column, or a text with {column} in it, or {column?} where a column may be empty.
      target: the column of the answer, or of a list of accepted answers.
      options: the column that lists a row's options, a list of columns with one option each, or a
        list of labels for all rows; the target is then an option, its index from 0, or its letter.
        [] is no options, even if there is a column of that name.
      name: default the name of the file or folder, or "own".
      templates: prompts with any {column} in them, and {input}; default the input as it is.
      on_error: "stop" at an unusable row (an empty value, a target that is not an option), or
        "skip" such rows and log how many they are.

    Raises:
      ValueError: no rows, an unusable row, an unknown column or kind of file.
      FileNotFoundError: no such file or folder.
    """
    check_on_error(on_error)
    data = open_data(rows)
    prompts = _as_templates(templates)
    columns = _columns(data, input, target, options, prompts)
    examples = _read(data, columns, on_error)
    return examples.task(name or data.name, prompts, _training_splits(examples.splits))


def evaluation_task(
    rows: Any,
    *,
    input: str | None = None,
    target: str | None = None,
    options: str | Sequence[str] | None = None,
) -> Task:
    """A task all of whose rows are its "test" split, and its exemplars ("train") as well.

    Where the data has a test split, it is that of `task`. Arguments and errors are those of `task`.
    """
    data = open_data(rows)
    columns = _columns(data, input, target, options, ())
    examples = _read(data, columns, "stop")
    splits = _training_splits(examples.splits)
    if "test" not in splits:
        everything = examples.all_rows()
        splits = {"train": everything, "test": everything}
    return examples.task(data.name, (), splits)


@dataclass(frozen=True)
class _OwnExamples:
    """The examples of all splits.

    Args:
      table: a memory-mapped table.
      splits: the rows of each split that the data has.
      digest: twelve hexadecimal digits of the training and validation examples.
      has_options: whether the answer is one of several options.
    """

    table: Any
    splits: Mapping[str, Rows]
    digest: str
    has_options: bool

    def all_rows(self) -> Rows:
        return Rows(self.table, np.arange(len(self.table)), stored_example)

    def task(self, name: str, templates: tuple[Template, ...], splits: Mapping[str, Rows]) -> Task:
        """The task of these examples in splits."""
        return Task(
            name=name,
            cluster=CLUSTER,
            load=splits.__getitem__,
            templates=templates or AS_IT_IS,
            metric=self.metric(),
            splits=tuple(splits),
            origin=functools.partial(str, self.digest),
        )

    def metric(self) -> str:
        if self.has_options:
            return "accuracy"
        answers = self.table.data.column("answer").slice(0, MEDIAN_OF).to_pylist()
        is_short = median(len(answer) for answer in answers) <= SHORT_TARGET
        return "exact_match" if is_short else "rouge_l"


def _as_templates(
    templates: str | Template | Sequence[str | Template] | None,
) -> tuple[Template, ...]:
    """The templates of the caller; none if the input is the prompt as it is."""
    if isinstance(templates, str | Template):
        templates = [templates]
    return tuple(
        Template(template) if isinstance(template, str) else template
        for template in templates or ()
    )


def _columns(
    data: OwnData,
    input: str | None,
    target: str | None,
    options: str | Sequence[str] | None,
    templates: tuple[Template, ...],
) -> OwnColumns:
    return choose_columns(
        data.head(HEAD),
        source=data.sources[0].name,
        input=input,
        target=target,
        options=options,
        templates=templates,
        labels=data.labels,
    )


def _read(data: OwnData, columns: OwnColumns, on_error: str) -> _OwnExamples:
    """All rows as examples on the disk.

    Raises:
      ValueError: an unusable row, or no usable ones.
    """
    sha = hashlib.sha256()
    with ProgressBar(desc=f"read {data.name}", unit="row", leave=False) as bar:
        table = on_disk(_hashed(_examples(data, columns, on_error, bar), sha))
    if not len(table):
        raise ValueError(f"{data.name}: no usable rows")
    splits = {}
    for split, indices in rows_by_name(table.data.column("task")).items():
        splits[split] = Rows(table, indices, stored_example)
    has_options = bool(columns.reference)
    return _OwnExamples(table, splits, sha.hexdigest()[:12], has_options)


def _examples(
    data: OwnData, columns: OwnColumns, on_error: str, bar: ProgressBar
) -> Iterator[tuple[Example, str, str]]:
    """Each example with its split (and an empty kind), in the form that `on_disk` takes."""
    num_examples = 0
    for split, sources in data.splits.items():
        for source in sources:
            for example in _source_examples(source, columns, num_examples, on_error):
                num_examples += 1
                bar.update()
                yield example, split, ""


def _source_examples(
    source: RowSource, columns: OwnColumns, first_id: int, on_error: str
) -> Iterator[Example]:
    """The examples of one file or object; their ids are numbers from `first_id`."""
    num_usable, num_skipped = 0, 0
    for number, row in source.rows():
        try:
            if isinstance(row, BadRow):
                raise row
            example = columns.example(row, str(first_id + num_usable))
        except ValueError as problem:
            if on_error == "stop":
                hint = 'correct the row or use on_error="skip"'
                raise ValueError(f"{source.name}:{number}: {problem}; {hint}") from None
            num_skipped += 1
            continue
        num_usable += 1
        yield example
    if num_skipped:
        total = num_usable + num_skipped
        log.warning("%s: skipped %d unusable of %d rows", source.name, num_skipped, total)


def _hashed(
    examples: Iterator[tuple[Example, str, str]], sha: Any
) -> Iterator[tuple[Example, str, str]]:
    """The same examples; those that are not tested are added to a checksum."""
    for example, split, kind in examples:
        if split != "test":
            content = (split, example.fields, example.answer, example.references, example.options)
            sha.update(repr(content).encode())
        yield example, split, kind


def _training_splits(splits: Mapping[str, Rows]) -> dict[str, Rows]:
    """The splits, with a part of "train" as "valid" where the data has none."""
    if "valid" in splits or "train" not in splits:
        return dict(splits)
    held_out = splits["train"].part("valid")
    if not len(held_out):
        return dict(splits)
    return {**splits, "train": splits["train"].part("train"), "valid": held_out}
