"""Super-NaturalInstructions (NIv2): one task a file, with a definition and instances.

Task files of the official repository are found anywhere in the data folder, in a folder named
`tasks` or `niv2` (or named task*.json at its top), beside or without the folder's own layout
(niv2/tasks.jsonl.gz and niv2/{train,valid,test}/<task>.jsonl.gz), which comes first where both
have a task. A task is held out if any splits/default/test_tasks.txt names it, left out if the
excluded_tasks.txt of its own repository does or if it was made from MMLU, and trained on otherwise.
"""

import logging
import re
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.data.sources import BadRow, read_json, read_rows
from moekit.data.tasks import Example, Task, templates

if TYPE_CHECKING:
    from moekit.data.mirror import Mirror

log = logging.getLogger("moekit")
MAX_LABELS = 8  # a task with at most so many distinct answers is a classification
LABEL_ROWS = 3  # if each is seen so often in the mean
MMLU = range(685, 738)  # numbers of the tasks that were made from MMLU; Chung 2022 removed them
_ROW = {"input": str, "output": [str]}
_META = {"definition": str, "categories?": [str], "domains?": [str], "source?": [str]}


def niv2_tasks(mirror: "Mirror", split: str) -> list[Task]:
    """Tasks of the official split "train" or "test" (other categories, held out)."""
    own = mirror.root / "niv2/tasks.jsonl.gz"
    found: dict[str, Task] = {}
    known: set[str] = set()
    if own.is_file():
        schema = {"task": str, "split": str, **_META}
        for row in read_rows(own, schema, on_error=mirror.on_error):
            known.add(row["task"])
            if row["split"] == split and (task := _own(mirror, row)):
                found[row["task"]] = task
    tests = set()
    for path in mirror.root.rglob("splits/default/test_tasks.txt"):
        tests |= _names(path)
    left_out = []
    for name, path in _task_files(mirror.root).items():
        number = re.match(r"task(\d+)_", name)
        excluded = name in _names(path.parent.parent / "splits/default/excluded_tasks.txt")
        if name in known or (name in tests) != (split == "test"):
            continue
        if split == "train" and (excluded or (number and int(number[1]) in MMLU)):
            left_out.append(name)
            continue
        try:
            found[name] = _official(mirror, name, path, split == "test")
        except ValueError as problem:
            if mirror.on_error == "stop":
                raise
            if callable(mirror.on_error):
                mirror.on_error(path, 0, str(problem))
            else:
                log.warning("%s; the task is left out", problem)
    if left_out:
        log.info("NIv2: %d tasks are excluded: %s", len(left_out), ", ".join(sorted(left_out)))
    return [found[name] for name in sorted(found)]


@lru_cache(maxsize=16)
def _names(path: Path) -> frozenset[str]:
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    return frozenset(line.strip().removesuffix(".json") for line in text.splitlines())


def _task_files(root: Path) -> dict[str, Path]:
    """Task files in the official schema by name, wherever they lie."""
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*.json")):
        folders = path.relative_to(root).parts[:-1]
        inside = {"tasks", "niv2"} & set(folders) or (not folders and path.name.startswith("task"))
        if inside and "splits" not in folders:
            found.setdefault(path.stem, path)
    return found


def _own(mirror: "Mirror", meta: dict) -> Task | None:
    """A task in the folder's own layout."""
    folders = ("train", "valid") if meta["split"] == "train" else ("test",)
    files = {f: mirror.root / f"niv2/{f}/{meta['task']}.jsonl.gz" for f in folders}
    files = {split: path for split, path in files.items() if path.is_file()}
    shots = meta.get("positive_examples") or []
    return _task(mirror, meta["task"], meta, files, shots) if files else None


def _official(mirror: "Mirror", name: str, path: Path, held_out: bool) -> Task:
    """A task file of the official repository."""
    content = read_json(path)
    keys = {"definition": "Definition", "categories": "Categories", "domains": "Domains"}
    keys["source"] = "Source"
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with Definition and Instances")
    if missing := {"Definition", "Instances"} - content.keys():
        raise ValueError(f"{path}: no {' and '.join(sorted(missing))}")
    if not isinstance(content["Instances"], list):
        raise ValueError(f"{path}: Instances is not a list")
    meta = {ours: content.get(theirs) or [] for ours, theirs in keys.items()}
    for key, value in meta.items():
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{path}: {keys[key]} is not a list of texts")
    meta |= {"definition": " ".join(meta["definition"]), "split": "test" if held_out else "train"}
    files = {"test" if held_out else "train": path}
    return _task(mirror, name, meta, files, content.get("Positive Examples") or [])


def _task(mirror: "Mirror", name: str, meta: dict, files: dict[str, Path], shots: list) -> Task:
    """A held-out task's exemplars are the positive examples of its definition."""
    held_out = meta["split"] == "test"
    categories = meta.get("categories") or ["niv2"]
    domain = (meta.get("domains") or categories)[0]
    official = files.get("test" if held_out else "train", next(iter(files.values())))
    instances = _Instances(mirror, official, meta["definition"], domain, shots)
    return mirror.task(
        f"niv2/{name}",
        categories[0],
        files,
        instances.of,
        templates("niv2"),
        exemplars=instances.exemplars if held_out else None,
        metric="rouge_l",
        held_out=held_out,
        facts=repr((meta["definition"], shots)),
        sources=tuple(meta.get("source") or ()),
    )


class _Instances:
    """The examples of one task; few distinct answers become its options."""

    def __init__(self, mirror: "Mirror", official: Path, definition: str, domain: str, shots: list):
        self.mirror, self.official = mirror, official
        self.definition, self.domain, self.shots = definition, domain, shots
        self._labels: tuple[str, ...] | None = None

    def _make(self, row: dict, number: int) -> Example:
        answers = tuple(a.strip() for a in row["output"] if a.strip())
        if not answers:
            raise BadRow("no output text")
        fields = {"definition": self.definition, "input": row["input"]}
        identity = str(row.get("id") or number)
        return Example(identity, fields, answers[0], references=answers, domain=self.domain)

    def of(self, path: Path) -> list[Example]:
        found = self.mirror.read(path, _ROW, self._make)
        if self._labels is None:
            same = path == self.official
            official = found if same else self.mirror.read(self.official, _ROW, self._make)
            answers = Counter(example.answer for example in official)
            few = 1 < len(answers) <= MAX_LABELS and answers.total() >= LABEL_ROWS * len(answers)
            self._labels = tuple(sorted(answers)) if few else ()
        labels = self._labels
        return [replace(e, options=labels) if e.answer in labels else e for e in found]

    def exemplars(self) -> list[Example]:
        """The positive examples that are well formed."""
        pairs = [(s.get("input"), s.get("output")) for s in self.shots if isinstance(s, dict)]
        pairs = [pair for pair in pairs if all(isinstance(text, str) and text for text in pair)]
        rows = [{"id": f"shot {i}", "input": a, "output": [b]} for i, (a, b) in enumerate(pairs)]
        return [self._make(row, 0) for row in rows if row["output"][0].strip()]
