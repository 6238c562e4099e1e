"""Evaluation: options are ranked by likelihood, free answers decoded and matched.

Q queries of a batch, R rows (a query with one of its options), L input length, T target length.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from moekit.data.suites import Suite
from moekit.data.tasks import Example, Prompt, Task, format_prompt, stable_random
from moekit.data.tokenizer import EOS, Tokenizer, load_tokenizer
from moekit.distributed import to_host
from moekit.evaluation.scores import (
    Difference,
    Scores,
    TaskScore,
    commonest,
    compare,
    exact_match,
    extract_answer,
    rouge_l,
)
from moekit.model.batching import encode_inputs, input_rows, length_groups
from moekit.model.decoding import generate_ids
from moekit.model.transformer import Encoded, EncoderDecoder, shift_right
from moekit.sharding import shard_batch

__all__ = ["Difference", "Scores", "compare", "evaluate", "evaluation_callback", "rank_options"]
QUERIES = 16  # of a batch, with four times as many options
ANSWER, RATIONALE = 64, 256  # tokens of a decoded answer, without and with reasoning


@functools.lru_cache(maxsize=16)
def _compiled_scores(graphdef):
    def score(
        state,
        inputs: Int[Array, "Q L"],
        segments: Int[Array, "Q L"],
        owner: Int[Array, "R"],
        targets: Int[Array, "R T"],
        weights: Float[Array, "R T"],
    ) -> tuple[Float[Array, "R"], Bool[Array, "R"]]:
        """Log-probability of each row and whether greedy decoding would say it; every query is
        encoded once."""
        model = nnx.merge(graphdef, state)
        encoded = model.encode(inputs, segments)
        encoded = Encoded(encoded.states[owner], encoded.segments[owner], {}, None)
        positions = jnp.broadcast_to(jnp.arange(targets.shape[1]), targets.shape)
        real = (weights > 0).astype(jnp.int32)
        logits = model.decode(encoded, shift_right(targets, positions), real).logits
        log_probs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
        greedy = (logits.argmax(-1) == targets) | (weights == 0)
        return (chosen * weights).sum(-1), greedy.all(-1)

    return jax.jit(score)


class Likelihood(NamedTuple):
    """Of a text after an input: log-probability (nats), tokens (both with the end of sequence),
    and whether greedy decoding would say it."""

    log_prob: float
    tokens: int
    greedy: bool


def likelihoods(
    model: EncoderDecoder, inputs: Sequence[list[int]], options: Sequence[Sequence[list[int]]]
) -> list[list[Likelihood]]:
    """How likely each option of each input is; all are token ids that end in end of sequence."""
    graphdef, state = nnx.split(model)
    score = _compiled_scores(graphdef)
    found: list[list[Likelihood]] = [[] for _ in inputs]
    counts = list(map(len, options))
    groups = list(
        length_groups(
            list(map(len, inputs)), model.cfg.max_length, QUERIES, counts, mesh=model.mesh
        )
    )
    for indices, length, rows in tqdm(groups, desc="rank options", unit="batch", leave=False):
        queries = input_rows([inputs[i] for i in indices], length, rows, model.mesh)
        targets = _target_rows([options[i] for i in indices], rows, model)
        log_probs, greedy = to_host(score(state, *queries, *targets))
        at = 0
        for i in indices:
            for row, option in enumerate(options[i], at):
                said = Likelihood(float(log_probs[row]), len(option), bool(greedy[row]))
                found[i].append(said)
            at += counts[i]
    return found


def _target_rows(options: Sequence[Sequence[list[int]]], queries: int, model) -> tuple:
    """Arrays of fixed shape for the compiled score: owner, targets, weights."""
    flat = [ids for each in options for ids in each]
    owners = [i for i, each in enumerate(options) for _ in each]
    rows, width = -(-len(flat) // (4 * queries)) * 4 * queries, 16
    while width < max(map(len, flat)):
        width *= 2
    targets, weights = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.float32)
    for i, ids in enumerate(flat):
        targets[i, : len(ids)], weights[i, : len(ids)] = ids, 1
    owner = np.pad(np.array(owners, np.int32), (0, rows - len(owners)))
    return shard_batch((owner, targets, weights), model.mesh)


def rank_options(
    model: EncoderDecoder, prompts: Sequence[Prompt], tokenizer: Tokenizer | None = None
) -> list[int]:
    """The most likely option of each prompt, by mean log-probability of its tokens."""
    tokenizer = tokenizer or load_tokenizer(model.cfg.tokenizer)
    ids = encode_inputs([prompt.input for prompt in prompts], tokenizer, model.cfg.max_length)
    return _ranked(model, ids, prompts, tokenizer)


def _ranked(model, inputs, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[int]:
    options = [[[*tokenizer.encode(o), EOS] for o in prompt.options] for prompt in prompts]
    found = likelihoods(model, inputs, options)
    return [int(np.argmax([each.log_prob / each.tokens for each in row])) for row in found]


@dataclass(frozen=True)
class _Question:
    """An example of a task as it is asked."""

    task: Task
    example: Example
    prompt: Prompt
    ids: list[int]  # of the input


def _questions(task: Task, suite: Suite, limit, seed, tokenizer, longest):
    """The task's questions (a fixed sample if limited), and how many exemplars did not fit."""
    examples = list(task.examples(suite.split)[: suite.first])
    if limit is not None and limit < len(examples):
        picks = stable_random(seed, task.name, suite.split).sample(range(len(examples)), limit)
        examples = [examples[i] for i in sorted(picks)]
    pool = _exemplars(task, suite.chain_of_thought) if suite.shots else []
    kind = {"options": suite.options, "style": suite.style}
    kind["chain_of_thought"] = suite.chain_of_thought
    questions, dropped = [], 0
    for example in examples:
        rng = stable_random(seed, task.name, example.id)
        usable = [e for e in pool if e.id != example.id]
        # a pool of just so many is a published list in its order
        several = len(usable) > suite.shots
        drawn = rng.sample(usable, suite.shots) if several else usable
        while True:
            prompt = format_prompt(task, example, shots=drawn, **kind)
            ids = [*tokenizer.encode(prompt.input), EOS]
            if len(ids) <= longest:
                break
            if not drawn:
                raise ValueError(
                    f"{task.name} {example.id}: the question alone is {len(ids)} tokens, the model "
                    f"reads {longest}: use cfg.replace(max_length={len(ids)}) or leave the task out"
                )
            drawn, dropped = drawn[1:], dropped + 1
        questions.append(_Question(task, example, prompt, ids))
    return questions, dropped


def _exemplars(task: Task, thought: bool) -> list[Example]:
    try:
        pool = list(task.examples("train"))
    except ValueError:
        raise ValueError(
            f"task {task.name} has no exemplars (no train split): use shots=0"
        ) from None
    # where any exemplar shows a chain of thought, all should; else they show the form of the answer
    return [e for e in pool if e.rationale or not thought] or pool


def _answered(questions: Sequence[_Question], suite: Suite, model, tokenizer, most) -> list[str]:
    """The model's answer to every question: an option, or free text."""
    answers = [""] * len(questions)
    ranked = [i for i, q in enumerate(questions) if q.prompt.options and suite.ranked]
    chosen = [questions[i] for i in ranked]
    best = _ranked(model, [q.ids for q in chosen], [q.prompt for q in chosen], tokenizer)
    for i, question, at in zip(ranked, chosen, best, strict=True):
        answers[i] = question.prompt.options[at]
    free = sorted(set(range(len(questions))) - set(ranked))
    said = generate_ids(model, [questions[i].ids for i in free], max_new_tokens=most)
    for i, ids in zip(free, said, strict=True):
        answers[i] = tokenizer.decode(ids)
    return answers


def _score(task: Task, questions: Sequence[_Question], answers, suite: Suite) -> TaskScore:
    choices = all(q.example.options for q in questions)
    rouge = task.metric == "rouge_l" and not (choices and suite.ranked)
    ranked = choices and suite.ranked and not suite.chain_of_thought
    measure = rouge_l if rouge else exact_match
    values, majority = [], commonest([q.example.answer for q in questions])
    for question, answer in zip(questions, answers, strict=True):
        prompt, example = question.prompt, question.example
        if prompt.options and suite.ranked:
            values.append(float(answer == prompt.target))
        else:
            if suite.chain_of_thought:
                answer = extract_answer(answer, example.answer, example.options)
            values.append(measure(answer, prompt.references))
    accepted = [(q.example.answer, *q.example.references) for q in questions]
    baseline = np.mean([measure(majority, references) for references in accepted])
    guesses = [1 / len(q.example.options) if q.example.options else 0.0 for q in questions]
    chance = 0.0 if rouge else float(np.mean(guesses))
    metric = "accuracy" if ranked else "rouge_l" if rouge else "exact_match"
    return TaskScore.of(task.name, task.cluster, metric, values, chance, float(baseline))


def evaluate(
    model: EncoderDecoder,
    suite: Suite | Sequence[Task],
    *,
    shots: int | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    options: bool | None = None,
    chain_of_thought: bool | None = None,
    max_new_tokens: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Scores:
    """Ask every question of a suite and score the answers.

    An example with options is answered by the most likely one (mean log-probability of its
    tokens), any other, and every chain of thought, by greedy decoding, scored by exact match or
    ROUGE-L as its task says. What is left at None is the suite's own way of asking.

    Args:
      shots: exemplars from each task's "train" split; left out from the front until they fit.
      limit: at most so many questions a task, a fixed sample.
      options: show the options in the question (they are ranked all the same).
      max_new_tokens: default 64, or 256 for a chain of thought.

    Raises:
      ValueError: a question alone is longer than the model's max_length, a task has no exemplars
        or no such split, or there are no questions.
    """
    tokenizer = tokenizer or load_tokenizer(model.cfg.tokenizer)
    suite = suite if isinstance(suite, Suite) else Suite("tasks", tuple(suite))
    given = {"shots": shots, "split": split, "options": options}
    given["chain_of_thought"] = chain_of_thought
    suite = replace(suite, **{name: v for name, v in given.items() if v is not None})
    most = max_new_tokens or (RATIONALE if suite.chain_of_thought else ANSWER)
    asked, dropped = {}, 0
    for task in tqdm(suite.tasks, desc="questions", unit="task", leave=False):
        questions, lost = _questions(task, suite, limit, seed, tokenizer, model.cfg.max_length)
        asked[task] = questions
        dropped += lost
    empty = tuple(task.name for task, questions in asked.items() if not questions)
    everything = [q for questions in asked.values() for q in questions]
    if not everything:
        raise ValueError(f"suite {suite.name} has no questions in its split {suite.split!r}")
    answers = iter(_answered(everything, suite, model, tokenizer, most))
    rows = [
        _score(task, questions, [next(answers) for _ in questions], suite)
        for task, questions in asked.items()
        if questions
    ]
    name = f"{model.cfg.name} on {suite.name}"
    return Scores(name, tuple(rows), suite.shots, dropped, suite.missing + empty)


def evaluation_callback(suite: Suite | Sequence[Task], name: str = "score", **kwargs) -> Callable:
    """A callback for `train`: logs the mean score under `name`."""

    def callback(step: int, model: EncoderDecoder) -> dict[str, float]:
        return {name: evaluate(model, suite, **kwargs).mean.score}

    return callback
