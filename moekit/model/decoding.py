"""Greedy and sampled decoding with a KV cache.

B batch, L input length, T longest output, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key
from tqdm import tqdm

from moekit.data.tokenizer import EOS, PAD, Tokenizer, load_tokenizer
from moekit.distributed import to_host
from moekit.errors import not_finite
from moekit.model.batching import encode_inputs, input_rows, length_groups
from moekit.model.cache import Cache
from moekit.model.transformer import EncoderDecoder


class _State(NamedTuple):
    """State of the decoding loop."""

    step: Int[Array, ""]
    tokens: Int[Array, "B"]  # the last ones, which the decoder reads next
    finished: Bool[Array, "B"]
    finite: Bool[Array, ""]  # False once a logit is NaN or infinite
    cache: Cache
    generated: Int[Array, "B T"]


def _start(
    model: EncoderDecoder,
    inputs: Int[Array, "B L"],
    segments: Int[Array, "B L"],
    length: int,
) -> _State:
    encoded = model.encode(inputs, segments)
    rows = inputs.shape[0]
    is_padding = (segments == 0).all(-1)
    return _State(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full(rows, PAD, jnp.int32),
        finished=is_padding,
        finite=jnp.ones((), bool),
        cache=model.start_cache(encoded, length),
        generated=jnp.full((rows, length), PAD, jnp.int32),
    )


def _advance(
    state: _State,
    tokens: Int[Array, "B"],
    logits: Float[Array, "B V"],
    cache: Cache,
) -> _State:
    """The state after the next token of every unfinished row."""
    tokens = jnp.where(state.finished, PAD, tokens).astype(jnp.int32)
    generated = jax.lax.dynamic_update_slice_in_dim(
        state.generated, tokens[:, None], state.step, axis=1
    )
    return _State(
        step=state.step + 1,
        tokens=tokens,
        finished=state.finished | (tokens == EOS),
        finite=state.finite & jnp.isfinite(logits).all(),
        cache=cache,
        generated=generated,
    )


@functools.lru_cache(maxsize=32)
def _compiled(graphdef: nnx.GraphDef, length: int, sample: bool) -> Callable[..., tuple]:
    """A compiled function that decodes up to `length` tokens of each row of a batch."""

    def decode(
        state: nnx.State,
        inputs: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        key: Key[Array, ""],
        temperature: Float[Array, ""],
    ) -> tuple[Int[Array, "B T"], Bool[Array, ""]]:
        model = nnx.merge(graphdef, state)

        def is_unfinished(current: _State) -> Bool[Array, ""]:
            has_room = current.step < length
            return has_room & current.finite & ~current.finished.all()

        def decode_token(current: _State) -> _State:
            logits, cache = model.decode_step(current.tokens, current.cache)
            if sample:
                step_key = jax.random.fold_in(key, current.step)
                tokens = jax.random.categorical(step_key, logits / temperature)
            else:
                tokens = jnp.argmax(logits, -1)
            return _advance(current, tokens, logits, cache)

        start = _start(model, inputs, segments, length)
        last = jax.lax.while_loop(is_unfinished, decode_token, start)
        return last.generated, last.finite

    return jax.jit(decode)


@overload
def generate(
    model: EncoderDecoder,
    texts: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 32,
) -> str: ...


@overload
def generate(
    model: EncoderDecoder,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 32,
) -> list[str]: ...


def generate(
    model: EncoderDecoder,
    texts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 32,
) -> str | list[str]:
    """The model's answer to a text, or a list of answers to a list of texts.

    Args:
      max_new_tokens: longest answer, in tokens.
      temperature: 0 decodes greedily; above 0, tokens are sampled from
        softmax(logits / temperature).
      seed: of sampling.
      tokenizer: default the one that the model's configuration names.
      batch_size: most texts in a batch; long ones come in smaller batches.

    Raises:
      ValueError: a text is longer than the model's max_length or not valid Unicode, temperature
        is negative or not finite, max_new_tokens or batch_size is below 1, or the model's
        parameters are not finite.
    """
    single = isinstance(texts, str)
    _check_settings(max_new_tokens, temperature, batch_size)
    tokenizer = tokenizer or load_tokenizer(model.cfg.tokenizer)
    if single:
        texts = [texts]
    inputs = encode_inputs(texts, tokenizer, model.cfg.max_length)
    generated = generate_ids(
        model,
        inputs,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    answers = [tokenizer.decode(ids) for ids in generated]
    return answers[0] if single else answers


def generate_ids(
    model: EncoderDecoder,
    inputs: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[Int[np.ndarray, "T"]]:
    """`generate` from token ids to token ids, with padding after the end of sequence."""
    _check_settings(max_new_tokens, temperature, batch_size)
    graphdef, state = nnx.split(model)
    decode = _compiled(graphdef, max_new_tokens, temperature > 0)
    key = jax.random.key(seed)
    lengths = [len(ids) for ids in inputs]
    max_length = model.cfg.max_length
    groups = list(length_groups(lengths, max_length, batch_size, mesh=model.mesh))
    generated = [np.zeros(0, np.int32)] * len(inputs)
    progress = tqdm(groups, desc="generate", unit="batch", leave=False)
    for batch_index, (indices, length, rows) in enumerate(progress):
        group = [inputs[index] for index in indices]
        tokens, segments = input_rows(group, length, rows, model.mesh)
        batch_key = jax.random.fold_in(key, batch_index)
        decoded = decode(state, tokens, segments, batch_key, jnp.float32(temperature))
        outputs, finite = to_host(decoded)
        if not finite:
            raise not_finite(model.cfg.name)
        for row, index in enumerate(indices):
            generated[index] = outputs[row]
    return generated


def _check_settings(max_new_tokens: int, temperature: float, batch_size: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; use 1 or more")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use 1 or more")
    if not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature is {temperature}; use 0 (greedy) or a finite number above 0")
