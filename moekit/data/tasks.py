"""Tasks in FLAN's form: examples, ten templates, options, exemplars, rationales, inversion."""

import hashlib
import random
import string
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

from moekit.errors import unknown

METRICS = ("accuracy", "exact_match", "rouge_l")
LETTERS = string.ascii_uppercase
TEMPLATES = tomllib.loads(files("moekit.data").joinpath("templates.toml").read_text("utf-8"))


class OptionStyle(NamedTuple):
    """How options are listed; where each has a letter, the letter is the answer (FLAN v2)."""

    header: str
    line: str
    lettered: bool


OPTION_STYLES = (
    OptionStyle("\nOptions:\n", "- {text}", False),
    OptionStyle("\nChoose from:\n", "* {text}", False),
    OptionStyle("\nPossible answers:\n", "{text}", False),
    OptionStyle("\nOPTIONS:\n", "({letter}) {text}", True),
    OptionStyle("\nPick one:\n", "{letter}. {text}", True),
)
REASONING_CUES = (
    "Let's think step by step.",
    "Give the reasoning before the answer.",
    "Reason first, then answer.",
    "Explain how you get there, then answer.",
)


@dataclass(frozen=True)
class Example:
    """One example of a task. `references` are further accepted answers beside `answer`.

    Raises:
      ValueError: the answer is empty or not an option, there are too many options, or a text is
        missing (None, NaN or another value that is not a string).
    """

    id: str
    fields: Mapping[str, str]
    answer: str
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    rationale: str = ""
    domain: str = ""

    def __post_init__(self) -> None:
        self._check_texts()
        if self.options and self.answer not in self.options:
            raise ValueError(f"example {self.id}: answer {self.answer!r} is not an option")
        if not self.answer.strip():
            raise ValueError(f"example {self.id}: the answer is empty")
        if len(self.options) > len(LETTERS):
            raise ValueError(f"example {self.id}: more than {len(LETTERS)} options")

    def _check_texts(self) -> None:
        texts = [self.answer, self.rationale, *self.options, *self.references]
        texts += self.fields.values()
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(
                    f"example {self.id}: {text!r} is not a text; fields, answer, references, "
                    "options and rationale must be strings"
                )

    @property
    def question(self) -> str:
        """All fields without case and whitespace: equal for examples that ask the same."""
        return _plain("\x1f".join(self.fields[name] for name in sorted(self.fields)))


def _plain(text: str) -> str:
    """A text without case and whitespace, in Unicode's compatibility form."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def same_question(first: Example, second: Example) -> bool:
    """Whether two examples ask the same, whatever their ids.

    With options, the same words ("Which of these is true?") can ask for different things: then the
    options or the answers are equal as well.
    """
    if _begin_differently(first, second) or first.question != second.question:
        return False
    if not first.options or not second.options:
        return True
    return first.answer == second.answer or set(first.options) == set(second.options)


def _begin_differently(first: Example, second: Example) -> bool:
    """Whether a field of two examples differs within its first characters.

    Most pairs do, and this is much faster than to compare long questions. The end of an excerpt may
    change when what follows is normalized with it, so only the first part of a long one counts.
    """
    for name, text in first.fields.items():
        excerpt, other = _plain(text[:80]), _plain(second.fields.get(name, "")[:80])
        if min(len(excerpt), len(other)) >= 40 and excerpt[:20] != other[:20]:
            return True
    return False


@dataclass(frozen=True)
class Template:
    """Instruction and target with {field} placeholders; {answer} is always available."""

    prompt: str
    target: str = "{answer}"

    def check(self) -> None:
        """Raise a ValueError if a placeholder is not a plain {field}."""
        for text in (self.prompt, self.target):
            try:
                pieces = list(string.Formatter().parse(text))
            except ValueError as error:
                raise ValueError(_template_problem(text, str(error))) from None
            for _, name, format_spec, conversion in pieces:
                if name is None:
                    continue
                plain = name.strip() and not name[0].isdigit() and not set(name) & set(".[]{}")
                if not plain or format_spec or conversion:
                    raise ValueError(_template_problem(text, "a placeholder must be a field name"))


def _template_problem(text: str, problem: str) -> str:
    return f"template {text!r}: {problem}; write {{field}}, and {{{{ or }}}} for a literal brace"


def templates(family: str, target: str | None = None) -> tuple[Template, ...]:
    """The templates of a family of tasks.

    With a target these are its inverted templates, which show the answer and request the target.
    """
    if target is None:
        return tuple(Template(text) for text in TEMPLATES["family"][family])
    return tuple(Template(text, target) for text in TEMPLATES["inverted"][family])


@dataclass(frozen=True)
class Task:
    """A named set of examples with its templates.

    Args:
      load: examples of a split ("train", "valid" or "test"), called once for each split.
      templates: ten templates of the instruction.
      inverted: templates that show the answer and request the question.
      metric: "accuracy" for tasks with options, else "exact_match" or "rouge_l".
      splits: the splits that `examples` accepts.
      origin: returns a digest of the files that contain the examples.
      held_out: kept out of every training mixture.
      size: number of training examples, where it is known without loading them.
      published_prompt: a benchmark's published prompt instead of the templates: returns the input
        text of an example, its exemplars, and whether to reason first.
      sources: names of the data sets that it was made from, for decontamination.

    Raises:
      ValueError: an unknown metric, no templates, or a template that cannot be filled in.
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
    size: int | None = None
    published_prompt: Callable[[Example, Sequence[Example], bool], str] | None = field(
        default=None, repr=False
    )
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise unknown("metric", self.metric, METRICS)
        if not self.templates:
            raise ValueError(f"task {self.name} has no templates")
        for template in (*self.templates, *self.inverted):
            try:
                template.check()
            except ValueError as error:
                raise ValueError(f"task {self.name}, {error}") from None

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
    examples = task.load(split)
    # a list is copied; other sequences read rows from files when they are needed
    return tuple(examples) if isinstance(examples, list) else examples


def content_digest(task: Task) -> str:
    """Digest of a task's training examples: of their files, else of the examples themselves."""
    if task.origin:
        return task.origin()
    sha = hashlib.sha256()
    for example in task.examples("train"):
        sha.update(repr((example.id, example.fields, example.answer)).encode())
    return sha.hexdigest()[:12]


def stable_random(*parts: object) -> random.Random:
    """A random generator that depends only on the parts, in every process."""
    key = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(key[:8], "big"))


def choose_exemplars(
    task: Task,
    example: Example,
    num_shots: int,
    rng: random.Random,
    *,
    chain_of_thought: bool = False,
) -> list[Example]:
    """Solved exemplars from a task's "train" split for an example of any split.

    No exemplar has the example's own question, whatever its id, and no question comes twice. If
    the split has no more than `num_shots` such examples, all are returned in their order, as for
    a benchmark's published list; so there can be fewer than `num_shots`.

    Args:
      chain_of_thought: take exemplars with a rationale, if there are any.

    Raises:
      ValueError: the task has no "train" split.
    """
    if "train" not in task.splits:
        raise ValueError(f"task {task.name} has no exemplars (no train split): use shots=0")
    pool = task.examples("train")
    chosen: dict[int, Example] = {}
    if chain_of_thought:
        chosen = _draw_distinct(pool, example, num_shots + 1, rng, with_rationale=True)
    if not chosen:
        chosen = _draw_distinct(pool, example, num_shots + 1, rng, with_rationale=False)
    if len(chosen) <= num_shots:
        return [chosen[index] for index in sorted(chosen)]
    return list(chosen.values())[:num_shots]


def _draw_distinct(
    pool: Sequence[Example],
    example: Example,
    count: int,
    rng: random.Random,
    *,
    with_rationale: bool,
) -> dict[int, Example]:
    """Up to `count` examples with different questions, by index, in the order drawn."""
    chosen: dict[int, Example] = {}
    for index in _random_order(len(pool), rng):
        candidate = pool[index]
        if with_rationale and not candidate.rationale:
            continue
        if any(same_question(candidate, other) for other in (example, *chosen.values())):
            continue
        chosen[index] = candidate
        if len(chosen) == count:
            break
    return chosen


def _random_order(size: int, rng: random.Random) -> Iterator[int]:
    """The numbers below `size` in random order, drawn one by one (Fisher-Yates)."""
    moved: dict[int, int] = {}
    for last in reversed(range(size)):
        place = rng.randint(0, last)
        yield moved.get(place, place)
        moved[place] = moved.get(last, last)


@dataclass(frozen=True)
class Prompt:
    """An example as text: the model's input and its target."""

    input: str
    target: str
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # as the model should generate them
    task: str = ""
    cluster: str = ""
    domain: str = ""
    id: str = ""
    shots: int = 0


class _Rendered(NamedTuple):
    """An example in a template."""

    text: str
    target: str
    options: tuple[str, ...]  # as the model should generate them; empty if they are not shown


def format_prompt(
    task: Task,
    example: Example,
    *,
    template: int = 0,
    shots: Sequence[Example] = (),
    options: bool = True,
    chain_of_thought: bool = False,
    inverted: bool = False,
    option_style: int = 0,
) -> Prompt:
    """An example as a prompt in FLAN's form.

    Args:
      template: index of the template (modulo their number).
      shots: solved exemplars, shown first in the same template.
      options: list the example's options after the question.
      chain_of_thought: the target is "<rationale> The answer is <answer>.".
      inverted: the prompt gives the answer and the target is the question.
      option_style: index of the style in which options are listed (modulo their number).

    Raises:
      ValueError: the template names a field that the example does not have, or the task has no
        inverted templates.
    """
    if task.published_prompt:
        text = task.published_prompt(example, shots, chain_of_thought)
        rendered = _Rendered(text, example.answer, ())
    else:

        def render(shown: Example) -> _Rendered:
            style = OPTION_STYLES[option_style % len(OPTION_STYLES)] if options else None
            return _render(task, shown, template, style, chain_of_thought, inverted)

        exemplars = [render(shot) for shot in shots]
        rendered = render(example)
        blocks = [f"{exemplar.text}\n{exemplar.target}\n\n" for exemplar in exemplars]
        text = "".join([*blocks, rendered.text])
    without_options = chain_of_thought or inverted
    return Prompt(
        input=text,
        target=rendered.target,
        references=_references(example, rendered, chain_of_thought, inverted),
        options=() if without_options else rendered.options or example.options,
        task=task.name,
        cluster=task.cluster,
        domain=example.domain,
        id=example.id,
        shots=len(shots),
    )


def _references(
    example: Example, rendered: _Rendered, chain_of_thought: bool, inverted: bool
) -> tuple[str, ...]:
    """All accepted answers to a prompt."""
    if chain_of_thought:
        return (example.answer, *example.references)
    lettered = rendered.options and rendered.options[0] not in example.options
    if lettered or inverted:
        return (rendered.target,)
    others = [text for text in example.references if text != rendered.target]
    return (rendered.target, *others)


def _render(
    task: Task,
    example: Example,
    template: int,
    option_style: OptionStyle | None,
    chain_of_thought: bool,
    inverted: bool,
) -> _Rendered:
    """An example without exemplars; no option style: options are not shown."""
    choices = task.inverted if inverted else task.templates
    if not choices:
        raise ValueError(f"task {task.name} has no inverted templates")
    text, target = _fill_in(task, example, choices[template % len(choices)])
    if inverted:
        return _Rendered(text, target, ())
    shown: tuple[str, ...] = ()
    if option_style and example.options:
        listing, shown = _list_options(example.options, option_style)
        text += listing
        if option_style.lettered:
            target = shown[example.options.index(example.answer)]
    if chain_of_thought:
        text += "\n" + REASONING_CUES[template % len(REASONING_CUES)]
        target = f"{example.rationale} The answer is {target}.".strip()
    return _Rendered(text, target, shown)


def _fill_in(task: Task, example: Example, template: Template) -> tuple[str, str]:
    """Prompt and target of a template."""
    values = {**example.fields, "answer": example.answer}
    try:
        return template.prompt.format_map(values), template.target.format_map(values)
    except KeyError as error:
        raise ValueError(
            f"task {task.name}, example {example.id}: template {template.prompt!r} needs the field "
            f"{error.args[0]!r}; the example has {sorted(values)}"
        ) from None


def _list_options(options: tuple[str, ...], style: OptionStyle) -> tuple[str, tuple[str, ...]]:
    """The text that lists options, and the options as the model should generate them."""
    letters = LETTERS[: len(options)]
    lines = []
    for letter, option in zip(letters, options, strict=True):
        lines.append(style.line.format(letter=letter, text=option))
    listing = style.header + "\n".join(lines)
    if style.lettered:
        return listing, tuple(f"({letter})" for letter in letters)
    return listing, options
