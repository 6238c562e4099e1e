"""Which training tasks overlap with evaluation suites: by the data sets they were made from, and
by their texts.

A question of a suite counts as seen in a task if at least 70 % of its 8-grams of words occur in
the task's training inputs (Chowdhery 2022, section 8). A task is left out if more than 1 % of the
questions of any task of the suite are seen in it.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from moekit.data.suites import Suite, suite
from moekit.data.tasks import Example, Task
from moekit.progress import ProgressBar

log = logging.getLogger("moekit")
GRAM, COVERED = 8, 0.7
SHARE = 0.01  # of a suite task's questions, seen in one training task, that are too many
ROWS = 30_000  # rows of a training task that are read, evenly spaced
# Other names of data sets. NIv2 calls MMLU "mmmlu": the tasks that Chung 2022 removed.
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
    opened = []
    for each in suites:
        opened.append(each if isinstance(each, Suite) else suite(each, data_dir=data_dir))
    names, questions = _suite_names(opened), _suite_questions(opened)
    shown = ", ".join(each.name for each in opened)
    overlaps = {}
    for task in ProgressBar(list(tasks), desc="decontaminate", unit="task", leave=False):
        origin = _held_out_origin(task, names)
        reason = f"made from {origin}" if origin else questions.seen_in(task)
        if reason:
            overlaps[task.name] = reason
            log.warning("held out for %s: %s (%s)", shown, task.name, reason)
    return overlaps


def _suite_names(suites: Sequence[Suite]) -> dict[str, str]:
    """{a name without separators: the suite's task or family}."""
    families = []
    for each in suites:
        tasks = [task.name for task in each.tasks]
        families += [task if task.startswith("niv2/") else task.split("/")[0] for task in tasks]
        families += each.missing
    known = {"".join(_words(family)): family for family in families}
    for family in families:
        for alias in _ALIASES.get(family, ()):
            known.setdefault(alias, family)
    return known


def _held_out_origin(task: Task, names: Mapping[str, str]) -> str | None:
    """The held-out data set named in full in the task's name or sources, or None."""
    for text in (task.name, *task.sources):
        words = _words(text)
        for start, end in combinations(range(len(words) + 1), 2):
            joined = "".join(words[start:end])
            if joined in names:
                return names[joined]
    return None


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _grams(example: Example) -> Iterator[str]:
    """Runs of eight words of what is particular to an example (a task's definition is not).

    A short question, often a mere stem, is taken with its options; a text shorter still is one
    run, if it has at least four words.
    """
    texts = [text for name, text in example.fields.items() if name != "definition"]
    words = _words(" ".join(texts))
    if len(words) < 2 * GRAM:
        words += _words(" ".join(example.options))
    if len(words) < GRAM // 2:
        return
    for start in range(max(1, len(words) - GRAM + 1)):
        yield " ".join(words[start : start + GRAM])


class SuiteQuestions:
    """The n-grams of the questions of suite tasks."""

    def __init__(self):
        self.owners: dict[str, list[int]] = {}  # of each n-gram, the questions that have it
        self.sizes: list[int] = []  # distinct n-grams of each question
        self.tasks: list[str] = []  # the task of each question
        self.counts: dict[str, int] = {}  # questions of each task

    def add(self, task: str, examples: Sequence[Example]) -> None:
        """Include the questions of a task."""
        self.counts[task] = len(examples)
        for example in examples:
            grams = set(_grams(example))
            for gram in grams:
                self.owners.setdefault(gram, []).append(len(self.tasks))
            self.sizes.append(len(grams))
            self.tasks.append(task)

    def seen_in(self, task: Task) -> str | None:
        """Why a training task overlaps, or None."""
        examples = task.examples("train")
        step = max(1, -(-len(examples) // ROWS))
        hits = set[str]()
        for index in range(0, len(examples), step):
            hits.update(gram for gram in _grams(examples[index]) if gram in self.owners)
        covered = Counter(question for gram in hits for question in self.owners[gram])
        seen = Counter()
        for question, count in covered.items():
            if count >= COVERED * self.sizes[question]:
                seen[self.tasks[question]] += 1
        shares = {name: count / self.counts[name] for name, count in seen.items()}
        worst = max(shares, key=shares.__getitem__, default=None)
        if worst is None or shares[worst] <= SHARE:
            return None
        return f"its inputs show {seen[worst]} of the {self.counts[worst]} questions of {worst}"


def _suite_questions(suites: Sequence[Suite]) -> SuiteQuestions:
    questions = SuiteQuestions()
    for each in suites:
        for task in each.tasks:
            questions.add(task.name, task.examples(each.split))
    return questions
