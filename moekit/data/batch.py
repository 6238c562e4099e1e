"""Batches of fixed shape: examples packed into rows or padded, one a row.

B batch, L input length, T target length.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, no_type_check, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, Int

from moekit.data.tasks import Prompt
from moekit.data.tokenizer import EOS, Tokenizer

TokenPair = Mapping[str, Any]  # token ids "inputs" and "targets"


@runtime_checkable
class Source(Protocol):
    """What a stream of batches needs of a corpus or mixture."""

    def token_pairs(
        self,
        tokenizer: Tokenizer,
        *,
        input_length: int,
        target_length: int,
        seed: int,
        split: str,
        shuffle: bool,
        repeat: bool,
    ) -> Any:
        """Dicts of token ids "inputs" and "targets", "task" and "truncated", by index."""

    def labels(self, split: str) -> tuple[tuple[str, str], ...]:
        """(task, cluster) for each value of "task"."""


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


def stack_rows(rows: Sequence[Sequence[TokenPair]], limits: tuple[int, int]) -> Batch:
    """A batch of rows of packed examples, filled up with padding.

    Args:
      limits: input and target length of a row; the examples of each row fit into them.
    """
    input_length, target_length = limits
    inputs, input_segments, input_positions = _lay_out(rows, "inputs", input_length)
    targets, target_segments, target_positions = _lay_out(rows, "targets", target_length)
    return Batch(
        inputs=inputs,
        input_segments=input_segments,
        input_positions=input_positions,
        targets=targets,
        target_segments=target_segments,
        target_positions=target_positions,
        loss_weights=(target_segments > 0).astype(np.float32),
    )


def _lay_out(
    rows: Sequence[Sequence[TokenPair]], side: str, length: int
) -> Int[np.ndarray, "3 B length"]:
    """Token ids, segments and positions of one side of all rows."""
    ids, segments, positions = arrays = np.zeros((3, len(rows), length), np.int32)
    for row_index, row in enumerate(rows):
        start = 0
        for segment, pair in enumerate(row, 1):
            tokens = pair[side]
            end = start + len(tokens)
            ids[row_index, start:end] = tokens
            segments[row_index, start:end] = segment
            positions[row_index, start:end] = np.arange(len(tokens))
            start = end
    return arrays


def tokenize_prompt(
    prompt: Prompt, tokenizer: Tokenizer, *, input_length: int, target_length: int
) -> dict[str, Any]:
    """Token ids "inputs" and "targets" of a prompt, and the number of "truncated" tokens.

    Inputs are truncated from the left, because the question comes last, and targets from the
    right. Both end with end of sequence.
    """
    inputs = tokenizer.encode(prompt.input)
    targets = tokenizer.encode(prompt.target)
    kept_inputs = inputs[-(input_length - 1) :]
    kept_targets = targets[: target_length - 1]
    removed = len(inputs) - len(kept_inputs) + len(targets) - len(kept_targets)
    return {
        "inputs": np.array([*kept_inputs, EOS], np.int32),
        "targets": np.array([*kept_targets, EOS], np.int32),
        "truncated": removed,
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
        inputs = [*tokenizer.encode(prompt.input), EOS]
        targets = [*tokenizer.encode(prompt.target), EOS]
        _check_length(prompt, "inputs", len(inputs), input_length)
        _check_length(prompt, "targets", len(targets), target_length)
        pairs.append({"inputs": inputs, "targets": targets})
    return pad_pairs(pairs, input_length=input_length, target_length=target_length)


def _check_length(prompt: Prompt, side: str, length: int, limit: int) -> None:
    if length > limit:
        raise ValueError(
            f"{side} of {prompt.task or 'prompt'} {prompt.id!r} are {length} tokens long, more "
            f"than the {limit} allowed: shorten the text or raise the length"
        )


def pad_pairs(
    pairs: Sequence[Mapping[str, Sequence[int] | Int[np.ndarray, "..."]]],
    *,
    input_length: int,
    target_length: int,
) -> Batch:
    """One pair of token ids {"inputs", "targets"} a row, filled up with padding."""
    return stack_rows([[pair] for pair in pairs], (input_length, target_length))


def unigram_entropy(stream: Iterable[Batch], vocab_size: int) -> float:
    """Entropy of the target tokens' own unigram distribution, in nats a token.

    This is the loss of the best model that ignores inputs and context: what learning must beat.
    """
    counts = np.zeros(vocab_size)
    for batch in stream:
        real_targets = batch.targets[batch.loss_weights > 0]
        counts += np.bincount(real_targets, minlength=vocab_size)
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())
