"""Streams of packed batches: data shards, reading ahead, exact resume (grain).

A source is a `Corpus` or a `Mixture`, or anything with their `token_pairs` and `labels`. Batch i is
a function of seed, i and the source, for any number of processes: its rows come in equal parts from
gcd(batch size, 64) data shards. Shard s of S packs the examples s, s + S, s + 2 S, .. of the
source, and every process reads the shards of its own rows.
"""

import json
import math
import queue
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Int

from moekit.data.batch import Batch, Source, TokenPair, stack_rows
from moekit.data.packing import WINDOW, Packer, SizedExample
from moekit.data.statistics import DataStatistics
from moekit.data.tokenizer import Tokenizer

MAX_SHARDS = 64  # of a batch, and so the largest number of processes that can share it
_BUFFERED = 2  # batches read ahead
_SECONDS_BETWEEN_CALLS = 0.5  # of on_wait
_SECONDS_TO_CLOSE = 5.0  # that a read in progress is waited for
OnWait = Callable[[float], None]


def batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    input_length: int,
    target_length: int,
    batch_size: int,
    seed: int,
    split: str = "train",
    shuffle: bool = True,
    repeat: bool = True,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
) -> "Stream":
    """The `Stream` of packed batches of a source.

    Without `repeat` it ends after one pass, filled up with empty rows.

    Args:
      source: a `Corpus`, a `Mixture`, or another `Source`.
      batch_size: rows of the global batch.
      shard: (i, n) for process i of n: it gets rows i * B / n to (i + 1) * B / n of every batch.
      workers: processes that read ahead, for hosts with cores to spare; 0 is a thread. They are
        spawned: a script needs its `if __name__ == "__main__":`, a notebook does not.

    Raises:
      ValueError: the data shards cannot be divided among this number of processes or workers.
    """
    num_shards = data_shards(batch_size)
    process, num_processes = shard
    own_shards = num_shards // num_processes
    if num_shards % num_processes or own_shards % max(1, workers):
        raise ValueError(
            f"a batch of {batch_size} rows consists of {num_shards} data shards, which "
            f"{num_processes} processes of {workers} workers cannot share evenly: use numbers that "
            f"divide {num_shards}, or a batch size that is a multiple of {MAX_SHARDS}"
        )
    pairs = source.token_pairs(
        tokenizer,
        input_length=input_length,
        target_length=target_length,
        seed=seed,
        split=split,
        shuffle=shuffle,
        repeat=repeat,
    )
    labels = source.labels(split)
    layout = BatchLayout(
        pairs=pairs,
        limits=(input_length, target_length),
        num_labels=len(labels),
        num_shards=num_shards,
        rows_per_shard=batch_size // num_shards,
    )
    own = range(process * own_shards, (process + 1) * own_shards)
    return Stream(layout, labels, own, workers)


def data_shards(batch_size: int) -> int:
    """Number of shards of a global batch; the number of processes must divide it."""
    return math.gcd(batch_size, MAX_SHARDS)


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of a batch are made from a source; the same in every process."""

    pairs: Any  # grain's dataset of token ids
    limits: tuple[int, int]  # input and target length
    num_labels: int
    num_shards: int  # of the global batch
    rows_per_shard: int  # in a batch


class Stream:
    """An iterator over this process's rows of the batches, which resumes exactly; see `batches`.

    While it waits for data, it calls `on_wait` every half second with the seconds waited.
    """

    on_wait: OnWait

    def __init__(
        self,
        layout: BatchLayout,
        labels: tuple[tuple[str, str], ...],
        own_shards: range,
        workers: int,
    ) -> None:
        self._layout = layout
        self._labels = labels
        self._own_shards = own_shards
        self._workers = workers
        self.on_wait = _keep_waiting
        self._states: dict[str, str] = {}
        self._readers: list = []
        self._statistics = self._no_statistics()
        weakref.finalize(self, _close, self._readers)  # before the interpreter shuts down

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        if not self._readers:
            self._readers += self._open_readers()
        parts = [reader.next(self.on_wait) for reader in self._readers]
        if not any(parts):
            raise StopIteration
        tables = []
        for part in parts:
            if part:
                self._states |= part.states
                tables.append(part.table)
        read = DataStatistics(
            labels=self._labels,
            limits=self._layout.limits,
            rows=len(self._own_shards) * self._layout.rows_per_shard,
            table=np.sum(tables, 0),
        )
        self._statistics += read
        rows = [part.rows if part else self._empty_rows() for part in parts]
        if len(rows) == 1:
            return rows[0]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)

    def _empty_rows(self) -> Batch:
        """What a reader returns while the others are not finished."""
        shards = len(self._own_shards) // len(self._readers)
        return stack_rows([[]] * (shards * self._layout.rows_per_shard), self._layout.limits)

    def _open_readers(self) -> list:
        """Iterators that read ahead: a thread, or processes that each read some of the shards."""
        states = dict(self._states)
        if not self._workers:
            rows = _RowsIterator(self._layout, self._own_shards, states)
            return [_ReadAhead(rows)]
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers read absl's flags
        size = len(self._own_shards) // self._workers
        options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=_BUFFERED)
        readers = []
        for worker in range(self._workers):
            shards = self._own_shards[worker * size : (worker + 1) * size]
            rows = _Rows(self._layout, shards, states)
            elements = iter(rows.mp_prefetch(options, worker_init_fn=_ignore_interrupts))
            readers.append(_ReadAhead(elements))
        return readers

    def get_state(self) -> dict[str, str]:
        """The state of each of this process's shards after the last batch, by the shard's number:
        JSON."""
        return {str(shard): self._states.get(str(shard), "") for shard in self._own_shards}

    def set_state(self, state: Mapping[str, str]) -> None:
        """Continue from a state; the shards of other processes are ignored."""
        self.close()
        self._states = {str(shard): state[str(shard)] for shard in self._own_shards}

    def take_statistics(self) -> DataStatistics:
        """Statistics of this process's rows since the last call."""
        taken = self._statistics
        self._statistics = self._no_statistics()
        return taken

    def _no_statistics(self) -> DataStatistics:
        table = np.zeros((self._layout.num_labels, len(DataStatistics.COLUMNS)), np.int64)
        return DataStatistics(self._labels, self._layout.limits, 0, table)

    def close(self) -> None:
        """Stop reading ahead."""
        _close(self._readers)


def _close(readers: list) -> None:
    for reader in readers:
        reader.close()
    readers.clear()


def _keep_waiting(seconds: float) -> None:
    """Wait for data however long it takes."""


def _ignore_interrupts(worker: int, num_workers: int) -> None:
    """Ctrl-C and the end of a terminal reach all its processes; only the main process decides
    whether to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


class _Part(NamedTuple):
    """Some shards' rows of a batch, the shards' states after it, and its statistics."""

    rows: Batch
    states: dict[str, str]
    table: Int[np.ndarray, "tasks columns"]


class _ReadAhead:
    """Reads a few elements ahead in a thread; errors are raised by `next`.

    The thread is a daemon: a read that never returns does not keep the process alive.
    """

    def __init__(self, elements: Iterator[_Part]) -> None:
        self._elements = elements
        # not a SimpleQueue: where a signal arrives as the time is up, its get() waits forever
        self._results: queue.Queue[_Part | Exception | None] = queue.Queue()
        self._free = threading.Semaphore(_BUFFERED)
        self._closed = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            self._free.acquire()
            if self._closed:
                return
            try:
                result = next(self._elements, None)
            except Exception as error:
                result = error
            self._results.put(result)
            if not isinstance(result, _Part):
                return

    def next(self, on_wait: OnWait) -> _Part | None:
        """The next element; None after the last one. `on_wait` is called every half second."""
        start = time.monotonic()
        while True:
            try:
                result = self._results.get(timeout=_SECONDS_BETWEEN_CALLS)
            except queue.Empty:
                on_wait(time.monotonic() - start)
                continue
            self._free.release()
            if not isinstance(result, _Part):
                self._results.put(result)  # also what a further call returns
            if isinstance(result, Exception):
                raise result
            return result

    def close(self) -> None:
        self._closed = True
        self._free.release()
        self._thread.join(timeout=_SECONDS_TO_CLOSE)
        if hasattr(self._elements, "close"):
            self._elements.close()


class _Rows(grain.IterDataset):
    """The parts of all batches that come from some of the shards, for a worker process."""

    def __init__(
        self, layout: BatchLayout, shards: Sequence[int], states: Mapping[str, str]
    ) -> None:
        super().__init__()
        self._layout = layout
        self._selected = shards
        self._states = states

    def __iter__(self) -> "_RowsIterator":
        return _RowsIterator(self._layout, self._selected, self._states)


class _RowsIterator(grain.DatasetIterator):
    def __init__(
        self, layout: BatchLayout, shards: Sequence[int], states: Mapping[str, str]
    ) -> None:
        super().__init__()
        self._layout = layout
        self._shards = {
            str(shard): _Shard(layout, shard, states.get(str(shard), "")) for shard in shards
        }

    def __next__(self) -> _Part:
        rows = []
        for shard in self._shards.values():
            for _ in range(self._layout.rows_per_shard):
                rows.append(shard.next_row())
        if not any(rows):
            raise StopIteration
        return _Part(
            rows=stack_rows(rows, self._layout.limits),
            states={name: shard.state for name, shard in self._shards.items()},
            table=self._count(rows),
        )

    def _count(self, rows: list[list[TokenPair]]) -> Int[np.ndarray, "tasks columns"]:
        """The table of `DataStatistics`."""
        table = np.zeros((self._layout.num_labels, len(DataStatistics.COLUMNS)), np.int64)
        for row in rows:
            for pair in row:
                truncated = pair["truncated"]
                num_inputs, num_targets = len(pair["inputs"]), len(pair["targets"])
                table[pair["task"]] += (1, num_inputs, num_targets, truncated > 0, truncated)
        return table

    def get_state(self) -> dict:
        return {}  # each element contains its own

    def set_state(self, state: dict) -> None:
        pass


class _Shard:
    """Packed rows of every n-th example.

    The state is the index of the next example and those of the examples that wait for a row, so
    that resuming costs the same at any step.
    """

    def __init__(self, layout: BatchLayout, number: int, state: str) -> None:
        self._pairs = layout.pairs
        self._step = layout.num_shards
        self._packer = Packer(layout.limits)
        self._next = number
        if state:
            self._next, window, rows = json.loads(state)
            self._packer.window = [self._example(index) for index in window]
            for row, indices in enumerate(rows):
                for index in indices:
                    sizes, pair = self._example(index)
                    self._packer.put(row, sizes, pair)

    def _example(self, index: int) -> SizedExample:
        pair = dict(self._pairs[index])
        pair["index"] = index
        return (len(pair["inputs"]), len(pair["targets"])), pair

    @property
    def state(self) -> str:
        window = [pair["index"] for _, pair in self._packer.window]
        rows = [[pair["index"] for pair in row] for row in self._packer.rows]
        return json.dumps([self._next, window, rows], separators=(",", ":"))

    def next_row(self) -> list[TokenPair]:
        """The next row's examples; none when all have been used."""
        while True:
            closed = self._packer.pack()
            if closed:
                return closed
            if self._next >= len(self._pairs):
                return self._close_an_open_row()
            end = min(self._next + WINDOW * self._step, len(self._pairs))
            indices = range(self._next, end, self._step)
            self._packer.add_window(self._example(index) for index in indices)
            self._next += len(indices) * self._step

    def _close_an_open_row(self) -> list[TokenPair]:
        for row, examples in enumerate(self._packer.rows):
            if examples:
                return self._packer.close(row)
        return []
