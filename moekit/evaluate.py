"""Evaluation: options are ranked by likelihood, free answers decoded and matched.

Q queries of a batch, R rows (a query with one of its options), L input length, T target length.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from moekit.data.pipeline import pad_prompts
from moekit.data.suites import Suite
from moekit.data.tasks import (
    Example,
    Prompt,
    Task,
    extract_answer,
    format_prompt,
    stable_random,
)
from moekit.data.tokenizer import EOS, Tokenizer, load_tokenizer
from moekit.generate import bucket, generate, length_groups, rows_at
from moekit.model.transformer import Encoded, EncoderDecoder, shift_right
from moekit.scores import Difference, Scores, TaskScore, commonest, compare, exact_match, rouge_l
from moekit.sharding import split_rows

__all__ = ["Difference", "Scores", "compare", "evaluate", "evaluation_callback", "rank_options"]
QUERIES = 16  # of a batch, with four times as many options


@functools.lru_cache(maxsize=16)
def _compiled_scores(graphdef):
    def score(
        state,
        inputs: Int[Array, "Q L"],
        segments: Int[Array, "Q L"],
        owner: Int[Array, "R"],
        targets: Int[Array, "R T"],
        weights: Float[Array, "R T"],
    ) -> Float[Array, "R"]:
        """Mean log-probability of each row's tokens; every query is encoded once."""
        model = nnx.merge(graphdef, state)
        encoded = model.encode(inputs, segments)
        encoded = Encoded(encoded.states[owner], encoded.segments[owner], {}, None)
        positions = jnp.broadcast_to(jnp.arange(targets.shape[1]), targets.shape)
        real = (weights > 0).astype(jnp.int32)
        logits = model.decode(encoded, shift_right(targets, positions), real).logits
        log_probs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
        return (chosen * weights).sum(-1) / jnp.maximum(weights.sum(-1), 1)

    return jax.jit(score)


def rank_options(
    model: EncoderDecoder, prompts: Sequence[Prompt], tokenizer: Tokenizer | None = None
) -> list[int]:
    """The most likely option of each prompt, by mean log-probability of its tokens."""
    tokenizer = tokenizer or load_tokenizer(model.cfg.tokenizer)
    graphdef, state = nnx.split(model)
    score = _compiled_scores(graphdef)
    best = [0] * len(prompts)
    lengths = [len(tokenizer.encode(prompt.input)) + 1 for prompt in prompts]
    options = [len(prompt.options) for prompt in prompts]
    groups = list(length_groups(lengths, model.cfg.max_length, QUERIES, options, model.mesh))
    for indices in tqdm(groups, desc="rank options", unit="batch", leave=False):
        chosen = [prompts[i] for i in indices]
        scores = np.asarray(score(state, *_option_rows(chosen, tokenizer, model)))
        at = 0
        for i, prompt in zip(indices, chosen, strict=True):
            best[i] = int(np.argmax(scores[at : at + len(prompt.options)]))
            at += len(prompt.options)
    return best


def _option_rows(prompts: Sequence[Prompt], tokenizer: Tokenizer, model) -> tuple:
    """Arrays of fixed shape for the compiled score: inputs, segments, owner, targets, weights."""
    options = [[*tokenizer.encode(o), EOS] for p in prompts for o in p.options]
    owners = [i for i, p in enumerate(prompts) for _ in p.options]
    length = max(len(tokenizer.encode(p.input)) for p in prompts) + 1
    length = bucket(length, model.cfg.max_length)
    bare = [Prompt(p.input, "", task=p.task, id=p.id) for p in prompts]
    batch = pad_prompts(bare, tokenizer, input_length=length, target_length=1)
    queries = rows_at(length, QUERIES, model.mesh)
    rows, width = -(-len(options) // (4 * queries)) * 4 * queries, 16
    while width < max(map(len, options)):
        width *= 2
    targets, weights = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.float32)
    for i, ids in enumerate(options):
        targets[i, : len(ids)], weights[i, : len(ids)] = ids, 1
    owner = np.pad(np.array(owners, np.int32), (0, rows - len(owners)))
    fill = ((0, queries - len(prompts)), (0, 0))
    inputs, segments = np.pad(batch.inputs, fill), np.pad(batch.input_segments, fill)
    return split_rows((inputs, segments, owner, targets, weights), model.mesh)


@dataclass(frozen=True)
class _Question:
    """An example of a task as it is asked."""

    task: Task
    example: Example
    prompt: Prompt


def _questions(task: Task, split: str, limit, seed, tokenizer, longest, **kind):
    """The task's questions (a fixed sample if limited), and how many exemplars did not fit."""
    examples = list(task.examples(split))
    if limit is not None and limit < len(examples):
        picks = stable_random(seed, task.name, split).sample(range(len(examples)), limit)
        examples = [examples[i] for i in sorted(picks)]
    shots = kind.pop("shots")
    pool = _exemplars(task, kind["chain_of_thought"]) if shots else []
    questions, dropped = [], 0
    for example in examples:
        rng = stable_random(seed, task.name, example.id)
        usable = [e for e in pool if e.id != example.id]
        drawn = rng.sample(usable, min(shots, len(usable)))
        while True:
            prompt = format_prompt(task, example, shots=drawn, **kind)
            length = len(tokenizer.encode(prompt.input)) + 1
            if length <= longest:
                break
            if not drawn:
                raise ValueError(
                    f"{task.name} {example.id}: the question alone is {length} tokens, the model "
                    f"reads {longest}: use cfg.replace(max_length={length}) or leave the task out"
                )
            drawn, dropped = drawn[1:], dropped + 1
        questions.append(_Question(task, example, prompt))
    return questions, dropped


def _exemplars(task: Task, thought: bool) -> list[Example]:
    try:
        pool = task.examples("train")
    except ValueError:
        raise ValueError(
            f"task {task.name} has no exemplars (no train split): use shots=0"
        ) from None
    # an exemplar without a rationale cannot show a chain of thought
    return [e for e in pool if e.rationale or not thought]


def _answered(questions: Sequence[_Question], model, tokenizer, max_new_tokens) -> list[str]:
    """The model's answer to every question: an option, or free text."""
    answers = [""] * len(questions)
    ranked = [i for i, q in enumerate(questions) if q.prompt.options]
    free = [i for i, q in enumerate(questions) if not q.prompt.options]
    for i, best in zip(
        ranked, rank_options(model, [questions[i].prompt for i in ranked], tokenizer), strict=True
    ):
        answers[i] = questions[i].prompt.options[best]
    texts = [questions[i].prompt.input for i in free]
    decoded = generate(model, texts, max_new_tokens=max_new_tokens, tokenizer=tokenizer)
    for i, text in zip(free, decoded, strict=True):
        answers[i] = text
    return answers


def _score(task: Task, questions: Sequence[_Question], answers, thought: bool) -> TaskScore:
    ranked = all(q.example.options for q in questions) and not thought
    metric = "accuracy" if ranked else "rouge_l" if task.metric == "rouge_l" else "exact_match"
    measure = rouge_l if metric == "rouge_l" else exact_match
    values, majority = [], commonest([q.example.answer for q in questions])
    for question, answer in zip(questions, answers, strict=True):
        prompt = question.prompt
        if prompt.options:
            values.append(float(answer == prompt.target))
        else:
            said = extract_answer(answer) if thought else answer
            values.append(measure(said, prompt.references))
    baseline = np.mean(
        [measure(majority, (q.example.answer, *q.example.references)) for q in questions]
    )
    chances = [1 / len(q.example.options) if q.example.options else 0.0 for q in questions]
    return TaskScore.of(
        task.name, task.cluster, metric, values, float(np.mean(chances)), float(baseline)
    )


def evaluate(
    model: EncoderDecoder,
    suite: Suite | Sequence[Task],
    *,
    shots: int = 0,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    options: bool = True,
    chain_of_thought: bool = False,
    max_new_tokens: int = 64,
    tokenizer: Tokenizer | None = None,
) -> Scores:
    """Ask every question of a suite and score the answers.

    An example with options is answered by the most likely one (mean log-probability of its
    tokens), any other, and every chain of thought, by greedy decoding, scored by exact match or
    ROUGE-L as its task says.

    Args:
      shots: exemplars from each task's "train" split; left out from the front until they fit.
      split: default the suite's.
      limit: at most so many questions a task, a fixed sample.
      options: show the options in the question (they are ranked all the same).

    Raises:
      ValueError: a question alone is longer than the model's max_length.
    """
    tokenizer = tokenizer or load_tokenizer(model.cfg.tokenizer)
    name = suite.name if isinstance(suite, Suite) else "tasks"
    tasks = suite.tasks if isinstance(suite, Suite) else tuple(suite)
    split = split or (suite.split if isinstance(suite, Suite) else "test")
    kind = {"shots": shots, "options": options, "chain_of_thought": chain_of_thought}
    asked, dropped = [], 0
    for task in tasks:
        questions, lost = _questions(
            task, split, limit, seed, tokenizer, model.cfg.max_length, **kind
        )
        asked.append(questions)
        dropped += lost
    rows, everything = [], [q for questions in asked for q in questions]
    answers = iter(_answered(everything, model, tokenizer, max_new_tokens))
    for task, questions in zip(tasks, asked, strict=True):
        own = [next(answers) for _ in questions]
        rows.append(_score(task, questions, own, chain_of_thought))
    return Scores(f"{model.cfg.name} on {name}", tuple(rows), shots, dropped)


def evaluation_callback(suite: Suite | Sequence[Task], name: str = "score", **kwargs) -> Callable:
    """A callback for `train`: logs the mean score under `name`."""

    def callback(step: int, model: EncoderDecoder) -> dict[str, float]:
        return {name: evaluate(model, suite, **kwargs).mean.score}

    return callback
