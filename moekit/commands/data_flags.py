"""What the flags --task, --mixture and --corpus name, for the verbs train and trace."""

from collections.abc import Sequence
from pathlib import Path

import moekit as mk
from moekit.commands.flags import names, one_or_several
from moekit.data.mixture import Mixture
from moekit.data.own_mixture import JointSource
from moekit.data.tasks import Task
from moekit.data.text import Corpus


def own_tasks(
    paths: Sequence[Path], input: str, target: str, options: Sequence[str], on_error: str
) -> list[Task]:
    """The tasks of files of the user's.

    Raises:
      ValueError: columns without a file, or rows that cannot be used.
    """
    if (input or target or options) and not paths:
        raise ValueError("--input, --target and --options name columns of --task: name its file")
    tasks = []
    for path in paths:
        task = mk.task(
            path,
            input=input or None,
            target=target or None,
            options=one_or_several(options),
            on_error=on_error,
        )
        tasks.append(task)
    return tasks


def named_data(
    tasks: list[Task], mixture: str, source: str, hold_out: str, corpus: str, on_error: str
) -> Mixture | Corpus | JointSource:
    """What was named, in equal shares; the builtin mixture if nothing was."""
    parts: dict[Mixture | Corpus, float] = {}
    if tasks:
        parts[mk.mixture(tasks)] = 1.0
    if mixture or not (tasks or corpus):
        flan = mk.flan_mixture(
            mixture or "builtin", source=source, hold_out=names(hold_out), on_error=on_error
        )
        parts[flan] = 1.0
    if corpus:
        parts[mk.corpus(corpus, on_error=on_error)] = 1.0
    return next(iter(parts)) if len(parts) == 1 else mk.mixture(parts)
