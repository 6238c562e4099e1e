"""Checking a data folder: every file against its manifest, every row against its schema."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from moekit.data.fetch import sha256
from moekit.data.hub import Source, copies, open_table, sources
from moekit.data.mirror import Mirror
from moekit.data.prompted import prompted_tasks
from moekit.data.sources import (
    KINDS,
    TEXT_DOMAINS,
    BadFile,
    BadRow,
    data_dir,
    read_manifest,
    read_text,
    scan,
)
from moekit.data.suites import SETS
from moekit.data.tasks import Task


@dataclass(frozen=True, order=True)
class Fault:
    """What is wrong with a row of a file; row 0 is the file as a whole."""

    path: str
    row: int
    problem: str

    def __str__(self) -> str:
        return (
            f"{self.path}:{self.row}: {self.problem}"
            if self.row
            else f"{self.path}: {self.problem}"
        )


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
        short = problem.removeprefix(f"{path}: ")
        faults.add(Fault(str(path.relative_to(root)), row, " ".join(short.split())))

    listed = _check_manifest(root, tell)
    counted = _check_counts(root, listed, tell)
    for load in tqdm(list(_loads(root, tell)), desc="check rows", unit="task", leave=False):
        load()
    return Report(sorted(faults), len(counted), sum(counted.values()), len(listed))


def _check_manifest(root: Path, tell: Callable) -> dict[str, dict]:
    """Sizes and checksums; returns the manifest's entries."""
    manifest = root / "manifest.json"
    try:
        listed = read_manifest(manifest) if manifest.is_file() else {}
    except ValueError as problem:
        tell(manifest, 0, str(problem))
        return {}
    for name, entry in tqdm(listed.items(), desc="check files", unit="file", leave=False):
        path = root / name
        if not path.is_file():
            tell(path, 0, "is in the manifest but missing")
        elif (size := path.stat().st_size) != entry["bytes"]:
            tell(path, 0, f"{size} bytes instead of {entry['bytes']}")
        elif sha256(path) != entry["sha256"]:
            tell(path, 0, "another sha256 than the manifest has")
    return listed


def _check_counts(root: Path, listed: dict[str, dict], tell: Callable) -> dict[Path, int]:
    """Rows of every file of a known kind, compared with the manifest; which cannot be read."""
    counted: dict[Path, int] = {}
    paths = [p for p in sorted(root.rglob("*")) if p.name.endswith(KINDS) and p.is_file()]
    paths = [
        p for p in paths if not any(part.startswith(".") for part in p.relative_to(root).parts)
    ]
    for path in tqdm(paths, desc="count rows", unit="file", leave=False):
        if path == root / "manifest.json" or path.name == "dataset_infos.json":
            continue
        wanted = listed.get(str(path.relative_to(root)), {}).get("rows")
        try:
            counted[path] = _count(path, tell)
        except BadFile as problem:
            tell(path, problem.number, str(problem))
        else:
            if wanted is not None and counted[path] != wanted:
                tell(path, 0, f"{counted[path]} rows instead of {wanted}")
    return counted


def _count(path: Path, tell: Callable) -> int:
    count = 0
    # a .tsv has no row of names; cells are counted, not named
    for number, row in scan(path, ("",) if path.suffix == ".tsv" else ()):
        if path.suffix not in (".tsv", ".csv") and isinstance(row, BadRow):
            tell(path, number, str(row))
        count += 1
    return count


def _loads(root: Path, tell: Callable) -> Iterator[Callable[[], object]]:
    """Calls that read everything that the kit would, telling of what is wrong."""
    mirror = Mirror(root, tell)
    tasks: list[Task | None] = [*mirror.niv2("train"), *mirror.niv2("test"), *mirror.cot()]
    tasks += [mirror.dolly(), *(read(mirror) for read in SETS.values())]
    tasks += mirror.mmlu() if (root / "mmlu").is_dir() else []
    tasks += mirror.bbh() if (root / "bbh").is_dir() else []
    for group, folder in (("t0", "p3"), *((g, g) for g in ("flan2021", "t0", "dialog", "program"))):
        try:
            prompted_tasks(mirror, group, folder)  # reads every row
        except ValueError as problem:
            tell(root / folder, 0, str(problem))
    for task in tasks:
        for split in task.splits if task else ():
            yield functools.partial(_load, task, split)
    for part, domain in TEXT_DOMAINS.items():
        for split in ("train", "valid"):
            yield functools.partial(read_text, root / "text" / part, split, domain, tell)
    for each in sources().values():
        for split in each.splits:
            if copies(each, split, root):
                yield functools.partial(_check_copy, each, split, root, tell)
    for path in sorted(root.glob("templates/**/*.yaml")):
        yield functools.partial(_check_templates, path, tell)


def _load(task: Task, split: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # the manifest tells
        task.load(split)


def _check_copy(each: Source, split: str, root: Path, tell: Callable) -> None:
    folder = copies(each, split, root)[0].parent
    try:
        found = open_table(each, split, root)
    except ValueError as problem:
        tell(folder, 0, str(problem))
        return
    for number, row in enumerate(tqdm(found, desc=each.name, leave=False)):
        try:
            each.example(row, number)
        except ValueError as problem:
            tell(folder, number + 1, str(problem))


def _check_templates(path: Path, tell: Callable) -> None:
    """promptsource files: every template parts prompt and target by three bars."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor(
        "!", lambda loader, tag, node: loader.construct_mapping(node, deep=True)
    )
    try:
        content = yaml.load(path.read_text("utf-8"), Loader)
        templates = content["templates"].values()
        bad = [t.get("name") for t in templates if not re.search(r"\|\|\|", t["jinja"])]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as problem:
        tell(path, 0, f"not a promptsource file ({type(problem).__name__}: {problem})")
    else:
        for name in bad:
            tell(path, 0, f"template {name!r} has no target after |||")
