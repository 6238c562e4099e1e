"""Instruction files: prompted rows of many kinds (P3, promptsource, FLAN, Alpaca, plain ones).

A folder of the data folder named like a group of the collection (flan2021, t0 or p3, cot, dialog,
program) holds one task a file, `<task>.jsonl` (.jsonl.gz, .json, .parquet, .csv with a header), or
one a folder, `<task>/{train,validation,test}*.jsonl`. A row has an input and a target under any
of the names below, and perhaps an instruction, context, options, a rationale, a task's name. Rows
that are prompts already stay as they are; instructions and questions get our templates.

Rows are stored in an Arrow file (in the folder for temporary files) and become examples when they
are read.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from moekit.data.collection import cluster_of
from moekit.data.column_names import INPUTS, INSTRUCTIONS, OPTIONS, TARGETS
from moekit.data.files import KINDS, BadRow, OnError, files_digest, is_data_file, read
from moekit.data.tables import Rows, on_disk, rows_by_name, stored_example
from moekit.data.tasks import Example, Task, Template, templates

FOLDERS = {  # of each group
    "flan2021": ("flan2021",),
    "t0": ("p3", "t0"),
    "cot": ("cot", "cot_data"),
    "dialog": ("dialog",),
    "program": ("program",),
}
SPLITS = {"train": ("train",), "valid": ("valid", "dev"), "test": ("test",)}
COT_COLUMNS = ("question", "answer", "rationale")  # of FLAN's .tsv files
AS_IT_IS = (Template("{instruction}"),)


def _first_text(row: Mapping[str, Any], names: Iterable[str]) -> str:
    """The first of these columns that holds a text, or ""."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
    return ""


def _targets(row: Mapping[str, Any], options: Sequence[str]) -> list[str]:
    """The accepted answers of a row; BadRow if there are none."""
    for name in TARGETS:
        value = row.get(name)
        if type(value) is int and options:
            if not 0 <= value < len(options):
                raise BadRow(f"{name} {value} is not one of {len(options)} options")
            return [options[value]]
        values = value if isinstance(value, list) else [value]
        if not values or any(type(each) not in (str, int) for each in values):
            continue
        texts = [str(each).strip() for each in values]
        # some ready-made rows list empty targets beside others
        if all(texts) or (name == "targets" and any(texts)):
            return [text for text in texts if text]
    raise BadRow(f"no target text under any of {', '.join(TARGETS)}")


def _options(row: Mapping[str, Any]) -> list[str]:
    for name in OPTIONS:
        listed = row.get(name)
        if isinstance(listed, list) and listed:
            if not all(isinstance(option, str) for option in listed):
                raise BadRow(f"{name} holds something other than texts: {str(listed)[:60]}")
            return [option.strip() for option in listed]
    return []


def prompt_row(row: dict, number: int) -> tuple[Example, str, str] | None:
    """A row of any of these kinds as an example, with its task's name and its kind; None for P3's
    wrong answers (is_correct false)."""
    if row.get("is_correct") is False:
        return None
    options = _options(row)
    answers = _targets(row, options)
    instruction = _first_text(row, INSTRUCTIONS)
    question = _first_text(row, ["question"])
    given = _first_text(row, INPUTS)
    if instruction:
        kind, text = "dialog", f"{instruction}\n{given}".strip()
    elif question:
        kind, text = "reading" if given else "question", question
    else:
        kind, text = "", given
    if not text:
        raise BadRow(f"no input text under any of {', '.join((*INSTRUCTIONS, *INPUTS))}")
    context = given if question else ""
    example = Example(
        id=str(row["id"] if row.get("id") is not None else number),
        fields={"instruction": text, "question": text, "context": context},
        answer=answers[0],
        references=tuple(answers),
        options=tuple(dict.fromkeys(options)) if answers[0] in options else (),
        rationale=_first_text(row, ["rationale", "explanation"]),
    )
    return example, _first_text(row, ["task_name", "task"]), kind


Tasks = dict[str, Int[np.ndarray, "n"]]  # row numbers of each task


@functools.lru_cache(maxsize=256)
def _load(paths: tuple[Path, ...], stamps: tuple[int, ...], on_error: OnError) -> tuple[Any, Tasks]:
    """A table of the rows of files, and the row numbers of each task."""
    table = on_disk(_rows(paths, on_error))
    return table, rows_by_name(table.data.column("task"))


def _rows(paths: Sequence[Path], on_error: OnError) -> Iterator[tuple[Example, str, str]]:
    for path in paths:
        columns = COT_COLUMNS if path.suffix == ".tsv" else ()
        for row in read(path, {}, prompt_row, columns=columns, on_error=on_error):
            if row:
                yield row


def _table(paths: Sequence[Path], on_error: OnError) -> tuple[Any, Tasks]:
    stamps = tuple(path.stat().st_mtime_ns for path in paths)  # a changed file is read again
    return _load(tuple(paths), stamps, on_error)


def task_files(folder: Path, described: Iterable[str] = ()) -> dict[str, dict[str, list[Path]]]:
    """{task: {split: files}} of a folder, without the described data sets."""
    found: dict[str, dict[str, list[Path]]] = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.is_dir():
            inside = [path for path in sorted(entry.iterdir()) if is_data_file(path)]
            splits = {}
            for split, starts in SPLITS.items():
                splits[split] = [path for path in inside if path.name.startswith(starts)]
            if splits["train"]:
                found[entry.name] = {split: files for split, files in splits.items() if files}
        elif is_data_file(entry) and (entry.suffix != ".tsv" or folder.name in FOLDERS["cot"]):
            kind = max((kind for kind in KINDS if entry.name.endswith(kind)), key=len)
            name = entry.name.removesuffix(kind)
            if folder.name in FOLDERS["cot"]:
                name = name.removesuffix("_train")
            if name in described:
                continue
            if name in found:
                raise ValueError(f"{entry}: {folder} has task {name} already; rename one of them")
            found[name] = {"train": [entry]}
    return found


@dataclass(frozen=True, eq=False)
class _TaskRows:
    """One task's rows of some files; without a file for it, 5 % of the rows validate."""

    files: Mapping[str, list[Path]]
    task: str
    on_error: OnError

    def __call__(self, split: str) -> Rows:
        whole = "valid" in self.files or split == "test"
        table, tasks = _table(self.files[split if whole else "train"], self.on_error)
        rows = Rows(table, tasks.get(self.task, np.zeros(0, np.int64)), stored_example)
        return rows if whole else rows.part(split)


def instruction_tasks(
    root: Path, group: str, described: Iterable[str] = (), on_error: OnError = "stop"
) -> list[Task]:
    """The tasks of a group's folders; every row is read and checked.

    Args:
      described: data sets of datasets.toml, which are not read here.
    """
    tasks = []
    for folder in FOLDERS.get(group, ()):
        for name, files in task_files(root / folder, described).items():
            table, found = _table(files["train"], on_error)
            for own_name, rows in found.items():
                first = table[int(rows[0])]
                load = _TaskRows(files, own_name, on_error)
                tasks.append(_task(group, own_name or name, first, load))
    return tasks


def _task(group: str, name: str, first: Mapping[str, Any], load: _TaskRows) -> Task:
    """A task that is like its first row."""
    family = first["kind"]
    if group == "program" and family == "dialog":
        family = "program"
    paths = [path for files in load.files.values() for path in files]
    free = "exact_match" if group == "cot" else "rouge_l"
    inverted = templates("question", target="{question}") if group == "cot" else ()
    return Task(
        name=f"{group}/{name}",
        cluster=cluster_of(group, name),
        load=load,
        templates=templates(family) if family else AS_IT_IS,
        inverted=inverted,
        metric="accuracy" if first["options"] else free,
        splits=tuple(dict.fromkeys((*load.files, "valid"))),
        origin=functools.partial(files_digest, set(paths)),
    )
