"""Examples on disk: an Arrow file behind a sequence that makes each one when it is asked for."""

import functools
import itertools
import json
import logging
import operator
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float, Int

from moekit.data.sources import rank
from moekit.data.tasks import Example

log = logging.getLogger("moekit")
VALID = 1 / 20  # the share of rows that validates where there is no file for it


class Rows(Sequence):
    """Examples of rows of an Arrow table.

    A row that makes no example gives way to the next one that does; how many did is logged.
    """

    def __init__(self, table: Any, indices: Int[np.ndarray, "n"], make: Callable[..., Example]):
        self._table, self._indices, self._make = table, indices, make
        self._bad = 0

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> Example:
        n, i = len(self), operator.index(index)
        if not -n <= i < n:
            raise IndexError(i)
        problem: Exception | None = None
        for step in range(min(n, 1000)):
            number = int(self._indices[(i + step) % n])
            try:
                row = self._table.data.fast_slice(number, 1).to_pylist()[0]
                return self._make(row, number)
            except ValueError as error:
                problem, self._bad = error, self._bad + 1
                if self._bad in (1, 100, 10_000):
                    log.warning("row %d cannot be used (%s); %d so far", number, error, self._bad)
        raise ValueError(f"no usable rows near row {number}: {problem}")

    def cut(self, split: str) -> "Rows":
        """The "train" or "valid" part of the rows of a table that `on_disk` wrote."""
        ranks = self._table.data.column("rank").to_numpy()[self._indices]
        return Rows(self._table, self._indices[validates(ranks) == (split == "valid")], self._make)


def validates(ranks: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Which rows validate, by their `rank`; of a small task one, unless all ask the same."""
    if len(np.unique(ranks)) < 2:
        return np.zeros(len(ranks), bool)
    return ranks <= max(VALID, ranks.min())


def cut(examples: Sequence[Example], split: str) -> Sequence[Example]:
    """The "train" or "valid" part of examples that are not split yet."""
    if isinstance(examples, Rows):
        return examples.cut(split)
    held = validates(np.array([rank(example.fields) for example in examples]))
    return [e for e, h in zip(examples, held, strict=True) if h == (split == "valid")]


def every_twentieth(numbers: Int[np.ndarray, "n"], split: str) -> Int[np.ndarray, "m"]:
    """The "train" or "valid" part of rows whose questions nobody wants to read for it."""
    held = (np.arange(len(numbers)) % round(1 / VALID) == 0) & (len(numbers) > 1)
    return numbers[held == (split == "valid")]


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="moekit-")  # gone when Python ends


def on_disk(examples: Iterable[tuple[Example, str, str]]):
    """A memory-mapped table of examples, each with a task's name and a kind."""
    import datasets
    import pyarrow as pa

    texts = ("id", "fields", "answer", "rationale", "domain", "task", "kind")
    lists = [(name, pa.list_(pa.large_string())) for name in ("references", "options")]
    columns = [(name, pa.large_string()) for name in texts]
    schema = pa.schema([*columns, *lists, ("rank", pa.float64())])
    rows = (
        vars(e)
        | {"fields": json.dumps(e.fields), "rank": rank(e.fields), "task": task, "kind": kind}
        for e, task, kind in examples
    )
    arrow = f"{_scratch().name}/{len(os.listdir(_scratch().name))}.arrow"
    with pa.OSFile(arrow, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while batch := list(itertools.islice(rows, 1000)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    return datasets.Dataset.from_file(arrow)


def example_of(row: dict, number: int = 0) -> Example:
    """A row that `on_disk` wrote as the example that it was."""
    return Example(
        row["id"],
        json.loads(row["fields"]),
        row["answer"],
        tuple(row["references"]),
        tuple(row["options"]),
        row["rationale"],
        row["domain"],
    )


def by_task(names: Any, usable: Any = None) -> dict[str, Int[np.ndarray, "n"]]:
    """Row numbers of every task, given the column of their names (and which rows are usable)."""
    import pyarrow.compute as pc

    column = pc.fill_null(names, "").combine_chunks().dictionary_encode()
    codes = column.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    if usable is not None:
        order = order[usable[order]]
    cuts = np.searchsorted(codes[order], np.arange(len(column.dictionary) + 1))
    keys = column.dictionary.to_pylist()
    found = {k: order[cuts[i] : cuts[i + 1]] for i, k in enumerate(keys)}
    return {key: rows for key, rows in found.items() if len(rows)}
