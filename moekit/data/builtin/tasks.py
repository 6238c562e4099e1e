"""The embedded default: text and tasks that need neither network nor files.

Four clusters are held out completely. In "description matching", "text selection" and "cloze", what
the held-in tasks teach (find in the text what the question is about) can help a tiny model; in
"state tracking" it should stay at chance. Every object falls into one split by the hash of its
text.
"""

import http
import re
import unicodedata
import zoneinfo
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import NamedTuple, SupportsIndex, overload

from moekit.data.builtin import generators
from moekit.data.builtin.entries import Entry, entries, sources_digest, split_of
from moekit.data.cache import cached_json
from moekit.data.tasks import TEMPLATES, Example, Task, Template, stable_random, templates
from moekit.data.text import Corpus, Document

SPLITS = ("train", "valid", "test")
MAX_OBJECTS = 1500  # of a task on real text, before they are split
NUM_GENERATED = 5000  # exercises of a generated task: with fewer, the tour's models memorize them
MAX_QUESTIONS = 250  # of a generated task in "valid" and "test" each
MIN_CHARACTERS = 160  # of a document

HELD_OUT = ("description matching", "text selection", "cloze", "state tracking")
INVERTED = templates("builtin", target="{x}")
KeyedExample = tuple[str, Example]  # the hash of the key determines the split


class Question(NamedTuple):
    """A question whose wrong options are answers of other questions."""

    key: str  # its hash determines the split
    text: str
    answer: str
    domain: str


@lru_cache(maxsize=1)
def builtin_corpus() -> Corpus:
    """The embedded text; its domains are the packages and the language reference."""
    return Corpus("builtin", _documents)


def _documents(split: str) -> list[Document]:
    documents = []
    for entry in entries():
        if entry.split == split and len(entry.text) >= MIN_CHARACTERS:
            title = f"{entry.module}.{entry.name}"
            document = Document(entry.text, title, entry.domain)
            documents.append(document)
    return documents


@lru_cache(maxsize=1)
def builtin_tasks() -> dict[str, Task]:
    """All embedded tasks by name; `task.held_out` marks those that are never trained on."""
    tasks = {}
    for name, description in TEMPLATES["builtin"].items():
        cluster = description["cluster"]
        task_templates = [Template(text) for text in description["templates"]]
        inverted = () if name in _REAL else INVERTED
        tasks[name] = Task(
            name=name,
            cluster=cluster,
            load=partial(_Examples, name),
            templates=tuple(task_templates),
            inverted=inverted,
            held_out=cluster in HELD_OUT,
        )
    return tasks


class _Examples(Sequence):
    """The examples of a split, read from the cache when the first of them is needed.

    A mixture of all tasks only needs their sizes, and a sample of it a few tasks.
    """

    def __init__(self, task: str, split: str):
        self._task, self._split = task, split

    def __len__(self) -> int:
        return _sizes()[self._task][self._split]

    @overload
    def __getitem__(self, index: SupportsIndex) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Example | tuple[Example, ...]:
        return _load(self._task, self._split)[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(_load(self._task, self._split))


@lru_cache(maxsize=1)
def _sizes() -> dict[str, dict[str, int]]:
    """The number of examples of every task and split."""
    return cached_json(f"builtin-{sources_digest()}/sizes", _count_all)


def _count_all() -> dict[str, dict[str, int]]:
    sizes = {}
    for name in TEMPLATES["builtin"]:
        by_split = _all_rows(name)
        sizes[name] = {split: len(rows) for split, rows in by_split.items()}
    return sizes


@lru_cache(maxsize=256)
def _load(name: str, split: str) -> tuple[Example, ...]:
    """The examples of a split: made once for each installation, then read from the cache."""
    rows = _all_rows(name)
    examples = []
    for identity, fields, answer, options, rationale, domain in rows[split]:
        example = Example(
            id=identity,
            fields=fields,
            answer=answer,
            options=tuple(options),
            rationale=rationale,
            domain=domain,
        )
        examples.append(example)
    return tuple(examples)


@lru_cache(maxsize=64)
def _all_rows(name: str) -> dict[str, list]:
    """The rows of every split of a task."""
    cache_key = f"builtin-{sources_digest()}/{name}"
    return cached_json(cache_key, partial(_make_rows, name))


def _make_rows(name: str) -> dict[str, list]:
    if name in _REAL:
        make_examples = _REAL[name]
        return _rows_by_split(make_examples(name))
    by_split = _rows_by_split(_generated(name))
    description = TEMPLATES["builtin"][name]
    if description["cluster"] in HELD_OUT:
        # never trained on: "train" needs only a few exemplars, "test" many questions
        by_split["train"], by_split["test"] = by_split["test"], by_split["train"]
    for split in ("valid", "test"):
        questions = by_split[split]
        by_split[split] = questions[:MAX_QUESTIONS]
    return by_split


def _rows_by_split(keyed_examples: list[KeyedExample]) -> dict[str, list]:
    by_split: dict[str, list] = {split: [] for split in SPLITS}
    for key, example in keyed_examples:
        split = split_of(key)
        by_split[split].append(_row(example))
    return by_split


def _row(example: Example) -> tuple:
    return (
        example.id,
        example.fields,
        example.answer,
        example.options,
        example.rationale,
        example.domain,
    )


def _example(
    name: str,
    key: str,
    fields: dict[str, str],
    answer: str,
    wrong: Sequence[str],
    domain: str,
    rationale: str = "",
) -> Example:
    options = [answer, *wrong]
    rng = stable_random(name, key, "options")
    rng.shuffle(options)
    return Example(
        id=f"{name}/{key}",
        fields=fields,
        answer=answer,
        options=tuple(options),
        rationale=rationale,
        domain=domain,
    )


def _generated(name: str) -> list[KeyedExample]:
    generate = getattr(generators, name)
    examples = {}
    for index in range(NUM_GENERATED):
        rng = stable_random(name, index)
        fields, answer, wrong, rationale = generate(rng)
        key = " ".join(fields.values())
        examples[key] = _example(name, key, fields, answer, wrong, "generated", rationale)
    return list(examples.items())


def _choices(
    name: str,
    questions: Iterable[Question],
    num_wrong: int = 3,
) -> list[KeyedExample]:
    """Multiple-choice examples; wrong options are other answers of the same split.

    Of equal questions only the first is kept, or one could be in two splits.
    """
    distinct: dict[str, Question] = {}
    for question in questions:
        distinct.setdefault(question.text, question)
    answers: dict[str, set[str]] = {split: set() for split in SPLITS}
    for question in distinct.values():
        split = split_of(question.key)
        answers[split].add(question.answer)
    pools = {split: sorted(found) for split, found in answers.items()}
    examples = []
    for question in distinct.values():
        split = split_of(question.key)
        pool = pools[split]
        wrong = _wrong_options(name, question, pool, num_wrong)
        if len(wrong) == num_wrong:
            key, text, answer, domain = question
            fields = {"x": text}
            example = _example(name, text, fields, answer, wrong, domain)
            examples.append((key, example))
    return examples


def _wrong_options(
    name: str,
    question: Question,
    pool: list[str],
    count: int,
) -> list[str]:
    """Random answers that neither contain the question nor are part of it."""
    others = [answer for answer in pool if answer != question.answer]
    if len(others) < count:
        return []
    rng = stable_random(name, question.text)
    num_drawn = min(len(others), 4 * count)
    wrong = []
    for answer in rng.sample(others, num_drawn):
        if answer not in question.text and question.text not in answer:
            wrong.append(answer)
    return wrong[:count]


def _summarized(kind: str, shortest: int = 20, longest: int = 100) -> list[Entry]:
    """Objects of a kind with a short summary that does not contain the name."""
    found: dict[str, Entry] = {}
    for entry in entries():
        name = entry.name
        summary = entry.summary
        if entry.kind != kind or not 3 < len(name) <= 24:
            continue
        fits = shortest <= len(summary) <= longest
        revealed = name.lower() in summary.lower()
        if fits and not revealed:
            found.setdefault(name, entry)
    mixed = sorted(found.values(), key=lambda entry: stable_random(entry.text).random())
    return mixed[:MAX_OBJECTS]


def _name_questions(found: list[Entry]) -> list[Question]:
    """Which name belongs to a summary."""
    questions = []
    for entry in found:
        question = Question(entry.text, entry.summary, entry.name, entry.domain)
        questions.append(question)
    return questions


def _function_names(name: str) -> list[KeyedExample]:
    functions = _summarized("function")
    return _choices(name, _name_questions(functions))


def _class_names(name: str) -> list[KeyedExample]:
    classes = _summarized("class")
    return _choices(name, _name_questions(classes))


def _module_names(name: str) -> list[KeyedExample]:
    modules = []
    for entry in entries():
        if entry.kind == "module" and 15 <= len(entry.summary) <= 100:
            modules.append(entry)
    questions = _name_questions(modules[:MAX_OBJECTS])
    return _choices(name, questions)


def _topic_titles(name: str) -> list[KeyedExample]:
    """Paragraphs of the language reference and their topic.

    A paragraph is in its topic's split; those of several topics are left out.
    """
    paragraphs: list[tuple[Entry, list[str]]] = []
    topics_of_text: Counter[str] = Counter()
    for entry in entries():
        if entry.kind == "topic":
            texts = []
            for paragraph in entry.text.split("\n\n"):
                text = " ".join(paragraph.split())
                texts.append(text[:120])
            paragraphs.append((entry, texts))
            topics_of_text.update(set(texts))
    questions = []
    for entry, texts in paragraphs:
        title = entry.name[:40]
        own = [text for text in texts if len(text) >= 40 and topics_of_text[text] == 1]
        for text in own[:10]:  # the same number for all, or a few long topics would dominate
            question = Question(entry.text, text, title, entry.domain)
            questions.append(question)
    return _choices(name, questions)


def _sentences(name: str) -> list[KeyedExample]:
    """Which summary contains a rare word; the wrong options do not contain it."""
    questions = []
    for entry in _summarized("function", 30, 90):
        words = re.findall(r"\b[a-z]{5,}\b", entry.summary)
        if words:
            longest_word = max(words, key=len)
            question = Question(entry.text, longest_word, entry.summary, entry.domain)
            questions.append(question)
    count = Counter(question.text for question in questions)
    rare = [question for question in questions if count[question.text] == 1]
    return _choices(name, rare)


def _text_words(name: str) -> list[KeyedExample]:
    """Which word occurs in a summary; the wrong options are words of other summaries."""
    questions = []
    for entry in entries():
        text = entry.summary[:150]
        words = re.findall(r"\b[a-z]{4,}\b", text)
        if len(words) > 2:
            rng = stable_random(name, entry.text)
            word = rng.choice(words)
            question = Question(entry.text, text, word, entry.domain)
            questions.append(question)
    mixed = _in_random_order(questions)
    return _choices(name, mixed[:NUM_GENERATED])


def _gaps(name: str) -> list[KeyedExample]:
    """Which word fills a gap: one that occurs before the gap, unlike the wrong options."""
    questions = []
    for entry in entries():
        full_text = " ".join(entry.text.split())
        text = full_text[:200]
        words = re.findall(r"\b[a-z]{5,}\b", text)
        repeated = [word for word in words if words.count(word) == 2]
        if entry.kind in ("function", "class") and repeated:
            word = repeated[0]
            first_end = text.index(word) + len(word)
            second_start = text.index(word, first_end)
            second_end = second_start + len(word)
            with_gap = f"{text[:second_start]}___{text[second_end:]}"
            whole_words, _, _ = with_gap.rpartition(" ")
            question = Question(entry.text, whole_words, word, entry.domain)
            questions.append(question)
    mixed = _in_random_order(questions)
    return _choices(name, mixed[:MAX_OBJECTS])


def _in_random_order(questions: list[Question]) -> list[Question]:
    return sorted(questions, key=lambda question: stable_random(question.key).random())


def _owners(name: str) -> list[KeyedExample]:
    """Which package a function belongs to."""
    packages: dict[str, list[Entry]] = {}
    for entry in entries():
        if entry.kind == "function" and len(entry.name) > 5:
            packages.setdefault(entry.domain, []).append(entry)
    questions = []
    for package, functions in sorted(packages.items()):
        # the same number for all, so that no answer is the most frequent one
        for entry in functions[: MAX_OBJECTS // 5]:
            question = Question(entry.text, entry.name, package, package)
            questions.append(question)
    return _choices(name, questions)


def _statuses(name: str) -> list[KeyedExample]:
    questions = []
    for status in http.HTTPStatus:
        code = str(status.value)
        question = Question(code, code, status.phrase, "http")
        questions.append(question)
    return _choices(name, questions)


def _characters(name: str) -> list[KeyedExample]:
    questions = []
    latin = range(0x21, 0x250)
    greek_and_cyrillic = range(0x370, 0x530)
    arrows_and_operators = range(0x2190, 0x2300)
    for code in chain(latin, greek_and_cyrillic, arrows_and_operators):
        character = chr(code)
        title = unicodedata.name(character, "")
        category = unicodedata.category(character)
        visible = category[0] in "LSP"  # letters, symbols, punctuation
        if title and visible and len(title) < 60:
            question = Question(title, title.lower(), character, "unicode")
            questions.append(question)
    return _choices(name, questions)


def _zones(name: str) -> list[KeyedExample]:
    regions = ("Africa", "America", "Asia", "Australia", "Europe", "Pacific")
    questions = []
    for zone in sorted(zoneinfo.available_timezones()):
        region, _, place = zone.partition("/")
        if region in regions and place and "/" not in place:
            city = place.replace("_", " ")
            question = Question(zone, city, region, "zones")
            questions.append(question)
    return _choices(name, questions)


_REAL: dict[str, Callable[[str], list[KeyedExample]]] = {
    "topic_title": _topic_titles,
    "module_name": _module_names,
    "owner_package": _owners,
    "http_status": _statuses,
    "unicode_name": _characters,
    "zone_region": _zones,
    "function_name": _function_names,
    "class_name": _class_names,
    "text_word": _text_words,
    "sentence_with": _sentences,
    "gap_word": _gaps,
}
