"""Evaluation suites: named groups of tasks that a trained model is asked about."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moekit.data.mirror import Mirror
from moekit.data.tasks import Task
from moekit.errors import unknown


@dataclass(frozen=True)
class Suite:
    """Tasks and the split to ask; exemplars come from each task's "train" split."""

    name: str
    tasks: tuple[Task, ...]
    split: str = "test"


def _builtin(held_out: bool) -> list[Task]:
    from moekit.data.builtin import builtin_tasks

    return [task for task in builtin_tasks().values() if task.held_out == held_out]


# name: (tasks of a mirror, split). Held-in suites ask about tasks that are trained on, other rows.
_MIRROR: dict[str, tuple[Callable[[Mirror], list[Task | None]], str]] = {
    "niv2-valid": (lambda m: m.niv2("train"), "valid"),
    "niv2-test": (lambda m: m.niv2("test"), "test"),
    "bbh": (lambda m: m.bbh(), "test"),
    "mmlu": (lambda m: m.mmlu(), "test"),
    "gsm8k": (lambda m: [m.arithmetic("gsm8k")], "test"),
    "svamp": (lambda m: [m.arithmetic("svamp", held_out=True)], "test"),
    "strategyqa": (lambda m: [m.strategyqa()], "test"),
    "aqua": (lambda m: [m.choices("aqua", "aqua", "arithmetic")], "test"),
} | {
    name: (
        lambda m, name=name, held_out=held_out: [
            m.choices(name, f"mc/{name}", "question answering", held_out=held_out)
        ],
        "test",
    )
    for name, held_out in (
        ("arc_easy", False),
        ("arc_challenge", False),
        ("openbookqa", False),
        ("boolq", False),
        ("piqa", True),
        ("winogrande", True),
        ("social_i_qa", True),
    )
}
SUITES = ("builtin", "builtin-heldin", *_MIRROR)


def suite(name: str, *, data_dir: str | Path | None = None) -> Suite:
    """The suite of that name: "builtin" (its held-out clusters), "builtin-heldin" (unseen objects
    of trained tasks), or one of the data folder's.

    Raises:
      ValueError: an unknown name.
      FileNotFoundError: no data folder, or it lacks this suite.
    """
    if name not in SUITES:
        raise unknown("suite", name, SUITES)
    if name not in _MIRROR:
        return Suite(name, tuple(_builtin(held_out=name == "builtin")))
    tasks_of, split = _MIRROR[name]
    mirror = Mirror(data_dir)
    tasks = tuple(task for task in tasks_of(mirror) if task)
    if not tasks:
        raise FileNotFoundError(f"the data folder {mirror.root} has no {name}")
    return Suite(name, tasks, split)
