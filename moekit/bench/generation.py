"""Greedy generation and the ranking of options beside transformers, in one run.

The models are those of `moekit.bench.baselines`: T5 v1.0 or Switch with random weights, in float32
on the CPU, with neither side dropping a token. Timed are the functions that a user calls, from
lists of token ids to results on the host: `generate` with a KV cache, and the log-likelihoods of
all options. In transformers every option is a row of a batch, together with its question.

The embedding of the end of sequence is zero on both sides. Its logit is zero, too, which is never
the largest, so all tokens are generated.
"""

import statistics
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from moekit.bench.baselines import Work, our_config, transformers_model
from moekit.bench.sides import (
    BASELINE,
    OURS,
    Functions,
    baseline_versions,
    compare,
    num_threads,
)
from moekit.data.tokenizer import EOS
from moekit.evaluation.likelihood import Likelihood, likelihoods
from moekit.model.decoding import generate_ids
from moekit.model.transformer import EncoderDecoder
from moekit.progress import ProgressBar

GENERATE = "generate"
RANK = "rank"
UNITS = {GENERATE: "tokens", RANK: "questions"}


@dataclass(frozen=True)
class DecodingWork:
    """What both sides compute: answers to inputs, and likelihoods of the options of questions."""

    model: Work  # the models' sizes
    new_tokens: int
    inputs: list[list[int]]
    questions: list[list[int]]
    options: list[list[list[int]]]  # of each question


def generation(
    *,
    experts: tuple[int, ...] = (0, 32),
    batch: int = 8,
    input_length: int = 128,
    new_tokens: int = 64,
    question_length: int = 256,
    options: int = 4,
    option_length: int = 8,
    d_model: int = 256,
    d_ff: int = 1024,
    vocab_size: int = 32_128,
    repeats: int = 9,
) -> list[dict[str, Any]]:
    """Tokens and questions per second of both sides; `speedup` is ours over theirs.

    Args:
      experts: numbers of experts to compare; 0 is a dense T5.
      batch: inputs, and questions, of a batch.
      input_length: tokens of an input.
      new_tokens: tokens that are generated for each input.
      question_length: tokens of a question with options.
      options: options of a question.
      option_length: tokens of an option, end of sequence included.
      d_model: width of the models.
      d_ff: hidden features of a feed-forward layer.
      vocab_size: size of the vocabulary.
      repeats: timed calls of each function.

    Raises:
      ValueError: torch or transformers is not installed.
    """
    baseline = baseline_versions("generation")
    rows = []
    for num_experts in ProgressBar(experts, desc="bench generation", unit="model"):
        work = decoding_work(
            num_experts=num_experts,
            batch=batch,
            input_length=input_length,
            new_tokens=new_tokens,
            question_length=question_length,
            num_options=options,
            option_length=option_length,
            d_model=d_model,
            d_ff=d_ff,
            vocab_size=vocab_size,
        )
        times, num_generated = compare(our_decoding, _transformers_decoding, work, repeats)
        for task, unit in UNITS.items():
            our_ms = statistics.median(times[OURS, task])
            baseline_ms = statistics.median(times[BASELINE, task])
            our_count = num_generated[OURS] if task == GENERATE else batch
            baseline_count = num_generated[BASELINE] if task == GENERATE else batch
            our_rate = 1e3 * our_count / our_ms
            baseline_rate = 1e3 * baseline_count / baseline_ms
            rows.append(
                {
                    "model": "switch" if num_experts else "t5",
                    "experts": num_experts,
                    "task": task,
                    "unit": unit,
                    "ours_per_second": round(our_rate, 3),
                    "peer_per_second": round(baseline_rate, 3),
                    "speedup": round(our_rate / baseline_rate, 3),
                    "ours_count": our_count,
                    "peer_count": baseline_count,
                    "batch": batch,
                    "input_length": input_length if task == GENERATE else question_length,
                    "target_length": new_tokens if task == GENERATE else option_length,
                    "options": 0 if task == GENERATE else options,
                    "threads": work.model.threads,
                    "peer": baseline,
                }
            )
    return rows


def decoding_work(
    *,
    num_experts: int,
    batch: int,
    input_length: int,
    new_tokens: int,
    question_length: int,
    num_options: int,
    option_length: int,
    d_model: int,
    d_ff: int,
    vocab_size: int,
) -> DecodingWork:
    """Random inputs, questions and options for a model of that size."""
    generator = np.random.default_rng(0)
    options = []
    for _ in range(batch):
        options.append(_random_texts(generator, num_options, option_length, vocab_size))
    model = Work(
        num_experts=num_experts,
        batch=batch,
        input_length=max(input_length, question_length),
        target_length=max(new_tokens, option_length),
        d_model=d_model,
        d_ff=d_ff,
        vocab_size=vocab_size,
        threads=num_threads(),
    )
    return DecodingWork(
        model=model,
        new_tokens=new_tokens,
        inputs=_random_texts(generator, batch, input_length, vocab_size),
        questions=_random_texts(generator, batch, question_length, vocab_size),
        options=options,
    )


def _random_texts(
    generator: np.random.Generator, count: int, length: int, vocab_size: int
) -> list[list[int]]:
    """Token ids of texts of equal length, which end in the end of sequence."""
    words = generator.integers(EOS + 1, vocab_size, (count, length))
    words[:, -1] = EOS
    return words.tolist()


def our_decoding(work: DecodingWork) -> tuple[Functions, int]:
    """Our functions by task, compiled, and how many tokens are generated."""
    cfg = our_config(work.model)
    longest = max(cfg.max_length, work.model.input_length)
    model = EncoderDecoder(replace(cfg, max_length=longest))
    model.embedding_vd[...] = model.embedding_vd[...].at[EOS].set(0.0)

    def generate() -> list[Int[ndarray, "T"]]:
        batch_size = len(work.inputs)
        return generate_ids(
            model, work.inputs, max_new_tokens=work.new_tokens, batch_size=batch_size
        )

    def rank() -> list[list[Likelihood]]:
        return likelihoods(model, work.questions, work.options)

    num_generated = _num_generated(np.stack(generate()))  # compiles
    rank()
    return {GENERATE: generate, RANK: rank}, num_generated


def _transformers_decoding(work: DecodingWork) -> tuple[Functions, int]:
    """The functions of transformers by task, and how many tokens are generated."""
    import torch

    torch.set_num_threads(work.model.threads)
    model = transformers_model(work.model).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[EOS] = 0.0

    def generate() -> Any:
        inputs = torch.tensor(work.inputs)
        return model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=work.new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
        )

    def rank() -> Any:
        num_options = len(work.options[0])
        questions = torch.tensor(work.questions).repeat_interleave(num_options, dim=0)
        options = torch.tensor(work.options).flatten(0, 1)
        with torch.no_grad():
            logits = model(input_ids=questions, labels=options).logits
            target_logits = logits.gather(-1, options[..., None])[..., 0]
            log_probs = target_logits - logits.logsumexp(-1)
        return log_probs.sum(-1).tolist()

    generated = generate()[:, 1:].numpy()  # without the start token
    return {GENERATE: generate, RANK: rank}, _num_generated(generated)


def _num_generated(generated: Int[ndarray, "B T"]) -> int:
    """Tokens of all rows, the end of sequence included, without the padding after it."""
    has_ended_before = np.cumsum(generated == EOS, axis=1) - (generated == EOS) > 0
    return int((~has_ended_before).sum())
