"""From examples to batches of fixed shape: tokenize, pack, shard, resume.

B batch, L input length, T target length. A source is a `Corpus` or a `Mixture`, or anything with
their `token_pairs` and `labels`. Batch i is a function of seed, i and the source, whatever the
number of processes: by definition its rows come in equal parts from S = gcd(B, 64) data shards.
Shard s packs the examples s, s + S, .. of the source, and a process reads the shards of its rows.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import numpy as np
from jaxtyping import Float, Int

from moekit.data.tasks import Prompt
from moekit.data.tokenizer import EOS, Tokenizer

_SMALL = 2**13  # up to so many examples, their order is kept in memory


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
    workers: int = 0,
):
    """The `Stream` of packed batches of a source.

    Without `repeat` it ends after one pass, filled up with empty rows.

    Args:
      batch_size: rows of the global batch.
      shard: (i, n) is process i of n: it gets rows i * B / n to (i + 1) * B / n of every batch.
      workers: processes that read ahead, for hosts with cores to spare; 0 is a thread. They are
        spawned: a script needs its `if __name__ == "__main__":`, a notebook nothing.

    Raises:
      ValueError: shards cannot be divided among so many processes or workers.
    """
    from moekit.data.loader import MAX_SHARDS, Plan, Stream, data_shards

    shards, (process, processes) = data_shards(batch_size), shard
    if shards % processes or (shards // processes) % max(1, workers):
        raise ValueError(
            f"a batch of {batch_size} rows is made of {shards} data shards, which {processes} "
            f"processes of {workers} workers cannot share evenly: use numbers that divide {shards}"
            f", or a batch size that is a multiple of {MAX_SHARDS}"
        )
    lengths = {"input_length": input_length, "target_length": target_length}
    order = {"seed": seed, "split": split, "shuffle": shuffle, "repeat": repeat}
    pairs, labels = source.token_pairs(tokenizer, **lengths, **order), source.labels(split)
    limits, own = (input_length, target_length), shards // processes
    plan = Plan(pairs, limits, len(labels), shards, batch_size // shards)
    return Stream(plan, labels, range(process * own, (process + 1) * own), workers)


def stack(rows: Sequence[Sequence[Mapping]], limits: tuple[int, int]) -> Batch:
    """Rows of packed examples, filled up with padding."""
    sides = []
    for name, length in zip(("inputs", "targets"), limits, strict=True):
        ids, segments, positions = np.zeros((3, len(rows), length), np.int32)
        for r, row in enumerate(rows):
            start = 0
            for number, pair in enumerate(row, 1):
                end = start + len(pair[name])
                ids[r, start:end] = pair[name]
                segments[r, start:end] = number
                positions[r, start:end] = np.arange(end - start)
                start = end
        sides += [ids, segments, positions]
    return Batch(*sides, loss_weights=(sides[4] > 0).astype(np.float32))


def shuffled(k: int, _=None, *, size: int, seed: int) -> int:
    """The k-th of endless draws from so many examples: each once an epoch, in an order of its own.

    grain's shuffle needs no memory but walks through 2^16 numbers: slow for few examples.
    """
    epoch, i = divmod(k, size)
    if size <= _SMALL:
        return int(_permutation(seed % 2**32, epoch, size)[i])
    from grain.experimental import index_shuffle

    return index_shuffle(i, max_index=size - 1, seed=(seed + epoch) % 2**32, rounds=4)


@functools.lru_cache(maxsize=4096)
def _permutation(seed: int, epoch: int, size: int) -> Int[np.ndarray, "size"]:
    return np.random.default_rng([seed, epoch]).permutation(size).astype(np.int32)


def tokenize_prompt(
    prompt: Prompt, tokenizer: Tokenizer, *, input_length: int, target_length: int
) -> dict[str, Any]:
    """Token ids "inputs" and "targets" of a prompt, and how many tokens were "lost". What does not
    fit is cut: inputs from the left, for the question stands last; targets from the right. Both
    end with end of sequence."""
    inputs, targets = tokenizer.encode(prompt.input), tokenizer.encode(prompt.target)
    kept = inputs[-(input_length - 1) :], targets[: target_length - 1]
    return {
        "inputs": np.array([*kept[0], EOS], np.int32),
        "targets": np.array([*kept[1], EOS], np.int32),
        "lost": len(inputs) + len(targets) - len(kept[0]) - len(kept[1]),
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
    return stack([[pair] for pair in pairs], (input_length, target_length))


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
