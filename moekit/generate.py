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

from moekit.data.pipeline import pad_prompts
from moekit.data.tasks import Prompt
from moekit.data.tokenizer import EOS, PAD, Tokenizer, load_tokenizer
from moekit.hosts import to_host
from moekit.model.transformer import EncoderDecoder
from moekit.sharding import row_shards, split_rows


def bucket(length: int, longest: int) -> int:
    """The next power of two from 64, at most `longest`: few shapes, few compilations."""
    size = 64
    while size < length:
        size *= 2
    return min(size, longest)


def rows_at(length: int, most: int, mesh: Mesh | None = None) -> int:
    """Rows of a batch of that length: attention takes memory by its square. A mesh divides them."""
    rows, shards = max(1, min(most, 2**23 // length**2)), row_shards(mesh)
    return -(-rows // shards) * shards


def length_groups(
    lengths: Sequence[int],
    longest: int,
    most: int,
    parts: Sequence[int] | None = None,
    mesh: Mesh | None = None,
) -> Iterator[list[int]]:
    """Indices of texts of similar length, for batches of `rows_at` their bucket.

    Args:
      parts: what each text brings to its batch (its options, say), which holds `4 * most` in all.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = len(group) >= rows_at(bucket(lengths[i], longest), most, mesh)
        if group and (full or (parts and sum(parts[j] for j in (*group, i)) > 4 * most)):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


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
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; use 0 (greedy) or more")
    tokenizer = tokenizer or load_tokenizer(model.cfg.tokenizer)
    prompts = [Prompt(text, "", id=str(i)) for i, text in enumerate(texts)]
    lengths = [len(tokenizer.encode(text)) + 1 for text in texts]
    longest, key = model.cfg.max_length, jax.random.key(seed)
    graphdef, state = nnx.split(model)
    run = _compiled(graphdef, max_new_tokens, temperature > 0)
    answers = [""] * len(texts)
    groups = list(length_groups(lengths, longest, batch_size, mesh=model.mesh))
    bar = tqdm(groups, desc="generate", unit="batch", leave=False, disable=len(groups) < 2)
    for number, group in enumerate(bar):
        size = bucket(max(lengths[i] for i in group), longest)
        batch = pad_prompts(
            [prompts[i] for i in group], tokenizer, input_length=size, target_length=1
        )
        fill = ((0, rows_at(size, batch_size, model.mesh) - len(group)), (0, 0))
        inputs, segments = np.pad(batch.inputs, fill), np.pad(batch.input_segments, fill)
        inputs, segments = split_rows((inputs, segments), model.mesh)
        noise = jax.random.fold_in(key, number)
        out = to_host(run(state, inputs, segments, noise, temperature))
        for i, ids in zip(group, out, strict=False):
            answers[i] = tokenizer.decode(ids)
    return answers
