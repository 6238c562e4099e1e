"""Packed rows kept as arrays, so that a machine can train without the data that they were made of.

N rows, B batch, L input length, T target length.
"""

import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8, UInt16

from moekit.data.batch import Batch

FIELDS = ("inputs", "input_segments", "targets", "target_segments")
MAX_ID = np.iinfo(np.uint16).max
MAX_SEGMENT = np.iinfo(np.uint8).max


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of packed examples; a segment is an example of its row, 0 is padding."""

    inputs: UInt16[np.ndarray, "N L"]
    input_segments: UInt8[np.ndarray, "N L"]
    targets: UInt16[np.ndarray, "N T"]
    target_segments: UInt8[np.ndarray, "N T"]

    def __len__(self) -> int:
        return len(self.inputs)

    @classmethod
    def of_stream(cls, stream: Iterator[Batch], num_rows: int) -> "PackedRows":
        """The first rows of a stream of batches, fewer where it ends before.

        Raises:
          ValueError: the stream is empty, or an id or segment is too large to be kept.
        """
        found: list[Batch] = []
        rows = 0
        for batch in stream:
            found.append(batch)
            rows += len(batch.inputs)
            if rows >= num_rows:
                break
        if not found:
            raise ValueError("the stream has no batches")
        arrays = {}
        for name in FIELDS:
            values = np.concatenate([np.asarray(getattr(batch, name)) for batch in found])
            is_segment = name.endswith("segments")
            largest = MAX_SEGMENT if is_segment else MAX_ID
            if values.max() > largest:
                raise ValueError(f"{name} has {values.max()}; rows are kept with at most {largest}")
            arrays[name] = values[:num_rows].astype(np.uint8 if is_segment else np.uint16)
        return cls(**arrays)

    def batch(self, rows: Int[np.ndarray, "B"]) -> Batch:
        """The rows of these indices as a batch."""
        input_segments = self.input_segments[rows].astype(np.int32)
        target_segments = self.target_segments[rows].astype(np.int32)
        return Batch(
            inputs=self.inputs[rows].astype(np.int32),
            input_segments=input_segments,
            input_positions=_positions(input_segments),
            targets=self.targets[rows].astype(np.int32),
            target_segments=target_segments,
            target_positions=_positions(target_segments),
            loss_weights=(target_segments > 0).astype(np.float32),
        )

    def batches(self, batch_size: int, seed: int) -> Generator[Batch, None, None]:
        """Batches without end: all rows in an order of the seed, then again in another one.

        Raises:
          ValueError: there are fewer rows than a batch has.
        """
        if len(self) < batch_size:
            raise ValueError(f"{len(self)} rows do not fill a batch of {batch_size}: pack more")
        for epoch in itertools.count():
            order = np.random.default_rng([seed, epoch]).permutation(len(self))
            for start in range(0, len(self) - batch_size + 1, batch_size):
                yield self.batch(order[start : start + batch_size])

    def in_order(self, batch_size: int, most: int) -> list[Batch]:
        """The first full batches, at most that many."""
        starts = range(0, len(self) - batch_size + 1, batch_size)[:most]
        return [self.batch(np.arange(start, start + batch_size)) for start in starts]

    def arrays(self) -> dict[str, Any]:
        """The arrays by the names of FIELDS."""
        return {name: getattr(self, name) for name in FIELDS}


def _positions(segments: Int[np.ndarray, "B L"]) -> Int[np.ndarray, "B L"]:
    """The position of each token in its example, 0 for padding."""
    index = np.arange(segments.shape[1])
    starts = np.zeros_like(segments)
    is_first = segments[:, 1:] != segments[:, :-1]
    starts[:, 1:] = np.where(is_first, index[1:], 0)
    positions = index - np.maximum.accumulate(starts, axis=1)
    return np.where(segments > 0, positions, 0).astype(np.int32)
