"""Log-likelihoods of texts given an input, and the most likely option of a prompt.

Q inputs of a batch, R rows (an input with one of its options), L input length, T target length.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from numpy import ndarray

from moekit.data.tasks import Prompt
from moekit.data.tokenizer import EOS, Tokenizer, load_tokenizer
from moekit.distributed import to_host
from moekit.errors import not_finite
from moekit.model.batching import encode_inputs, input_rows, length_groups
from moekit.model.transformer import Encoded, EncoderDecoder, shift_right
from moekit.progress import ProgressBar
from moekit.sharding import shard_batch

MAX_INPUTS = 16  # inputs in a batch, with at most four times as many options
SHORTEST_TARGETS = 16  # tokens; longer targets are padded to the next power of two


class Likelihood(NamedTuple):
    """Likelihood of a text given an input.

    Args:
      log_prob: sum over the tokens, in nats, end of sequence included.
      tokens: number of tokens, end of sequence included.
      greedy: whether greedy decoding generates this text.
    """

    log_prob: float
    tokens: int
    greedy: bool


@functools.lru_cache(maxsize=16)
def _compiled_scores(graphdef: nnx.GraphDef) -> Callable[..., tuple[Array, Array]]:
    def score(
        state: nnx.State,
        inputs: Int[Array, "Q L"],
        segments: Int[Array, "Q L"],
        input_of_row: Int[Array, "R"],
        targets: Int[Array, "R T"],
        weights: Float[Array, "R T"],
    ) -> tuple[Float[Array, "R"], Bool[Array, "R"]]:
        """Log-probability of each row, and whether each of its tokens is the most likely one.
        Every input is encoded once."""
        model = nnx.merge(graphdef, state)
        encoded = model.encode(inputs, segments)
        states = encoded.states[input_of_row]
        encoded = Encoded(states, encoded.segments[input_of_row], {}, None)

        positions = jnp.broadcast_to(jnp.arange(targets.shape[1]), targets.shape)
        target_segments = (weights > 0).astype(jnp.int32)
        decoder_inputs = shift_right(targets, positions)
        logits = model.decode(encoded, decoder_inputs, target_segments).logits

        log_probs = jax.nn.log_softmax(logits)
        target_log_probs = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
        is_best = (logits.argmax(-1) == targets) | (weights == 0)
        return (target_log_probs * weights).sum(-1), is_best.all(-1)

    return jax.jit(score)


def likelihoods(
    model: EncoderDecoder,
    inputs: Sequence[list[int]],
    options: Sequence[Sequence[list[int]]],
) -> list[list[Likelihood]]:
    """The likelihood of each option of each input.

    Args:
      inputs: token ids that end in end of sequence.
      options: token ids of the options of each input, which end in end of sequence.

    Raises:
      ValueError: the model's parameters are not finite.
    """
    graphdef, state = nnx.split(model)
    score = _compiled_scores(graphdef)
    results: list[list[Likelihood]] = [[] for _ in inputs]
    lengths = [len(ids) for ids in inputs]
    counts = [len(each) for each in options]
    max_length = model.cfg.max_length
    groups = list(length_groups(lengths, max_length, MAX_INPUTS, counts, mesh=model.mesh))
    progress = ProgressBar(groups, desc="rank options", unit="batch", leave=False)
    for indices, length, num_inputs in progress:
        group_inputs = [inputs[index] for index in indices]
        group_options = [options[index] for index in indices]
        input_ids, segments = input_rows(group_inputs, length, num_inputs, model.mesh)
        rows = _option_rows(group_options, num_inputs)
        input_of_row, targets, weights = shard_batch(rows, model.mesh)

        with progress.compiling(score, (input_ids.shape, targets.shape)):
            scores = score(state, input_ids, segments, input_of_row, targets, weights)
            log_probs, greedy = to_host(scores)
        row = 0
        for index in indices:
            for option in options[index]:
                found = Likelihood(float(log_probs[row]), len(option), bool(greedy[row]))
                results[index].append(found)
                row += 1
        if not np.isfinite(log_probs[:row]).all():
            raise not_finite(model.cfg.name)
    return results


def _option_rows(
    options: Sequence[Sequence[list[int]]], num_inputs: int
) -> tuple[Int[ndarray, "R"], Int[ndarray, "R T"], Float[ndarray, "R T"]]:
    """The input of each row, target ids and their weights, in one of few shapes."""
    targets = [ids for each in options for ids in each]
    owners = [index for index, each in enumerate(options) for _ in each]
    multiple = 4 * num_inputs
    num_rows = -(-len(targets) // multiple) * multiple
    longest = max(len(ids) for ids in targets)
    width = SHORTEST_TARGETS
    while width < longest:
        width *= 2

    target_ids = np.zeros((num_rows, width), np.int32)
    weights = np.zeros((num_rows, width), np.float32)
    for row, ids in enumerate(targets):
        target_ids[row, : len(ids)] = ids
        weights[row, : len(ids)] = 1
    input_of_row = np.zeros(num_rows, np.int32)
    input_of_row[: len(owners)] = owners
    return input_of_row, target_ids, weights


def rank_options(
    model: EncoderDecoder, prompts: Sequence[Prompt], tokenizer: Tokenizer | None = None
) -> list[int]:
    """The index of each prompt's most likely option, by mean log-probability of its tokens.

    Raises:
      ValueError: a prompt has no options, or its input is longer than the model's max_length.
    """
    tokenizer = tokenizer or load_tokenizer(model.cfg.tokenizer)
    texts = [prompt.input for prompt in prompts]
    inputs = encode_inputs(texts, tokenizer, model.cfg.max_length)
    return rank_encoded(model, inputs, prompts, tokenizer)


def rank_encoded(
    model: EncoderDecoder,
    inputs: Sequence[list[int]],
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
) -> list[int]:
    """`rank_options` of prompts whose inputs are token ids already."""
    options = []
    for index, prompt in enumerate(prompts):
        if not prompt.options:
            name = " ".join(filter(None, (prompt.task, prompt.id))) or repr(prompt.input[:40])
            raise ValueError(
                f"prompt {index} ({name}) has no options to rank: generate its answer instead, or "
                "format it from an example with options"
            )
        options.append([[*tokenizer.encode(option), EOS] for option in prompt.options])
    best = []
    for found in likelihoods(model, inputs, options):
        mean_log_probs = [each.log_prob / each.tokens for each in found]
        best.append(int(np.argmax(mean_log_probs)))
    return best
