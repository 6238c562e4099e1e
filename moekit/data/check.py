"""Checking a data folder: every file against its manifest, every row against its schema."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moekit.data.corpora import TEXT_DOMAINS, read_text
from moekit.data.datasets import Access, copy_task, datasets, find_copies
from moekit.data.files import (
    BadFile,
    BadRow,
    data_dir,
    is_data_file,
    read_manifest,
    scan,
    sha256,
)
from moekit.data.instructions import FOLDERS, instruction_tasks
from moekit.data.niv2 import niv2_tasks
from moekit.data.paths import file_problem, named_files
from moekit.data.published import bbh_tasks
from moekit.data.ready_made import ready_made_copies, ready_made_tasks
from moekit.data.tasks import Task
from moekit.progress import ProgressBar

Tell = Callable[[Path, int, str], None]  # file, row (0: the file as a whole), problem


@dataclass(frozen=True, order=True)
class Fault:
    """What is wrong with a row of a file; row 0 is the file as a whole."""

    path: str
    row: int
    problem: str

    def __str__(self) -> str:
        where = f"{self.path}:{self.row}" if self.row else self.path
        return f"{where}: {self.problem}"


@dataclass(frozen=True)
class Report:
    """Faults of a data folder, and how much was looked at."""

    faults: list[Fault]
    files: int
    rows: int
    listed: int

    def __str__(self) -> str:
        seen = f"{self.files:,} files, {self.rows:,} rows; {self.listed:,} files in the manifest"
        count = f"{len(self.faults):,} faults" if self.faults else "no faults"
        return "\n".join([*map(str, self.faults), f"{seen}; {count}"])


def check(folder: str | Path | None = None) -> Report:
    """Every fault of a data folder, by file and row."""
    root = data_dir(folder)
    faults: set[Fault] = set()

    def tell(path: Path, row: int, problem: str) -> None:
        short = problem.removeprefix(f"{path}:{row}: ").removeprefix(f"{path}: ")
        faults.add(Fault(str(path.relative_to(root)), row, " ".join(short.split())))

    listed = _check_manifest(root, tell)
    counted = _check_counts(root, listed, tell)
    for load in ProgressBar(list(_loads(root, tell)), desc="check rows", unit="task", leave=False):
        load()
    return Report(sorted(faults), len(counted), sum(counted.values()), len(listed))


def _check_manifest(root: Path, tell: Tell) -> dict[str, dict]:
    """Sizes and checksums; returns the manifest's entries."""
    manifest = root / "manifest.json"
    try:
        listed = read_manifest(manifest) if os.path.lexists(manifest) else {}
    except ValueError as problem:
        tell(manifest, 0, str(problem))
        return {}
    for name, entry in ProgressBar(listed.items(), desc="check files", unit="file", leave=False):
        path = root / name
        if not os.path.lexists(path):
            tell(path, 0, "is in the manifest but missing")
        elif file_problem(path):
            tell(path, 0, file_problem(path))
        elif path.stat().st_size != entry["bytes"]:
            tell(path, 0, f"{path.stat().st_size} bytes instead of {entry['bytes']}")
        elif sha256(path) != entry["sha256"]:
            tell(path, 0, "another sha256 than the manifest has")
    return listed


def _check_counts(root: Path, listed: dict[str, dict], tell: Tell) -> dict[Path, int]:
    """Rows of every file of a known kind, compared with the manifest."""
    counted: dict[Path, int] = {}
    for path in ProgressBar(_data_files(root), desc="count rows", unit="file", leave=False):
        wanted = listed.get(str(path.relative_to(root)), {}).get("rows")
        try:
            counted[path] = _count(path, tell)
        except BadFile as problem:
            tell(path, problem.row, str(problem))
        else:
            if wanted is not None and counted[path] != wanted:
                tell(path, 0, f"{counted[path]} rows instead of {wanted}")
    return counted


def _data_files(root: Path) -> list[Path]:
    manifest = root / "manifest.json"
    found = named_files(root, is_data_file)
    return [path for path in found if path != manifest and path.name != "dataset_infos.json"]


def _count(path: Path, tell: Tell) -> int:
    count = 0
    # a .tsv has no row of names; cells are counted, not named
    for number, row in scan(path, ("",) if path.suffix == ".tsv" else ()):
        if path.suffix not in (".tsv", ".csv") and isinstance(row, BadRow):
            tell(path, number, str(row))
        count += 1
    return count


def _loads(root: Path, tell: Tell) -> Iterator[Callable[[], object]]:
    """Calls that read everything that the kit would, and report what is wrong."""
    for task in _tasks(root, tell):
        for split in task.splits:
            yield functools.partial(_load, task, split, root, tell)
    for part, domain in TEXT_DOMAINS.items():
        for split in ("train", "valid"):
            yield functools.partial(read_text, root / "text" / part, split, domain, tell)
    for path in sorted(root.glob("templates/**/*.yaml")):
        if file_problem(path):
            tell(path, 0, file_problem(path))
            continue
        yield functools.partial(_check_templates, path, tell)


def _tasks(root: Path, tell: Tell) -> Iterator[Task]:
    """Every task of a folder: of its own files, and of fetched copies."""
    yield from niv2_tasks(root, "train", tell)
    yield from niv2_tasks(root, "test", tell)
    yield from bbh_tasks(root, tell)
    for each in datasets().values():
        access = Access(root, on_error=tell)
        for copy in find_copies(each, access):
            yield copy_task(each, copy, access)
    for group, folders in FOLDERS.items():
        try:
            yield from instruction_tasks(root, group, datasets(), tell)
        except ValueError as problem:
            tell(root / folders[-1], 0, str(problem))
        if ready_made_copies(group, root):
            yield from ready_made_tasks(group, Access(root, on_error=tell))


def _load(task: Task, split: str, root: Path, tell: Tell) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):  # the manifest reports it
            task.load(split)
    except ValueError as problem:
        path, _, message = str(problem).partition(": ")
        tell(Path(path) if Path(path).is_relative_to(root) else root, 0, message)


def _check_templates(path: Path, tell: Tell) -> None:
    """promptsource files: every template separates prompt and target by three bars."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, tag: str, node: yaml.MappingNode) -> dict:
        return loader.construct_mapping(node, deep=True)

    Loader.add_multi_constructor("!", mapping)
    try:
        content = yaml.load(path.read_text("utf-8"), Loader)
        templates = content["templates"].values()
        bad = [each.get("name") for each in templates if "|||" not in each["jinja"]]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as problem:
        tell(path, 0, f"not a promptsource file ({type(problem).__name__}: {problem})")
    else:
        for name in bad:
            tell(path, 0, f"template {name!r} has no target after |||")
