"""The public data sets, each described once in datasets.toml, as tasks.

A set's rows come from the data folder's own files, from a copy of the hub's files there
(`moekit data fetch`), or from the hub; the tasks are the same. Where a set that is trained on has
no validation rows of its own, every twentieth usable training row validates.
"""

import functools
import logging
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from moekit.data.columns import Columns
from moekit.data.files import (
    BadRow,
    OnError,
    check_on_error,
    files_digest,
    is_data_file,
    read,
)
from moekit.data.hub_files import CONVERTED, HubFiles, download, open_copies
from moekit.data.tables import Rows, every_twentieth
from moekit.data.tasks import Example, Task, templates
from moekit.errors import unknown

log = logging.getLogger("moekit")
SPLITS = ("train", "valid", "test")
CHECKED = 20_000  # rows of a table that are all read when it is opened
FORMER_NAMES = {"bool_q": "boolq"}


@dataclass(frozen=True)
class Access:
    """Where data is looked for, and what happens to unusable rows.

    Args:
      root: the data folder, if there is one.
      local: use the data folder's own files.
      hub: load what the data folder lacks from the hub.
      limit: of a set of the hub, stream that many rows of a split instead of downloading it.
    """

    root: Path | None
    local: bool = True
    hub: bool = False
    limit: int = 0
    on_error: OnError = "stop"

    def __post_init__(self):
        check_on_error(self.on_error)


@dataclass(frozen=True)
class LocalFiles:
    """How the data folder's own files hold a set: patterns of each split, columns."""

    patterns: Mapping[str, list[str]]
    columns: Columns

    def find(self, root: Path, split: str) -> list[Path]:
        """The files of a split: what the first pattern that matches any gives."""
        for pattern in self.patterns[split]:
            found = [path for path in root.glob(pattern) if is_data_file(path) or not path.is_dir()]
            if found:
                return sorted(found)
        return []


@dataclass(frozen=True, eq=False)
class DataSet:
    """A public data set; datasets.toml explains the entries."""

    name: str
    cluster: str
    templates: str
    group: str = ""
    inverted: str = ""
    licence: str = ""
    skip_unusable: bool = False
    local: tuple[LocalFiles, ...] = ()
    hub: Mapping[str, HubFiles] = field(default_factory=dict)  # of each split
    hub_columns: Columns | None = None

    @property
    def has_options(self) -> bool:
        """Whether every question has options, as the first description of the columns says."""
        described = [self.hub_columns] if self.hub_columns else []
        described += [place.columns for place in self.local]
        return described[0].has_options

    @property
    def repository(self) -> str:
        return next((files.repository for files in self.hub.values()), "")


@functools.cache
def datasets_table() -> dict[str, Any]:
    """The content of datasets.toml."""
    return tomllib.loads(files("moekit.data").joinpath("datasets.toml").read_text("utf-8"))


@functools.cache
def datasets() -> dict[str, DataSet]:
    """Every data set of datasets.toml by name."""
    entries = {name: row for name, row in datasets_table().items() if "templates" in row}
    return {name: _described(name, row) for name, row in entries.items()}


def dataset(name: str) -> DataSet:
    """A data set by name; ValueError with the nearest names for an unknown one."""
    known = FORMER_NAMES.get(name, name)
    if known not in datasets():
        raise unknown("data set", name, datasets())
    return datasets()[known]


def _described(name: str, row: Mapping[str, Any]) -> DataSet:
    local = tuple(_local_files(name, place) for place in row.get("local", ()))
    hub = row.get("hub", {})
    return DataSet(
        name=name,
        cluster=row["cluster"],
        templates=row["templates"],
        group=row.get("group", ""),
        inverted=row.get("inverted", ""),
        licence=row.get("licence", ""),
        skip_unusable=row.get("skip_unusable", False),
        local=local,
        hub=_hub_files(hub),
        hub_columns=_columns(hub) if hub else None,
    )


def _columns(row: Mapping[str, Any]) -> Columns:
    known = {each.name for each in fields(Columns)}
    return Columns(**{name: value for name, value in row.items() if name in known})


def _local_files(name: str, place: Mapping[str, str]) -> LocalFiles:
    layout = datasets_table()["layouts"][place["layout"]]
    patterns = {}
    for split in SPLITS:
        listed = layout.get(split, [f"{{folder}}/{split}.jsonl.gz"])
        folder = place.get("folder", "")
        patterns[split] = [text.format(name=name, folder=folder) for text in listed]
    return LocalFiles(patterns, _columns(layout))


def _hub_files(row: Mapping[str, Any]) -> dict[str, HubFiles]:
    named = {split: row.get(split, split if split == "train" else "") for split in SPLITS}
    return {
        split: HubFiles(row["repository"], CONVERTED, f"{row['config']}/{name}/*.parquet")
        for split, name in named.items()
        if row and name
    }


@dataclass(frozen=True, eq=False)
class Copy:
    """Where the rows of a set are: files of each split with their columns, or the hub."""

    files: Mapping[str, tuple[Path, ...]]
    columns: Mapping[str, Columns]
    hub: Mapping[str, HubFiles] = field(default_factory=dict)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.columns)


def find_copies(dataset: DataSet, access: Access) -> list[Copy]:
    """The copies of a set in the data folder, those with more splits first."""
    copies = []
    if access.root and access.local:
        copies.append(_local_copy(dataset, access.root))
    if access.root and dataset.hub:
        copies.append(_fetched_copy(dataset, access.root))
    copies = [copy for copy in copies if copy.splits]
    return sorted(copies, key=lambda copy: -len(copy.splits))


def find_copy(dataset: DataSet, access: Access) -> Copy | None:
    """The copy of a set that is used, else the hub; None if there is none."""
    copies = find_copies(dataset, access)
    if copies:
        return copies[0]
    if access.hub and dataset.hub:
        return Copy({}, dict.fromkeys(dataset.hub, dataset.hub_columns), dataset.hub)
    return None


def _local_copy(dataset: DataSet, root: Path) -> Copy:
    found, columns = {}, {}
    for split in SPLITS:
        for place in dataset.local:
            paths = place.find(root, split)
            if paths:
                found[split], columns[split] = tuple(paths), place.columns
                break
    return Copy(found, columns)


def _fetched_copy(dataset: DataSet, root: Path) -> Copy:
    copies = {split: tuple(each.copies(root)) for split, each in dataset.hub.items()}
    found = {split: paths for split, paths in copies.items() if paths}
    return Copy(found, dict.fromkeys(found, dataset.hub_columns))


def dataset_task(dataset: DataSet, access: Access) -> Task | None:
    """A set as a task with our templates, held out if it has no group; None without its rows.

    Nothing is read or downloaded before the first call of the task's `examples`.
    """
    copy = find_copy(dataset, access)
    return copy_task(dataset, copy, access) if copy else None


def copy_task(dataset: DataSet, copy: Copy, access: Access) -> Task:
    """One copy of a set as a task."""
    examples = DataSetExamples(dataset, copy, access)
    text_metric = "exact_match" if dataset.templates == "question" else "rouge_l"
    splits = []
    for split in SPLITS:
        if split in copy.splits or examples.is_cut_from_train(split):
            splits.append(split)
    inverted = ()
    if dataset.inverted:
        inverted = templates(dataset.inverted, target="{question}")
    return Task(
        name=dataset.name,
        cluster=dataset.cluster,
        load=examples,
        templates=templates(dataset.templates),
        inverted=inverted,
        metric="accuracy" if dataset.has_options else text_metric,
        splits=tuple(splits),
        origin=examples.digest,
        held_out=not dataset.group,
        sources=(dataset.name,),
    )


def licences(tasks: Iterable[Task]) -> dict[str, str]:
    """The licences of the tasks whose use is restricted."""
    found = {}
    for task in tasks:
        described = datasets().get(task.name)
        if described and described.licence:
            found[task.name] = described.licence
    return found


@dataclass(frozen=True, eq=False)
class DataSetExamples:
    """The examples of a set, a split a call."""

    dataset: DataSet
    copy: Copy
    access: Access

    def is_cut_from_train(self, split: str) -> bool:
        """Whether a split is a part of the training rows, by position."""
        if not self.dataset.group or split == "test":
            return False
        return "train" in self.copy.splits and "valid" not in self.copy.splits

    def __call__(self, split: str) -> Sequence[Example]:
        if not self.is_cut_from_train(split):
            return self._read(split)
        training_rows = self._read("train")
        positions = every_twentieth(np.arange(len(training_rows)), split)
        if isinstance(training_rows, Rows):
            return training_rows.select(positions)
        return [training_rows[position] for position in positions]

    def digest(self) -> str:
        """Names the rows: the content of their files, or repository, rows and bytes."""
        if self.copy.files:
            paths = {path for found in self.copy.files.values() for path in found}
            return files_digest(paths)
        first = next(iter(self.copy.hub.values()))
        table = download(first, self.access.limit)
        size = f"{len(table)} rows, {table.data.nbytes} bytes"
        return f"{first.repository}@{first.revision}: {size}"

    @property
    def _on_error(self) -> OnError:
        return "skip" if self.dataset.skip_unusable else self.access.on_error

    def _read(self, split: str) -> Sequence[Example]:
        columns = self.copy.columns[split]
        paths = self.copy.files.get(split, ())
        if not paths:
            hub = self.copy.hub[split]
            table = download(hub, self.access.limit)
            return _table_examples(table, str(hub), columns, split, self._on_error)
        if paths[0].suffix == ".parquet":
            table = open_copies(paths, split, self.access.limit)
            return _table_examples(table, str(paths[0].parent), columns, split, self._on_error)
        found = []
        for path in paths:
            found += _file_examples(path, columns, split, self._on_error)
        return found


def _file_examples(path: Path, columns: Columns, split: str, on_error: OnError) -> list[Example]:
    """The examples of one file that is read whole."""
    subject = re.sub(r"_(dev|val|test)$", "", path.stem)  # of MMLU's files, one a subject

    def make(row: dict, number: int) -> Example | None:
        if header and row[header[-1]] == header[-1]:
            return None  # some copies have a header
        return columns.example(row | {"file": subject}, f"{split}/{number}")

    header = columns.header if path.suffix in (".csv", ".tsv") else ()
    found = read(path, {}, make, columns=header, on_error=on_error)
    return [example for example in found if example]


def _table_examples(
    table: Any, where: str, columns: Columns, split: str, on_error: OnError
) -> Rows:
    """The usable rows of a table as examples that are made when they are read.

    A table of up to CHECKED rows is checked row by row; of a longer one only missing values are
    found now, and any other unusable row is replaced by the next one when it is read.

    Raises:
      ValueError: an unusable row and on_error "stop", or no usable rows.
    """

    def make(row: dict, number: int) -> Example:
        try:
            return columns.example(row, f"{split}/{number + 1}")
        except ValueError as problem:
            raise BadRow(f"{where}:{number + 1}: {problem}") from None

    unusable = _missing_values(table, where, columns)
    if len(table) <= CHECKED:
        unusable = {}
        for number, row in enumerate(table):
            try:
                make(row, number)
            except ValueError as problem:
                unusable[number] = str(problem)
    for number, problem in unusable.items():
        if on_error == "stop":
            raise ValueError(f'{problem}; correct the row or use on_error="skip"')
        if callable(on_error):
            on_error(Path(where), number + 1, problem)
    if unusable and not callable(on_error):
        log.warning("%s: skipped %d unusable of %d rows", where, len(unusable), len(table))
    numbers: Int[np.ndarray, n] = np.delete(np.arange(len(table)), list(unusable))
    if not len(numbers) and not callable(on_error):
        raise ValueError(f"{where}: no usable rows")
    return Rows(table, numbers, make)


def _missing_values(table: Any, where: str, columns: Columns) -> dict[int, str]:
    """{row: problem} of the rows of a table that lack a value of a column."""
    import pyarrow.compute as pc

    found = {}
    for name in columns.used:
        if name not in table.column_names:
            raise ValueError(f"{where}: column {name!r} is missing")
        missing = pc.is_null(table.data.column(name), nan_is_null=True).to_numpy()
        for number in np.flatnonzero(missing).tolist():
            found[number] = f"{where}:{number + 1}: column {name!r} holds no text: missing"
    return dict(sorted(found.items()))
