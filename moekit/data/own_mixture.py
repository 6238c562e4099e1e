"""Mixtures of a user's own: tasks, tasks by name, whole mixtures and text, each with a rate."""

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.data.corpora import corpus, is_text_path
from moekit.data.flan import flan_mixture
from moekit.data.mixture import Mixture, PromptFormats
from moekit.data.own import task
from moekit.data.shuffle import window_shuffle
from moekit.data.tasks import Task, stable_random
from moekit.data.text import Corpus
from moekit.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grain

OWN_FORMATS = PromptFormats(few_shot=0.0, no_options=0.0)
_WINDOW = 8192  # examples within which tasks and text are shuffled


@dataclass(frozen=True)
class JointSource:
    """Examples of several sources in one stream for training: a mixture of tasks and text.

    Args:
      sources: mixtures and corpora.
      rates: share of each source among all examples.
    """

    sources: tuple[Mixture | Corpus, ...]
    rates: tuple[float, ...]

    def labels(self, split: str) -> tuple[tuple[str, str], ...]:
        """The labels of all sources, for statistics."""
        labels: list[tuple[str, str]] = []
        for source in self.sources:
            labels += source.labels(split)
        return tuple(labels)

    def digest(self) -> str:
        """Twelve hexadecimal digits for the sources and their rates."""
        digests = [source.digest() for source in self.sources]
        return hashlib.sha256(repr((digests, self.rates)).encode()).hexdigest()[:12]

    def token_pairs(
        self,
        tokenizer: Tokenizer,
        *,
        input_length: int,
        target_length: int,
        seed: int,
        split: str = "train",
        shuffle: bool = True,
        repeat: bool = True,
    ) -> "grain.MapDataset":
        """The token ids of all sources as a grain dataset, mixed by rate.

        Without `repeat` every example comes once, one source after the other.
        """
        import grain

        datasets = []
        num_labels = 0
        for source in self.sources:
            pairs = source.token_pairs(
                tokenizer,
                input_length=input_length,
                target_length=target_length,
                seed=seed,
                split=split,
                shuffle=shuffle,
                repeat=repeat,
            )
            datasets.append(pairs.map(functools.partial(_shift_label, num_labels)))
            num_labels += len(source.labels(split))
        if not repeat:
            return grain.MapDataset.concatenate(datasets)
        mixed = grain.MapDataset.mix(datasets, weights=self.rates)
        if not shuffle:
            return mixed
        # grain mixes in a fixed rhythm, which would interfere with every n-th example
        window_seed = stable_random(seed, "joint").getrandbits(31)
        return window_shuffle(mixed, size=_WINDOW, seed=window_seed)


def _shift_label(offset: int, pair: Mapping[str, Any]) -> dict[str, Any]:
    """A pair of token ids whose label counts from an offset."""
    shifted = dict(pair)
    shifted["task"] += offset
    return shifted


def mixture(
    rates: Mapping[Any, float | int] | Sequence[Any],
    *,
    source: str = "local",
    data_dir: str | Path | None = None,
    name: str = "own",
) -> Mixture | JointSource:
    """A mixture of your own tasks and others.

    Own tasks are prompted without exemplars and with their options shown; tasks by name and those
    of whole mixtures keep their prompt formats.

    Args:
      rates: {task: rate}, not normalized. A key is a task (`mk.task`), the name of a builtin or
        FLAN task, a whole mixture, whose tasks share the rate in their own proportions, or a text
        corpus, which is read with span corruption. A list of tasks is mixed by their numbers of
        examples.
      source: where tasks by name come from, as for `mk.flan_mixture`.
      data_dir: data folder of the tasks by name.

    Returns:
      A `Mixture`; with a corpus among the keys, a source to train on.

    Raises:
      ValueError: no tasks, tasks of the same name, an unknown name, or a rate that is not a
        positive number.
    """
    if not isinstance(rates, Mapping):
        rates = {each: each.train_size for each in _tasks_only(rates)}
    rates = {part: float(rate) for part, rate in rates.items()}
    for part, rate in rates.items():
        if not rate > 0 or rate == float("inf"):
            raise ValueError(f"rate of {_name(part)} is {rate}; use a number above 0")
    corpora = [part for part in rates if isinstance(part, Corpus)]
    others = {part: rate for part, rate in rates.items() if not isinstance(part, Corpus)}
    tasks = _mixture_of_tasks(others, source, data_dir, name) if others or not corpora else None
    if not corpora:
        return tasks
    sources = [*corpora]
    weights = [rates[each] for each in corpora]
    if tasks:
        sources.append(tasks)
        weights.append(sum(others.values()))
    total = sum(weights)
    return JointSource(tuple(sources), tuple(weight / total for weight in weights))


def _tasks_only(parts: Iterable[Any]) -> list[Task]:
    found = list(parts)
    for part in found:
        if not isinstance(part, Task):
            kind = type(part).__name__
            raise ValueError(f"a list of tasks holds a {kind}: give a dict with its rate instead")
    _check_names(found)
    return found


def _name(part: Any) -> str:
    return str(getattr(part, "name", part))


def _mixture_of_tasks(
    rates: Mapping[Any, float],
    source: str,
    data_dir: str | Path | None,
    name: str,
) -> Mixture:
    """One mixture of tasks, tasks by name and mixtures."""
    tasks: list[Task] = []
    weights: list[float] = []
    formats: list[PromptFormats] = []
    submixtures: list[str] = []
    dropped: dict[str, str] = {}
    for part, rate in rates.items():
        inside = _as_mixture(part, source, data_dir)
        tasks += inside.tasks
        weights += [rate * share for share in inside.rates.values()]
        formats += inside.formats
        submixtures += inside.submixtures
        dropped |= inside.dropped
    _check_names(tasks)
    return Mixture(
        name=name,
        tasks=tuple(tasks),
        weights=tuple(weights),
        formats=tuple(formats),
        submixtures=tuple(submixtures),
        dropped=dropped,
    )


def _as_mixture(part: Any, source: str, data_dir: str | Path | None) -> Mixture:
    """A key of `mixture` as a mixture."""
    if isinstance(part, Mixture):
        return part
    if isinstance(part, str):
        return flan_mixture({part: 1.0}, source=source, data_dir=data_dir)
    if not isinstance(part, Task):
        kind = type(part).__name__
        raise ValueError(
            f"a mixture is made of tasks, mixtures, names and corpora, not of a {kind}"
        )
    return Mixture(part.name, (part,), (1.0,), (OWN_FORMATS,), (part.cluster,))


def _check_names(tasks: Sequence[Task]) -> None:
    names = [each.name for each in tasks]
    repeated = sorted({each for each in names if names.count(each) > 1})
    if repeated:
        raise ValueError(
            f"a mixture has several tasks called {', '.join(repeated)}: name them, as in "
            'mk.task(rows, name="first")'
        )


def as_source(data: Any) -> Any:
    """What `mk.train` accepts, as a source of token ids.

    Mixtures, corpora and other sources are returned as they are. A task becomes a mixture; a
    folder or file of text (.txt, .md) a corpus; other rows and paths are read as by `mk.task`.

    Raises:
      ValueError, FileNotFoundError: as for `mk.task` and `mk.corpus`.
    """
    if hasattr(data, "token_pairs"):
        return data
    if isinstance(data, str | Path) and is_text_path(Path(data)):
        return corpus(data)
    return mixture([data if isinstance(data, Task) else task(data)])
