"""The embedded default: text and tasks that need neither network nor files.

Held out whole are "description matching", "text selection" and "cloze", where what the held-in
tasks teach (find in the text what the question is about) can help a tiny model, and "state
tracking", where it should stay at chance. Every object falls into one split by the hash of its
text.
"""

import http
import re
import unicodedata
import zoneinfo
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from moekit.data.builtin import generators as g
from moekit.data.builtin.entries import Entry, entries, split_of
from moekit.data.span_corruption import Corpus, Document
from moekit.data.tasks import WORDINGS, Example, Task, Template, stable_random, templates

SIZE = 1500  # objects of a real task before they are split
GENERATED = 5000  # of a generated one: fewer are learned by heart in the tour
ASKED = 250  # questions of a generated task in "valid" and "test" each
MIN_TEXT = 160  # characters of a document

HELD_OUT = ("description matching", "text selection", "cloze", "state tracking")
_INVERTED = templates("builtin", target="{x}")
Objects = list[tuple[str, Example]]  # with the key whose hash decides the split


def _example(name: str, key: str, fields: dict, answer: str, wrong: Sequence[str], **kw) -> Example:
    options = [answer, *wrong]
    stable_random(name, key, "options").shuffle(options)
    return Example(f"{name}/{key}", fields, answer, options=tuple(options), **kw)


def _generated(name: str, make: Callable) -> Objects:
    objects = {}
    for i in range(GENERATED):
        fields, answer, wrong, rationale = make(stable_random(name, i))
        key = " ".join(fields.values())
        objects[key] = _example(
            name, key, fields, answer, wrong, rationale=rationale, domain="generated"
        )
    return list(objects.items())


def _choices(name: str, pairs: Sequence[tuple[str, str, str, str]], wrong: int = 3) -> Objects:
    """Pairs (key, question, answer, domain); wrong options are other answers of the same split.

    Of equal questions only the first is kept, or one could be in two splits.
    """
    first: dict[str, tuple] = {}
    for pair in pairs:
        first.setdefault(pair[1], pair)
    pairs = list(first.values())
    by_split: dict[str, list[str]] = {}
    for key, _, answer, _ in pairs:
        by_split.setdefault(split_of(key), []).append(answer)
    pools = {split: sorted(set(answers)) for split, answers in by_split.items()}
    objects = []
    for key, question, answer, domain in pairs:
        others = [a for a in pools[split_of(key)] if a != answer]
        if len(others) >= wrong:
            rng, fields = stable_random(name, question), {"x": question}
            drawn = rng.sample(others, min(len(others), 4 * wrong))
            apart = [a for a in drawn if a not in question and question not in a][:wrong]
            if len(apart) == wrong:
                objects.append(
                    (key, _example(name, question, fields, answer, apart, domain=domain))
                )
    return objects


def _documented(kind: str, low: int = 20, high: int = 100) -> list[Entry]:
    """Objects of a kind with a short summary that does not give the name away whole."""
    found, names = [], set()
    for entry in entries():
        fits = low <= len(entry.summary) <= high and 3 < len(entry.name) <= 24
        given = entry.name.lower() in entry.summary.lower()
        if entry.kind == kind and fits and not given and entry.name not in names:
            names.add(entry.name)
            found.append(entry)
    return sorted(found, key=lambda e: stable_random(e.text).random())[:SIZE]


def _by_summary(kind: str) -> Callable[[str], Objects]:
    def make(name: str) -> Objects:
        return _choices(name, [(e.text, e.summary, e.name, e.domain) for e in _documented(kind)])

    return make


def _module_names(name: str) -> Objects:
    modules = [e for e in entries() if e.kind == "module" and 15 <= len(e.summary) <= 100]
    return _choices(name, [(e.text, e.summary, e.name, e.domain) for e in modules[:SIZE]])


def _topic_titles(name: str) -> Objects:
    """Paragraphs fall where their topic does; those of several topics are left out."""
    topics = [entry for entry in entries() if entry.kind == "topic"]
    paragraphs = [[" ".join(p.split())[:120] for p in e.text.split("\n\n")] for e in topics]
    count = Counter(text for texts in paragraphs for text in set(texts))
    pairs = []
    for entry, texts in zip(topics, paragraphs, strict=True):
        own = [text for text in texts if len(text) >= 40 and count[text] == 1]
        for text in own[:10]:  # alike for all, or a few long topics would dominate
            pairs.append((entry.text, text, entry.name[:40], entry.domain))
    return _choices(name, pairs)


def _sentences(name: str) -> Objects:
    """A rare word of a summary asks for the summary, among others that do not have it."""
    pairs = []
    for entry in _documented("function", 30, 90):
        words = re.findall(r"\b[a-z]{5,}\b", entry.summary)
        if words:
            pairs.append((entry.text, max(words, key=len), entry.summary, entry.domain))
    count = Counter(pair[1] for pair in pairs)
    return _choices(name, [pair for pair in pairs if count[pair[1]] == 1])


def _text_words(name: str) -> Objects:
    """A word of a summary; the others are words of other summaries."""
    pairs = []
    for entry in entries():
        words = re.findall(r"\b[a-z]{4,}\b", entry.summary[:150])
        if len(words) > 2:
            word = stable_random(name, entry.text).choice(words)
            pairs.append((entry.text, entry.summary[:150], word, entry.domain))
    pairs.sort(key=lambda pair: stable_random(pair[0]).random())
    return _choices(name, pairs[:GENERATED])


def _gaps(name: str) -> Objects:
    """A word that a text says twice, hidden the second time; the others do not occur in it."""
    pairs = []
    for entry in entries():
        text = " ".join(entry.text.split())[:200]
        words = re.findall(r"\b[a-z]{5,}\b", text)
        again = [w for w in dict.fromkeys(words) if words.count(w) == 2]
        if entry.kind in ("function", "class") and again:
            word = again[0]
            at = text.index(word, text.index(word) + len(word))
            hidden = f"{text[:at]}___{text[at + len(word) :]}".rpartition(" ")[0]
            pairs.append((entry.text, hidden, word, entry.domain))
    pairs.sort(key=lambda pair: stable_random(pair[0]).random())
    return _choices(name, pairs[:SIZE])


def _owners(name: str) -> Objects:
    packages: dict[str, list[Entry]] = {}
    for entry in entries():
        if entry.kind == "function" and len(entry.name) > 5:
            packages.setdefault(entry.domain, []).append(entry)
    pairs = [
        (entry.text, entry.name, package, package)
        for package, members in sorted(packages.items())
        for entry in members[: SIZE // 5]  # alike for all, so that no answer is the common one
    ]
    return _choices(name, pairs)


def _statuses(name: str) -> Objects:
    return _choices(name, [(str(s.value), str(s.value), s.phrase, "http") for s in http.HTTPStatus])


def _characters(name: str) -> Objects:
    pairs = []
    for code in (*range(0x21, 0x250), *range(0x370, 0x530), *range(0x2190, 0x2300)):
        title = unicodedata.name(chr(code), "")
        visible = unicodedata.category(chr(code))[0] in "LSP"
        if title and visible and len(title) < 60:
            pairs.append((title, title.lower(), chr(code), "unicode"))
    return _choices(name, pairs)


def _zones(name: str) -> Objects:
    regions = ("Africa", "America", "Asia", "Australia", "Europe", "Pacific")
    pairs = []
    for zone in sorted(zoneinfo.available_timezones()):
        region, _, place = zone.partition("/")
        if region in regions and place and "/" not in place:
            pairs.append((zone, place.replace("_", " "), region, "zones"))
    return _choices(name, pairs)


_REAL: dict[str, Callable[[str], Objects]] = {
    "topic_title": _topic_titles,
    "module_name": _module_names,
    "owner_package": _owners,
    "http_status": _statuses,
    "unicode_name": _characters,
    "zone_region": _zones,
    "function_name": _by_summary("function"),
    "class_name": _by_summary("class"),
    "text_word": _text_words,
    "sentence_with": _sentences,
    "gap_word": _gaps,
}


@lru_cache(maxsize=64)
def _objects(name: str) -> tuple[tuple[str, Example], ...]:
    make = _REAL.get(name)
    return tuple(make(name) if make else _generated(name, getattr(g, name)))


def _load(name: str, split: str) -> list[Example]:
    part, generated = split, name not in _REAL
    if generated and WORDINGS["builtin"][name]["cluster"] in HELD_OUT:
        # never trained on: few exemplars and many questions, so the two parts swap roles
        part = {"train": "test", "test": "train"}.get(split, split)
    found = [example for key, example in _objects(name) if split_of(key) == part]
    return found[:ASKED] if generated and split != "train" else found


@lru_cache(maxsize=1)
def builtin_tasks() -> dict[str, Task]:
    """All embedded tasks by name; `task.held_out` tells which clusters are never trained on."""
    tasks = {}
    for name, asked in WORDINGS["builtin"].items():
        cluster, generated = asked["cluster"], name not in _REAL
        tasks[name] = Task(
            name,
            cluster,
            lambda split, name=name: _load(name, split),
            tuple(map(Template, asked["wordings"])),
            inverted=_INVERTED if generated else (),
            held_out=cluster in HELD_OUT,
        )
    return tasks


def _documents(split: str) -> list[Document]:
    return [
        Document(entry.text, f"{entry.module}.{entry.name}", entry.domain)
        for entry in entries()
        if entry.split == split and len(entry.text) >= MIN_TEXT
    ]


@lru_cache(maxsize=1)
def builtin_corpus() -> Corpus:
    """The embedded text; its domains are the packages and the language reference."""
    return Corpus("builtin", _documents)
