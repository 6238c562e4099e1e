"""A mixture of tasks: its rates, and the stream of prompts and token ids for training."""

import functools
import hashlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from moekit.data.shuffle import shuffled_index, window_shuffle
from moekit.data.summary import MixtureRow, Overview
from moekit.data.tasks import (
    Example,
    Prompt,
    Task,
    choose_exemplars,
    content_digest,
    format_prompt,
    stable_random,
)
from moekit.data.tokenizer import ByteTokenizer, Tokenizer
from moekit.table import Table

if TYPE_CHECKING:
    import grain

_WINDOW = 8192  # examples within which the mixture is shuffled
# changes when the same tasks and rates give other examples, or the same in another order
ORDER_VERSION = "0.1.0"
NUM_SAMPLED = 16  # prompts of a task whose tokens are counted for `describe`


@dataclass(frozen=True)
class PromptFormats:
    """How often the prompts of a sub-mixture have which form, as shares of all examples."""

    few_shot: float = 0.5
    no_options: float = 0.5
    chain_of_thought: float = 0.0  # of the examples that have a rationale
    inverted: float = 0.0  # of the tasks that have inverted templates
    max_shots: int = 3


@dataclass(frozen=True)
class Mixture:
    """Tasks with rates. `token_pairs` streams token ids, `sample` shows the first prompts.

    Args:
      weights: rates of the tasks, not normalized.
      formats: prompt formats of each task.
      submixtures: the sub-mixture of each task.
      dropped: names of tasks and data sets that were left out, and why.

    Raises:
      ValueError: no tasks, a task twice, or a weight that is not a positive number.
    """

    name: str
    tasks: tuple[Task, ...]
    weights: tuple[float, ...]
    formats: tuple[PromptFormats, ...]
    submixtures: tuple[str, ...]
    dropped: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"mixture {self.name!r} has no tasks")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"mixture {self.name!r} has tasks twice: {', '.join(repeated)}")
        for task, weight in zip(self.tasks, self.weights, strict=True):
            if not weight > 0 or not np.isfinite(weight):
                raise ValueError(f"rate of task {task.name} is {weight}; use a number above 0")

    @property
    def rates(self) -> dict[str, float]:
        """Share of each task among all examples; they sum to 1."""
        total = sum(self.weights)
        return {
            task.name: weight / total for task, weight in zip(self.tasks, self.weights, strict=True)
        }

    def __repr__(self) -> str:
        return f"Mixture({self.name!r}, {len(self.tasks)} tasks)"

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        """The rate of every cluster; `describe` counts examples and tokens as well."""
        clusters: dict[tuple[str, str], list[float]] = {}
        for task, submixture in zip(self.tasks, self.submixtures, strict=True):
            rates = clusters.setdefault((submixture, task.cluster), [])
            rates.append(self.rates[task.name])
        rows = []
        for (submixture, cluster), rates in clusters.items():
            rows.append((submixture, cluster, str(len(rates)), f"{sum(rates):.2%}"))
        headings = ("submixture", "cluster", "tasks", "rate")
        return Table(headings, rows, title=[repr(self)], num_left=2)

    def select(self, indices: Iterable[int]) -> "Mixture":
        """The mixture of some of its tasks, in the same proportions."""
        chosen = list(indices)
        return replace(
            self,
            tasks=tuple(self.tasks[index] for index in chosen),
            weights=tuple(self.weights[index] for index in chosen),
            formats=tuple(self.formats[index] for index in chosen),
            submixtures=tuple(self.submixtures[index] for index in chosen),
        )

    def digest(self) -> str:
        """Twelve hexadecimal digits for the tasks, their data, templates, rates and formats, and
        the version of their order."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        sha = hashlib.sha256(ORDER_VERSION.encode())
        rates = self.rates
        for task, formats in zip(self.tasks, self.formats, strict=True):
            templates = (task.templates, task.inverted)
            content = content_digest(task)
            description = (task.name, rates[task.name], formats, templates, content)
            sha.update(repr(description).encode())
        return sha.hexdigest()[:12]

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
    ) -> "grain.MapDataset":
        """A grain dataset of (index of the task, prompt), with random access.

        Each task is read in its own random order, epoch after epoch, and the tasks are mixed by
        rate. Without `repeat` every example comes once. `fits` decides whether a few-shot prompt
        is short enough; exemplars are left out until it is.

        Raises:
          ValueError: a task has no examples in this split.
        """

        import grain  # which takes a second

        def random_seed(name: str) -> int:
            return stable_random(seed, name).getrandbits(32)

        datasets = []
        for index, task in enumerate(self.tasks):
            size = len(task.examples(split))
            if not size and repeat:
                raise ValueError(f"task {task.name} has no examples in split {split!r}")
            dataset = grain.MapDataset.source(range(size))
            if repeat:
                dataset = dataset.repeat()
            if shuffle:
                order = functools.partial(shuffled_index, size=size, seed=random_seed(task.name))
                dataset = dataset.map_with_index(order)
            datasets.append(dataset.map(functools.partial(_with_task, index)))
        if repeat:
            mixed = grain.MapDataset.mix(datasets, weights=list(self.rates.values()))
            # grain mixes in a fixed rhythm, which would interfere with every n-th example
            if shuffle:
                mixed = window_shuffle(mixed, size=_WINDOW, seed=random_seed("") >> 1)
        else:
            mixed = grain.MapDataset.concatenate(datasets)
            if shuffle:
                mixed = mixed.shuffle(seed=random_seed(""))
        formatter = _Formatter(self.tasks, self.formats, split, fits)
        return mixed.random_map(formatter, seed=random_seed(""))

    def sample(self, n: int, *, seed: int = 0, split: str = "train") -> list[Prompt]:
        """The first n prompts of the stream for training with this seed."""
        stream = self.prompts(seed=seed, split=split)
        return [stream[position][1] for position in range(n)]

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
        """Prompts as a grain dataset of token ids: the dicts of `tokenize_prompt` with "task", the
        index of the example's label."""
        tokenize = _Tokenize(tokenizer, input_length, target_length)
        prompts = self.prompts(
            seed=seed, split=split, shuffle=shuffle, repeat=repeat, fits=tokenize.fits
        )
        return prompts.map(tokenize)

    def describe(self, tokenizer: Tokenizer | None = None, tokens: int = 0) -> Overview:
        """What a training run will see: tasks, clusters, examples, rates after caps, tokens, and
        how often each task repeats; print it or `.plot()` it.

        Args:
          tokenizer: what counts tokens; default bytes.
          tokens: length of the run, inputs and targets; default one epoch.
        """
        from moekit.progress import ProgressBar

        tokenizer = tokenizer or ByteTokenizer()
        indices = ProgressBar(range(len(self.tasks)), desc="describe", unit="task", leave=False)
        rows = tuple(self._describe_task(index, tokenizer) for index in indices)
        return Overview(self.name, rows, 0.0, dict(self.dropped)).for_run(tokens)

    def _describe_task(self, index: int, tokenizer: Tokenizer) -> MixtureRow:
        task = self.tasks[index]
        prompts = self.select([index]).sample(NUM_SAMPLED)
        inputs = [len(tokenizer.encode(prompt.input)) + 1 for prompt in prompts]
        targets = [len(tokenizer.encode(prompt.target)) + 1 for prompt in prompts]
        return MixtureRow(
            submixture=self.submixtures[index],
            cluster=task.cluster,
            task=task.name,
            tasks=1,
            examples=task.train_size,
            valid=len(task.examples("valid")) if "valid" in task.splits else 0,
            rate=self.rates[task.name],
            input_tokens=float(np.mean(inputs)),
            target_tokens=float(np.mean(targets)),
            repeats=0.0,
        )


# classes and functions at the top level, not closures: worker processes receive them pickled
@dataclass(frozen=True)
class _Tokenize:
    """(index of the task, prompt) -> token ids."""

    tokenizer: Tokenizer
    input_length: int
    target_length: int

    def fits(self, prompt: Prompt) -> bool:
        return len(self.tokenizer.encode(prompt.input)) < self.input_length

    def __call__(self, drawn: tuple[int, Prompt]) -> dict:
        from moekit.data.batch import tokenize_prompt  # with jax

        task, prompt = drawn
        pair = tokenize_prompt(
            prompt,
            self.tokenizer,
            input_length=self.input_length,
            target_length=self.target_length,
        )
        pair["task"] = task
        return pair


def _with_task(task: int, example: int) -> tuple[int, int]:
    return task, example


@dataclass(frozen=True)
class _Formatter:
    """(index of a task, index of its example) and a generator -> (index of the task, prompt)."""

    tasks: tuple[Task, ...]
    formats: tuple[PromptFormats, ...]
    split: str
    fits: Callable[[Prompt], bool] | None

    def __reduce__(self) -> tuple:
        """For worker processes: with the examples in place of the functions that load them."""
        tasks = []
        for task in self.tasks:
            splits = {self.split, "train"} & set(task.splits)
            examples = {name: task.examples(name) for name in splits}
            tasks.append(replace(task, load=examples.__getitem__))
        return _Formatter, (tuple(tasks), self.formats, self.split, self.fits)

    def __call__(self, drawn: tuple[int, int], rng: np.random.Generator) -> tuple[int, Prompt]:
        task_index, example_index = drawn
        task = self.tasks[task_index]
        formats = self.formats[task_index]
        example = task.examples(self.split)[example_index]
        inverted = bool(task.inverted) and rng.random() < formats.inverted
        reasoned = bool(example.rationale) and rng.random() < formats.chain_of_thought
        chain_of_thought = reasoned and not inverted
        template = int(rng.integers(1000))
        option_style = int(rng.integers(1000))
        options = rng.random() >= formats.no_options
        exemplars = _draw_exemplars(task, formats, example, rng, chain_of_thought)
        while True:
            prompt = format_prompt(
                task,
                example,
                template=template,
                shots=exemplars,
                options=options,
                chain_of_thought=chain_of_thought,
                inverted=inverted,
                option_style=option_style,
            )
            if not exemplars or self.fits is None or self.fits(prompt):
                return task_index, prompt
            exemplars = exemplars[1:]


def _draw_exemplars(
    task: Task,
    formats: PromptFormats,
    example: Example,
    rng: np.random.Generator,
    chain_of_thought: bool,
) -> list[Example]:
    if rng.random() >= formats.few_shot:
        return []
    num_shots = int(rng.integers(1, formats.max_shots + 1))
    exemplar_rng = random.Random(int(rng.integers(2**63)))
    return choose_exemplars(
        task, example, num_shots, exemplar_rng, chain_of_thought=chain_of_thought
    )
