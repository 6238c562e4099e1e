"""Examples on disk: an Arrow file behind a sequence that makes each example when it is read."""

import functools
import hashlib
import itertools
import json
import logging
import operator
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float, Int

from moekit.data.tasks import Example

log = logging.getLogger("moekit")
VALID = 1 / 20  # the share of rows that validates where there is no file for it
MAX_TRIES = 1000  # rows that are tried in place of an unusable one


class Rows(Sequence):
    """Examples of rows of an Arrow table.

    An unusable row is replaced by the next usable one; the log counts how many were.
    """

    def __init__(
        self, table: Any, indices: Int[np.ndarray, "n"], make: Callable[[dict, int], Example]
    ):
        self._table, self._indices, self._make = table, indices, make
        self._unusable = 0

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> Example:
        size, position = len(self), operator.index(index)
        if not -size <= position < size:
            raise IndexError(position)
        problem: Exception | None = None
        for step in range(min(size, MAX_TRIES)):
            number = int(self._indices[(position + step) % size])
            try:
                row = self._table.data.fast_slice(number, 1).to_pylist()[0]
                return self._make(row, number)
            except ValueError as error:
                problem = error
                self._count_unusable(error)
        raise ValueError(f"no usable rows near row {number + 1}: {problem}")

    def _count_unusable(self, error: ValueError) -> None:
        self._unusable += 1
        if self._unusable in (1, 100, 10_000):
            log.warning("a row cannot be used (%s); %d so far", error, self._unusable)

    def select(self, positions: Int[np.ndarray, "m"]) -> "Rows":
        """The rows at these positions."""
        return Rows(self._table, self._indices[positions], self._make)

    def part(self, split: str) -> "Rows":
        """The "train" or "valid" part of the rows of a table that `on_disk` wrote."""
        hashes = self._table.data.column("rank").to_numpy()[self._indices]
        return self.select(np.flatnonzero(is_validation(hashes) == (split == "valid")))


def question_hash(fields: Mapping[str, str]) -> float:
    """Hash of the question in [0, 1); the lowest 5 % form the validation split.

    It does not depend on case, punctuation and spaces, or on the file that holds the question.
    """
    text = fields.get("question") or fields.get("input") or "".join(fields.values())
    sha = hashlib.sha256(re.sub(r"\W+", "", text.lower()).encode())
    return int.from_bytes(sha.digest()[:8], "big") / 2**64


def is_validation(hashes: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Which rows validate: those of low hash, at least one unless all questions are the same."""
    if len(np.unique(hashes)) < 2:
        return np.zeros(len(hashes), bool)
    return hashes <= max(VALID, hashes.min())


def part_by_hash(examples: Sequence[Example], split: str) -> Sequence[Example]:
    """The "train" or "valid" part of examples, by the hash of their questions."""
    if isinstance(examples, Rows):
        return examples.part(split)
    held = is_validation(np.array([question_hash(example.fields) for example in examples]))
    pairs = zip(examples, held, strict=True)
    return [example for example, valid in pairs if valid == (split == "valid")]


def every_twentieth(numbers: Int[np.ndarray, "n"], split: str) -> Int[np.ndarray, "m"]:
    """The "train" or "valid" part of rows by position: every twentieth row validates."""
    valid = np.arange(len(numbers)) % round(1 / VALID) == 0
    if len(numbers) == 1:
        valid[:] = False
    return numbers[valid == (split == "valid")]


@functools.cache
def _scratch_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="moekit-")  # removed when Python ends


def on_disk(examples: Iterable[tuple[Example, str, str]]) -> Any:
    """A memory-mapped table of examples, each with a task's name and a kind."""
    import datasets
    import pyarrow as pa

    texts = ("id", "fields", "answer", "rationale", "domain", "task", "kind")
    columns = [(name, pa.large_string()) for name in texts]
    columns += [(name, pa.list_(pa.large_string())) for name in ("references", "options")]
    schema = pa.schema([*columns, ("rank", pa.float64())])
    rows = (_stored(example, task, kind) for example, task, kind in examples)
    folder = _scratch_folder().name
    path = f"{folder}/{len(os.listdir(folder))}.arrow"
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while batch := list(itertools.islice(rows, 1000)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    return datasets.Dataset.from_file(path)


def _stored(example: Example, task: str, kind: str) -> dict:
    row = dict(vars(example), task=task, kind=kind)
    row["fields"] = json.dumps(example.fields)
    row["rank"] = question_hash(example.fields)
    return row


def stored_example(row: dict, number: int = 0) -> Example:
    """The example that `on_disk` wrote as this row."""
    return Example(
        id=row["id"],
        fields=json.loads(row["fields"]),
        answer=row["answer"],
        references=tuple(row["references"]),
        options=tuple(row["options"]),
        rationale=row["rationale"],
        domain=row["domain"],
    )


def rows_by_name(names: Any, usable: Any = None) -> dict[str, Int[np.ndarray, "n"]]:
    """Row numbers of every name in an Arrow column, of the usable rows if a mask is given."""
    import pyarrow.compute as pc

    column = pc.fill_null(names, "").combine_chunks().dictionary_encode()
    codes = column.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    if usable is not None:
        order = order[usable[order]]
    bounds = np.searchsorted(codes[order], np.arange(len(column.dictionary) + 1))
    found = {}
    for code, name in enumerate(column.dictionary.to_pylist()):
        rows = order[bounds[code] : bounds[code + 1]]
        if len(rows):
            found[name] = rows
    return found
