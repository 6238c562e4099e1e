"""Prompted rows in files of many kinds: P3, promptsource's, FLAN's ready-made ones, plain ones.

A folder of the data folder named like a group of the collection (flan2021, t0 or p3, dialog,
program) holds one task a file, `<task>.jsonl` (.jsonl.gz, .json, .parquet, .csv with a header), or
one a folder, `<task>/{train,validation,test}*.jsonl`. A row has an input and a target under any
of the names below, perhaps an instruction, context, options, a rationale, a task's name. Rows that
are prompts already stay as they are; instructions and questions get our wordings.

Rows lie in an Arrow file on disk (of the folder for temporary files) and become examples when they
are asked for.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moekit.data.collection import cluster_of
from moekit.data.rows import Rows, by_task, example_of, on_disk
from moekit.data.sources import KINDS, BadRow, OnError, files_digest, is_kind, read
from moekit.data.tasks import Example, Task, Template, templates

if TYPE_CHECKING:
    from moekit.data.mirror import Mirror

INSTRUCTIONS = ("instruction", "definition")
INPUTS = ("inputs_pretokenized", "inputs", "input", "prompt", "source", "context", "passage")
TARGETS = ("targets_pretokenized", "targets", "target", "outputs", "output", "completion")
TARGETS += ("response", "answers", "answer", "label")
OPTIONS = ("options", "answer_choices", "choices")
SPLITS = {"train": ("train",), "valid": ("valid", "dev"), "test": ("test",)}
READY = (Template("{instruction}"),)


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


def prompt_row(row: dict, number: int) -> tuple[Example, str, str] | None:
    """A row of any of these kinds as an example, with its task's name and its kind; None for P3's
    wrong answers (is_correct false)."""
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
    context = given if question else ""
    example = Example(
        id=str(row["id"] if row.get("id") is not None else number),
        fields={"instruction": text, "question": text, "context": context},
        answer=answers[0],
        references=tuple(answers),
        options=tuple(dict.fromkeys(options)) if answers[0] in options else (),
        rationale=_text(row, ["rationale", "explanation"]),
    )
    return example, _text(row, ["task_name", "task"]), kind


@functools.lru_cache(maxsize=256)
def _load(paths: tuple[Path, ...], stamps: tuple[int, ...], on_error: OnError):
    """A table of the rows of files, and the row numbers of each task."""
    rows = (row for path in paths for row in read(path, {}, prompt_row, on_error=on_error) if row)
    table = on_disk(rows)
    return table, by_task(table.data.column("task"))


def _table(paths: Sequence[Path], on_error: OnError):
    stamps = tuple(path.stat().st_mtime_ns for path in paths)  # a changed file is read again
    return _load(tuple(paths), stamps, on_error)


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
            name = entry.name.removesuffix(kind)
            if name in found:
                raise ValueError(f"{entry}: {folder} has task {name} already; rename one of them")
            found[name] = {"train": [entry]}
    return found


@dataclass(frozen=True, eq=False)
class _Prompted:
    """One task's rows of some files."""

    files: dict[str, list[Path]]
    task: str
    on_error: OnError

    def __call__(self, split: str) -> Rows:
        apart = "valid" in self.files or split == "test"
        table, tasks = _table(self.files[split if apart else "train"], self.on_error)
        rows = Rows(table, tasks.get(self.task, np.zeros(0, np.int64)), example_of)
        return rows if apart else rows.cut(split)


def prompted_tasks(mirror: "Mirror", group: str, folder: str) -> list[Task]:
    """The tasks of a group's folder."""
    tasks, root = [], mirror.root / folder
    for name, files in _files(root).items() if root.is_dir() else ():
        table, found = _table(files["train"], mirror.on_error)
        for own, indices in found.items():
            first = table[int(indices[0])]
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
