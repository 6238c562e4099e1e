"""Log-likelihoods of texts given an input, and the most likely option of a prompt.

Options are decoded as rows of one question (see `moekit.model.incremental`): they share the
encoder states and their projections, and the decoder drops none of their tokens, as in decoding.

Q inputs of a batch, W options of each, L input length, T target length.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
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
from moekit.model.finite import require_finite
from moekit.model.incremental import decode_states, start_cache
from moekit.model.transformer import EncoderDecoder
from moekit.progress import ProgressBar
from moekit.sharding import shard_batch

MAX_INPUTS = 16  # inputs in a batch
MAX_OPTIONS = 64  # options in a batch
SHORTEST_TARGETS = 4  # tokens; longer targets are padded to the next power of two


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


class _Scores(NamedTuple):
    """Sums over the tokens of each option."""

    log_probs: Float[Array, "Q W"]
    greedy: Bool[Array, "Q W"]


@functools.lru_cache(maxsize=16)
def _compiled_scores(graphdef: nnx.GraphDef) -> Callable[..., _Scores]:
    def score(
        state: nnx.State,
        inputs: Int[Array, "Q L"],
        segments: Int[Array, "Q L"],
        targets: Int[Array, "Q W T"],
        mask: Bool[Array, "Q W T"],
    ) -> _Scores:
        """Every input is encoded and projected once, and its options share that."""
        model = nnx.merge(graphdef, state)
        questions, num_options, length = targets.shape
        layer_states = model.decoder.layer_states()
        encoded = model.encode(inputs, segments)
        cache = start_cache(model, layer_states, encoded, rows=num_options, length=length)
        decoder_inputs = jnp.pad(targets[..., :-1], ((0, 0), (0, 0), (1, 0)))
        states, _ = decode_states(model, layer_states, decoder_inputs, cache, mask)
        flat_targets = targets.reshape(questions, -1)

        logits = model.logits(states)
        target_logits = jnp.take_along_axis(logits, flat_targets[..., None], axis=-1)[..., 0]
        log_probs = target_logits - jax.nn.logsumexp(logits, axis=-1)
        is_best = logits.argmax(-1) == flat_targets

        log_probs = jnp.where(mask, log_probs.reshape(targets.shape), 0.0)
        is_best = is_best.reshape(targets.shape) | ~mask
        return _Scores(log_probs.sum(-1), is_best.all(-1))

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
    require_finite(model)
    graphdef, state = nnx.split(model)
    score = _compiled_scores(graphdef)
    results: list[list[Likelihood]] = [[] for _ in inputs]
    groups = list(_groups(model, inputs, options))
    progress = ProgressBar(groups, desc="rank options", unit="batch", leave=False)
    for group in progress:
        group_inputs = [inputs[index] for index in group.indices]
        group_options = [options[index] for index in group.indices]
        input_ids, segments = input_rows(group_inputs, group.length, group.rows, model.mesh)
        arrays = _option_arrays(group_options, group.rows, group.num_options)
        targets, mask = shard_batch(arrays, model.mesh)

        with progress.compiling(score, (input_ids.shape, targets.shape)):
            scores = score(state, input_ids, segments, targets, mask)
            log_probs, greedy = to_host(tuple(scores))
        for row, index in enumerate(group.indices):
            for column, option in enumerate(options[index]):
                log_prob = float(log_probs[row, column])
                if not math.isfinite(log_prob):
                    raise not_finite(model.cfg.name)
                is_greedy = bool(greedy[row, column])
                results[index].append(Likelihood(log_prob, len(option), is_greedy))
    return results


class _Group(NamedTuple):
    """Inputs that are scored together, with at most `num_options` options each."""

    indices: list[int]
    length: int
    rows: int
    num_options: int


def _groups(
    model: EncoderDecoder,
    inputs: Sequence[list[int]],
    options: Sequence[Sequence[list[int]]],
) -> Iterator[_Group]:
    """Batches of inputs of similar length and similar numbers of options."""
    indices_of_count: dict[int, list[int]] = {}
    for index, each in enumerate(options):
        count = _padded_count(len(each))
        indices_of_count.setdefault(count, []).append(index)
    for count, indices in indices_of_count.items():
        # one question should not cost as much as a full batch
        power_of_two = 1 << (len(indices) - 1).bit_length()
        max_batch = min(MAX_INPUTS, power_of_two, max(1, MAX_OPTIONS // count))
        lengths = [len(inputs[index]) for index in indices]
        groups = length_groups(lengths, model.cfg.max_length, max_batch, mesh=model.mesh)
        for chosen, length, rows in groups:
            yield _Group([indices[index] for index in chosen], length, rows, count)


def _padded_count(count: int) -> int:
    """A number of options, rounded up to one of few: 1 to 5, and multiples of 5."""
    return max(1, count) if count <= 5 else -(-count // 5) * 5


def _option_arrays(
    options: Sequence[Sequence[list[int]]], rows: int, num_options: int
) -> tuple[Int[ndarray, "Q W T"], Bool[ndarray, "Q W T"]]:
    """Target ids of the options of each input, and a mask that is False at padding."""
    longest = max((len(ids) for each in options for ids in each), default=1)
    width = SHORTEST_TARGETS
    while width < longest:
        width *= 2
    targets = np.zeros((rows, num_options, width), np.int32)
    mask = np.zeros(targets.shape, bool)
    for row, each in enumerate(options):
        for column, ids in enumerate(each):
            targets[row, column, : len(ids)] = ids
            mask[row, column, : len(ids)] = True
    return targets, mask


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
