"""Beam search: the most probable answers, of which several are continued at a time.

Every token extends the W running beams of a question by the 2 W most probable continuations. Those
that end the answer and are among the first W are finished; the best W others run on. A finished
answer's score is its log-probability divided by a power of its length; the best W answers are kept.
A question is done when no running beam can reach the score of its worst kept answer. At the longest
length, running beams are finished as they are. These are the rules of transformers with
`early_stopping=False`.

Q questions, W beams, C candidates, L input length, T longest output, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from moekit.data.tokenizer import EOS, PAD
from moekit.model.cache import Cache
from moekit.model.incremental import (
    LayerStates,
    Programs,
    decode_token,
    decode_until,
    start_cache,
)

NONE = -jnp.inf  # the score of no answer, and the log-probability of no beam


class Beams(NamedTuple):
    """Running beams or finished answers of each question, best first."""

    sequences: Int[Array, "Q W T"]
    scores: Float[Array, "Q W"]


class State(NamedTuple):
    """State of the search."""

    step: Int[Array, ""]
    running: Beams  # scores are log-probabilities
    answers: Beams  # scores are normalized by length
    finished: Bool[Array, "Q"]
    finite: Bool[Array, ""]  # False once a logit is NaN or infinite
    cache: Cache
    generated: Int[Array, "Q T"]  # the best answers


class Candidates(NamedTuple):
    """The most probable continuations of a question's beams, best first."""

    parents: Int[Array, "Q C"]
    tokens: Int[Array, "Q C"]
    log_probs: Float[Array, "Q C"]


class Length(NamedTuple):
    """How scores depend on the length of an answer.

    Args:
      normalization: "t5" divides a log-probability by ((5 + n) / 6) ** penalty (Wu 2016),
        "transformers" by n ** penalty.
      longest: the most tokens of an answer.
    """

    normalization: str
    penalty: float
    longest: int

    def divisor(self, num_tokens: int | Int[Array, ""]) -> Float[Array, ""]:
        """What the log-probability of `num_tokens` tokens is divided by."""
        size = jnp.asarray(num_tokens, jnp.float32)
        if self.normalization == "t5":
            size = (5 + size) / 6
        return size**self.penalty

    def best_divisor(self, num_tokens: Int[Array, ""]) -> Float[Array, ""]:
        """The divisor of the best score that a running beam is expected to reach.

        T5's is the bound at the longest length. transformers uses the present length.
        """
        if self.normalization == "t5" and self.penalty > 0:
            return self.divisor(self.longest)
        return self.divisor(num_tokens)


@functools.lru_cache(maxsize=32)
def programs(graphdef: nnx.GraphDef, num_beams: int, length: Length) -> Programs:
    """The programs for a number of beams."""

    def start(
        parameters: nnx.State,
        inputs: Int[Array, "Q L"],
        segments: Int[Array, "Q L"],
    ) -> tuple[LayerStates, State]:
        model = nnx.merge(graphdef, parameters)
        layer_states = model.decoder.layer_states()
        encoded = model.encode(inputs, segments)
        questions = inputs.shape[0]
        shape = (questions, num_beams)
        empty = jnp.full((*shape, length.longest), PAD, jnp.int32)
        no_scores = jnp.full(shape, NONE)
        cache = start_cache(model, layer_states, encoded, rows=num_beams, length=length.longest)
        state = State(
            step=jnp.zeros((), jnp.int32),
            running=Beams(empty, no_scores.at[:, 0].set(0.0)),  # all beams start equal: one
            answers=Beams(empty, no_scores),
            finished=(segments == 0).all(-1),
            finite=jnp.ones((), bool),
            cache=cache,
            generated=empty[:, 0],
        )
        return layer_states, state

    def advance(
        parameters: nnx.State,
        layer_states: LayerStates,
        state: State,
        limit: Int[Array, ""],
    ) -> State:
        model = nnx.merge(graphdef, parameters)

        def decode(state: State) -> State:
            last_step = jnp.maximum(state.step - 1, 0)
            sequences = state.running.sequences
            last_tokens = jax.lax.dynamic_index_in_dim(sequences, last_step, 2, keepdims=False)
            logits, cache = decode_token(model, layer_states, last_tokens, state.cache)
            return search_step(state, logits, cache, length)

        return decode_until(limit, decode, state)

    # the cache is updated in place
    return Programs(jax.jit(start), jax.jit(advance, donate_argnames="state"))


def search_step(
    state: State,
    logits: Float[Array, "Q W V"],
    cache: Cache,
    length: Length,
) -> State:
    """The state after one more token of every running beam."""
    num_beams = logits.shape[1]
    num_tokens = state.step + 1
    candidates = _candidates(state.running.scores, logits)
    parents, tokens, log_probs = candidates
    sequences = _select(state.running.sequences, parents)
    sequences = jax.lax.dynamic_update_slice_in_dim(
        sequences, tokens[..., None], state.step, axis=2
    )
    is_end = (tokens == EOS) | (num_tokens == length.longest)

    running_log_probs = jnp.where(is_end, NONE, log_probs)
    scores, best = jax.lax.top_k(running_log_probs, num_beams)
    running = Beams(_select(sequences, best), scores)
    cache = cache.reorder(_select(parents, best))

    is_among_first = jnp.arange(tokens.shape[1]) < num_beams
    ends_answer = is_end & is_among_first & ~state.finished[:, None]
    new_scores = jnp.where(ends_answer, log_probs / length.divisor(num_tokens), NONE)
    answers = _best_answers(state.answers, Beams(sequences, new_scores))

    best_possible = running.scores[:, 0] / length.best_divisor(num_tokens)
    can_improve = best_possible > answers.scores[:, -1]
    return State(
        step=num_tokens,
        running=running,
        answers=answers,
        finished=state.finished | ~can_improve,
        finite=state.finite & jnp.isfinite(logits).all(),
        cache=cache,
        generated=answers.sequences[:, 0],
    )


def _candidates(log_probs: Float[Array, "Q W"], logits: Float[Array, "Q W V"]) -> Candidates:
    """The 2 W most probable continuations of a question: W go on even if W end the answer."""
    questions, num_beams, vocab_size = logits.shape
    per_beam = min(2 * num_beams, vocab_size)
    best_logits, best_tokens = jax.lax.top_k(logits, per_beam)
    log_sums = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    extended = log_probs[..., None] + (best_logits - log_sums)
    extended = extended.reshape(questions, -1)
    scores, index = jax.lax.top_k(extended, min(2 * num_beams, num_beams * per_beam))
    tokens = _select(best_tokens.reshape(questions, -1), index)
    return Candidates(parents=index // per_beam, tokens=tokens, log_probs=scores)


def _best_answers(first: Beams, second: Beams) -> Beams:
    """The best W of W earlier answers and some new ones, best first."""
    num_kept = first.scores.shape[1]
    sequences = jnp.concatenate([first.sequences, second.sequences], axis=1)
    scores = jnp.concatenate([first.scores, second.scores], axis=1)
    best_scores, best = jax.lax.top_k(scores, num_kept)
    return Beams(_select(sequences, best), best_scores)


def _select(array: Shaped[Array, "Q W *T"], index: Int[Array, "Q C"]) -> Shaped[Array, "Q C *T"]:
    """The entries `index` of each question's beams."""
    shape = (*index.shape, *(1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, index.reshape(shape), axis=1)
