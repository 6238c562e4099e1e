"""FLAN mixtures: sub-mixtures in proportion, a cap on every task, a blend of formats.

A task's share of its sub-mixture is min(cap, examples) over the sum of these (Longpre 2023).
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from moekit.data.collection import FORMATS, GROUPS, MIXTURES
from moekit.data.mirror import Mirror
from moekit.data.mixture import Mixture, PromptFormats
from moekit.data.tasks import Task
from moekit.errors import unknown

log = logging.getLogger("moekit")
# mostly short prompts: a nano model learns from many examples in the tour's few minutes
BUILTIN_FORMATS = PromptFormats(few_shot=0.1, no_options=0.75, chain_of_thought=0.05, inverted=0.02)
# ready-made prompts are few-shot already where they should be
READY_FORMATS = PromptFormats(few_shot=0.0, no_options=0.0)
NAMES = ("builtin", *MIXTURES)
SOURCES = ("mirror", "hub", "hub-raw")
Groups = dict[str, list[tuple[Task, PromptFormats]]]


def flan_mixture(
    mixture: str | Mapping[str, float] = "flan2022",
    *,
    source: str = "mirror",
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
      source: "mirror", what the data folder has; "hub", the ready-made sub-mixtures of the hub,
        worded by FLAN's authors; "hub-raw", the raw data sets behind them, in our wordings.
      exclude: task names to leave out.
      hold_out: suites that will be asked: tasks that overlap with them are left out.
      limit: of the hub, stream so many rows of a set instead of downloading it.
      on_error: "stop" or "skip" malformed rows of the data folder.

    Raises:
      ValueError: an unknown mixture or task, or a held-out task.
      FileNotFoundError: no data folder.
      ConnectionError: the hub cannot be reached.
    """
    if source not in SOURCES:
        raise unknown("source", source, SOURCES)
    if isinstance(mixture, str) and mixture not in NAMES:
        raise unknown("mixture", mixture, NAMES)
    custom = isinstance(mixture, Mapping)
    groups: Groups = {}
    if custom or mixture == "builtin":
        groups["builtin"] = _builtin(everything=custom)
    known = {task.name for task, _ in groups.get("builtin", ())}
    named = source != "mirror" or data_dir or os.environ.get("MOEKIT_DATA")
    if mixture != "builtin" and not (custom and (set(mixture) <= known or not named)):
        groups |= tasks_of(source, data_dir, limit, on_error)
    if custom:
        groups = _chosen(groups, mixture)
    _check_known(exclude, (task.name for _, task, _ in _flat(groups)))
    dropped = _overlaps(groups, hold_out, data_dir)
    groups = {
        group: [pair for pair in pairs if pair[0].name not in {*exclude, *dropped}]
        for group, pairs in groups.items()
    }
    if custom:
        return _mixture(
            "custom", ((g, t, f, mixture[t.name]) for g, t, f in _flat(groups)), dropped
        )
    if mixture == "builtin":
        rows = ((g, t, f, float(t.train_size)) for g, t, f in _flat(groups))
        return _mixture("builtin", rows, dropped)
    return _mixture(mixture, _proportional(mixture, groups), dropped)


def tasks_of(source: str, data_dir, limit: int = 0, on_error: str = "stop") -> Groups:
    """The tasks that a source has of each group of the collection, with their formats.

    Of the data folder its own files come first, then fetched raw data sets of the hub, then, for a
    group that has neither, a fetched ready-made set.
    """
    from moekit.data.hub import copies, raw_task, ready_tasks, sources

    root = Path(data_dir or os.environ.get("MOEKIT_DATA") or "nowhere")
    root = root if source != "mirror" and root.is_dir() else None
    groups: Groups = {group: [] for group in GROUPS}
    if source == "mirror":
        mirror = Mirror(data_dir, on_error)
        root = mirror.root
        groups |= {g: [(t, FORMATS[g]) for t in ts] for g, ts in _own_tasks(mirror).items()}
    for name, each in sources().items():
        if not each.group or (source == "mirror" and not copies(each, "train", root)):
            continue
        taken = {task.name.rpartition("/")[2] for _, task, _ in _flat(groups)}
        if each.config and source != "hub" and name not in taken:
            groups[each.group].append((raw_task(name, root, limit), FORMATS[each.group]))
    for group in GROUPS:
        ready = sources().get(group)
        wanted = source == "hub" or (source == "mirror" and not groups[group])
        if ready and wanted and (source == "hub" or copies(ready, "train", root)):
            groups[group] = [(t, READY_FORMATS) for t in ready_tasks(group, root, limit)]
    if not any(groups.values()):
        raise FileNotFoundError(
            f"{root} holds no instruction data (niv2/, cot/, mc/, ..); moekit data fetch gets some"
        )
    return groups


def _own_tasks(mirror: Mirror) -> dict[str, list[Task]]:
    """What the data folder's own files give of each group."""
    from moekit.data.prompted import prompted_tasks

    questions = [
        mirror.choices(name, f"mc/{name}", "question answering")
        for name in ("arc_easy", "arc_challenge", "openbookqa", "boolq")
    ]
    groups = {
        "flan2021": [*questions, mirror.arithmetic("gsm8k"), mirror.strategyqa()],
        "t0": prompted_tasks(mirror, "t0", "p3"),
        "niv2": mirror.niv2("train"),
        "cot": mirror.cot(),
        "dialog": [mirror.dolly()],
        "program": [],
    }
    for group in ("flan2021", "t0", "dialog", "program"):
        groups[group] += prompted_tasks(mirror, group, group)
    return {group: [task for task in tasks if task] for group, tasks in groups.items()}


def _proportional(name: str, groups: Groups) -> Iterator[tuple[str, Task, PromptFormats, float]]:
    """Every task with its sub-mixture and weight; an absent sub-mixture leaves its share."""
    for part, sub in MIXTURES[name].items():
        rows = [pair for group in sub.groups for pair in groups.get(group, ())]
        capped = [min(sub.cap, task.train_size) for task, _ in rows]
        for (task, formats), size in zip(rows, capped, strict=True):
            if size:
                yield part, task, formats, sub.share * size / sum(capped)
            else:
                log.warning("task %s has no usable rows and is left out", task.name)


def _mixture(name: str, rows: Iterable[tuple], dropped: Mapping[str, str]) -> Mixture:
    parts, tasks, formats, weights = zip(*rows, strict=True) if (rows := list(rows)) else ((),) * 4
    return Mixture(name, tasks, tuple(map(float, weights)), formats, parts, dropped)


def _builtin(everything: bool) -> list[tuple[Task, PromptFormats]]:
    from moekit.data.builtin.tasks import builtin_tasks

    tasks = builtin_tasks().values()
    return [(task, BUILTIN_FORMATS) for task in tasks if everything or not task.held_out]


def _check_known(names: Iterable[str], known: Iterable[str]) -> None:
    known = set(known)
    for name in names:
        if name not in known:
            raise unknown("task", name, known)


def _chosen(groups: Groups, rates: Mapping[str, float]) -> Groups:
    """The tasks that a dict of rates names, in its order."""
    known = {task.name: (group, task, formats) for group, task, formats in _flat(groups)}
    _check_known(rates, known)
    chosen: Groups = {}
    for name in rates:
        group, task, formats = known[name]
        if task.held_out:
            raise ValueError(f"task {name} is held out for evaluation and never trained on")
        chosen.setdefault(group, []).append((task, formats))
    return chosen


def _overlaps(groups: Groups, hold_out: Sequence[str], data_dir) -> dict[str, str]:
    """{task: reason} of the tasks that share data with suites."""
    if not hold_out:
        return {}
    from moekit.data.decontaminate import overlapping

    return overlapping([task for _, task, _ in _flat(groups)], hold_out, data_dir)


def _flat(groups: Groups) -> Iterator[tuple[str, Task, PromptFormats]]:
    for group, pairs in groups.items():
        for task, formats in pairs:
            yield group, task, formats
