"""From examples to batches of fixed shape: tokenize, pack, batch, resume (grain).

B batch, L input length, T target length. A source is anything with
`token_pairs(tokenizer, *, input_length, target_length, seed, split, shuffle, repeat)`: a `Corpus`
or a `Mixture`. Batch i is a function of seed, i and the source.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import numpy as np
from jaxtyping import Float, Int

from moekit.data.tasks import Prompt
from moekit.data.tokenizer import EOS, Tokenizer


@no_type_check  # a pytree: tree.map rebuilds it around leaves of any shape
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Packed examples. Segment 0 is padding; positions restart with every example."""

    inputs: Int[np.ndarray, "B L"]
    input_segments: Int[np.ndarray, "B L"]
    input_positions: Int[np.ndarray, "B L"]
    targets: Int[np.ndarray, "B T"]
    target_segments: Int[np.ndarray, "B T"]
    target_positions: Int[np.ndarray, "B T"]
    loss_weights: Float[np.ndarray, "B T"]  # 1 on real target tokens, else 0


def batches(
    source: Any,
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
):
    """A grain iterator of packed `Batch`es with get_state() and set_state() for exact resume.

    The global batch is the concatenation of `data_shards(batch_size)` packed streams. `shard`
    (i, n) gives part i of n of its rows, and reads only their streams. Without `repeat` it ends
    after one pass, filled up with padding.

    Raises:
      ValueError: n does not divide the number of streams.
    """
    import grain

    streams = data_shards(batch_size)
    i, n = shard
    if streams % n:
        raise ValueError(
            f"a batch of {batch_size} rows cannot be read by {n} processes: use rows or processes "
            "so that the latter divide the former, at most 64"
        )
    rows = batch_size // streams
    pairs = source.token_pairs(
        tokenizer,
        input_length=input_length,
        target_length=target_length,
        seed=seed,
        split=split,
        shuffle=shuffle,
        repeat=repeat,
    )

    def stream(j):
        with warnings.catch_warnings():
            # grain warns that an infinite dataset cannot be sliced evenly; ours needs no even ends
            warnings.simplefilter("ignore")
            own = pairs[j::streams] if streams > 1 else pairs
        packed = grain.experimental.FirstFitPackIterDataset(
            own.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)),
            length_struct={"inputs": input_length, "targets": target_length},
            num_packing_bins=max(2 * rows, 16),
            seed=seed,
            shuffle_bins=shuffle,
        )
        return iter(packed.batch(rows, batch_fn=lambda some: _stack(some, rows)))

    return _Joined({j: stream(j) for j in range(i * streams // n, (i + 1) * streams // n)})


def data_shards(batch_size: int) -> int:
    """Of how many independent streams a batch is made: a function of its rows alone."""
    return math.gcd(batch_size, 64)


class _Joined:
    """Batches side by side, until all streams have ended."""

    def __init__(self, streams: dict[int, Any]):
        self._streams = streams

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        parts = [next(stream, None) for stream in self._streams.values()]
        if not any(parts):
            raise StopIteration
        blank = jax.tree.map(np.zeros_like, next(filter(None, parts)))
        return jax.tree.map(lambda *p: np.concatenate(p), *(part or blank for part in parts))

    def get_state(self) -> dict[str, Any]:
        return {str(j): copy.deepcopy(s.get_state()) for j, s in self._streams.items()}

    def set_state(self, states: dict[str, Any]) -> None:
        for j, stream in self._streams.items():
            stream.set_state(states[str(j)])

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()


def _stack(rows: Sequence[dict], batch_size: int) -> Batch:
    """Packed rows as a Batch, filled up with empty rows."""

    def field(name: str) -> np.ndarray:
        stacked = np.stack([row[name] for row in rows]).astype(np.int32)
        return np.pad(stacked, ((0, batch_size - len(rows)), (0, 0)))

    segments = field("targets_segment_ids")
    return Batch(
        inputs=field("inputs"),
        input_segments=field("inputs_segment_ids"),
        input_positions=field("inputs_positions"),
        targets=field("targets"),
        target_segments=segments,
        target_positions=field("targets_positions"),
        loss_weights=(segments > 0).astype(np.float32),
    )


def tokenize_prompt(
    prompt: Prompt, tokenizer: Tokenizer, *, input_length: int, target_length: int
) -> dict[str, Int[np.ndarray, "length"]]:
    """Ids of a prompt. What does not fit is cut: inputs from the left, for the question stands
    last; targets from the right. Both end with end of sequence."""
    inputs = tokenizer.encode(prompt.input)[-(input_length - 1) :]
    targets = tokenizer.encode(prompt.target)[: target_length - 1]
    return {
        "inputs": np.array([*inputs, EOS], np.int32),
        "targets": np.array([*targets, EOS], np.int32),
    }


def pad_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, *, input_length: int, target_length: int
) -> Batch:
    """One prompt a row, for evaluation and tracing.

    Raises:
      ValueError: a prompt is longer than input_length or a target longer than target_length.
    """
    pairs = []
    for prompt in prompts:
        pair = {}
        for name, text, limit in (
            ("inputs", prompt.input, input_length),
            ("targets", prompt.target, target_length),
        ):
            pair[name] = [*tokenizer.encode(text), EOS]
            if len(pair[name]) > limit:
                raise ValueError(
                    f"{name} of {prompt.task or 'prompt'} {prompt.id!r} are {len(pair[name])} "
                    f"tokens long, more than the {limit} allowed: shorten the text or raise the "
                    "length"
                )
        pairs.append(pair)
    return pad_pairs(pairs, input_length=input_length, target_length=target_length)


def pad_pairs(
    pairs: Sequence[Mapping[str, Sequence[int] | Int[np.ndarray, "..."]]],
    *,
    input_length: int,
    target_length: int,
) -> Batch:
    """One pair of token ids {"inputs", "targets"} a row, filled up with padding."""
    inputs = _rectangle([pair["inputs"] for pair in pairs], input_length)
    targets = _rectangle([pair["targets"] for pair in pairs], target_length)
    return Batch(*inputs, *targets, loss_weights=targets[1].astype(np.float32))


def _rectangle(rows: Sequence[Sequence[int] | np.ndarray], length: int) -> tuple[np.ndarray, ...]:
    ids = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows])[:, None]
    segments = (np.arange(length) < lengths).astype(np.int32)
    return ids, segments, np.arange(length, dtype=np.int32) * segments


def unigram_entropy(stream: Iterable[Batch], vocab_size: int) -> float:
    """Entropy of the target tokens' own unigram distribution, nats a token.

    The loss of the best model that ignores inputs and context: what learning must beat.
    """
    counts = np.zeros(vocab_size)
    for batch in stream:
        counts += np.bincount(
            batch.targets[batch.loss_weights > 0].reshape(-1), minlength=vocab_size
        )
    probs = counts[counts > 0] / counts.sum()
    return float(-(probs * np.log(probs)).sum())
