"""Text corpora and T5's span corruption: hide spans of the input, predict them (Raffel 2020)."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from jaxtyping import Int

from moekit.data.batch import shuffled
from moekit.data.tokenizer import EOS, NUM_SENTINELS, Tokenizer

RATE, MEAN_SPAN = 0.15, 3.0


@dataclass(frozen=True)
class Document:
    """A text with its origin; `domain` labels what it is about or where it is from."""

    text: str
    title: str = ""
    domain: str = ""

    def __post_init__(self):
        if not self.text.strip():
            raise ValueError(f"document {self.title!r} of domain {self.domain!r} is empty")


@dataclass(frozen=True)
class Corpus:
    """Documents in splits "train" and "valid"; `load(split)` is called once and kept."""

    name: str
    load: Callable[[str], Sequence[Document]]

    def documents(self, split: str = "train") -> Sequence[Document]:
        """The documents of a split; ValueError if there are none."""
        return _documents(self, split)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(sorted({d.domain for d in self.documents("train")}))

    def labels(self, split: str) -> tuple[tuple[str, str], ...]:
        """(domain, corpus) of each domain of a split, for statistics."""
        domains = {d.domain for d in self.documents(split)}
        return tuple((domain, self.name) for domain in sorted(domains))

    def digest(self) -> str:
        """Twelve hexadecimal digits that name the training text."""
        sha = hashlib.sha256()
        for document in self.documents("train"):
            sha.update(document.text.encode())
        return sha.hexdigest()[:12]

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
        """Corrupted chunks as a grain dataset of {"inputs", "targets"}, end of sequence included,
        with "task", the number of the domain's label, and "lost", which is 0: nothing is cut.

        Every document is cut into chunks whose corrupted inputs just fill input_length. Spans are
        drawn anew in each epoch.
        """
        import grain

        chunks = _chunks(self, split, tokenizer, chunk_length(input_length, target_length))

        def corrupt(i: int, rng: np.random.Generator) -> dict:
            tokens, domain = chunks[i]
            inputs, targets = span_corruption(tokens, rng, tokenizer=tokenizer)
            end = np.int32(EOS)
            pair = {"inputs": np.append(inputs, end), "targets": np.append(targets, end)}
            return pair | {"task": domain, "lost": 0}

        dataset = grain.MapDataset.source(range(len(chunks)))
        dataset = dataset.repeat() if repeat else dataset
        if shuffle:
            order = partial(shuffled, size=len(chunks), seed=seed)
            dataset = dataset.map_with_index(order)
        return dataset.random_map(corrupt, seed=seed % 2**32)


@lru_cache(maxsize=32)
def _documents(corpus: Corpus, split: str) -> Sequence[Document]:
    documents = corpus.load(split)
    if not documents:
        raise ValueError(f"corpus {corpus.name!r} has no documents in split {split!r}")
    return documents


class _Chunks:
    """Random access to the chunks of tokenized documents: token ids and number of the domain."""

    def __init__(self, tokens: Sequence[np.ndarray], domains: Sequence[int], length: int):
        self._tokens, self._domains, self._length = tokens, domains, length
        # a tail shorter than a span teaches nothing
        starts = [range(0, max(1, len(ids) - int(MEAN_SPAN)), length) for ids in tokens]
        self._index = [(d, start) for d, each in enumerate(starts) for start in each]

    def __len__(self):
        return len(self._index)

    def __getitem__(self, i: int) -> tuple[Int[np.ndarray, "length"], int]:
        document, start = self._index[i]
        return self._tokens[document][start : start + self._length], self._domains[document]


@lru_cache(maxsize=8)
def _tokenized(corpus: Corpus, split: str, tokenizer: Tokenizer) -> list[np.ndarray]:
    from tqdm import tqdm

    documents = corpus.documents(split)
    bar = tqdm(documents, desc=f"tokenize {corpus.name} {split}", unit="doc", leave=False)
    return [np.asarray(tokenizer.encode(d.text), np.int32) for d in bar]


@lru_cache(maxsize=16)
def _chunks(corpus: Corpus, split: str, tokenizer: Tokenizer, length: int) -> _Chunks:
    numbers = {domain: i for i, (domain, _) in enumerate(corpus.labels(split))}
    domains = [numbers[d.domain] for d in corpus.documents(split)]
    return _Chunks(_tokenized(corpus, split, tokenizer), domains, length)


def _noise(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """Noise tokens and noise spans of a chunk (T5's rounding)."""
    noise = min(max(round(length * rate), 1), length - 1)
    spans = max(round(noise / mean_span), 1)
    return noise, min(spans, length - noise, NUM_SENTINELS)


def chunk_length(
    input_length: int, target_length: int, rate: float = RATE, mean_span: float = MEAN_SPAN
) -> int:
    """The longest chunk whose corrupted inputs and targets, with end of sequence, fit.

    T5: 568 tokens for 512 inputs and 114 targets.
    """
    length = 2
    while True:
        noise, spans = _noise(length + 1, rate, mean_span)
        if length + 1 - noise + spans + 1 > input_length or noise + spans + 1 > target_length:
            return length
        length += 1


def _partition(total: int, parts: int, rng: np.random.Generator) -> Int[np.ndarray, "parts"]:
    """Random positive lengths that add up to total."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def span_corruption(
    tokens: Int[np.ndarray, "length"],
    rng: np.random.Generator,
    *,
    tokenizer: Tokenizer,
    rate: float = RATE,
    mean_span: float = MEAN_SPAN,
) -> tuple[Int[np.ndarray, "L"], Int[np.ndarray, "T"]]:
    """Hide random spans: inputs with a sentinel for each span, targets sentinel + hidden tokens.

    The chunk starts with a visible span, as in T5. A single token is left as it is.
    """
    length = len(tokens)
    if length < 2:
        return tokens.astype(np.int32), np.zeros(0, np.int32)
    noise, spans = _noise(length, rate, mean_span)
    visible = _partition(length - noise, spans, rng)
    hidden = _partition(noise, spans, rng)
    inputs, targets, at = [], [], 0
    for i in range(spans):
        sentinel = np.array([tokenizer.sentinel(i)], np.int32)
        middle = at + visible[i]
        end = middle + hidden[i]
        inputs += [tokens[at:middle], sentinel]
        targets += [sentinel, tokens[middle:end]]
        at = end
    return np.concatenate(inputs).astype(np.int32), np.concatenate(targets).astype(np.int32)


def restore(
    inputs: Int[np.ndarray, "L"], targets: Int[np.ndarray, "T"], tokenizer: Tokenizer
) -> Int[np.ndarray, "length"]:
    """The tokens that span corruption hid and showed, in order: its inverse."""
    sentinels = {tokenizer.sentinel(i) for i in range(NUM_SENTINELS)}
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in targets.tolist():
        if token in sentinels:
            current = spans.setdefault(token, [])
        elif token != EOS:
            current.append(token)
    shown = (spans.get(t, [t]) for t in inputs.tolist() if t != EOS)
    return np.array([t for each in shown for t in each], np.int32)
