"""FLAN mixtures: sub-mixtures in proportion, a cap on every task, a blend of formats.

A task's share of its sub-mixture is min(cap, examples) over the sum of these (Longpre 2023).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moekit.data.mirror import Mirror
from moekit.data.mixture import Formats, Mixture
from moekit.data.tasks import Task
from moekit.errors import unknown

# input inversion stands at rate 0.3 beside 1 inside chain of thought and dialog
_INVERTED = 0.3 / 1.3


@dataclass(frozen=True)
class SubMixture:
    """Share of the whole mixture, cap on the examples of a task, formats."""

    share: float
    cap: int
    formats: Formats


# Shares of the public release (google-research/FLAN, flan/v2); caps of Chung 2022, Table 23, and
# 200,000 for dialog from the release. Missing sub-mixtures leave their share to the others.
FLAN2022 = {
    "flan2021": SubMixture(0.40, 30_000, Formats()),
    "t0": SubMixture(0.32, 20_000, Formats()),
    "niv2": SubMixture(0.20, 5_000, Formats(no_options=0.0)),
    "cot": SubMixture(
        0.05, 100_000, Formats(no_options=0.0, chain_of_thought=1.0, inverted=_INVERTED)
    ),
    "dialog": SubMixture(0.03, 200_000, Formats(no_options=0.0, inverted=_INVERTED)),
}
# mostly short prompts: a nano model learns from many examples in the tour's few minutes
BUILTIN_FORMATS = Formats(few_shot=0.1, no_options=0.75, chain_of_thought=0.05, inverted=0.02)
NAMES = ("builtin", "flan2022")


def flan_mixture(
    mixture: str | Mapping[str, float] = "flan2022",
    *,
    data_dir: str | Path | None = None,
    exclude: Sequence[str] = (),
    on_error: str = "stop",
) -> Mixture:
    """A mixture by name, or a dict of {task name: rate}.

    "builtin" is the embedded default (its held-out clusters left out), "flan2022" what the data
    folder has of FLAN 2022 by FLAN's shares and caps. A dict may name tasks of either.

    Args:
      exclude: task names to leave out.
      on_error: "stop" or "skip" malformed rows of the data folder.

    Raises:
      ValueError: an unknown mixture or task, or a held-out task.
      FileNotFoundError: no data folder.
    """
    if isinstance(mixture, Mapping):
        return _custom(mixture, data_dir, on_error)
    if mixture == "builtin":
        return _builtin(exclude)
    if mixture != "flan2022":
        raise unknown("mixture", mixture, NAMES)
    groups = _flan_groups(Mirror(data_dir, on_error))
    _check_known(exclude, (task.name for tasks in groups.values() for task in tasks))
    groups = {part: [t for t in tasks if t.name not in exclude] for part, tasks in groups.items()}
    return _proportional("flan2022", {part: tasks for part, tasks in groups.items() if tasks})


def _flan_groups(mirror: Mirror) -> dict[str, list[Task]]:
    """What the data folder has of each sub-mixture."""
    questions = [
        mirror.choices(name, f"mc/{name}", "question answering")
        for name in ("arc_easy", "arc_challenge", "openbookqa", "boolq")
    ]
    groups = {
        "flan2021": [*questions, mirror.arithmetic("gsm8k"), mirror.strategyqa()],
        "niv2": mirror.niv2("train") if (mirror.root / "niv2").is_dir() else [],
        "cot": mirror.cot() if (mirror.root / "cot").is_dir() else [],
        "dialog": [mirror.dolly()],
    }
    groups = {part: [task for task in tasks if task] for part, tasks in groups.items()}
    if not any(groups.values()):
        raise FileNotFoundError(f"{mirror.root} holds no instruction data (niv2/, cot/, mc/, ..)")
    return groups


def _proportional(name: str, groups: Mapping[str, Sequence[Task]]) -> Mixture:
    tasks, weights, formats, parts = [], [], [], []
    for part, members in groups.items():
        sub = FLAN2022[part]
        capped = [min(sub.cap, task.train_size) for task in members]
        for task, size in zip(members, capped, strict=True):
            tasks.append(task)
            weights.append(sub.share * size / sum(capped))
            formats.append(sub.formats)
            parts.append(part)
    return Mixture(name, tuple(tasks), tuple(weights), tuple(formats), tuple(parts))


def _builtin(exclude: Sequence[str]) -> Mixture:
    from moekit.data.builtin import builtin_tasks

    known = builtin_tasks()
    _check_known(exclude, known)
    tasks = tuple(t for t in known.values() if not t.held_out and t.name not in exclude)
    weights = tuple(float(task.train_size) for task in tasks)
    parts = tuple("builtin" for _ in tasks)
    return Mixture("builtin", tasks, weights, (BUILTIN_FORMATS,) * len(tasks), parts)


def _check_known(names: Sequence[str], known) -> None:
    known = set(known)
    for name in names:
        if name not in known:
            raise unknown("task", name, known)


def _custom(rates: Mapping[str, float], data_dir, on_error: str) -> Mixture:
    from moekit.data.builtin import builtin_tasks

    known = {name: (task, BUILTIN_FORMATS, "builtin") for name, task in builtin_tasks().items()}
    elsewhere = data_dir or os.environ.get("MOEKIT_DATA")
    if elsewhere and not set(rates) <= set(known):
        for part, task in _flat(_flan_groups(Mirror(data_dir, on_error))):
            known[task.name] = (task, FLAN2022[part].formats, part)
    _check_known(list(rates), known)
    for name in rates:
        if known[name][0].held_out:
            raise ValueError(f"task {name} is held out for evaluation and never trained on")
    tasks, formats, parts = (
        zip(*(known[name] for name in rates), strict=True) if rates else ((),) * 3
    )
    return Mixture("custom", tasks, tuple(map(float, rates.values())), formats, parts)


def _flat(groups: Mapping[str, Sequence[Task]]) -> Iterator[tuple[str, Task]]:
    for part, tasks in groups.items():
        for task in tasks:
            yield part, task
