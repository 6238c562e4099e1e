"""Evaluation suites: named groups of tasks with the way in which a benchmark prompts for them."""

import functools
import logging
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from moekit.data.builtin.tasks import builtin_tasks
from moekit.data.datasets import Access, dataset, dataset_task, find_copy
from moekit.data.files import data_dir as data_folder
from moekit.data.mixture import Mixture
from moekit.data.niv2 import niv2_tasks
from moekit.data.own import evaluation_task, task as own_task
from moekit.data.own_rows import is_path
from moekit.data.published import bbh_tasks, mmlu_tasks
from moekit.data.tasks import Example, Task
from moekit.errors import unknown

log = logging.getLogger("moekit")
PAPER = ("mmlu", "bbh", "reasoning", "qa")  # the suites of the paper's normalised average
WORD_PROBLEMS = ("svamp", "asdiv")  # evaluated with exemplars of our own
SETS = (  # single data sets
    "gsm8k",
    "svamp",
    "asdiv",
    "strategyqa",
    "aqua",
    "ai2_science_elementary",
    "boolq",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "piqa",
    "winogrande",
    "social_i_qa",
)
GROUPS = {
    "reasoning": ("gsm8k", "svamp", "asdiv", "strategyqa"),
    "qa": ("ai2_science_elementary", "boolq", "arc_easy", "arc_challenge"),
}
COLLECTIONS = ("niv2-valid", "niv2-test", "bbh", "mmlu")
SUITES = ("builtin", "builtin-heldin", *COLLECTIONS, *GROUPS, *SETS)


@dataclass(frozen=True)
class Suite:
    """Tasks, and how they are prompted unless `evaluate` gets other arguments.

    Args:
      split: what is evaluated; exemplars come from each task's "train" split.
      shots: exemplars in a prompt.
      chain_of_thought: reason first; the answer is extracted from the text.
      options: list the options in the question, in the style of that number.
      ranked: the most likely option is the answer; else, and without options, it is decoded.
      first: evaluate at most that many examples of a task, the first ones.
      missing: tasks of the suite that neither the data folder nor the hub has.
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


def suite(
    name: str | Path,
    *,
    data_dir: str | Path | None = None,
    input: str | None = None,
    target: str | None = None,
    options: str | Sequence[str] | None = None,
) -> Suite:
    """The suite of that name: "builtin" (its held-out clusters), "builtin-heldin" (unseen objects
    of trained tasks), or one of the data folder or the hub; with "-cot" appended, by chain of
    thought. "niv2/<task>" is a single task of Super-NaturalInstructions.

    The path of a file or folder of your own rows is a suite, too: all rows are evaluated, and
    exemplars come from the other ones. Of a folder with a test split, that split is evaluated.

    Args:
      input, target, options: columns of your own rows, as for `mk.task`.

    Raises:
      ValueError: an unknown name, or rows that cannot be used.
      FileNotFoundError: neither the data folder nor the hub has this suite; no such file.
    """
    base = str(name).removesuffix("-cot")
    if is_own(name):
        task = evaluation_task(name, input=input, target=target, options=options)
        return Suite(task.name, (task,))
    if input or target or options:
        raise ValueError(
            f"suite {name} has columns of its own: name columns of a file of yours only"
        )
    if base.startswith("niv2/"):
        found = _single_niv2(base, data_folder(data_dir))
    elif base not in SUITES:
        raise unknown("suite", name, SUITES)
    elif base in ("builtin", "builtin-heldin"):
        found = Suite(base, _builtin(held_out=base == "builtin"))
    elif base in COLLECTIONS:
        found = _collection(base, data_dir)
    else:
        found = _sets(base, data_dir)
    if name != base:
        found = replace(found, chain_of_thought=True)
    return replace(found, name=name)


def is_own(name: str | Path) -> bool:
    """Whether a suite is a file or folder of a user's own, not one of a known name."""
    base = str(name).removesuffix("-cot")
    is_known = base in SUITES or base.startswith("niv2/")
    return is_path(name) and not is_known


def suites(
    names: str,
    *,
    data_dir: str | Path | None = None,
    input: str | None = None,
    target: str | None = None,
    options: str | Sequence[str] | None = None,
) -> list[Suite]:
    """The suites of a comma-separated list; "paper" names the four of its average.

    Args:
      input, target, options: columns of the files of your own among them, as for `mk.task`.
    """
    listed = ",".join(PAPER) if names == "paper" else names
    found = []
    for name in map(str.strip, listed.split(",")):
        if is_own(name):
            found.append(suite(name, input=input, target=target, options=options))
        else:
            found.append(suite(name, data_dir=data_dir))
    return found


def as_suite(source: Any) -> Suite:
    """What `mk.evaluate` accepts, as a suite.

    A suite is returned as it is. A task, several tasks, a mixture (its tasks) and own rows (read as
    by `mk.task`) are evaluated on the first split of "test" and "valid" that all of them have.

    Raises:
      ValueError: a task has neither of these splits, or the source is no rows.
    """
    if isinstance(source, Suite):
        return source
    if isinstance(source, str) and not is_own(source):
        return suite(source)
    if isinstance(source, Mixture):
        name, tasks = source.name, source.tasks
    elif isinstance(source, Task):
        name, tasks = source.name, (source,)
    elif isinstance(source, list | tuple) and all(isinstance(each, Task) for each in source):
        name, tasks = "tasks", tuple(source)
    elif hasattr(source, "token_pairs"):
        kind = type(source).__name__
        raise ValueError(f"a {kind} has no questions to evaluate: give tasks, a suite or rows")
    else:
        task = own_task(source)
        name, tasks = task.name, (task,)
    return Suite(name, tasks, _evaluated_split(tasks))


def _evaluated_split(tasks: Sequence[Task]) -> str:
    for split in ("test", "valid"):
        if all(split in task.splits for task in tasks):
            return split
    return "test"


def _builtin(held_out: bool) -> tuple[Task, ...]:
    return tuple(task for task in builtin_tasks().values() if task.held_out == held_out)


def _niv2_suite(name: str, tasks: Sequence[Task], split: str) -> Suite:
    """Super-NaturalInstructions decodes every answer after two positive examples and takes the
    first hundred instances of a task (Wang 2022)."""
    return Suite(name, tuple(tasks), split, shots=2, options=False, ranked=False, first=100)


def _single_niv2(name: str, root: Path) -> Suite:
    for folder, split in (("train", "valid"), ("test", "test")):
        found = niv2_tasks(root, folder, only=name.removeprefix("niv2/"))
        if found:
            return _niv2_suite(name, found, split)
    known = [*niv2_tasks(root, "train"), *niv2_tasks(root, "test")]
    raise unknown("suite", name, [task.name for task in known])


def _collection(name: str, data_dir: str | Path | None) -> Suite:
    """A suite of many tasks; the shots are those of Chung 2022 and Shen 2023."""
    if name == "mmlu":
        tasks = _mmlu(data_dir)
        # the paper reports the validation split; the data folder's own files do not have it
        valid = bool(tasks) and "valid" in tasks[0].splits
        found = Suite(name, tuple(tasks), "valid" if valid else "test", shots=5, style=3)
    elif name == "bbh":
        found = Suite(name, tuple(bbh_tasks(data_folder(data_dir))), shots=3)
    elif name == "niv2-test":
        found = _niv2_suite(name, niv2_tasks(data_folder(data_dir), "test"), "test")
    else:
        tasks = niv2_tasks(data_folder(data_dir), "train")
        found = _niv2_suite(name, [task for task in tasks if "valid" in task.splits], "valid")
    if not found.tasks:
        raise FileNotFoundError(f"no suite {name}: the data folder has no {name}")
    return found


def _mmlu(data_dir: str | Path | None) -> list[Task]:
    try:
        return mmlu_tasks(_access(data_dir))
    except ConnectionError as error:
        raise FileNotFoundError(f"no suite mmlu: {error}") from None


def _sets(name: str, data_dir: str | Path | None) -> Suite:
    """A suite of single data sets, those that the data folder or the hub has."""
    tasks: list[Task] = []
    missing: dict[str, str] = {}
    for each in GROUPS.get(name, (name,)):
        try:
            tasks.append(_set_task(each, _access(data_dir)))
        except (ConnectionError, FileNotFoundError) as error:
            log.warning("%s is left out: %s", each, error)
            missing[each] = str(error)
    if not tasks:
        raise FileNotFoundError(f"no suite {name}: {'; '.join(missing.values())}")
    found = Suite(name, tuple(tasks), missing=tuple(missing))
    if name == "reasoning" or name in GROUPS["reasoning"]:
        return replace(found, shots=8, chain_of_thought=True)
    return found


def _access(data_dir: str | Path | None) -> Access:
    """The data folder, if there is one, and the hub."""
    named = data_dir or os.environ.get("MOEKIT_DATA")
    return Access(data_folder(data_dir) if named else None, hub=True)


def _set_task(name: str, access: Access) -> Task:
    """A data set with its test split.

    Raises:
      FileNotFoundError: there is no source of it.
      ConnectionError: it would have to come from the hub, which cannot be reached.
    """
    task = dataset_task(dataset(name), access)
    if task is None or "test" not in task.splits:
        raise FileNotFoundError(f"the data folder has no {name}, nor does the hub")
    if not find_copy(dataset(name), access).files:
        task.examples("test")  # to be known now, not after a run
    return _with_exemplars(task) if name in WORD_PROBLEMS else task


@functools.cache
def _word_problem_exemplars() -> tuple[Example, ...]:
    text = files("moekit.data").joinpath("exemplars.toml").read_text("utf-8")
    found = []
    for index, row in enumerate(tomllib.loads(text)["arithmetic"]):
        fields = {"question": row["question"]}
        found.append(Example(f"exemplar/{index}", fields, row["answer"], rationale=row["why"]))
    return tuple(found)


def _with_exemplars(task: Task) -> Task:
    """A task of word problems with exemplars of our own."""

    def load(split: str) -> Sequence[Example]:
        return _word_problem_exemplars() if split == "train" else task.load(split)

    return replace(task, load=load, splits=("train", "test"))
