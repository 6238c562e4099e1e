"""The decoder applied to a few more tokens at a time, with a KV cache.

One path serves greedy decoding and sampling (one row of a question, one token at a time), beam
search (several rows) and the scoring of options (several rows, all of their tokens at once). An
expert takes every token that is routed to it: nothing is dropped, so that a row does not depend on
the rows beside it.

Q questions, W rows of each, S new tokens of a row, L input length, T longest output, D d_model, N
heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moekit.model.cache import Cache, LayerCache
from moekit.model.stack import DecodingContext
from moekit.model.transformer import Encoded, EncoderDecoder
from moekit.sharding import use_mesh

LayerStates = Sequence[nnx.State]  # see Stack.layer_states
State = TypeVar("State")  # of a decoding loop; has the fields step, finished and finite


class Programs(NamedTuple):
    """Compiled functions: encode a batch, and decode up to a limit of tokens."""

    start: Callable[..., tuple[LayerStates, Any]]
    advance: Callable[..., Any]


def decode_until(
    limit: Int[Array, ""],
    decode: Callable[[State], State],
    state: State,
) -> State:
    """Decode one token after the other until all rows have ended, or up to a number of tokens.

    It ends early where a logit was NaN or infinite.
    """

    def is_unfinished(state: State) -> Bool[Array, ""]:
        has_room = state.step < limit
        return has_room & state.finite & ~state.finished.all()

    return jax.lax.while_loop(is_unfinished, decode, state)


def start_cache(
    model: EncoderDecoder,
    states: LayerStates,
    encoded: Encoded,
    *,
    rows: int,
    length: int,
) -> Cache:
    """An empty cache for up to `length` tokens of `rows` rows of each question.

    The encoder states are projected here, once for all rows and tokens of a question.

    Args:
      states: `model.decoder.layer_states()`.
    """
    questions = encoded.segments.shape[0]
    layers = []
    with use_mesh(model.mesh):
        for layer in model.decoder.layers(states):
            keys, values = layer.cross_attention.keys_values(encoded.states)
            memory_keys = keys.transpose(0, 2, 1, 3)
            memory_values = values.transpose(0, 2, 1, 3)
            _, num_heads, _, head_dim = memory_keys.shape
            shape = (questions, num_heads, rows, length, head_dim)
            empty = jnp.zeros(shape, memory_keys.dtype)
            layers.append(LayerCache(empty, empty, memory_keys, memory_values))
    own_row = jnp.arange(rows)[:, None]
    owner = jnp.broadcast_to(own_row, (questions, rows, length))
    return Cache(tuple(layers), encoded.segments, owner, jnp.zeros((), jnp.int32))


def decode_states(
    model: EncoderDecoder,
    states: LayerStates,
    tokens: Int[Array, "Q W S"],
    cache: Cache,
    mask: Bool[Array, "Q W S"] | None = None,
) -> tuple[Float[Array, "Q WS D"], Cache]:
    """The decoder's final states after each of S more input tokens of every row.

    Args:
      tokens: the first input token of a row is the padding id 0 (as in T5), then follow the
        tokens that it has generated.
      mask: False at padding, which experts leave out (default: none).
    """
    questions, _, num_tokens = tokens.shape
    tokens = tokens.reshape(questions, -1)
    if mask is None:
        mask = jnp.ones(tokens.shape, bool)
    with use_mesh(model.mesh):
        context = DecodingContext(
            mask=mask.reshape(tokens.shape),
            token_ids=tokens,
            self_mask=cache.self_mask(num_tokens),
            bias=_bias(model, cache, num_tokens),
            cross_mask=(cache.segments > 0)[:, None, None, :],
            step=cache.step,
        )
        x = model.embed(tokens)
        layers = []
        for layer, layer_cache in zip(model.decoder.layers(states), cache.layers, strict=True):
            x, layer_cache = layer.decode(x, context, layer_cache)
            layers.append(layer_cache)
        x = model.decoder.norm(x)
    return x, replace(cache, layers=tuple(layers), step=cache.step + num_tokens)


def _bias(model: EncoderDecoder, cache: Cache, num_tokens: int) -> Float[Array, "N WS WT"]:
    """The relative bias between S tokens of every row and the keys of all rows."""
    _, rows, length = cache.owner.shape
    query_positions = cache.step + jnp.arange(num_tokens)
    bias = model.decoder.bias(query_positions, jnp.arange(length))
    return jnp.tile(bias.values, (1, rows, rows))


def decode_token(
    model: EncoderDecoder,
    states: LayerStates,
    tokens: Int[Array, "Q W"],
    cache: Cache,
) -> tuple[Float[Array, "Q W V"], Cache]:
    """Logits of the next token of every row, given the last one."""
    x, cache = decode_states(model, states, tokens[..., None], cache)
    return model.logits(x), cache
