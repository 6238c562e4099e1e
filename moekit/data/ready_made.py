"""FLAN's ready-made sub-mixtures of the hub: prompts of many tasks in one table."""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from moekit.data.collection import cluster_of
from moekit.data.datasets import Access, datasets_table
from moekit.data.files import BadRow, files_digest
from moekit.data.hub_files import HubFiles, download, open_copies
from moekit.data.tables import Rows, every_twentieth, rows_by_name
from moekit.data.tasks import Example, Task, Template

log = logging.getLogger("moekit")
AS_IT_IS = (Template("{instruction}"),)  # the template of rows that are prompts already


def ready_made(group: str) -> list[HubFiles]:
    """The repositories of a group's sub-mixture, to be tried in this order."""
    repositories = datasets_table()["ready_made"].get(group, ())
    return [HubFiles(name, "main", "data/train-*.parquet") for name in repositories]


def ready_made_copies(group: str, root: Path | None) -> list[Path]:
    """The files of a group's sub-mixture in a data folder's hub/."""
    for each in ready_made(group):
        paths = each.copies(root)
        if paths:
            return paths
    return []


def open_ready_made(group: str, access: Access) -> Any:
    """The table of a sub-mixture.

    Raises:
      ConnectionError: there is no copy, and no repository can be loaded.
    """
    paths = ready_made_copies(group, access.root)
    if paths:
        return open_copies(paths, limit=access.limit)
    problems = []
    for each in ready_made(group):
        try:
            return download(each, access.limit)
        except ConnectionError as problem:
            problems.append(str(problem))
    raise ConnectionError(problems[0])


@functools.lru_cache(maxsize=8)
def _tasks(group: str, access: Access) -> tuple[Any, Mapping[str, Int[np.ndarray, "n"]]]:
    """The table of a sub-mixture, and the usable rows of each task."""
    import pyarrow.compute as pc

    table = open_ready_made(group, access)
    usable = np.ones(len(table), bool)
    for name in ("inputs", "targets"):
        trimmed = pc.utf8_trim_whitespace(table.data.column(name))
        usable &= pc.fill_null(pc.binary_length(trimmed), 0).to_numpy() > 0
    if not usable.all():
        log.warning("%s: %d of %d rows are empty", group, (~usable).sum(), len(usable))
    return table, rows_by_name(table.data.column("task_name"), usable)


def _example(row: dict, number: int) -> Example:
    if not row["inputs"].strip():
        raise BadRow("the input is empty")
    return Example(str(number), {"instruction": row["inputs"]}, row["targets"].strip())


@dataclass(frozen=True, eq=False)
class _TaskRows:
    """One task's rows of a sub-mixture; one in 20 validates."""

    group: str
    task: str
    access: Access

    def __call__(self, split: str) -> Rows:
        table, tasks = _tasks(self.group, self.access)
        return Rows(table, every_twentieth(tasks[self.task], split), _example)


def _digest(group: str, access: Access) -> str:
    paths = ready_made_copies(group, access.root)
    if paths:
        return files_digest(paths)
    table, _ = _tasks(group, access)
    return f"{group}: {len(table)} rows, {table.data.nbytes} bytes"


def ready_made_tasks(group: str, access: Access) -> list[Task]:
    """The tasks of a sub-mixture (flan2021, t0, niv2, cot or dialog), with FLAN's templates.

    Raises:
      ConnectionError: there is no copy, and no repository can be loaded.
    """
    return [
        Task(
            name=f"{group}/{name}",
            cluster=cluster_of(group, name),
            load=_TaskRows(group, name, access),
            templates=AS_IT_IS,
            metric="rouge_l",
            splits=("train", "valid"),
            origin=functools.partial(_digest, group, access),
            sources=(name,),
        )
        for name in _tasks(group, access)[1]
    ]
