"""Evaluation suites: named groups of tasks with the way in which a benchmark asks them."""

import functools
import logging
import os
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from moekit.data.hub import raw_task, sources
from moekit.data.mirror import Mirror
from moekit.data.tasks import Example, Task
from moekit.errors import unknown

log = logging.getLogger("moekit")
PAPER = ("mmlu", "bbh", "reasoning", "qa")  # what the paper's normalised average is taken over
WORD_PROBLEMS = ("svamp", "asdiv")  # have no train split
HUB_NAMES = {"boolq": "bool_q"}


@dataclass(frozen=True)
class Suite:
    """Tasks and how they are asked unless `evaluate` is told otherwise.

    Args:
      split: exemplars come from each task's "train" split.
      shots: exemplars a question.
      chain_of_thought: reason first; the answer is read out of the text.
      options: list the options in the question, in the style of that number.
      ranked: the most likely option is the answer; else, and without options, it is decoded.
      first: ask only so many examples of a task, the first ones.
      missing: tasks that belong here and that neither the data folder nor the hub gave.
    """

    name: str
    tasks: tuple[Task, ...]
    split: str = "test"
    shots: int = 0
    chain_of_thought: bool = False
    options: bool = True
    style: int = 0
    ranked: bool = True
    first: int | None = None
    missing: tuple[str, ...] = ()


def _builtin(held_out: bool) -> tuple[Task, ...]:
    from moekit.data.builtin.tasks import builtin_tasks

    return tuple(task for task in builtin_tasks().values() if task.held_out == held_out)


@functools.cache
def _arithmetic_exemplars() -> tuple[Example, ...]:
    text = files("moekit.data").joinpath("exemplars.toml").read_text("utf-8")
    return tuple(
        Example(f"exemplar/{i}", {"question": r["question"]}, r["answer"], rationale=r["why"])
        for i, r in enumerate(tomllib.loads(text)["arithmetic"])
    )


def _with_exemplars(task: Task) -> Task:
    """A task of word problems without a train split, with exemplars of our own."""

    def load(split: str) -> Sequence[Example]:
        return _arithmetic_exemplars() if split == "train" else task.load(split)

    return replace(task, load=load, splits=("train", "test"))


# single data sets of a folder, by name; most are on the hub too
SETS: dict[str, Callable[[Mirror], Task | None]] = {
    "gsm8k": lambda m: m.arithmetic("gsm8k"),
    "svamp": lambda m: m.arithmetic("svamp", held_out=True),
    "asdiv": lambda m: m.arithmetic("asdiv", held_out=True),
    "strategyqa": lambda m: m.strategyqa(),
    "aqua": lambda m: m.choices("aqua", "aqua", "arithmetic"),
} | {
    name: lambda m, name=name, held_out=held_out: m.choices(
        name, f"mc/{name}", "question answering", held_out=held_out
    )
    for name, held_out in (
        ("ai2_science_elementary", False),
        ("boolq", False),
        ("arc_easy", False),
        ("arc_challenge", False),
        ("openbookqa", False),
        ("piqa", True),
        ("winogrande", True),
        ("social_i_qa", True),
    )
}
_GROUPS = {
    "reasoning": ("gsm8k", "svamp", "asdiv", "strategyqa"),
    "qa": ("ai2_science_elementary", "boolq", "arc_easy", "arc_challenge"),
}
_WHOLE: dict[str, Callable[[Mirror], Sequence[Task]]] = {
    "niv2-valid": lambda m: [task for task in m.niv2("train") if "valid" in task.splits],
    "niv2-test": lambda m: m.niv2("test"),
    "bbh": lambda m: m.bbh(),
    "mmlu": lambda m: m.mmlu(),
}
# The shots of Chung 2022 and Shen 2023; Super-NaturalInstructions decodes every answer after two
# positive examples and takes the first hundred instances of a task (Wang 2022).
_NIV2 = {"shots": 2, "options": False, "ranked": False, "first": 100}
_ASKED = {
    "niv2-valid": {"split": "valid", **_NIV2},
    "niv2-test": _NIV2,
    "bbh": {"shots": 3},
    "mmlu": {"shots": 5, "style": 3},
} | {name: {"shots": 8, "chain_of_thought": True} for name in ("reasoning", *_GROUPS["reasoning"])}
SUITES = ("builtin", "builtin-heldin", *_WHOLE, *_GROUPS, *SETS)


def suite(name: str, *, data_dir: str | Path | None = None) -> Suite:
    """The suite of that name: "builtin" (its held-out clusters), "builtin-heldin" (unseen objects
    of trained tasks), or one of the data folder's; with "-cot" behind it, by chain of thought.
    "niv2/<task>" is a single task of Super-NaturalInstructions.

    Raises:
      ValueError: an unknown name.
      FileNotFoundError: neither the data folder nor the hub gives this suite.
    """
    base = name.removesuffix("-cot")
    asked = _ASKED.get(base, {}) | ({"chain_of_thought": True} if name != base else {})
    if base.startswith("niv2/"):
        return _single(base, name, asked, Mirror(data_dir))
    if base not in SUITES:
        raise unknown("suite", name, SUITES)
    if base in ("builtin", "builtin-heldin"):
        return Suite(name, _builtin(held_out=base == "builtin"), **asked)
    missing: dict[str, str] = {}
    if base in _WHOLE:
        tasks = _WHOLE[base](Mirror(data_dir))
    else:
        tasks = [_set(each, data_dir, missing) for each in _GROUPS.get(base, (base,))]
    tasks = tuple(task for task in tasks if task)
    if not tasks:
        why = "; ".join(missing.values()) or f"the data folder has no {base}"
        raise FileNotFoundError(f"no suite {name}: {why}")
    return Suite(name, tasks, missing=tuple(missing), **asked)


def suites(names: str, *, data_dir: str | Path | None = None) -> list[Suite]:
    """The suites of a comma-separated list; "paper" stands for those of its average."""
    listed = ",".join(PAPER) if names == "paper" else names
    return [suite(name.strip(), data_dir=data_dir) for name in listed.split(",")]


def _set(name: str, data_dir: str | Path | None, missing: dict[str, str]) -> Task | None:
    """A data set of the folder, else of the hub; None after a warning if neither has it."""
    root = data_dir or os.environ.get("MOEKIT_DATA")
    task, there = SETS[name](Mirror(root)) if root else None, HUB_NAMES.get(name, name)
    try:
        if task is None and there not in sources():
            raise FileNotFoundError(f"the data folder has no {name}, nor does the hub")
        if task is None:
            task = raw_task(there, Path(root) if root else None)
            task.examples("test")
    except (ConnectionError, FileNotFoundError) as error:
        log.warning("%s is left out: %s", name, error)
        missing[name] = str(error)
        return None
    return _with_exemplars(task) if name in WORD_PROBLEMS else task


def _single(base: str, name: str, asked: dict, mirror: Mirror) -> Suite:
    known = {}
    for split, part in (("train", "valid"), ("test", "test")):
        known |= {task.name: (task, part) for task in mirror.niv2(split)}
    if base not in known:
        raise unknown("suite", name, known)
    task, part = known[base]
    return Suite(name, (task,), **{**_NIV2, **asked, "split": part})
