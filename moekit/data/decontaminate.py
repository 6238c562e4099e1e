"""Which training tasks overlap with evaluation suites: by the data sets they were made from, and
by their texts.

A question of a suite counts as seen in a task if at least 70 % of its 8-grams of words occur in
the task's training inputs (Chowdhery 2022, section 8); a task goes if it shows a share of the
questions of any task of the suite.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

from tqdm import tqdm

from moekit.data.suites import Suite, suite
from moekit.data.tasks import Example, Task

log = logging.getLogger("moekit")
GRAM, COVERED = 8, 0.7
SHARE = 0.01  # of a suite task's questions, seen in one training task, that are too many
ROWS = 30_000  # rows of a training task that are read, evenly spaced
# Names that data sets go by elsewhere. NIv2 calls MMLU "mmmlu": the tasks that Chung 2022 removed.
_ALIASES = {
    "mmlu": ("mmmlu", "hendryckstest"),
    "bbh": ("bigbench", "bigbenchhard"),
    "gsm8k": ("gsm", "gradeschoolmath"),
    "arc_easy": ("arc", "ai2arc"),
    "arc_challenge": ("arc", "ai2arc"),
    "aqua": ("aquarat",),
    "social_i_qa": ("socialiqa",),
    "ai2_science_elementary": ("ai2science",),
}


def overlapping(
    tasks: Iterable[Task], suites: Sequence[str | Suite], data_dir: str | Path | None = None
) -> dict[str, str]:
    """The tasks that must not be trained on if the suites are to be held out, {name: reason}; each
    is logged.

    Raises:
      ValueError: an unknown suite.
      FileNotFoundError: no data for one.
    """
    asked = [s if isinstance(s, Suite) else suite(s, data_dir=data_dir) for s in suites]
    held_out = [task for each in asked for task in each.tasks]
    split = {task.name: each.split for each in asked for task in each.tasks}
    names = _names([*(task.name for task in held_out), *(n for s in asked for n in s.missing)])
    questions = _Questions({task.name: task.examples(split[task.name]) for task in held_out})
    dropped = {}
    for task in tqdm(list(tasks), desc="decontaminate", unit="task", leave=False):
        found = _named(task, names)
        if reason := f"made from {found}" if found else questions.seen_in(task):
            dropped[task.name] = reason
            log.warning(
                "held out for %s: %s (%s)", ", ".join(s.name for s in asked), task.name, reason
            )
    return dropped


def _names(tasks: Iterable[str]) -> dict[str, str]:
    """{a name without separators: the suite's task or family}."""
    families = [task if task.startswith("niv2/") else task.split("/")[0] for task in tasks]
    known = {"".join(_words(family)): family for family in families}
    for family in families:
        for alias in _ALIASES.get(family, ()):
            known.setdefault(alias, family)
    return known


def _named(task: Task, names: dict[str, str]) -> str | None:
    """The held-out data set whose name stands, whole, in a task's name or among its sources."""
    for text in (task.name, *task.sources):
        words = _words(text)
        for start, end in combinations(range(len(words) + 1), 2):
            if found := names.get("".join(words[start:end])):
                return found
    return None


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _grams(example: Example) -> Iterator[str]:
    """Runs of eight words of what is particular to an example (a task's definition is not). A short
    question, often a mere stem, is taken with its options; a text shorter still is one run, if it
    has four words at least."""
    words = _words(" ".join(v for name, v in example.fields.items() if name != "definition"))
    if len(words) < 2 * GRAM:
        words += _words(" ".join(example.options))
    if len(words) >= GRAM // 2:
        for i in range(max(1, len(words) - GRAM + 1)):
            yield " ".join(words[i : i + GRAM])


class _Questions:
    """The n-grams of the questions of suite tasks."""

    def __init__(self, examples: dict[str, Sequence[Example]]):
        self.owners: dict[str, list[int]] = {}  # of each n-gram, the questions that have it
        self.sizes: list[int] = []  # distinct n-grams of each question
        self.tasks: list[str] = []  # the task of each question
        self.asked = {task: len(rows) for task, rows in examples.items()}
        for task, rows in examples.items():
            for example in rows:
                grams = set(_grams(example))
                for gram in grams:
                    self.owners.setdefault(gram, []).append(len(self.tasks))
                self.sizes.append(len(grams))
                self.tasks.append(task)

    def seen_in(self, task: Task) -> str | None:
        """Why a training task overlaps, or None."""
        rows = task.examples("train")
        step = max(1, -(-len(rows) // ROWS))
        hits = set[str]()
        for i in range(0, len(rows), step):
            hits.update(gram for gram in _grams(rows[i]) if gram in self.owners)
        covered = Counter(question for gram in hits for question in self.owners[gram])
        seen = Counter(self.tasks[q] for q, n in covered.items() if n >= COVERED * self.sizes[q])
        worst = max(seen, key=lambda name: seen[name] / self.asked[name], default="")
        if not worst or seen[worst] / self.asked[worst] <= SHARE:
            return None
        return f"its inputs show {seen[worst]} of the {self.asked[worst]} questions of {worst}"
