"""Answers to texts: greedy, sampled or by beam search, with a KV cache.

A compiled loop decodes until every row has ended. Where the text must be looked at in between (to
stream it, or to find a stop text), the loop is left every few tokens and entered again.

Q questions of a batch, L input length, T longest output.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from moekit.data.tokenizer import EOS, Tokenizer, load_tokenizer
from moekit.distributed import to_host
from moekit.errors import not_finite
from moekit.generation_config import GenerationSettings
from moekit.model import beam_search, sampling
from moekit.model.batching import encode_inputs, input_rows, length_groups
from moekit.model.finite import require_finite
from moekit.model.incremental import Programs
from moekit.model.text_stream import stop_texts, text_pieces, until_stop
from moekit.model.transformer import EncoderDecoder
from moekit.progress import ProgressBar
from moekit.sharding import shard_batch

CHUNK = 8  # tokens that are decoded between two looks at the text
Value = TypeVar("Value")


@dataclass(frozen=True)
class _Settings:
    """How answers are decoded.

    Raises:
      ValueError: a value is out of range, or beams are to be sampled.
    """

    generation: GenerationSettings
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; use 1 or more")
        num_beams = self.generation.num_beams
        temperature = self.generation.temperature
        if num_beams > 1 and temperature > 0:
            raise ValueError(
                f"num_beams is {num_beams} and temperature {temperature}: beam search does not "
                "sample; use temperature=0, or num_beams=1"
            )

    def programs(self, model: EncoderDecoder) -> Programs:
        """The compiled functions of this kind of decoding."""
        generation = self.generation
        graphdef, _ = nnx.split(model)
        if generation.num_beams > 1:
            length = beam_search.Length(
                generation.length_normalization,
                generation.length_penalty,
                generation.max_new_tokens,
            )
            return beam_search.programs(graphdef, generation.num_beams, length)
        if generation.temperature == 0:
            return sampling.programs(graphdef, generation.max_new_tokens)
        return sampling.programs(
            graphdef,
            generation.max_new_tokens,
            sample=True,
            top_k=generation.top_k,
            nucleus=generation.top_p < 1,
        )


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
    settings: _Settings,
    chunk: int,
) -> Iterator[Int[np.ndarray, "Q T"]]:
    """All tokens that were generated so far, after every `chunk` tokens.

    Raises:
      ValueError: logits are not finite.
    """
    length = settings.generation.max_new_tokens
    programs = settings.programs(model)
    _, parameters = nnx.split(model)
    chosen = [inputs[index] for index in group.indices]
    tokens, segments = input_rows(chosen, group.length, group.rows, model.mesh)
    layer_states, state = programs.start(parameters, tokens, segments)
    random = None if settings.generation.num_beams > 1 else _random(model, group, settings)
    for step in range(0, length, chunk):
        limit = jnp.int32(min(step + chunk, length))
        if random is None:
            state = programs.advance(parameters, layer_states, state, limit)
        else:
            state = programs.advance(parameters, layer_states, state, limit, random)
        visible = (state.generated, state.finished, state.finite)
        generated, finished, finite = to_host(visible)
        if not finite:
            raise not_finite(model.cfg.name)
        yield generated
        if finished.all():
            return


def _random(model: EncoderDecoder, group: _Group, settings: _Settings) -> sampling.Sampling:
    """What sampling depends on; the key of a question depends on its index among all inputs."""
    indices = np.zeros(group.rows, np.int32)
    indices[: len(group.indices)] = group.indices
    return sampling.Sampling(
        keys=_row_keys(jax.random.key(settings.seed), shard_batch(indices, model.mesh)),
        temperature=jnp.float32(settings.generation.temperature),
        top_p=jnp.float32(settings.generation.top_p),
    )


@jax.jit
def _row_keys(key: Key[Array, ""], indices: Int[Array, "Q"]) -> Key[Array, "Q"]:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)


@overload
def generate(
    model: EncoderDecoder,
    texts: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    length_normalization: str | None = None,
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
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    length_normalization: str | None = None,
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
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    length_normalization: str | None = None,
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
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    length_normalization: str | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stream: bool = False,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 32,
) -> str | list[str] | Iterator[str]:
    """The model's answer to a text, or a list of answers to a list of texts.

    Settings that are left out are those of the model's configuration (`cfg.generation`). Penalties
    and bans of repeated words are left out on purpose: a score that they change is no longer the
    model's probability.

    What else is in the batch changes no answer, apart from rounding, in a dense or dropless model;
    the decoder never drops a token. With dispatch="capacity" the encoder's MoE layers drop tokens
    that exceed the slots of their group, and a group spans the texts of a batch: raise
    `eval_capacity_factor`, or use dispatch="dropless", to be independent of it.

    Args:
      max_new_tokens: longest answer, in tokens.
      temperature: 0 decodes greedily; above 0, tokens are sampled from
        softmax(logits / temperature).
      top_k: sample from the k most probable tokens only; 0 is off.
      top_p: sample from the smallest set of most probable tokens whose probabilities add up to
        this (Holtzman 2020); 1 is off.
      num_beams: beams of beam search; 1 is off.
      length_penalty: exponent of the length by which beam search divides the log-probability of an
        answer; a larger one prefers longer answers.
      length_normalization: that length, for n tokens: "t5" is (5 + n) / 6 (Wu 2016), "transformers"
        is n, with the rules of transformers about when the search ends.
      seed: of sampling. The random numbers of a text depend on its index in the list.
      stop: a text or several; the answer ends before the first occurrence of any of them.
      stream: for one text, return an iterator of the answer's pieces, as they are decoded. Joined,
        they are the answer; a piece contains whole characters only.
      tokenizer: default the one that the model's configuration names.
      batch_size: most texts in a batch; long ones come in smaller batches.

    Raises:
      ValueError: a text is longer than the model's max_length or not valid Unicode, a setting is
        out of range, top_k or top_p is given for greedy decoding, temperature for beams, a stop
        text is empty, `stream` with a list of texts or with beams, or the model's parameters are
        not finite.
    """
    generation = generation_settings(
        model.cfg.generation,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_beams=num_beams,
        length_penalty=length_penalty,
        length_normalization=length_normalization,
    )
    vocab_size = model.cfg.vocab_size
    if generation.num_beams > vocab_size:
        raise ValueError(f"num_beams is {generation.num_beams}; use at most {vocab_size} (tokens)")
    settings = _Settings(generation, seed, batch_size)
    stops = stop_texts(stop)
    single = isinstance(texts, str)
    if stream:
        _check_stream(single, generation.num_beams)
    tokenizer = tokenizer or load_tokenizer(model.cfg.tokenizer)
    if single:
        texts = [texts]
    inputs = encode_inputs(texts, tokenizer, model.cfg.max_length)
    if stream:
        return _stream(model, inputs, settings, tokenizer, stops)

    def has_stopped(ids: Int[np.ndarray, "T"]) -> bool:
        text = tokenizer.decode(ids)
        return until_stop(text, stops) != text

    # with beams, the best answer is only known at the end
    watches = bool(stops) and generation.num_beams == 1
    generated = _generate_ids(model, inputs, settings, has_stopped if watches else None)
    answers = [until_stop(tokenizer.decode(ids), stops) for ids in generated]
    return answers[0] if single else answers


def generation_settings(
    defaults: GenerationSettings,
    *,
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    num_beams: int | None,
    length_penalty: float | None,
    length_normalization: str | None,
) -> GenerationSettings:
    """Settings, with those that are not None in the place of the defaults.

    Raises:
      ValueError: a value is out of range, or top_k or top_p is given although nothing is sampled.
    """
    settings = GenerationSettings(
        max_new_tokens=_first(max_new_tokens, defaults.max_new_tokens),
        temperature=_first(temperature, defaults.temperature),
        top_k=_first(top_k, defaults.top_k),
        top_p=_first(top_p, defaults.top_p),
        num_beams=_first(num_beams, defaults.num_beams),
        length_penalty=_first(length_penalty, defaults.length_penalty),
        length_normalization=_first(length_normalization, defaults.length_normalization),
    )
    if settings.temperature == 0:
        for name, value in (("top_k", top_k), ("top_p", top_p)):
            if value is not None:
                raise ValueError(
                    f"{name} is {value}, but temperature is 0, which is greedy: give a "
                    f"temperature to sample with, for example 1.0, or leave {name} out"
                )
    return settings


def _first(given: Value | None, default: Value) -> Value:
    return default if given is None else given


def _check_stream(single: bool, num_beams: int) -> None:
    if not single:
        raise ValueError("stream=True is for one text: pass a string, or a list without stream")
    if num_beams > 1:
        raise ValueError(
            f"stream=True with num_beams={num_beams}: which beam is the answer is known at the end "
            "only; use num_beams=1, or leave stream out"
        )


def _stream(
    model: EncoderDecoder,
    inputs: Sequence[Sequence[int]],
    settings: _Settings,
    tokenizer: Tokenizer,
    stops: Sequence[str],
) -> Iterator[str]:
    """The pieces of the answer to the only input."""
    require_finite(model)
    (group,) = _groups(model, inputs, settings)
    decoded = _decode_group(model, inputs, group, settings, CHUNK)
    texts = (tokenizer.decode(tokens[0]) for tokens in decoded)
    return text_pieces(texts, stops)


def generate_ids(
    model: EncoderDecoder,
    inputs: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    num_beams: int = 1,
    length_penalty: float = 0.6,
    length_normalization: str = "t5",
    seed: int = 0,
    batch_size: int = 32,
) -> list[Int[np.ndarray, "T"]]:
    """`generate` from token ids to token ids, with padding after the end of sequence.

    Greedy unless the arguments say otherwise: the model's own settings are not read.
    """
    generation = GenerationSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        num_beams=num_beams,
        length_penalty=length_penalty,
        length_normalization=length_normalization,
    )
    return _generate_ids(model, inputs, _Settings(generation, seed, batch_size))


def _generate_ids(
    model: EncoderDecoder,
    inputs: Sequence[Sequence[int]],
    settings: _Settings,
    has_stopped: Callable[[Int[np.ndarray, "T"]], bool] | None = None,
) -> list[Int[np.ndarray, "T"]]:
    """Generated ids of each input; a batch also ends when all of its answers have stopped."""
    require_finite(model)
    chunk = CHUNK if has_stopped else settings.generation.max_new_tokens
    groups = _groups(model, inputs, settings)
    generated = [np.zeros(0, np.int32)] * len(inputs)
    program = settings.programs(model).advance
    progress = ProgressBar(groups, desc="generate", unit="batch", leave=False)
    for group in progress:
        with progress.compiling(program, (group.length, group.rows)):
            for tokens in _decode_group(model, inputs, group, settings, chunk):
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
