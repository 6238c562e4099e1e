"""A stream of packed batches: shards that pack, readers that work ahead, exact resume (grain)."""

import json
import math
import signal
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Int

from moekit.data.batch import Batch, stack
from moekit.data.packing import WINDOW, Packer, Sized
from moekit.data.statistics import Counts

MAX_SHARDS = 64  # of a batch, so the most processes that can share one
_AHEAD = 2  # batches read ahead


def data_shards(batch_size: int) -> int:
    """How many shards a global batch is made of; the number of processes must divide it."""
    return math.gcd(batch_size, MAX_SHARDS)


class _Shard:
    """Packed rows of every `step`-th example.

    The state is the number of the next example and those of the examples in hand, so taking it up
    costs the same at any step.
    """

    def __init__(self, pairs, start: int, step: int, limits: tuple[int, int], state: str | None):
        self._pairs, self._step, self._packer = pairs, step, Packer(limits)
        self._next, window, rows = json.loads(state) if state else (start, [], [])
        self._packer.window = [self._example(i) for i in window]
        for row, numbers in enumerate(rows):
            for i in numbers:
                self._packer.put(row, *self._example(i))

    def _example(self, i: int) -> Sized:
        pair = self._pairs[i]
        return (len(pair["inputs"]), len(pair["targets"])), pair | {"number": i}

    @property
    def state(self) -> str:
        window = [pair["number"] for _, pair in self._packer.window]
        rows = [[pair["number"] for pair in row] for row in self._packer.rows]
        return json.dumps([self._next, window, rows], separators=(",", ":"))

    def row(self) -> list[dict]:
        """The next row's examples; none when all are spent."""
        while not (closed := self._packer.pack()) and self._next < len(self._pairs):
            end = min(self._next + WINDOW * self._step, len(self._pairs))
            numbers = range(self._next, end, self._step)
            self._packer.take(map(self._example, numbers))
            self._next += len(numbers) * self._step
        open_rows = (i for i, row in enumerate(self._packer.rows) if row)
        return closed or next((self._packer.close(i) for i in open_rows), [])


@dataclass(frozen=True)
class Plan:
    """What every reader of a stream needs to know."""

    pairs: Any  # grain's dataset of token ids
    limits: tuple[int, int]
    labels: int
    shards: int  # of the global batch
    rows: int  # of a shard in a batch


class _Rows(grain.IterDataset):
    """Some shards' rows of each batch, with the shards' states after it and its counts."""

    def __init__(self, *arguments):
        super().__init__()
        self._arguments = arguments

    def __iter__(self):
        return _RowsIterator(*self._arguments)


class _RowsIterator(grain.DatasetIterator):
    def __init__(self, plan: Plan, shards: Sequence[int], states: Mapping[str, str]):
        super().__init__()
        self._plan = plan
        self._shards = {
            str(i): _Shard(plan.pairs, i, plan.shards, plan.limits, states.get(str(i)))
            for i in shards
        }

    def __next__(self) -> tuple[Batch, dict[str, str], Int[np.ndarray, "tasks columns"]]:
        rows = [shard.row() for shard in self._shards.values() for _ in range(self._plan.rows)]
        if not any(rows):
            raise StopIteration
        table = np.zeros((self._plan.labels, len(Counts.COLUMNS)), np.int64)
        for pair in (pair for row in rows for pair in row):
            sizes = len(pair["inputs"]), len(pair["targets"])
            table[pair["task"]] += (1, *sizes, pair["lost"] > 0, pair["lost"])
        states = {name: shard.state for name, shard in self._shards.items()}
        return stack(rows, self._plan.limits), states, table

    def get_state(self) -> dict:
        return {}  # each element carries its own

    def set_state(self, state: dict) -> None:
        pass


class Stream:
    """An iterator of `Batch`es, this process' rows of each, that resumes exactly; see `batches`."""

    def __init__(self, plan: Plan, labels, own: range, workers: int):
        self._plan, self._labels, self._workers = plan, labels, workers
        self._own, self._states, self._readers = own, {}, []
        weakref.finalize(self, _close, self._readers)  # while the interpreter still stands
        self._rows, self._table = 0, np.zeros((plan.labels, len(Counts.COLUMNS)), np.int64)

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        if not self._readers:
            self._readers += self._open()
        parts = [next(reader, None) for reader in self._readers]
        if not any(parts):
            raise StopIteration
        for part in filter(None, parts):
            self._states |= part[1]
            self._table = self._table + part[2]
        self._rows += len(self._own) * self._plan.rows
        empty = [[]] * (self._plan.rows * (len(self._own) // len(parts)))
        read = [part[0] if part else stack(empty, self._plan.limits) for part in parts]
        return read[0] if len(read) == 1 else jax.tree.map(lambda *x: np.concatenate(x), *read)

    def _open(self) -> list:
        """Readers that work ahead: a thread, or processes that each read a part of the shards."""
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers ask for absl's flags, which nobody set
        parts = max(1, self._workers)
        size, options = len(self._own) // parts, grain.MultiprocessingOptions(1, _AHEAD)
        ahead = []
        for own in (self._own[i * size : (i + 1) * size] for i in range(parts)):
            rows = _Rows(self._plan, own, dict(self._states))
            if self._workers:
                ahead.append(rows.mp_prefetch(options, worker_init_fn=_leave_signals))
            else:
                ahead.append(
                    grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=_AHEAD)
                )
        return [iter(each) for each in ahead]

    def get_state(self) -> dict[str, str]:
        """The state of each own shard after the last batch, by the shard's number: JSON."""
        return {str(i): self._states.get(str(i), "") for i in self._own}

    def set_state(self, state: Mapping[str, str]) -> None:
        """Go on from there; other shards than one's own are ignored."""
        self.close()
        self._states = {str(i): state[str(i)] for i in self._own}

    def take_counts(self) -> Counts:
        """What the batches since the last call held, of this process' rows."""
        taken = Counts(self._labels, self._plan.limits, self._rows, self._table)
        self._rows, self._table = 0, np.zeros_like(self._table)
        return taken

    def close(self) -> None:
        """Stop what reads ahead."""
        _close(self._readers)


def _close(readers: list) -> None:
    for reader in readers:
        reader.close()
    readers.clear()


def _leave_signals(*_) -> None:
    """Ctrl-C reaches the whole group; whether to stop is the main process' to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
