"""A mixture of tasks: its rates, and the stream of prompts and token ids that training sees."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moekit import __version__
from moekit.data.tasks import Example, Prompt, Task, content_digest, format_prompt

if TYPE_CHECKING:
    from moekit.data.overview import Overview


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
        from moekit.data.overview import overview

        return overview(self, tokenizer, tokens)

    def prompts(
        self,
        *,
        seed: int = 0,
        split: str = "train",
        shuffle: bool = True,
        repeat: bool = True,
        fits=None,
    ):
        """A grain dataset of prompts, each task in its own order, mixed by rate.

        `fits(prompt)` decides whether a few-shot prompt may stay as long as it is; exemplars are
        left out until it does.
        """
        import grain

        datasets = []
        for i, (task, formats) in enumerate(zip(self.tasks, self.formats, strict=True)):
            examples = task.examples(split)
            dataset = grain.MapDataset.source(range(len(examples))).seed(seed * 100_003 + i)
            dataset = dataset.shuffle() if shuffle else dataset
            dataset = dataset.repeat() if repeat else dataset
            datasets.append(dataset.random_map(_Formatter(task, formats, split, fits)))
        if not repeat:
            return grain.MapDataset.concatenate(datasets)
        return grain.MapDataset.mix(datasets, weights=list(self.rates.values()))

    def sample(self, n: int, *, seed: int = 0, split: str = "train") -> list[Prompt]:
        """The first n prompts of the stream that training with this seed sees."""
        stream = self.prompts(seed=seed, split=split)
        return [stream[i] for i in range(n)]

    def token_pairs(
        self,
        tokenizer,
        *,
        input_length,
        target_length,
        seed,
        split="train",
        shuffle=True,
        repeat=True,
    ):
        """Prompts as a grain dataset of {"inputs", "targets"} token ids."""
        from moekit.data.pipeline import tokenize_prompt

        lengths = {"input_length": input_length, "target_length": target_length}

        def fits(prompt: Prompt) -> bool:
            return len(tokenizer.encode(prompt.input)) < input_length

        prompts = self.prompts(seed=seed, split=split, shuffle=shuffle, repeat=repeat, fits=fits)
        if not repeat and shuffle:
            prompts = prompts.seed(seed).shuffle()
        return prompts.map(lambda prompt: tokenize_prompt(prompt, tokenizer, **lengths))


@dataclass(frozen=True)
class _Formatter:
    """An example's index and a generator to a prompt."""

    task: Task
    formats: Formats
    split: str
    fits: object

    def __call__(self, index: int, rng: np.random.Generator) -> Prompt:
        example = self.task.examples(self.split)[index]
        inverted = bool(self.task.inverted) and rng.random() < self.formats.inverted
        thought = bool(example.rationale) and rng.random() < self.formats.chain_of_thought
        kwargs = {
            "template": int(rng.integers(1000)),
            "style": int(rng.integers(1000)),
            "options": rng.random() >= self.formats.no_options,
            "inverted": inverted,
            "chain_of_thought": thought and not inverted,
        }
        shots = self._shots(example, rng, thought)
        while True:
            prompt = format_prompt(self.task, example, shots=shots, **kwargs)
            if not shots or self.fits is None or self.fits(prompt):
                return prompt
            shots = shots[1:]

    def _shots(self, example: Example, rng: np.random.Generator, thought: bool) -> list[Example]:
        if rng.random() >= self.formats.few_shot:
            return []
        pool = self.task.examples("train")
        wanted = int(rng.integers(1, self.formats.max_shots + 1))
        drawn = rng.choice(len(pool), min(wanted + 1, len(pool)), replace=False)
        others = (pool[i] for i in drawn if pool[i].id != example.id)
        return [shot for shot in others if shot.rationale or not thought][:wanted]
