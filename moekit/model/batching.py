"""Batches of texts of similar length, for decoding, scoring and tracing.

B batch, L input length.
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from moekit.data.batch import pad_pairs
from moekit.data.tokenizer import EOS, Tokenizer
from moekit.sharding import batch_shards, shard_batch

SHORTEST = 64  # tokens
MAX_SCORES = 2**23  # attention scores of a head and layer in one batch: rows * length^2


def bucket_length(length: int, max_length: int) -> int:
    """The next power of two from 64, at most `max_length`: few shapes, few compilations."""
    bucket = SHORTEST
    while bucket < length:
        bucket *= 2
    return min(bucket, max_length)


def num_rows(length: int, max_batch: int, mesh: Mesh | None = None) -> int:
    """Rows of a batch of inputs of that length.

    Long inputs come in smaller batches, because attention scores grow with the square of the
    length. The result is a multiple of the mesh's batch shards.
    """
    rows = max(1, min(max_batch, MAX_SCORES // length**2))
    shards = batch_shards(mesh)
    return -(-rows // shards) * shards


def length_groups(
    lengths: Sequence[int],
    max_length: int,
    max_batch: int,
    options: Sequence[int] | None = None,
    mesh: Mesh | None = None,
) -> Iterator[tuple[list[int], int, int]]:
    """Groups of texts of similar length: (indices, padded length, rows of the batch).

    Args:
      lengths: tokens of each text.
      options: answer options of each text; a batch holds at most `4 * max_batch` of them.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: lengths[index])
    group: list[int] = []
    num_options = padded_length = rows = 0
    for index in by_length:
        own_length = bucket_length(lengths[index], max_length)
        own_rows = num_rows(own_length, max_batch, mesh)
        own_options = options[index] if options else 0
        is_full = len(group) >= own_rows or num_options + own_options > 4 * max_batch
        if group and is_full:
            yield group, padded_length, rows
            group = []
            num_options = 0
        group.append(index)
        num_options += own_options
        padded_length = own_length
        rows = own_rows
    if group:
        yield group, padded_length, rows


def encode_inputs(texts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> list[list[int]]:
    """Token ids of texts, each with the end of sequence.

    Raises:
      ValueError: a text has more than `max_length` tokens, or is not valid Unicode.
    """
    encoded = []
    for index, text in enumerate(texts):
        _check_unicode(text, index)
        ids = [*tokenizer.encode(text), EOS]
        if len(ids) > max_length:
            raise ValueError(
                f"text {index} ({text[:40]!r}..) is {len(ids)} tokens long, more than the "
                f"{max_length} that the model reads: shorten it or raise the model's max_length"
            )
        encoded.append(ids)
    return encoded


def _check_unicode(text: str, index: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = text[error.start]
        raise ValueError(
            f"text {index} has a lone surrogate, U+{ord(character):04X}, at character "
            f"{error.start}, which UTF-8 cannot encode: remove it, or read the text again with "
            'errors="replace"'
        ) from None


def input_rows(
    inputs: Sequence[Sequence[int]], length: int, rows: int, mesh: Mesh | None
) -> tuple[Int[Array | np.ndarray, "B L"], Int[Array | np.ndarray, "B L"]]:
    """Token ids and segments of a batch of `rows` rows; rows without an input are padding."""
    pairs = [{"inputs": ids, "targets": []} for ids in inputs]
    batch = pad_pairs(pairs, input_length=length, target_length=1)
    arrays = (batch.inputs, batch.input_segments)
    return shard_batch(jax.tree.map(lambda array: pad_rows(array, rows), arrays), mesh)


def pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """An array with rows of zeros (padding) appended, `rows` in all."""
    missing = rows - len(array)
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
