"""Greedy and sampled decoding with a KV cache.

B batch, L input length, T longest output.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key
from tqdm import tqdm

from moekit.data.batch import pad_pairs
from moekit.data.tokenizer import EOS, PAD, Tokenizer, load_tokenizer
from moekit.distributed import to_host
from moekit.model.transformer import EncoderDecoder
from moekit.sharding import batch_shards, shard_batch


def bucket(length: int, longest: int) -> int:
    """The next power of two from 64, at most `longest`: few shapes, few compilations."""
    size = 64
    while size < length:
        size *= 2
    return min(size, longest)


def rows_at(length: int, most: int, mesh: Mesh | None = None) -> int:
    """Rows of a batch of that length: attention takes memory by its square. A mesh divides them."""
    rows, shards = max(1, min(most, 2**23 // length**2)), batch_shards(mesh)
    return -(-rows // shards) * shards


def length_groups(
    lengths: Sequence[int],
    longest: int,
    most: int,
    parts: Sequence[int] | None = None,
    mesh: Mesh | None = None,
) -> Iterator[tuple[list[int], int, int]]:
    """Indices of texts of similar length, with the length and the rows of their batch.

    Args:
      parts: what each text brings to its batch (its options, say), which holds `4 * most` in all.
    """
    group: list[int] = []
    size = rows = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        new = bucket(lengths[i], longest)
        full = len(group) >= rows_at(new, most, mesh)
        if group and (full or (parts and sum(parts[j] for j in (*group, i)) > 4 * most)):
            yield group, size, rows
            group = []
        group.append(i)
        size, rows = new, rows_at(new, most, mesh)
    if group:
        yield group, size, rows


def encode_inputs(texts: Sequence[str], tokenizer: Tokenizer, longest: int) -> list[list[int]]:
    """Token ids of texts with end of sequence.

    Raises:
      ValueError: a text is longer than the model reads.
    """
    rows = [[*tokenizer.encode(text), EOS] for text in texts]
    for i, row in enumerate(rows):
        if len(row) > longest:
            raise ValueError(
                f"text {i} ({texts[i][:40]!r}..) is {len(row)} tokens long, more than the "
                f"{longest} that the model reads: shorten it or raise the model's max_length"
            )
    return rows


def input_rows(
    ids: Sequence[Sequence[int]], length: int, rows: int, mesh: Mesh | None
) -> tuple[Int[Array | np.ndarray, "B L"], Int[Array | np.ndarray, "B L"]]:
    """Inputs and segments of a batch of so many rows, the last ones padding."""
    pairs = [{"inputs": row, "targets": []} for row in ids]
    batch = pad_pairs(pairs, input_length=length, target_length=1)
    fill = ((0, rows - len(ids)), (0, 0))
    return shard_batch((np.pad(batch.inputs, fill), np.pad(batch.input_segments, fill)), mesh)


@functools.lru_cache(maxsize=32)
def _compiled(graphdef, length: int, sample: bool):
    def run(
        state,
        inputs: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        key: Key[Array, ""],
        temperature,
    ) -> Int[Array, "B T"]:
        model = nnx.merge(graphdef, state)
        cache = model.start_cache(model.encode(inputs, segments), length)
        rows = inputs.shape[0]

        def unfinished(carry):
            step, _, done, _, _ = carry
            return (step < length) & ~done.all()

        def step(carry):
            step, tokens, done, cache, out = carry
            logits, cache = model.decode_step(tokens, cache)
            if sample:
                noise = jax.random.fold_in(key, step)
                tokens = jax.random.categorical(noise, logits / temperature)
            else:
                tokens = jnp.argmax(logits, -1)
            tokens = jnp.where(done, PAD, tokens).astype(jnp.int32)
            out = jax.lax.dynamic_update_slice_in_dim(out, tokens[:, None], step, axis=1)
            return step + 1, tokens, done | (tokens == EOS), cache, out

        # rows of padding are done before they start
        start = (
            jnp.zeros((), jnp.int32),
            jnp.full(rows, PAD, jnp.int32),
            (segments == 0).all(-1),
            cache,
            jnp.full((rows, length), PAD, jnp.int32),
        )
        return jax.lax.while_loop(unfinished, step, start)[-1]

    return jax.jit(run)


def generate(
    model: EncoderDecoder,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 32,
) -> list[str]:
    """What the model says to each text: greedily, or sampled at a temperature above 0.

    Args:
      batch_size: most texts at a time; long ones come in smaller batches.

    Raises:
      ValueError: a text is longer than the model's max_length, or temperature is negative.
    """
    tokenizer = tokenizer or load_tokenizer(model.cfg.tokenizer)
    ids = encode_inputs(texts, tokenizer, model.cfg.max_length)
    options = {"temperature": temperature, "seed": seed, "batch_size": batch_size}
    said = generate_ids(model, ids, max_new_tokens=max_new_tokens, **options)
    return [tokenizer.decode(row) for row in said]


def generate_ids(
    model: EncoderDecoder,
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[Int[np.ndarray, "T"]]:
    """`generate` from token ids to token ids, padded behind the end of sequence."""
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; use 0 (greedy) or more")
    graphdef, state = nnx.split(model)
    run, key = _compiled(graphdef, max_new_tokens, temperature > 0), jax.random.key(seed)
    lengths, said = list(map(len, ids)), [np.zeros(0, np.int32)] * len(ids)
    groups = list(length_groups(lengths, model.cfg.max_length, batch_size, mesh=model.mesh))
    bar = tqdm(groups, desc="generate", unit="batch", leave=False)
    for number, (group, length, rows) in enumerate(bar):
        inputs, segments = input_rows([ids[i] for i in group], length, rows, model.mesh)
        noise = jax.random.fold_in(key, number)
        out = to_host(run(state, inputs, segments, noise, temperature))
        for i, row in zip(group, out, strict=False):
            said[i] = row
    return said
