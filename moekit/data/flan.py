"""FLAN mixtures: sub-mixtures in proportion, a cap on every task, a blend of formats.

A task's share of its sub-mixture is min(cap, examples) over the sum of these (Longpre 2023).
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moekit.data.mirror import Mirror
from moekit.data.tasks import Example, Prompt, Task, format_prompt
from moekit.errors import unknown


@dataclass(frozen=True)
class Formats:
    """How often a sub-mixture shows its examples in which form; shares of all examples."""

    few_shot: float = 0.5
    no_options: float = 0.5
    chain_of_thought: float = 0.0  # of the examples that have a rationale
    inverted: float = 0.0  # of the tasks that have inverted templates
    max_shots: int = 3


# input inversion stands at rate 0.3 beside 1 inside chain of thought and dialog
_INVERTED = 0.3 / 1.3


@dataclass(frozen=True)
class SubMixture:
    """Share of the whole mixture, cap on the examples of a task, formats."""

    share: float
    cap: int
    formats: Formats


# Shares of the public release (google-research/FLAN, flan/v2); caps of Chung 2022, Table 23, and
# 200,000 for dialog from the release. Missing sub-mixtures leave their share to the others.
FLAN2022 = {
    "flan2021": SubMixture(0.40, 30_000, Formats()),
    "t0": SubMixture(0.32, 20_000, Formats()),
    "niv2": SubMixture(0.20, 5_000, Formats(no_options=0.0)),
    "cot": SubMixture(
        0.05, 100_000, Formats(no_options=0.0, chain_of_thought=1.0, inverted=_INVERTED)
    ),
    "dialog": SubMixture(0.03, 200_000, Formats(no_options=0.0, inverted=_INVERTED)),
}
# mostly short prompts: a nano model learns from many examples in the tour's few minutes
BUILTIN_FORMATS = Formats(few_shot=0.1, no_options=0.75, chain_of_thought=0.05, inverted=0.02)
NAMES = ("builtin", "flan2022")


@dataclass(frozen=True)
class Mixture:
    """Tasks with normalised rates; iterate it through `token_pairs`, look into it with `sample`."""

    name: str
    tasks: tuple[Task, ...]
    weights: tuple[float, ...]
    formats: tuple[Formats, ...]
    parts: tuple[str, ...]  # the sub-mixture of each task

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
        """Twelve hexadecimal digits that name tasks, rates and formats."""
        text = repr([sorted(self.rates.items()), self.formats])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def describe(self) -> str:
        """A table of sub-mixtures and clusters: tasks, training examples, rate."""
        groups: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for task, part in zip(self.tasks, self.parts, strict=True):
            row = (task.train_size, self.rates[task.name])
            groups.setdefault((part, task.cluster), []).append(row)
        lines = [f"{'sub-mixture':12} {'cluster':32} {'tasks':>6} {'examples':>9} {'rate':>7}"]
        for (part, cluster), rows in groups.items():
            count, rate = sum(r[0] for r in rows), sum(r[1] for r in rows)
            lines.append(f"{part:12} {cluster[:32]:32} {len(rows):6} {count:9,} {rate:7.2%}")
        total = sum(task.train_size for task in self.tasks)
        lines.append(f"{'all':12} {'':32} {len(self.tasks):6} {total:9,} {1:7.2%}")
        return "\n".join(lines)

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


def flan_mixture(
    mixture: str | Mapping[str, float] = "flan2022",
    *,
    data_dir: str | Path | None = None,
    exclude: Sequence[str] = (),
    on_error: str = "stop",
) -> Mixture:
    """A mixture by name, or a dict of {task name: rate}.

    "builtin" is the embedded default (its held-out clusters left out), "flan2022" what the data
    folder has of FLAN 2022 by FLAN's shares and caps. A dict may name tasks of either.

    Args:
      exclude: task names to leave out.
      on_error: "stop" or "skip" malformed rows of the data folder.

    Raises:
      ValueError: an unknown mixture or task, or a held-out task.
      FileNotFoundError: no data folder.
    """
    if isinstance(mixture, Mapping):
        return _custom(mixture, data_dir, on_error)
    if mixture == "builtin":
        return _builtin(exclude)
    if mixture != "flan2022":
        raise unknown("mixture", mixture, NAMES)
    groups = _flan_groups(Mirror(data_dir, on_error))
    _check_known(exclude, (task.name for tasks in groups.values() for task in tasks))
    groups = {part: [t for t in tasks if t.name not in exclude] for part, tasks in groups.items()}
    return _proportional("flan2022", {part: tasks for part, tasks in groups.items() if tasks})


def _flan_groups(mirror: Mirror) -> dict[str, list[Task]]:
    """What the data folder has of each sub-mixture."""
    questions = [
        mirror.choices(name, f"mc/{name}", "question answering")
        for name in ("arc_easy", "arc_challenge", "openbookqa", "boolq")
    ]
    groups = {
        "flan2021": [*questions, mirror.arithmetic("gsm8k"), mirror.strategyqa()],
        "niv2": mirror.niv2("train") if (mirror.root / "niv2").is_dir() else [],
        "cot": mirror.cot() if (mirror.root / "cot").is_dir() else [],
        "dialog": [mirror.dolly()],
    }
    groups = {part: [task for task in tasks if task] for part, tasks in groups.items()}
    if not any(groups.values()):
        raise FileNotFoundError(f"{mirror.root} holds no instruction data (niv2/, cot/, mc/, ..)")
    return groups


def _proportional(name: str, groups: Mapping[str, Sequence[Task]]) -> Mixture:
    tasks, weights, formats, parts = [], [], [], []
    for part, members in groups.items():
        sub = FLAN2022[part]
        capped = [min(sub.cap, task.train_size) for task in members]
        for task, size in zip(members, capped, strict=True):
            tasks.append(task)
            weights.append(sub.share * size / sum(capped))
            formats.append(sub.formats)
            parts.append(part)
    return Mixture(name, tuple(tasks), tuple(weights), tuple(formats), tuple(parts))


def _builtin(exclude: Sequence[str]) -> Mixture:
    from moekit.data.builtin import builtin_tasks

    known = builtin_tasks()
    _check_known(exclude, known)
    tasks = tuple(t for t in known.values() if not t.held_out and t.name not in exclude)
    weights = tuple(float(task.train_size) for task in tasks)
    parts = tuple("builtin" for _ in tasks)
    return Mixture("builtin", tasks, weights, (BUILTIN_FORMATS,) * len(tasks), parts)


def _check_known(names: Sequence[str], known) -> None:
    known = set(known)
    for name in names:
        if name not in known:
            raise unknown("task", name, known)


def _custom(rates: Mapping[str, float], data_dir, on_error: str) -> Mixture:
    from moekit.data.builtin import builtin_tasks

    known = {name: (task, BUILTIN_FORMATS, "builtin") for name, task in builtin_tasks().items()}
    elsewhere = data_dir or os.environ.get("MOEKIT_DATA")
    if elsewhere and not set(rates) <= set(known):
        for part, task in _flat(_flan_groups(Mirror(data_dir, on_error))):
            known[task.name] = (task, FLAN2022[part].formats, part)
    _check_known(list(rates), known)
    for name in rates:
        if known[name][0].held_out:
            raise ValueError(f"task {name} is held out for evaluation and never trained on")
    tasks, formats, parts = (
        zip(*(known[name] for name in rates), strict=True) if rates else ((),) * 3
    )
    return Mixture("custom", tasks, tuple(map(float, rates.values())), formats, parts)


def _flat(groups: Mapping[str, Sequence[Task]]) -> Iterator[tuple[str, Task]]:
    for part, tasks in groups.items():
        for task in tasks:
            yield part, task
