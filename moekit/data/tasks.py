"""Tasks as FLAN makes them: examples, ten templates, options, exemplars, rationales, inversion."""

import hashlib
import random
import string
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files

from moekit.errors import unknown

METRICS = ("accuracy", "exact_match", "rouge_l")
LETTERS = string.ascii_uppercase
WORDINGS = tomllib.loads(files("moekit.data").joinpath("templates.toml").read_text("utf-8"))
# How options may be shown; where each is lettered, the letter is the answer (FLAN v2).
OPTION_STYLES: tuple[tuple[str, str, bool], ...] = (
    ("\nOptions:\n", "- {text}", False),
    ("\nChoose from:\n", "* {text}", False),
    ("\nPossible answers:\n", "{text}", False),
    ("\nOPTIONS:\n", "({letter}) {text}", True),
    ("\nPick one:\n", "{letter}. {text}", True),
)
COT_CUES = (
    "Let's think step by step.",
    "Give the reasoning before the answer.",
    "Reason first, then answer.",
    "Explain how you get there, then answer.",
)


@dataclass(frozen=True)
class Example:
    """One object of a task. `references` are further accepted answers beside `answer`."""

    id: str
    fields: Mapping[str, str]
    answer: str
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    rationale: str = ""
    domain: str = ""

    def __post_init__(self):
        if self.options and self.answer not in self.options:
            raise ValueError(f"example {self.id}: answer {self.answer!r} is not an option")
        if not self.answer.strip():
            raise ValueError(f"example {self.id}: the answer is empty")
        if len(self.options) > len(LETTERS):
            raise ValueError(f"example {self.id}: more than {len(LETTERS)} options")


@dataclass(frozen=True)
class Template:
    """Instruction and target with {field} places; {answer} is always there."""

    prompt: str
    target: str = "{answer}"


def templates(family: str, target: str | None = None) -> tuple[Template, ...]:
    """The wordings of a family of tasks; with a target, those that show the answer and ask for
    that instead."""
    if target is None:
        return tuple(map(Template, WORDINGS["family"][family]))
    return tuple(Template(text, target) for text in WORDINGS["inverted"][family])


@dataclass(frozen=True)
class Task:
    """A named set of examples with its wordings.

    Args:
      load: examples of a split ("train", "valid" or "test"), called once per split.
      templates: ten wordings of the instruction.
      inverted: wordings that show the answer and ask for the question.
      metric: "accuracy" for tasks with options, else "exact_match" or "rouge_l".
      splits: what `examples` can be asked for.
      origin: gives a digest of the files that the examples come from.
      held_out: kept out of every training mixture.
      ask: a benchmark's published prompt instead of the templates: the input text of an example,
        its exemplars, and whether to reason first.
      sources: names of the data sets that it was made from, for decontamination.
    """

    name: str
    cluster: str
    load: Callable[[str], Sequence[Example]] = field(repr=False)
    templates: tuple[Template, ...] = field(repr=False)
    inverted: tuple[Template, ...] = field(default=(), repr=False)
    metric: str = "accuracy"
    splits: tuple[str, ...] = ("train", "valid", "test")
    origin: Callable[[], str] | None = field(default=None, repr=False, compare=False)
    held_out: bool = False
    size: int | None = None  # training examples, where known without loading them
    ask: Callable[["Example", Sequence["Example"], bool], str] | None = field(
        default=None, repr=False
    )
    sources: tuple[str, ...] = ()

    def __post_init__(self):
        if self.metric not in METRICS:
            raise unknown("metric", self.metric, METRICS)
        if not self.templates:
            raise ValueError(f"task {self.name} has no templates")

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of a split, kept after the first call.

        Raises:
          ValueError: the task has no such split.
        """
        if split not in self.splits:
            raise ValueError(f"task {self.name} has no split {split!r}; it has {self.splits}")
        return _examples(self, split)

    @property
    def train_size(self) -> int:
        return self.size if self.size is not None else len(self.examples("train"))


@lru_cache(maxsize=4096)
def _examples(task: Task, split: str) -> Sequence[Example]:
    found = task.load(split)
    return tuple(found) if isinstance(found, list) else found  # or rows that stay on disk


def content_digest(task: Task) -> str:
    """What names the training examples of a task: its files, else its examples themselves."""
    if task.origin:
        return task.origin()
    sha = hashlib.sha256()
    for example in task.examples("train"):
        sha.update(repr((example.id, example.fields, example.answer)).encode())
    return sha.hexdigest()[:12]


@dataclass(frozen=True)
class Prompt:
    """An example as text: what the model reads and what it should say."""

    input: str
    target: str
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # as the model should say them
    task: str = ""
    cluster: str = ""
    domain: str = ""
    id: str = ""
    shots: int = 0


def stable_random(*parts: object) -> random.Random:
    """A random generator that depends on nothing but the parts, in every process."""
    key = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(key[:8], "big"))


def format_prompt(
    task: Task,
    example: Example,
    *,
    template: int = 0,
    shots: Sequence[Example] = (),
    options: bool = True,
    chain_of_thought: bool = False,
    inverted: bool = False,
    style: int = 0,
) -> Prompt:
    """An example in FLAN's anatomy.

    Args:
      template: which wording (modulo their number); `style` which way to show options.
      shots: solved exemplars, shown first in the same wording.
      options: list the example's options after the question.
      chain_of_thought: the target is "<rationale> The answer is <answer>.".
      inverted: the answer is given and the question asked for.

    Raises:
      ValueError: the template names a field that the example does not have, or the task has no
        inverted templates.
    """
    kind = {"options": options, "cot": chain_of_thought, "inverted": inverted, "style": style}
    said: tuple[str, ...] = ()
    if task.ask:
        text, target = task.ask(example, shots, chain_of_thought), example.answer
    else:
        wordings = task.inverted if inverted else task.templates
        if not wordings:
            raise ValueError(f"task {task.name} has no inverted templates")
        wording, parts = wordings[template % len(wordings)], []
        for shot in shots:
            text, target, _ = _render(task, wording, shot, template, **kind)
            parts.append(f"{text}\n{target}\n\n")
        text, target, said = _render(task, wording, example, template, **kind)
        text = "".join([*parts, text])
    lettered = said and said[0] not in example.options
    answers = (target,) if lettered or inverted else ()
    references = answers or (target, *(r for r in example.references if r != target))
    if chain_of_thought:
        references = (example.answer, *example.references)
    return Prompt(
        input=text,
        target=target,
        references=references,
        options=() if chain_of_thought or inverted else said or example.options,
        task=task.name,
        cluster=task.cluster,
        domain=example.domain,
        id=example.id,
        shots=len(shots),
    )


def _render(task, wording, example, template, *, options, cot, inverted, style):
    """Input, target, and the options as the model should say them (if they are shown)."""
    values = {**example.fields, "answer": example.answer}
    try:
        text, target = wording.prompt.format(**values), wording.target.format(**values)
    except KeyError as error:
        raise ValueError(
            f"task {task.name}, example {example.id}: template {wording.prompt!r} needs the field "
            f"{error.args[0]!r}; the example has {sorted(values)}"
        ) from None
    if inverted:
        return text, target, ()
    said: tuple[str, ...] = ()
    if options and example.options:
        header, line, lettered = OPTION_STYLES[style % len(OPTION_STYLES)]
        letters = LETTERS[: len(example.options)]
        shown = [
            line.format(letter=letter, text=option)
            for letter, option in zip(letters, example.options, strict=True)
        ]
        text += header + "\n".join(shown)
        said = tuple(f"({each})" for each in letters) if lettered else example.options
        if lettered:
            target = said[example.options.index(example.answer)]
    if cot:
        text += "\n" + COT_CUES[template % len(COT_CUES)]
        target = f"{example.rationale} The answer is {target}.".strip()
    return text, target, said
