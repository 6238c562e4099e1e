"""T5's span corruption: hide spans of the input and predict them (Raffel 2020)."""

import numpy as np
from jaxtyping import Int

from moekit.data.tokenizer import EOS, NUM_SENTINELS, Tokenizer

RATE = 0.15  # share of tokens that are hidden
MEAN_SPAN = 3.0  # tokens


def span_corruption(
    tokens: Int[np.ndarray, "length"],
    rng: np.random.Generator,
    *,
    tokenizer: Tokenizer,
    rate: float = RATE,
    mean_span: float = MEAN_SPAN,
) -> tuple[Int[np.ndarray, "L"], Int[np.ndarray, "T"]]:
    """Hide random spans of a chunk of tokens.

    Returns inputs with a sentinel in place of each span, and targets with each sentinel followed
    by the tokens that it hides. As in T5, the chunk starts with a visible span. A single token is
    returned unchanged.
    """
    length = len(tokens)
    if length < 2:
        no_targets = np.zeros(0, np.int32)
        return tokens.astype(np.int32), no_targets
    num_hidden, num_spans = _noise(length, rate, mean_span)
    num_visible = length - num_hidden
    visible_lengths = _partition(num_visible, num_spans, rng)
    hidden_lengths = _partition(num_hidden, num_spans, rng)
    input_parts = []
    target_parts = []
    start = 0
    for span in range(num_spans):
        sentinel = np.array([tokenizer.sentinel(span)], np.int32)
        hidden_start = start + visible_lengths[span]
        hidden_end = hidden_start + hidden_lengths[span]
        visible = tokens[start:hidden_start]
        hidden = tokens[hidden_start:hidden_end]
        input_parts += [visible, sentinel]
        target_parts += [sentinel, hidden]
        start = hidden_end
    inputs = np.concatenate(input_parts)
    targets = np.concatenate(target_parts)
    return inputs.astype(np.int32), targets.astype(np.int32)


def restore(
    inputs: Int[np.ndarray, "L"],
    targets: Int[np.ndarray, "T"],
    tokenizer: Tokenizer,
) -> Int[np.ndarray, "length"]:
    """The original tokens of a corrupted chunk: the inverse of `span_corruption`."""
    sentinels = {tokenizer.sentinel(index) for index in range(NUM_SENTINELS)}
    span_of_sentinel: dict[int, list[int]] = {}
    span: list[int] = []
    for token in targets.tolist():
        if token in sentinels:
            span = span_of_sentinel.setdefault(token, [])
        elif token != EOS:
            span.append(token)
    tokens: list[int] = []
    for token in inputs.tolist():
        if token != EOS:
            tokens += span_of_sentinel.get(token, [token])
    return np.array(tokens, np.int32)


def chunk_length(
    input_length: int,
    target_length: int,
    rate: float = RATE,
    mean_span: float = MEAN_SPAN,
) -> int:
    """The longest chunk whose corrupted inputs and targets, with end of sequence, fit.

    T5: 568 tokens for 512 inputs and 114 targets.
    """
    length = 2
    while True:
        longer = length + 1
        num_hidden, num_spans = _noise(longer, rate, mean_span)
        num_visible = longer - num_hidden
        num_inputs = num_visible + num_spans + 1
        num_targets = num_hidden + num_spans + 1
        if num_inputs > input_length or num_targets > target_length:
            return length
        length = longer


def _noise(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """Number of hidden tokens and of hidden spans in a chunk (T5's rounding)."""
    num_hidden = round(length * rate)
    num_hidden = max(num_hidden, 1)
    num_hidden = min(num_hidden, length - 1)
    num_visible = length - num_hidden
    num_spans = round(num_hidden / mean_span)
    num_spans = max(num_spans, 1)
    num_spans = min(num_spans, num_visible, NUM_SENTINELS)
    return num_hidden, num_spans


def _partition(total: int, parts: int, rng: np.random.Generator) -> Int[np.ndarray, "parts"]:
    """Random positive lengths that sum to the total."""
    cuts = rng.choice(total - 1, parts - 1, replace=False) + 1
    cuts = np.sort(cuts)
    boundaries = np.concatenate([[0], cuts, [total]])
    return np.diff(boundaries)
