"""Text corpora, and their chunks under span corruption."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from moekit.data.shuffle import shuffled_index
from moekit.data.span_corruption import MEAN_SPAN, chunk_length, span_corruption
from moekit.data.tokenizer import EOS, Tokenizer

if TYPE_CHECKING:
    import grain


@dataclass(frozen=True)
class Document:
    """A text with its origin; `domain` labels its subject or its source."""

    text: str
    title: str = ""
    domain: str = ""

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"document {self.title!r} of domain {self.domain!r} is empty")


@dataclass(frozen=True)
class Corpus:
    """Documents in splits "train" and "valid"; `load(split)` is called once and kept."""

    name: str
    load: Callable[[str], Sequence[Document]]

    def documents(self, split: str = "train") -> Sequence[Document]:
        """The documents of a split; a ValueError if there are none."""
        return _documents(self, split)

    @property
    def domains(self) -> tuple[str, ...]:
        documents = self.documents("train")
        domains = {document.domain for document in documents}
        return tuple(sorted(domains))

    def labels(self, split: str) -> tuple[tuple[str, str], ...]:
        """(domain, corpus) of each domain of a split, for statistics."""
        documents = self.documents(split)
        domains = {document.domain for document in documents}
        return tuple((domain, self.name) for domain in sorted(domains))

    def digest(self) -> str:
        """Twelve hexadecimal digits of the training text."""
        sha = hashlib.sha256()
        for document in self.documents("train"):
            sha.update(document.text.encode())
        digest = sha.hexdigest()
        return digest[:12]

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
        """Corrupted chunks as a grain dataset of {"inputs", "targets"}, end of sequence included,
        with "task", the index of the domain's label, and "truncated", which is 0.

        Every document is divided into chunks whose corrupted inputs just fill input_length. Spans
        are drawn anew in each epoch.
        """
        import grain  # which takes a second

        length = chunk_length(input_length, target_length)
        chunks = _chunks(self, split, tokenizer, length)
        num_chunks = len(chunks)
        dataset = grain.MapDataset.source(range(num_chunks))
        if repeat:
            dataset = dataset.repeat()
        if shuffle:
            order = partial(shuffled_index, size=num_chunks, seed=seed)
            dataset = dataset.map_with_index(order)
        corrupt = partial(_corrupt, chunks, tokenizer)
        return dataset.random_map(corrupt, seed=seed % 2**32)


@lru_cache(maxsize=32)
def _documents(corpus: Corpus, split: str) -> Sequence[Document]:
    documents = corpus.load(split)
    if not documents:
        raise ValueError(f"corpus {corpus.name!r} has no documents in split {split!r}")
    return documents


class _Chunks:
    """Random access to the chunks of tokenized documents: token ids and index of the domain."""

    def __init__(
        self,
        tokens: Sequence[Int[np.ndarray, "_"]],
        domains: Sequence[int],
        length: int,
    ) -> None:
        self._tokens = tokens
        self._domains = domains
        self._length = length
        self._places: list[tuple[int, int]] = []  # document and start of each chunk
        for document, ids in enumerate(tokens):
            # a tail no longer than a mean span is left out: too short to learn from
            last_start = len(ids) - int(MEAN_SPAN)
            end = max(1, last_start)
            for start in range(0, end, length):
                self._places.append((document, start))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Int[np.ndarray, "length"], int]:
        document, start = self._places[index]
        end = start + self._length
        tokens = self._tokens[document]
        domain = self._domains[document]
        return tokens[start:end], domain


def _corrupt(
    chunks: _Chunks,
    tokenizer: Tokenizer,
    index: int,
    rng: np.random.Generator,
) -> dict:
    tokens, domain = chunks[index]
    inputs, targets = span_corruption(tokens, rng, tokenizer=tokenizer)
    end = np.int32(EOS)
    return {
        "inputs": np.append(inputs, end),
        "targets": np.append(targets, end),
        "task": domain,
        "truncated": 0,
    }


@lru_cache(maxsize=8)
def _tokenized(corpus: Corpus, split: str, tokenizer: Tokenizer) -> list[Int[np.ndarray, "_"]]:
    from moekit.progress import ProgressBar

    documents = corpus.documents(split)
    description = f"tokenize {corpus.name} {split}"
    tokens = []
    for document in ProgressBar(documents, desc=description, unit="doc", leave=False):
        ids = tokenizer.encode(document.text)
        tokens.append(np.asarray(ids, np.int32))
    return tokens


@lru_cache(maxsize=16)
def _chunks(
    corpus: Corpus,
    split: str,
    tokenizer: Tokenizer,
    length: int,
) -> _Chunks:
    tokens = _tokenized(corpus, split, tokenizer)
    index_of_domain = {}
    for index, (domain, _) in enumerate(corpus.labels(split)):
        index_of_domain[domain] = index
    domains = []
    for document in corpus.documents(split):
        index = index_of_domain[document.domain]
        domains.append(index)
    return _Chunks(tokens, domains, length)
