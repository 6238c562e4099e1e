"""The Hugging Face hub: FLAN's ready-made sub-mixtures, and the raw data sets behind our tasks.

What there is stands in hub.toml. Files are downloaded once and memory-mapped, or streamed; a copy
under <data folder>/hub/ (made by `moekit data fetch`) is read instead of the hub.
"""

import functools
import logging
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from moekit.data.collection import cluster_of
from moekit.data.prompted import READY, Rows, by_task
from moekit.data.sources import VALID, BadRow, files_digest
from moekit.data.tasks import Example, Task, templates
from moekit.errors import unknown

log = logging.getLogger("moekit")
_TABLE = tomllib.loads(files("moekit.data").joinpath("hub.toml").read_text("utf-8"))
_CONVERTED = "refs/convert/parquet"  # where the hub keeps every public data set as parquet files


@dataclass(frozen=True, eq=False)
class Source:
    """A data set of the hub; hub.toml explains the fields. A ready-made one has no `config`."""

    name: str
    path: str
    group: str
    config: str = ""
    cluster: str = ""
    family: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    answer: str = ""
    labels: list[str] = field(default_factory=list)
    options: str | list[str] = ""
    keys: str | list[str] = ""
    first: int = 0
    after: str = ""
    upto: str = ""
    rationale: str = ""
    train: str = "train"
    valid: str = ""
    test: str = ""

    @property
    def revision(self) -> str:
        return _CONVERTED if self.config else "main"

    @property
    def splits(self) -> dict[str, str]:
        """The source's files of every split of ours."""
        named = {"train": self.train, "valid": self.valid, "test": self.test}
        if not self.config:
            return {"train": "data/train-*.parquet"}
        return {s: f"{self.config}/{name}/*.parquet" for s, name in named.items() if name}

    def example(self, row: Mapping[str, Any], number: int) -> Example:
        """A raw row as an example; ValueError if it is not one."""
        if not self.config:
            return _ready_example(row, number)
        shown = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        try:
            fields = {name: form.format(**shown).strip() for name, form in self.fields.items()}
            rationale = self.rationale.format(**shown).strip()
            answer, options = self._answer(row)
        except (KeyError, IndexError, TypeError) as error:
            raise BadRow(f"{self.path} row {number}: {type(error).__name__} {error}") from None
        if self.after:
            rationale, _, answer[0] = answer[0].rpartition(self.after)
        if self.upto:
            answer[0] = answer[0].partition(self.upto)[0]
        return Example(f"{number}", fields, answer[0], tuple(answer), options, rationale.strip())

    def _answer(self, row: Mapping[str, Any]) -> tuple[list[str], tuple[str, ...]]:
        value = _at(row, self.answer)
        options = self.labels
        if self.options:
            listed = isinstance(self.options, list)
            options = [row[o] for o in self.options] if listed else _at(row, self.options)
        if not options:
            texts = [str(each).strip() for each in (value if isinstance(value, list) else [value])]
            return texts, ()
        keys = self.keys if isinstance(self.keys, list) else _at(row, self.keys)
        index = list(keys).index(value) if self.keys else int(value) - self.first
        if not 0 <= index < len(options):
            raise BadRow(f"answer {value} is not one of {len(options)} options")
        return [options[index]], tuple(dict.fromkeys(options))


def _at(row: Mapping[str, Any], column: str) -> Any:
    """The value of "a.b"; the row itself of ""."""
    for part in filter(None, column.split(".")):
        row = row[part]
    return row


def _ready_example(row: Mapping[str, Any], number: int) -> Example:
    if not row["inputs"].strip():
        raise BadRow("the input is empty")
    return Example(str(number), {"instruction": row["inputs"]}, row["targets"].strip())


@functools.cache
def sources() -> dict[str, Source]:
    """Everything that hub.toml lists, by name."""
    ready = {group: Source(group, path, group) for group, path in _TABLE["ready"].items()}
    return ready | {name: Source(name, **row) for name, row in _TABLE["raw"].items()}


def source(name: str) -> Source:
    """A source of hub.toml; ValueError naming the nearest for an unknown name."""
    if name not in sources():
        raise unknown("hub source", name, sources())
    return sources()[name]


def copies(each: Source, split: str, root: Path | None) -> list[Path]:
    """The source's files of a split in a data folder's hub/."""
    folder = root / "hub" / each.path if root else None
    return sorted(folder.glob(each.splits[split])) if folder else []


def reachable(path: str, revision: str = "main"):
    """What the hub says of a data set.

    Raises:
      ConnectionError: no network, or no such data set.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(path, revision=revision, timeout=10, files_metadata=True)
    except Exception as error:  # the hub client raises many types for one cause
        raise _out_of_reach(path, error) from None


def _out_of_reach(path: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"could not load {path!r} from the Hugging Face hub ({type(error).__name__}): check the "
        "network, or fetch it where there is one (moekit data fetch) and set MOEKIT_DATA to that "
        'folder, or use the data folder\'s own files or the builtin data ("builtin")'
    )


def open_table(each: Source, split: str = "train", root: Path | None = None, limit: int = 0):
    """A split as a memory-mapped table; with a limit its first rows, streamed.

    Raises:
      ConnectionError: there is no copy and the hub cannot be reached.
      ValueError: files that are not parquet.
    """
    import datasets

    if split not in each.splits:
        raise ValueError(f"{each.name} has no split {split!r}; it has {', '.join(each.splits)}")
    own = [str(path) for path in copies(each, split, root)]
    kind, kwargs = ("parquet", {}) if own else (each.path, {"revision": each.revision})
    data_files = {split: own or [each.splits[split]]}
    if not own and not datasets.config.HF_HUB_OFFLINE:
        try:
            reachable(each.path, each.revision)
        except ConnectionError:  # perhaps it was downloaded before
            kwargs["download_config"] = datasets.DownloadConfig(local_files_only=True)
    try:
        found = datasets.load_dataset(
            kind, data_files=data_files, split=split, streaming=bool(limit), **kwargs
        )
        return datasets.Dataset.from_list(list(found.take(limit))) if limit else found
    except Exception as error:
        if own:
            raise ValueError(f"{Path(own[0]).parent}: not readable ({error})") from None
        raise _out_of_reach(each.path, error) from None


@dataclass(frozen=True, eq=False)
class _Raw:
    """Examples of a raw set; without validation rows of its own, one training row in 20 is one."""

    source: Source
    root: Path | None
    limit: int

    def __call__(self, split: str) -> Sequence[Example]:
        each = self.source
        cut = split not in each.splits or (split == "train" and "valid" not in each.splits)
        found = open_table(each, "train" if cut else split, self.root, self.limit)
        numbers = np.arange(len(found))
        if cut and each.group:
            numbers = numbers[(numbers % round(1 / VALID) == 0) == (split == "valid")]
        return Rows(found, numbers, each.example)


def raw_task(name: str, root: Path | None = None, limit: int = 0) -> Task:
    """A raw data set of hub.toml as a task, with our wordings; held out if it has no group.

    Args:
      root: the data folder, whose copy is read where there is one.
      limit: stream so many rows of a split instead of downloading all.
    """
    each = source(name)
    if not each.config:
        raise ValueError(f"{name} is a ready-made set of many tasks: use ready_tasks")
    free = "exact_match" if each.family == "question" else "rouge_l"
    splits = (*each.splits, *(("valid",) if each.group and "valid" not in each.splits else ()))
    return Task(
        name,
        each.cluster,
        _Raw(each, root, limit),
        templates(each.family),
        metric="accuracy" if each.labels or each.options else free,
        splits=splits,
        origin=functools.partial(_origin, each, root, limit),
        held_out=not each.group,
        sources=(name,),
    )


def _origin(each: Source, root: Path | None, limit: int) -> str:
    if own := copies(each, "train", root):
        return files_digest(own)
    found = open_table(each, next(iter(each.splits)), root, limit)
    return f"{each.path}@{each.revision}: {len(found)} rows, {found.data.nbytes} bytes"


@functools.lru_cache(maxsize=8)
def _ready(group: str, root: Path | None, limit: int) -> tuple[Any, dict[str, np.ndarray]]:
    import pyarrow.compute as pc

    found = open_table(source(group), "train", root, limit)
    sizes = [pc.fill_null(pc.binary_length(found.data.column(n)), 0) for n in ("inputs", "targets")]
    usable = np.logical_and(*(size.to_numpy() > 0 for size in sizes))
    if not usable.all():
        log.warning("%s: %d of %d rows are empty", group, (~usable).sum(), len(usable))
    return found, by_task(found.data.column("task_name"), usable)


@dataclass(frozen=True, eq=False)
class _Ready:
    """One task's rows of a ready-made set; one in 20 validates."""

    group: str
    task: str
    root: Path | None
    limit: int

    def __call__(self, split: str) -> Rows:
        found, tasks = _ready(self.group, self.root, self.limit)
        numbers = tasks[self.task]
        held = np.arange(len(numbers)) % round(1 / VALID) == 0
        held &= len(numbers) > 1
        return Rows(found, numbers[held == (split == "valid")], _ready_example)


def ready_tasks(group: str, root: Path | None = None, limit: int = 0) -> list[Task]:
    """The tasks of a ready-made sub-mixture (flan2021, t0, niv2, cot or dialog), as FLAN worded
    them; arguments as for `raw_task`."""
    origin = functools.partial(_origin, source(group), root, limit)
    return [
        Task(
            f"{group}/{task}",
            cluster_of(group, task),
            _Ready(group, task, root, limit),
            READY,
            metric="rouge_l",
            splits=("train", "valid"),
            origin=origin,
            sources=(task,),
        )
        for task in _ready(group, root, limit)[1]
    ]
