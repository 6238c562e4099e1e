"""Packing of examples with inputs and targets into rows, and lengths that fill both sides."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from moekit.data.batch import Source
from moekit.data.tokenizer import Tokenizer

OPEN_ROWS = 32  # rows that are filled at the same time
WINDOW = 128  # examples that are packed largest first
INPUT_LENGTHS = (512, 1024, 2048, 4096, 8192)  # tried by `propose_lengths`
TARGET_FACTORS = (0.85, 0.9, 0.95, 1, 1.05, 1.1)
SizedExample = tuple[tuple[int, int], Any]  # number of input and target tokens, and the example


class Packer:
    """Best fit, largest first within a window, over a bounded number of open rows.

    An example is put into the open row in which it leaves the least room. If it fits into none, the
    fullest row is topped up from the window and closed. grain's packers close all their rows at
    once: of a FLAN mixture's inputs at 512 / 128 its best fit fills 0.92 with 64 open rows and
    0.945 with 512, this one 0.955 with 32.
    """

    def __init__(self, limits: tuple[int, int]) -> None:
        self.limits = np.array(limits)
        self.free = np.tile(self.limits, (OPEN_ROWS, 1))
        self.rows: list[list] = [[] for _ in range(OPEN_ROWS)]
        self.window: list[SizedExample] = []  # the largest last

    def add_window(self, examples: Iterable[SizedExample]) -> None:
        """The next examples to pack; a ValueError if one is longer than a row."""
        self.window = sorted(examples, key=self._share_of_row)
        if not self.window:
            return
        largest = self.window[-1]
        if self._share_of_row(largest) > 1:
            sizes, _ = largest
            raise ValueError(f"{sizes} tokens do not fit a row of {self.limits}")

    def _share_of_row(self, sized: SizedExample) -> float:
        (inputs, targets), _ = sized
        input_limit, target_limit = self.limits.tolist()
        input_share = inputs / input_limit
        target_share = targets / target_limit
        return max(input_share, target_share)

    def put(self, row: int, sizes: tuple[int, int], example: Any) -> None:
        self.free[row] -= sizes
        self.rows[row].append(example)

    def pack(self) -> list | None:
        """Place the window's examples until a row is closed.

        Returns the examples of this row, or None if the window is empty before a row is closed.
        """
        while self.window:
            sizes, example = self.window[-1]
            room = (self.free - sizes) / self.limits  # [rows, inputs and targets]
            room_of_row = room.min(1)
            fits = room_of_row >= 0
            if not fits.any():
                return self._close_fullest()
            room_if_fits = np.where(fits, room_of_row, np.inf)
            best_row = int(room_if_fits.argmin())
            self.put(best_row, sizes, example)
            self.window.pop()
        return None

    def _close_fullest(self) -> list:
        room = self.free / self.limits
        room_of_row = room.min(1)
        row = int(room_of_row.argmin())
        free_inputs, free_targets = self.free[row].tolist()
        remaining = []
        for sized in reversed(self.window):
            (inputs, targets), example = sized
            if inputs <= free_inputs and targets <= free_targets:
                free_inputs -= inputs
                free_targets -= targets
                self.rows[row].append(example)
            else:
                remaining.append(sized)
        self.window = remaining[::-1]
        return self.close(row)

    def close(self, row: int) -> list:
        """Empty a row; returns its examples."""
        closed = self.rows[row]
        self.rows[row] = []
        self.free[row] = self.limits
        return closed


@dataclass(frozen=True)
class Lengths:
    """A pair of lengths; fill of the rows and share truncated in a sample of `examples`."""

    input_length: int
    target_length: int
    input_fill: float
    target_fill: float
    truncated: float
    examples: int

    @property
    def emptier_fill(self) -> float:
        return min(self.input_fill, self.target_fill)

    def __str__(self) -> str:
        return (
            f"lengths {self.input_length} / {self.target_length} would fill inputs "
            f"{self.input_fill:.1%}, targets {self.target_fill:.1%} and truncate "
            f"{self.truncated:.1%} of the examples (from a sample of {self.examples:,})"
        )


def propose_lengths(
    source: Source,
    tokenizer: Tokenizer,
    *,
    full: float = 0.855,
    examples: int = 4096,
    seed: int = 0,
) -> Lengths:
    """The shortest lengths at which both sides of a source's rows are filled to `full`.

    If there are none, the lengths at which the fill of the emptier side, minus the share of
    truncated examples, is largest. It is measured by packing the first examples of the stream.
    """
    from moekit.progress import ProgressBar

    measured: list[Lengths] = []
    for input_length in ProgressBar(INPUT_LENGTHS, desc="propose lengths", leave=False):
        sizes = _sample_sizes(source, tokenizer, input_length, examples, seed)
        for target_length in _target_lengths(sizes, input_length):
            lengths = _measure(sizes, input_length, target_length)
            measured.append(lengths)
        best = max(measured, key=lambda lengths: lengths.emptier_fill - lengths.truncated)
        if best.emptier_fill >= full:
            break
    return best


def _sample_sizes(
    source: Source,
    tokenizer: Tokenizer,
    length: int,
    examples: int,
    seed: int,
) -> Int[np.ndarray, "examples 3"]:
    """Input tokens, target tokens and truncated tokens of the first examples."""
    pairs = source.token_pairs(tokenizer, input_length=length, target_length=length, seed=seed)
    sizes = []
    for index in range(examples):
        pair = pairs[index]
        num_inputs = len(pair["inputs"])
        num_targets = len(pair["targets"])
        sizes.append((num_inputs, num_targets, pair["truncated"]))
    return np.array(sizes)


def _target_lengths(sizes: Int[np.ndarray, "examples 3"], input_length: int) -> list[int]:
    """Multiples of 8 around the length at which inputs and targets are equally full."""
    mean_inputs, mean_targets, _ = sizes.mean(0)
    balanced = input_length * mean_targets / mean_inputs
    lengths = set()
    for factor in TARGET_FACTORS:
        length = 8 * round(balanced * factor / 8)
        lengths.add(max(8, length))
    return sorted(lengths)


def _measure(
    sizes: Int[np.ndarray, "examples 3"],
    input_length: int,
    target_length: int,
) -> Lengths:
    """Pack a sample repeatedly, until the rows that stay open matter little."""
    limits = (input_length, target_length)
    already_truncated = sizes[:, 2] > 0
    truncated = already_truncated | (sizes[:, 1] > target_length)
    clipped = np.minimum(sizes[:, :2], limits)
    total_inputs = int(clipped[:, 0].sum())
    repeats = 1 + 400 * input_length // total_inputs
    fitting = [tuple(pair) for pair in clipped.tolist()]
    fills = []
    for row in _pack_all(fitting * repeats, limits):
        total = np.sum(row, 0)
        fills.append(total / limits)
    mean_fill = np.mean(fills or [(0.0, 0.0)], 0)
    input_fill, target_fill = mean_fill.tolist()
    return Lengths(
        input_length=input_length,
        target_length=target_length,
        input_fill=input_fill,
        target_fill=target_fill,
        truncated=float(truncated.mean()),
        examples=len(sizes),
    )


def _pack_all(sizes: list[tuple[int, int]], limits: tuple[int, int]) -> Iterator[list]:
    packer = Packer(limits)
    for start in range(0, len(sizes), WINDOW):
        window = sizes[start : start + WINDOW]
        packer.add_window((pair, pair) for pair in window)
        while closed := packer.pack():
            yield closed
