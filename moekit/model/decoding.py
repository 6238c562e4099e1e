"""Greedy and sampled decoding with a KV cache.

A compiled loop decodes until every row has ended. Where the text must be looked at in between (to
stream it, or to find a stop text), the loop is left every few tokens and entered again.

B batch, L input length, T longest output, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moekit.data.tokenizer import EOS, PAD, Tokenizer, load_tokenizer
from moekit.distributed import to_host
from moekit.errors import not_finite
from moekit.model.batching import encode_inputs, input_rows, length_groups
from moekit.model.cache import Cache
from moekit.model.text_stream import stop_texts, text_pieces, until_stop
from moekit.model.transformer import EncoderDecoder
from moekit.progress import ProgressBar

CHUNK = 8  # tokens that are decoded between two looks at the text


@dataclass(frozen=True)
class _Settings:
    """How answers are decoded.

    Raises:
      ValueError: a value is out of range.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(
                f"temperature is {self.temperature}; use 0 (greedy) or a finite number above 0"
            )


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


class _Programs(NamedTuple):
    """Compiled functions: encode a batch, and decode its next tokens up to a limit."""

    start: Callable[..., _State]
    advance: Callable[..., _State]


@functools.lru_cache(maxsize=32)
def _compiled(graphdef: nnx.GraphDef, length: int, sample: bool) -> _Programs:
    """The programs for answers of up to `length` tokens."""

    def start(
        parameters: nnx.State,
        inputs: Int[Array, "B L"],
        segments: Int[Array, "B L"],
    ) -> _State:
        model = nnx.merge(graphdef, parameters)
        return _start(model, inputs, segments, length)

    def advance(
        parameters: nnx.State,
        state: _State,
        key: Key[Array, ""],
        temperature: Float[Array, ""],
        limit: Int[Array, ""],
    ) -> _State:
        model = nnx.merge(graphdef, parameters)

        def is_unfinished(current: _State) -> Bool[Array, ""]:
            has_room = current.step < limit
            return has_room & current.finite & ~current.finished.all()

        def decode_token(current: _State) -> _State:
            logits, cache = model.decode_step(current.tokens, current.cache)
            if sample:
                step_key = jax.random.fold_in(key, current.step)
                tokens = jax.random.categorical(step_key, logits / temperature)
            else:
                tokens = jnp.argmax(logits, -1)
            return _advance(current, tokens, logits, cache)

        return jax.lax.while_loop(is_unfinished, decode_token, state)

    # the cache is updated in place
    return _Programs(jax.jit(start), jax.jit(advance, donate_argnames="state"))


class _Group(NamedTuple):
    """Texts that are decoded together: their indices, and length and rows of the batch."""

    indices: list[int]
    length: int
    rows: int


def _groups(
    model: EncoderDecoder, inputs: Sequence[Sequence[int]], settings: _Settings
) -> list[_Group]:
    lengths = [len(ids) for ids in inputs]
    # one question should not cost as much as a full batch
    power_of_two = 1 << max(0, len(inputs) - 1).bit_length()
    max_batch = min(settings.batch_size, power_of_two)
    groups = length_groups(lengths, model.cfg.max_length, max_batch, mesh=model.mesh)
    return [_Group(indices, length, rows) for indices, length, rows in groups]


def _decode_group(
    model: EncoderDecoder,
    inputs: Sequence[Sequence[int]],
    group: _Group,
    key: Key[Array, ""],
    settings: _Settings,
    chunk: int,
) -> Iterator[Int[np.ndarray, "B T"]]:
    """All tokens that were generated so far, after every `chunk` tokens.

    Raises:
      ValueError: logits are not finite.
    """
    length = settings.max_new_tokens
    graphdef, parameters = nnx.split(model)
    programs = _compiled(graphdef, length, settings.temperature > 0)
    chosen = [inputs[index] for index in group.indices]
    tokens, segments = input_rows(chosen, group.length, group.rows, model.mesh)
    state = programs.start(parameters, tokens, segments)
    temperature = jnp.float32(settings.temperature)
    for step in range(0, length, chunk):
        limit = jnp.int32(min(step + chunk, length))
        state = programs.advance(parameters, state, key, temperature, limit)
        visible = (state.generated, state.finished, state.finite)
        generated, finished, finite = to_host(visible)
        if not finite:
            raise not_finite(model.cfg.name)
        yield generated
        if finished.all():
            return


@overload
def generate(
    model: EncoderDecoder,
    texts: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stream: Literal[False] = False,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 32,
) -> str: ...


@overload
def generate(
    model: EncoderDecoder,
    texts: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stream: Literal[True],
    tokenizer: Tokenizer | None = None,
    batch_size: int = 32,
) -> Iterator[str]: ...


@overload
def generate(
    model: EncoderDecoder,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stream: Literal[False] = False,
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
    stop: str | Sequence[str] = (),
    stream: bool = False,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 32,
) -> str | list[str] | Iterator[str]:
    """The model's answer to a text, or a list of answers to a list of texts.

    Args:
      max_new_tokens: longest answer, in tokens.
      temperature: 0 decodes greedily; above 0, tokens are sampled from
        softmax(logits / temperature).
      seed: of sampling.
      stop: a text or several; the answer ends before the first occurrence of any of them.
      stream: for one text, return an iterator of the answer's pieces, as they are decoded. Joined,
        they are the answer; a piece contains whole characters only.
      tokenizer: default the one that the model's configuration names.
      batch_size: most texts in a batch; long ones come in smaller batches.

    Raises:
      ValueError: a text is longer than the model's max_length or not valid Unicode, temperature
        is negative or not finite, max_new_tokens or batch_size is below 1, a stop text is empty,
        `stream` with a list of texts, or the model's parameters are not finite.
    """
    settings = _Settings(max_new_tokens, temperature, seed, batch_size)
    stops = stop_texts(stop)
    single = isinstance(texts, str)
    if stream and not single:
        raise ValueError("stream=True is for one text: pass a string, or a list without stream")
    tokenizer = tokenizer or load_tokenizer(model.cfg.tokenizer)
    if single:
        texts = [texts]
    inputs = encode_inputs(texts, tokenizer, model.cfg.max_length)
    if stream:
        return _stream(model, inputs, settings, tokenizer, stops)

    def has_stopped(ids: Int[np.ndarray, "T"]) -> bool:
        text = tokenizer.decode(ids)
        return until_stop(text, stops) != text

    generated = _generate_ids(model, inputs, settings, has_stopped if stops else None)
    answers = [until_stop(tokenizer.decode(ids), stops) for ids in generated]
    return answers[0] if single else answers


def _stream(
    model: EncoderDecoder,
    inputs: Sequence[Sequence[int]],
    settings: _Settings,
    tokenizer: Tokenizer,
    stops: Sequence[str],
) -> Iterator[str]:
    """The pieces of the answer to the only input."""
    (group,) = _groups(model, inputs, settings)
    key = _group_key(settings.seed, 0)
    decoded = _decode_group(model, inputs, group, key, settings, CHUNK)
    texts = (tokenizer.decode(tokens[0]) for tokens in decoded)
    return text_pieces(texts, stops)


def _group_key(seed: int, group_index: int) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(seed), group_index)


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
    settings = _Settings(max_new_tokens, temperature, seed, batch_size)
    return _generate_ids(model, inputs, settings)


def _generate_ids(
    model: EncoderDecoder,
    inputs: Sequence[Sequence[int]],
    settings: _Settings,
    has_stopped: Callable[[Int[np.ndarray, "T"]], bool] | None = None,
) -> list[Int[np.ndarray, "T"]]:
    """Generated ids of each input; a batch also ends when all of its answers have stopped."""
    chunk = CHUNK if has_stopped else settings.max_new_tokens
    groups = _groups(model, inputs, settings)
    generated = [np.zeros(0, np.int32)] * len(inputs)
    graphdef, _ = nnx.split(model)
    program = _compiled(graphdef, settings.max_new_tokens, settings.temperature > 0).advance
    progress = ProgressBar(groups, desc="generate", unit="batch", leave=False)
    for group_index, group in enumerate(progress):
        key = _group_key(settings.seed, group_index)
        with progress.compiling(program, (group.length, group.rows)):
            for tokens in _decode_group(model, inputs, group, key, settings, chunk):
                for row, index in enumerate(group.indices):
                    generated[index] = tokens[row]
                if has_stopped and _all_ended(generated, group.indices, has_stopped):
                    break
    return generated


def _all_ended(
    generated: Sequence[Int[np.ndarray, "T"]],
    indices: Sequence[int],
    has_stopped: Callable[[Int[np.ndarray, "T"]], bool],
) -> bool:
    answers = [generated[index] for index in indices]
    return all((ids == EOS).any() or has_stopped(ids) for ids in answers)
