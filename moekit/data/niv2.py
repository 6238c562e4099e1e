"""Super-NaturalInstructions (NIv2): one task a file, with a definition and instances.

Task files of the official repository are found anywhere in the data folder, in a folder named
`tasks` or `niv2` (or named task*.json at its top). The folder's own layout (niv2/tasks.jsonl.gz
and niv2/{train,valid,test}/<task>.jsonl.gz) comes first where both have a task. A task is held out
if any splits/default/test_tasks.txt names it, left out if the excluded_tasks.txt of its own
repository does or if it was made from MMLU, and trained on otherwise.
"""

import functools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from moekit.data.files import (
    BadRow,
    OnError,
    files_digest,
    read,
    read_json,
    rows_in_manifest,
)
from moekit.data.tables import Rows, on_disk, part_by_hash, stored_example
from moekit.data.tasks import Example, Task, templates

log = logging.getLogger("moekit")
LARGE = 2 << 20  # bytes of a file whose examples stay on disk
MAX_LABELS = 8  # a task with at most that many distinct answers is a classification
LABEL_ROWS = 3  # if each occurs that often in the mean
MMLU = range(685, 738)  # numbers of the tasks that were made from MMLU; Chung 2022 removed them
_ROW = {"input": str, "output": [str]}
_OFFICIAL_NAMES = {  # our names: those of the official files
    "definition": "Definition",
    "categories": "Categories",
    "domains": "Domains",
    "sources": "Source",
}


@dataclass(frozen=True)
class Definition:
    """What a task file says about its task."""

    name: str
    held_out: bool
    definition: str
    categories: Sequence[str]
    domains: Sequence[str]
    sources: Sequence[str]
    positive_examples: Sequence = field(repr=False)

    def task(self, root: Path, files: Mapping[str, Path], on_error: OnError) -> Task:
        """The task with the instances of these files. A held-out task's exemplars are the
        positive examples of its definition."""
        instances = Instances(self, files, on_error)
        whole = not self.held_out and "valid" in files
        size = rows_in_manifest(root, files["train"]) if whole else None
        return Task(
            name=f"niv2/{self.name}",
            cluster=self.categories[0] if self.categories else "niv2",
            load=instances,
            templates=templates("niv2"),
            metric="rouge_l",
            splits=("train", "test") if self.held_out else ("train", "valid"),
            origin=instances.digest,
            held_out=self.held_out,
            size=size,
            sources=tuple(self.sources),
        )


def niv2_tasks(
    root: Path, split: str, on_error: OnError = "stop", only: str | None = None
) -> list[Task]:
    """Tasks of the official split "train" or "test" (other categories, held out).

    Args:
      only: the name of one task; the others are not opened.
    """
    found: dict[str, Task] = {}
    own_names = set()
    for task in _own_definitions(root, on_error):
        own_names.add(task.name)
        wanted = only in (None, task.name) and task.held_out == (split == "test")
        files = _own_files(root, task) if wanted else {}
        if files:
            found[task.name] = task.task(root, files, on_error)
    if only not in own_names:
        paths = _official_files(root, split, only)
        for name, path in paths.items():
            if name not in own_names:
                found |= _official_task(root, name, path, split == "test", on_error)
    return [found[name] for name in sorted(found)]


def _own_definitions(root: Path, on_error: OnError) -> Iterator[Definition]:
    """The definitions in the folder's own layout."""
    path = root / "niv2/tasks.jsonl.gz"
    schema = {"task": str, "split": str, "definition": str}
    schema |= {"categories?": [str], "domains?": [str], "source?": [str]}
    if not os.path.lexists(path):
        return iter(())
    return read(path, schema, _own_definition, on_error=on_error)


def _own_definition(row: dict, number: int) -> Definition:
    if Path(row["task"]).name != row["task"] or row["task"].startswith("."):
        raise BadRow(f"task {row['task']!r} is no file name: it leads out of the data folder")
    return Definition(
        name=row["task"],
        held_out=row["split"] == "test",
        definition=row["definition"],
        categories=row.get("categories") or (),
        domains=row.get("domains") or (),
        sources=row.get("source") or (),
        positive_examples=row.get("positive_examples") or (),
    )


def _own_files(root: Path, task: Definition) -> dict[str, Path]:
    splits = ("test",) if task.held_out else ("train", "valid")
    paths = {split: root / f"niv2/{split}/{task.name}.jsonl.gz" for split in splits}
    files = {split: path for split, path in paths.items() if os.path.lexists(path)}
    return files if splits[0] in files else {}


def _official_files(root: Path, split: str, only: str | None) -> dict[str, Path]:
    """Task files in the official schema of a split by name, wherever they are stored."""
    tests: set[str] = set()
    for path in root.rglob("splits/default/test_tasks.txt"):
        tests |= _listed(path)
    found: dict[str, Path] = {}
    excluded = []
    for path in sorted(root.rglob("*.json")):
        name = path.stem
        if only not in (None, name) or name in found:
            continue
        if not _is_task_file(path.relative_to(root)):
            continue
        if (name in tests) != (split == "test"):
            continue
        if split == "train" and _is_excluded(path):
            excluded.append(name)
        else:
            found[name] = path
    if excluded:
        log.info("NIv2: %d tasks are excluded: %s", len(excluded), ", ".join(excluded))
    return found


def _is_task_file(path: Path) -> bool:
    folders = path.parts[:-1]
    if "splits" in folders:
        return False
    return bool({"tasks", "niv2"} & set(folders)) or (not folders and path.name.startswith("task"))


def _is_excluded(path: Path) -> bool:
    """Whether a task's own repository excludes it, or it was made from MMLU."""
    number = re.match(r"task(\d+)_", path.stem)
    if number and int(number[1]) in MMLU:
        return True
    return path.stem in _listed(path.parent.parent / "splits/default/excluded_tasks.txt")


@functools.lru_cache(maxsize=16)
def _listed(path: Path) -> frozenset[str]:
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    return frozenset(line.strip().removesuffix(".json") for line in text.splitlines())


def _official_task(
    root: Path, name: str, path: Path, held_out: bool, on_error: OnError
) -> dict[str, Task]:
    """{name: task} of a task file, empty if it is malformed and on_error is not "stop"."""
    try:
        task = _official_definition(name, path, held_out)
    except ValueError as problem:
        if on_error == "stop":
            raise
        if callable(on_error):
            on_error(path, 0, str(problem))
        else:
            log.warning("%s; the task is left out", problem)
        return {}
    return {name: task.task(root, {"test" if held_out else "train": path}, on_error)}


def _official_definition(name: str, path: Path, held_out: bool) -> Definition:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with Definition and Instances")
    missing = sorted({"Definition", "Instances"} - content.keys())
    if missing:
        raise ValueError(f"{path}: no {' and '.join(missing)}")
    if not isinstance(content["Instances"], list):
        raise ValueError(f"{path}: Instances is not a list")
    lists = {}
    for ours, official in _OFFICIAL_NAMES.items():
        value = content.get(official) or []
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{path}: {official} is not a list of texts")
        lists[ours] = value
    return Definition(
        name=name,
        held_out=held_out,
        definition=" ".join(lists["definition"]),
        categories=lists["categories"],
        domains=lists["domains"],
        sources=lists["sources"],
        positive_examples=content.get("Positive Examples") or (),
    )


class Instances:
    """The examples of one task; few distinct answers become its options."""

    def __init__(self, task: Definition, files: Mapping[str, Path], on_error: OnError):
        self.task, self.files, self.on_error = task, files, on_error
        self._labels: tuple[str, ...] | None = None

    def __call__(self, split: str) -> Sequence[Example]:
        if self.task.held_out and split == "train":
            return self.exemplars()
        if split in self.files and (split == "test" or len(self.files) > 1):
            return self._examples(self.files[split])
        return part_by_hash(self._examples(next(iter(self.files.values()))), split)

    def digest(self) -> str:
        """Names the task's files, definition and positive examples."""
        about = repr((self.task.definition, list(self.task.positive_examples)))
        return files_digest(set(self.files.values())) + about

    def _examples(self, path: Path) -> Sequence[Example]:
        """The examples of a file; those of a large one stay on disk."""
        found, answers = self._read(path)
        if self._labels is None:
            official = next(iter(self.files.values()))
            self._labels = _labels(answers if path == official else self._read(official)[1])
        if isinstance(found, Rows):
            return found
        return [self._whole(example, self._labels) for example in found]

    def _read(self, path: Path) -> tuple[Sequence[Example], list[str]]:
        """Examples without definition and options, and all answers."""
        rows = read(path, _ROW, self._bare_example, on_error=self.on_error)
        if path.stat().st_size < LARGE:
            found = list(rows)
            return found, [example.answer for example in found]
        table = on_disk((example, "", "") for example in rows)
        answers = table.data.column("answer").to_pylist()
        return Rows(table, np.arange(len(table)), self._from_disk), answers

    def _bare_example(self, row: dict, number: int) -> Example:
        answers = tuple(answer.strip() for answer in row["output"] if answer.strip())
        if not answers:
            raise BadRow("no output text")
        domains = self.task.domains or self.task.categories or ["niv2"]
        return Example(
            id=str(row.get("id") or number),
            fields={"input": row["input"]},
            answer=answers[0],
            references=answers,
            domain=domains[0],
        )

    def _whole(self, example: Example, labels: tuple[str, ...] = ()) -> Example:
        """With the definition, and the labels as options where the answer is one."""
        fields = {"definition": self.task.definition, **example.fields}
        return replace(example, fields=fields, options=labels if example.answer in labels else ())

    def _from_disk(self, row: dict, number: int) -> Example:
        return self._whole(stored_example(row), self._labels or ())

    def exemplars(self) -> list[Example]:
        """The positive examples that are well formed."""
        found = []
        for index, shown in enumerate(filter(_is_pair, self.task.positive_examples)):
            row = {"id": f"shot {index}", "input": shown["input"], "output": [shown["output"]]}
            found.append(self._whole(self._bare_example(row, 0)))
        return found


def _is_pair(shown: object) -> bool:
    if not isinstance(shown, dict):
        return False
    texts = [shown.get("input"), shown.get("output")]
    return all(isinstance(text, str) and text.strip() for text in texts)


def _labels(answers: Sequence[str]) -> tuple[str, ...]:
    """The distinct answers of a classification, else none."""
    counts = Counter(answers)
    if 1 < len(counts) <= MAX_LABELS and counts.total() >= LABEL_ROWS * len(counts):
        return tuple(sorted(counts))
    return ()
