"""Greedy decoding and sampling: one token after the other, one row for every question.

Q questions, L input length, T longest output, V vocabulary, C candidates.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moekit.data.tokenizer import EOS, PAD
from moekit.model.cache import Cache
from moekit.model.incremental import (
    LayerStates,
    Programs,
    decode_token,
    decode_until,
    start_cache,
)


class State(NamedTuple):
    """State of the decoding loop."""

    step: Int[Array, ""]
    tokens: Int[Array, "Q"]  # the last ones, which the decoder reads next
    finished: Bool[Array, "Q"]
    finite: Bool[Array, ""]  # False once a logit is NaN or infinite
    cache: Cache
    generated: Int[Array, "Q T"]


class Sampling(NamedTuple):
    """Numbers that sampling depends on; a key for each question, whatever is beside it."""

    keys: Key[Array, "Q"]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]


def choose(
    logits: Float[Array, "Q V"],
    sampling: Sampling,
    step: Int[Array, ""],
    top_k: int,
    nucleus: bool,
) -> Int[Array, "Q"]:
    """A token of each row, drawn from softmax(logits / temperature).

    Args:
      step: number of the token, which the random numbers depend on.
      top_k: draw from the k most probable tokens only; 0: from all.
      nucleus: draw from the smallest set of the most probable tokens whose probabilities add up to
        `top_p` (Holtzman 2020), of those that `top_k` leaves.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(sampling.keys, step)
    logits = logits / sampling.temperature
    vocab_size = logits.shape[-1]
    if not top_k and not nucleus:
        return jax.vmap(jax.random.categorical)(keys, logits)
    num_candidates = min(top_k or vocab_size, vocab_size)
    candidates, tokens = jax.lax.top_k(logits, num_candidates)
    if nucleus:
        probabilities = jax.nn.softmax(candidates)
        more_probable = jnp.cumsum(probabilities, -1) - probabilities
        is_kept = more_probable < sampling.top_p
        is_kept = is_kept.at[:, 0].set(True)
        candidates = jnp.where(is_kept, candidates, -jnp.inf)
    chosen = jax.vmap(jax.random.categorical)(keys, candidates)
    return jnp.take_along_axis(tokens, chosen[:, None], axis=-1)[:, 0]


@functools.lru_cache(maxsize=32)
def programs(
    graphdef: nnx.GraphDef,
    length: int,
    sample: bool = False,
    top_k: int = 0,
    nucleus: bool = False,
) -> Programs:
    """The programs for answers of up to `length` tokens."""

    def start(
        parameters: nnx.State,
        inputs: Int[Array, "Q L"],
        segments: Int[Array, "Q L"],
    ) -> tuple[LayerStates, State]:
        model = nnx.merge(graphdef, parameters)
        layer_states = model.decoder.layer_states()
        encoded = model.encode(inputs, segments)
        questions = inputs.shape[0]
        is_padding = (segments == 0).all(-1)
        state = State(
            step=jnp.zeros((), jnp.int32),
            tokens=jnp.full(questions, PAD, jnp.int32),
            finished=is_padding,
            finite=jnp.ones((), bool),
            cache=start_cache(model, layer_states, encoded, rows=1, length=length),
            generated=jnp.full((questions, length), PAD, jnp.int32),
        )
        return layer_states, state

    def advance(
        parameters: nnx.State,
        layer_states: LayerStates,
        state: State,
        limit: Int[Array, ""],
        sampling: Sampling,
    ) -> State:
        model = nnx.merge(graphdef, parameters)

        def decode(state: State) -> State:
            last_tokens = state.tokens[:, None]
            logits, cache = decode_token(model, layer_states, last_tokens, state.cache)
            logits = logits[:, 0]
            if sample:
                tokens = choose(logits, sampling, state.step, top_k, nucleus)
            else:
                tokens = jnp.argmax(logits, -1)
            return _append(state, tokens, logits, cache)

        return decode_until(limit, decode, state)

    # the cache is updated in place
    return Programs(jax.jit(start), jax.jit(advance, donate_argnames="state"))


def _append(
    state: State,
    tokens: Int[Array, "Q"],
    logits: Float[Array, "Q V"],
    cache: Cache,
) -> State:
    """The state after the next token of every unfinished row."""
    tokens = jnp.where(state.finished, PAD, tokens).astype(jnp.int32)
    generated = jax.lax.dynamic_update_slice_in_dim(
        state.generated, tokens[:, None], state.step, axis=1
    )
    return State(
        step=state.step + 1,
        tokens=tokens,
        finished=state.finished | (tokens == EOS),
        finite=state.finite & jnp.isfinite(logits).all(),
        cache=cache,
        generated=generated,
    )
