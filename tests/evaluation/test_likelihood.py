"""Ranking of options by log-likelihood."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import moekit as mk
from moekit.data.tasks import Example, Prompt, Task, Template
from moekit.evaluation.likelihood import likelihoods


def some_prompts() -> list[Prompt]:
    examples = [
        Example(str(index), {"x": f"say {index} now"}, "word0", options=("word0", "two", "a"))
        for index in range(4)
    ]
    task = Task("pick", "cluster", lambda split: examples, (Template("{x}"),))
    return [mk.format_prompt(task, example) for example in examples]


def test_ranking_equals_teacher_forcing_of_each_option(model):
    tokenizer = mk.ByteTokenizer()
    prompts = some_prompts()
    targets = [
        dataclasses.replace(prompt, target=option)
        for prompt in prompts
        for option in prompt.options
    ]
    batch = mk.pad_prompts(targets, tokenizer, input_length=64, target_length=16)
    logits = np.asarray(jax.jit(lambda batch: model(batch).logits)(batch), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(log_probs, batch.targets[..., None], -1)[..., 0]
    sums = (own * batch.loss_weights).sum(1).reshape(4, 3)
    tokens = batch.loss_weights.sum(1).reshape(4, 3)

    inputs = [[*tokenizer.encode(prompt.input), 1] for prompt in prompts]
    options = [[[*tokenizer.encode(option), 1] for option in each.options] for each in prompts]
    found = likelihoods(model, inputs, options)
    np.testing.assert_allclose([[each.log_prob for each in row] for row in found], sums, atol=1e-4)
    assert [[each.tokens for each in row] for row in found] == tokens.tolist()
    ranked = mk.rank_options(model, prompts, tokenizer)
    assert ranked == (sums / tokens).argmax(1).tolist()


def test_a_model_that_is_not_finite_is_named(model):
    graphdef, state = nnx.split(model)
    broken = nnx.merge(graphdef, jax.tree.map(lambda array: array * np.nan, state))
    with pytest.raises(ValueError, match="parameters of st-nano are not finite"):
        mk.rank_options(broken, some_prompts(), mk.ByteTokenizer())


def test_prompts_without_options_are_named_before_the_model_runs(model):
    prompts = [*some_prompts(), Prompt("What is it?", "x", task="free", id="7")]
    with pytest.raises(ValueError, match=r"prompt 4 \(free 7\) has no options to rank"):
        mk.rank_options(model, prompts)
    with pytest.raises(ValueError, match=r"prompt 0 \('What is it\?'\) has no options"):
        mk.rank_options(model, [Prompt("What is it?", "x")])
    assert mk.rank_options(model, []) == []
