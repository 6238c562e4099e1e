"""A mixture of tasks: its rates, and the stream of prompts and token ids that training sees."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from moekit import __version__
from moekit.data.batch import shuffled, tokenize_prompt
from moekit.data.tasks import (
    Example,
    Prompt,
    Task,
    content_digest,
    format_prompt,
    stable_random,
)
from moekit.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moekit.data.summary import Overview

_WINDOW = 8192  # examples within which the mixture is shuffled


@dataclass(frozen=True)
class Formats:
    """How often a sub-mixture shows its examples in which form; shares of all examples."""

    few_shot: float = 0.5
    no_options: float = 0.5
    chain_of_thought: float = 0.0  # of the examples that have a rationale
    inverted: float = 0.0  # of the tasks that have inverted templates
    max_shots: int = 3


@dataclass(frozen=True)
class Mixture:
    """Tasks with normalised rates; iterate it through `token_pairs`, look into it with `sample`."""

    name: str
    tasks: tuple[Task, ...]
    weights: tuple[float, ...]
    formats: tuple[Formats, ...]
    parts: tuple[str, ...]  # the sub-mixture of each task
    # tasks left out because they overlap with suites, and why
    dropped: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        if not self.tasks:
            raise ValueError(f"mixture {self.name!r} has no tasks")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise ValueError(f"mixture {self.name!r} has tasks twice: {', '.join(twice)}")
        for task, weight in zip(self.tasks, self.weights, strict=True):
            if not weight > 0 or not np.isfinite(weight):
                raise ValueError(f"rate of task {task.name} is {weight}; use a number above 0")

    @property
    def rates(self) -> dict[str, float]:
        """Share of each task among all examples; they sum to 1."""
        total = sum(self.weights)
        return {t.name: w / total for t, w in zip(self.tasks, self.weights, strict=True)}

    def digest(self) -> str:
        """Twelve hexadecimal digits that name tasks, data, wordings, rates, formats and version."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        sha = hashlib.sha256(__version__.encode())
        for task, formats in zip(self.tasks, self.formats, strict=True):
            wordings = (task.templates, task.inverted)
            facts = (task.name, self.rates[task.name], formats, wordings, content_digest(task))
            sha.update(repr(facts).encode())
        return sha.hexdigest()[:12]

    def describe(self, tokenizer=None, tokens: int = 0) -> "Overview":
        """What a training run will see: tasks, clusters, examples, rates after caps, tokens, and
        how often each task repeats; print it or `.plot()` it.

        Args:
          tokenizer: what counts tokens; default bytes.
          tokens: length of the run, inputs and targets; default one epoch.
        """
        from moekit.data.summary import overview

        return overview(self, tokenizer, tokens)

    def labels(self, split: str) -> tuple[tuple[str, str], ...]:
        """(task, cluster) of each task, for statistics."""
        return tuple((task.name, task.cluster) for task in self.tasks)

    def prompts(
        self,
        *,
        seed: int = 0,
        split: str = "train",
        shuffle: bool = True,
        repeat: bool = True,
        fits: Callable[[Prompt], bool] | None = None,
    ):
        """A grain dataset of (number of the task, prompt), random access.

        Each task is gone through in its own order, epoch after epoch, and all are mixed by rate.
        Without `repeat` every example comes once. `fits` decides whether a few-shot prompt may
        stay as long as it is; exemplars are left out until it does.
        """
        import grain

        def key(name: str) -> int:
            return stable_random(seed, name).getrandbits(32)

        datasets = []
        for number, task in enumerate(self.tasks):
            size = len(task.examples(split))
            if not size and repeat:
                raise ValueError(f"task {task.name} has no examples in split {split!r}")
            dataset = grain.MapDataset.source(range(size))
            dataset = dataset.repeat() if repeat else dataset
            if shuffle:
                order = functools.partial(shuffled, size=size, seed=key(task.name))
                dataset = dataset.map_with_index(order)
            datasets.append(dataset.map(functools.partial(_pair, number)))
        if not repeat:
            mixed = grain.MapDataset.concatenate(datasets)
            mixed = mixed.shuffle(seed=key("")) if shuffle else mixed
        else:
            mixed = grain.MapDataset.mix(datasets, weights=list(self.rates.values()))
            if shuffle:  # grain mixes in a fixed rhythm, with which every n-th example would beat
                mixed = grain.experimental.WindowShuffleMapDataset(
                    mixed, window_size=_WINDOW, seed=key("") >> 1
                )
        return mixed.random_map(_Formatter(self.tasks, self.formats, split, fits), seed=key(""))

    def sample(self, n: int, *, seed: int = 0, split: str = "train") -> list[Prompt]:
        """The first n prompts of the stream that training with this seed sees."""
        stream = self.prompts(seed=seed, split=split)
        return [stream[i][1] for i in range(n)]

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
    ):
        """Prompts as a grain dataset of token ids: the dicts of `tokenize_prompt` with "task", the
        number of the example's label."""
        tokenize = _Tokenize(tokenizer, input_length, target_length)
        order = {"seed": seed, "split": split, "shuffle": shuffle, "repeat": repeat}
        return self.prompts(**order, fits=tokenize.fits).map(tokenize)


# classes, not closures: worker processes get them pickled
@dataclass(frozen=True)
class _Tokenize:
    """A task's number and a prompt to token ids."""

    tokenizer: Tokenizer
    input_length: int
    target_length: int

    def fits(self, prompt: Prompt) -> bool:
        return len(self.tokenizer.encode(prompt.input)) < self.input_length

    def __call__(self, drawn: tuple[int, Prompt]) -> dict:
        lengths = {"input_length": self.input_length, "target_length": self.target_length}
        return tokenize_prompt(drawn[1], self.tokenizer, **lengths) | {"task": drawn[0]}


def _pair(task: int, example: int) -> tuple[int, int]:
    return task, example


@dataclass(frozen=True)
class _Formatter:
    """Numbers of a task and of its example, and a generator, to the task's number and a prompt."""

    tasks: tuple[Task, ...]
    formats: tuple[Formats, ...]
    split: str
    fits: Callable[[Prompt], bool] | None

    def __reduce__(self):
        """For worker processes: with the examples in place of the closures that load them."""
        tasks = []
        for task in self.tasks:
            examples = {name: task.examples(name) for name in {self.split, "train"}}
            tasks.append(replace(task, load=examples.__getitem__))
        return _Formatter, (tuple(tasks), self.formats, self.split, self.fits)

    def __call__(self, where: tuple[int, int], rng: np.random.Generator) -> tuple[int, Prompt]:
        task, formats = self.tasks[where[0]], self.formats[where[0]]
        example = task.examples(self.split)[where[1]]
        inverted = bool(task.inverted) and rng.random() < formats.inverted
        thought = bool(example.rationale) and rng.random() < formats.chain_of_thought
        kwargs = {
            "template": int(rng.integers(1000)),
            "style": int(rng.integers(1000)),
            "options": rng.random() >= formats.no_options,
            "inverted": inverted,
            "chain_of_thought": thought and not inverted,
        }
        shots = _shots(task, formats, example, rng, thought)
        while True:
            prompt = format_prompt(task, example, shots=shots, **kwargs)
            if not shots or self.fits is None or self.fits(prompt):
                return where[0], prompt
            shots = shots[1:]


def _shots(task, formats, example, rng: np.random.Generator, thought: bool) -> list[Example]:
    if rng.random() >= formats.few_shot:
        return []
    pool = task.examples("train")
    wanted = int(rng.integers(1, formats.max_shots + 1))
    drawn = rng.choice(len(pool), min(wanted + 1, len(pool)), replace=False)
    others = (pool[int(i)] for i in drawn)
    return [o for o in others if o.id != example.id and (o.rationale or not thought)][:wanted]
