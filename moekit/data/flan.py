"""FLAN mixtures: sub-mixtures in proportion, a cap on every task, a blend of formats.

A task's share of its sub-mixture is min(cap, examples) over the sum of these (Longpre 2023).
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from moekit.data.builtin.tasks import builtin_tasks
from moekit.data.collection import FORMATS, GROUPS, MIXTURES, published_size
from moekit.data.datasets import FORMER_NAMES, Access, dataset_task, datasets
from moekit.data.decontaminate import overlapping
from moekit.data.files import OnError, data_dir as data_folder
from moekit.data.instructions import FOLDERS, instruction_tasks
from moekit.data.mixture import Mixture, PromptFormats
from moekit.data.niv2 import niv2_tasks
from moekit.data.ready_made import ready_made, ready_made_copies, ready_made_tasks
from moekit.data.tasks import Task
from moekit.errors import unknown

log = logging.getLogger("moekit")
# mostly short prompts: a nano model learns from many examples in the tour's few minutes
BUILTIN_FORMATS = PromptFormats(few_shot=0.1, no_options=0.75, chain_of_thought=0.05, inverted=0.02)
# ready-made prompts are few-shot already where they should be
READY_FORMATS = PromptFormats(few_shot=0.0, no_options=0.0)
NAMES = ("builtin", *MIXTURES)
SOURCES = ("local", "hub", "hub-raw")
FORMER_SOURCES = {"mirror": "local"}


class Member(NamedTuple):
    """A task of a mixture: its group, formats and weight."""

    group: str
    task: Task
    formats: PromptFormats
    weight: float = 1.0


def flan_mixture(
    mixture: str | Mapping[str, float] = "flan2022",
    *,
    source: str = "local",
    data_dir: str | Path | None = None,
    exclude: Sequence[str] = (),
    hold_out: Sequence[str] = (),
    limit: int = 0,
    on_error: str = "stop",
) -> Mixture:
    """A mixture by name, or a dict of {task name: rate}.

    "builtin" is the embedded default (its held-out clusters left out), "flan2022" FLAN 2022 by the
    shares and caps of its public release, "flan-t5" by those of Flan-T5 and FLAN-MoE,
    "flan-ablation" by those of Chung 2022's ablations. A dict may name tasks of any.

    Args:
      source: "local", the data folder's files and copies of the hub's in it; "hub", the
        ready-made sub-mixtures of the hub, with FLAN's own templates; "hub-raw", the data sets
        behind them, with our templates.
      exclude: task names to leave out.
      hold_out: suites that will be evaluated: tasks that overlap with them are left out.
      limit: of the hub, stream that many rows of a set instead of downloading it.
      on_error: "stop" at an unusable row or a set that cannot be loaded, or "skip" it: the rest
        of its sub-mixture takes its share.

    Raises:
      ValueError: an unknown mixture or task, a held-out task, or an unusable row.
      FileNotFoundError: no data folder.
      ConnectionError: a set cannot be loaded from the hub.
    """
    source = FORMER_SOURCES.get(source, source)
    if source not in SOURCES:
        raise unknown("source", source, SOURCES)
    if isinstance(mixture, Mapping):
        members = _custom(mixture, source, data_dir, limit, on_error)
        name = "custom"
    elif mixture not in NAMES:
        raise unknown("mixture", mixture, NAMES)
    else:
        name = mixture
        members = _named(name, source, data_dir, limit, on_error)
    if exclude:
        _check_known(exclude, members)
    overlaps: dict[str, str] = {}
    if hold_out:
        overlaps = overlapping([member.task for member in members], hold_out, data_dir)
    left_out = {*map(_canonical, exclude), *overlaps}
    members = [member for member in members if member.task.name not in left_out]
    dropped = dict(overlaps)
    if name in MIXTURES:
        members = proportional(name, _loaded(members, on_error, dropped))
    return Mixture(
        name=name,
        tasks=tuple(member.task for member in members),
        weights=tuple(float(member.weight) for member in members),
        formats=tuple(member.formats for member in members),
        submixtures=tuple(member.group for member in members),
        dropped=dropped,
    )


def _named(
    name: str, source: str, data_dir: str | Path | None, limit: int, on_error: str
) -> list[Member]:
    """The tasks of a mixture by name."""
    if name == "builtin":
        members = _builtin_members()
        trained = [member for member in members if not member.task.held_out]
        return [member._replace(weight=member.task.train_size) for member in trained]
    access = source_access(source, data_dir, limit, on_error)
    members = []
    for group in GROUPS:
        members += group_members(group, source, access)
    if not members:
        raise FileNotFoundError(
            f"{access.root} holds no instruction data (niv2/, cot/, mc/, ..); moekit data fetch "
            "gets some"
        )
    return members


def source_access(
    source: str, data_dir: str | Path | None = None, limit: int = 0, on_error: str = "stop"
) -> Access:
    """How the tasks of a source are read.

    Raises:
      FileNotFoundError: source "local" without a data folder.
    """
    if source == "local":
        return Access(data_folder(data_dir), limit=limit, on_error=on_error)
    named = data_dir or os.environ.get("MOEKIT_DATA")
    root = Path(named) if named and Path(named).is_dir() else None
    return Access(root, local=False, hub=True, limit=limit, on_error=on_error)


def group_members(group: str, source: str, access: Access, only: str | None = None) -> list[Member]:
    """The tasks that a source has of a group, with their formats; of the data folder its own files
    and fetched data sets come first, then a fetched ready-made sub-mixture.

    Args:
      only: the name of one task; others need not be opened.
    """
    formats = FORMATS[group]
    tasks: list[Task] = []
    if source == "local" and group == "niv2":
        name = only.removeprefix("niv2/") if only else None
        tasks = niv2_tasks(access.root, "train", access.on_error, name)
    elif source != "hub":
        tasks = described_tasks(group, access)
    if source == "local" and group in FOLDERS:
        tasks += instruction_tasks(access.root, group, datasets(), access.on_error)
    if source == "hub" or (source == "local" and not tasks):
        offered = ready_made(group) if access.hub else ready_made_copies(group, access.root)
        if offered:
            tasks, formats = _ready_made(group, access), READY_FORMATS
    return [Member(group, task, formats) for task in tasks]


def described_tasks(group: str, access: Access) -> list[Task]:
    """The data sets of a group that can be loaded."""
    tasks = []
    for each in datasets().values():
        if each.group == group:
            task = dataset_task(each, access)
            if task and "train" in task.splits:
                tasks.append(task)
    return tasks


def _ready_made(group: str, access: Access) -> list[Task]:
    """The tasks of a ready-made sub-mixture; none if it cannot be loaded and may be skipped."""
    try:
        return ready_made_tasks(group, access)
    except ConnectionError as problem:
        _go_on_without(group, problem, access.on_error)
        return []


def _go_on_without(name: str, problem: ConnectionError, on_error: OnError) -> None:
    """Logs what is left out; with on_error "stop", raises instead."""
    if on_error == "stop":
        hint = 'or use on_error="skip" to go on without it'
        raise ConnectionError(f"{name}: {problem}, {hint}") from None
    log.warning("%s is left out: %s", name, problem)


def _loaded(members: Iterable[Member], on_error: OnError, dropped: dict[str, str]) -> list[Member]:
    """The members that have training examples; the others are logged and added to `dropped`."""
    found = []
    for member in members:
        try:
            size = member.task.train_size
        except ConnectionError as problem:
            _go_on_without(member.task.name, problem, on_error)
            dropped[member.task.name] = str(problem)
            continue
        if size:
            found.append(member)
        else:
            log.warning("task %s has no usable rows and is left out", member.task.name)
    return found


def proportional(name: str, members: Sequence[Member]) -> list[Member]:
    """The members by the shares and caps of a mixture, with their sub-mixtures in place of their
    groups; an absent sub-mixture leaves its share to the others."""
    found = []
    for submixture, part in MIXTURES[name].items():
        inside = [member for member in members if member.group in part.groups]
        sizes = [_counted_examples(member.task, part.cap) for member in inside]
        for member, size in zip(inside, sizes, strict=True):
            weight = part.share * size / sum(sizes)
            found.append(member._replace(group=submixture, weight=weight))
    return found


def _counted_examples(task: Task, cap: int) -> int:
    """The examples of a task that count for its rate."""
    return min(task.train_size, cap, published_size(task.name) or cap)


def _builtin_members() -> list[Member]:
    return [Member("builtin", task, BUILTIN_FORMATS) for task in builtin_tasks().values()]


def _canonical(name: str) -> str:
    """The name of a task, given a former one: "cot/gsm8k" is gsm8k."""
    bare = name.removeprefix("cot/")
    if "/" in bare:
        return name
    bare = FORMER_NAMES.get(bare, bare)
    return bare if bare in datasets() else name


def _check_known(names: Iterable[str], members: Sequence[Member]) -> None:
    known = {member.task.name for member in members}
    for name in names:
        if _canonical(name) not in known:
            raise unknown("task", name, known)


def _custom(
    rates: Mapping[str, float],
    source: str,
    data_dir: str | Path | None,
    limit: int,
    on_error: str,
) -> list[Member]:
    """The tasks that a dict of rates names, in its order; no others are opened."""
    access = None
    if source != "local" or data_dir or os.environ.get("MOEKIT_DATA"):
        access = source_access(source, data_dir, limit, on_error)
    wanted = {_canonical(name): float(rate) for name, rate in rates.items()}
    known: dict[str, Member] = {}
    if any("/" not in name for name in wanted):
        known |= {member.task.name: member for member in _builtin_members()}
    if access:
        known |= _outside_builtin([name for name in wanted if name not in known], source, access)
    for name in wanted:
        if name not in known:
            raise unknown("task", name, _all_names(source, access))
        if known[name].task.held_out:
            raise ValueError(f"task {name} is held out for evaluation and never trained on")
    return [known[name]._replace(weight=rate) for name, rate in wanted.items()]


def _outside_builtin(names: Sequence[str], source: str, access: Access) -> dict[str, Member]:
    """The members that names outside the builtin tasks mean, as far as there are any."""
    members = []
    by_group: dict[str, list[str]] = {}
    for name in names:
        if "/" not in name and name in datasets():
            task = dataset_task(datasets()[name], access)
            group = datasets()[name].group
            if task:
                members.append(Member(group, task, FORMATS.get(group, PromptFormats())))
        else:
            by_group.setdefault(name.partition("/")[0], []).append(name)
    for group, inside in by_group.items():
        if group in GROUPS:
            only = inside[0] if len(inside) == 1 else None
            members += group_members(group, source, access, only)
    return {member.task.name: member for member in members}


def _all_names(source: str, access: Access | None) -> list[str]:
    members = _builtin_members()
    for group in GROUPS if access else ():
        members += group_members(group, source, access)
    return [member.task.name for member in members]
