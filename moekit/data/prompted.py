"""Prompted rows in files of many kinds: P3, promptsource's, FLAN's ready-made ones, plain ones.

A folder of the data folder named like a group of the collection (flan2021, t0 or p3, dialog,
program) holds one task a file, `<task>.jsonl` (.jsonl.gz, .json, .parquet, .csv with a header), or
one a folder, `<task>/{train,validation,test}*.jsonl`. A row has an input and a target under any
of the names below, perhaps an instruction, context, options, a rationale, a task's name. Rows that
are prompts already stay as they are; instructions and questions get our wordings.

Rows lie in an Arrow file on disk and become examples when they are asked for.
"""

import functools
import itertools
import logging
import operator
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int

from moekit.data.collection import cluster_of
from moekit.data.sources import KINDS, VALID, BadRow, OnError, files_digest, is_kind, rank, read
from moekit.data.tasks import Example, Task, Template, templates

if TYPE_CHECKING:
    from moekit.data.mirror import Mirror

log = logging.getLogger("moekit")
INSTRUCTIONS = ("instruction", "definition")
INPUTS = ("inputs_pretokenized", "inputs", "input", "prompt", "source", "context", "passage")
TARGETS = ("targets_pretokenized", "targets", "target", "outputs", "output", "completion")
TARGETS += ("response", "answers", "answer", "label")
OPTIONS = ("options", "answer_choices", "choices")
SPLITS = {"train": ("train",), "valid": ("valid", "dev"), "test": ("test",)}
READY = (Template("{instruction}"),)


class Rows(Sequence):
    """Examples of an Arrow table, each made when it is asked for.

    A row that makes no example gives way to the next one that does; how many did is logged.
    """

    def __init__(self, table: Any, indices: Int[np.ndarray, "n"], make: Callable[..., Example]):
        self._table, self._indices, self._make = table, indices, make
        self._bad = 0

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> Example:
        n, i = len(self), operator.index(index)
        if not -n <= i < n:
            raise IndexError(i)
        problem: Exception | None = None
        for step in range(min(n, 1000)):
            number = int(self._indices[(i + step) % n])
            try:
                row = self._table.data.fast_slice(number, 1).to_pylist()[0]
                return self._make(row, number)
            except ValueError as error:
                problem, self._bad = error, self._bad + 1
                if self._bad in (1, 100, 10_000):
                    log.warning("row %d cannot be used (%s); %d so far", number, error, self._bad)
        raise ValueError(f"no usable rows near row {number}: {problem}")


def by_task(names: Any, usable: Any = None) -> dict[str, Int[np.ndarray, "n"]]:
    """Row numbers of every task, given the column of their names (and which rows are usable)."""
    import pyarrow.compute as pc

    column = pc.fill_null(names, "").combine_chunks().dictionary_encode()
    codes = column.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    if usable is not None:
        order = order[usable[order]]
    cuts = np.searchsorted(codes[order], np.arange(len(column.dictionary) + 1))
    keys = column.dictionary.to_pylist()
    found = {k: order[cuts[i] : cuts[i + 1]] for i, k in enumerate(keys)}
    return {key: rows for key, rows in found.items() if len(rows)}


def _text(row: dict, names: Iterable[str]) -> str:
    return next((row[n] for n in names if isinstance(row.get(n), str) and row[n].strip()), "")


def _targets(row: dict, options: list[str]) -> list[str]:
    for name in TARGETS:
        value = row.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and options:
            if not 0 <= value < len(options):
                raise BadRow(f"{name} {value} is not one of {len(options)} options")
            return [options[value]]
        values = value if isinstance(value, list) else [value]
        if values and all(isinstance(v, str | int | float) for v in values):
            if any(isinstance(v, bool) for v in values):
                continue
            texts = [str(v).strip() for v in values]
            if all(texts) or (name == "targets" and any(texts)):
                return [text for text in texts if text]
    raise BadRow(f"no target text under any of {', '.join(TARGETS)}")


def prompt_row(row: dict, number: int) -> dict | None:
    """A row of any of these kinds in one form; None for P3's wrong answers (is_correct false)."""
    if row.get("is_correct") is False:
        return None
    listed = next((row[n] for n in OPTIONS if isinstance(row.get(n), list) and row[n]), [])
    options = [o.strip() for o in listed if isinstance(o, str)]
    answers = _targets(row, options)
    instruction, question = _text(row, INSTRUCTIONS), _text(row, ["question"])
    given = _text(row, INPUTS)
    if instruction:
        kind, text = "dialog", f"{instruction}\n{given}".strip()
    elif question:
        kind, text = ("reading" if given else "question"), question
    else:
        kind, text = "", given
    if not text:
        raise BadRow(f"no input text under any of {', '.join((*INSTRUCTIONS, *INPUTS))}")
    made = {
        "kind": kind,
        "instruction": text,
        "context": given if question else "",
        "answers": answers,
        "options": list(dict.fromkeys(options)) if answers[0] in options else [],
        "rationale": _text(row, ["rationale", "explanation"]),
        "task": _text(row, ["task_name", "task"]),
        "id": str(row.get("id") if row.get("id") is not None else number),
    }
    return made | {"valid": rank(_example(made, number).fields) < VALID}


def _example(row: dict, number: int) -> Example:
    fields = {name: row["instruction"] for name in ("instruction", "question")}
    return Example(
        id=row["id"],
        fields=fields | {"context": row["context"]},
        answer=row["answers"][0],
        references=tuple(row["answers"]),
        options=tuple(row["options"]),
        rationale=row["rationale"],
    )


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="moekit-")  # gone when Python ends


@dataclass(frozen=True, eq=False)
class Table:
    """Rows on disk, the row numbers of each task, and which rows validate."""

    rows: Any
    tasks: dict[str, Int[np.ndarray, "n"]]
    valid: Bool[np.ndarray, "rows"]

    def part(self, task: str, split: str | None) -> Rows:
        """Examples of a task; with a split those of "train" or "valid"."""
        indices = self.tasks.get(task, np.zeros(0, np.int64))
        if split and len(indices):
            held = self.valid[indices]
            if not held.any() and len(indices) > 1:
                held = np.arange(len(indices)) == 0
            indices = indices[held == (split == "valid")]
        return Rows(self.rows, indices, _example)


@functools.lru_cache(maxsize=256)
def _load(paths: tuple[Path, ...], stamps: tuple[int, ...], on_error: OnError) -> Table:
    import datasets
    import pyarrow as pa

    texts = ("kind", "instruction", "context", "rationale", "task", "id")
    schema = pa.schema([(name, pa.large_string()) for name in texts])
    for name in ("answers", "options"):
        schema = schema.append(pa.field(name, pa.list_(pa.string())))
    schema = schema.append(pa.field("valid", pa.bool_()))
    rows = (row for path in paths for row in read(path, {}, prompt_row, on_error=on_error) if row)
    arrow = f"{_scratch().name}/{len(os.listdir(_scratch().name))}.arrow"
    with pa.OSFile(arrow, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while batch := list(itertools.islice(rows, 1000)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    found = datasets.Dataset.from_file(arrow)
    valid = found.data.column("valid").to_numpy().astype(bool)
    return Table(found, by_task(found.data.column("task")), valid)


def table(paths: Sequence[Path], on_error: OnError) -> Table:
    """The rows of files; read again if a file has changed."""
    return _load(tuple(paths), tuple(p.stat().st_mtime_ns for p in paths), on_error)


def _files(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """{task: {split: files}} of a folder."""
    found: dict[str, dict[str, list[Path]]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            inside = [path for path in sorted(entry.iterdir()) if is_kind(path)]
            splits = {s: [p for p in inside if p.name.startswith(n)] for s, n in SPLITS.items()}
            if splits["train"]:
                found[entry.name] = {split: files for split, files in splits.items() if files}
        elif is_kind(entry) and entry.suffix != ".tsv":
            kind = max((k for k in KINDS if entry.name.endswith(k)), key=len)
            found[entry.name.removesuffix(kind)] = {"train": [entry]}
    return found


@dataclass(frozen=True, eq=False)
class _Prompted:
    """One task's rows of some files."""

    files: dict[str, list[Path]]
    task: str
    on_error: OnError

    def __call__(self, split: str) -> Rows:
        cut = "valid" not in self.files and split in ("train", "valid")
        found = table(self.files["train" if cut else split], self.on_error)
        return found.part(self.task, split if cut else None)


def prompted_tasks(mirror: "Mirror", group: str, folder: str) -> list[Task]:
    """The tasks of a group's folder."""
    tasks, root = [], mirror.root / folder
    for name, files in _files(root).items() if root.is_dir() else ():
        found = table(files["train"], mirror.on_error)
        for own, indices in found.tasks.items():
            first = found.rows[int(indices[0])]
            kind = first["kind"]
            family = "program" if (group, kind) == ("program", "dialog") else kind
            tasks.append(
                Task(
                    f"{group}/{own or name}",
                    cluster_of(group, own or name),
                    _Prompted(files, own, mirror.on_error),
                    templates(family) if family else READY,
                    metric="accuracy" if first["options"] else "rouge_l",
                    splits=tuple(dict.fromkeys((*files, "valid"))),
                    origin=functools.partial(files_digest, set().union(*files.values())),
                )
            )
    return tasks
