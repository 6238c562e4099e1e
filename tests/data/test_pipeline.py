import itertools

import jax
import numpy as np
import pytest

from moekit.data.corruption import Corpus, Document, restore
from moekit.data.pipeline import batches, pad_prompts, tokenize_prompt, unigram_entropy
from moekit.data.tasks import Prompt
from moekit.data.tokenizer import EOS, ByteTokenizer

TOKENIZER = ByteTokenizer()
DOCUMENTS = [
    Document(f"document {i} speaks of {i * i} and " * (1 + i % 5), str(i)) for i in range(37)
]
CORPUS = Corpus("test", lambda split: DOCUMENTS)
SHAPE = {"input_length": 96, "target_length": 32, "batch_size": 4, "seed": 3}


def rows(batch):
    """(inputs, targets) of every packed example."""
    for b, segments in enumerate(batch.input_segments):
        for segment in range(1, segments.max() + 1):
            there = segments == segment
            target = batch.target_segments[b] == segment
            yield (b, segment), batch.inputs[b][there], batch.targets[b][target], there, target


def test_nothing_is_lost_and_examples_stay_apart():
    texts = []
    for batch in batches(CORPUS, TOKENIZER, repeat=False, **SHAPE):
        assert batch.inputs.shape == (4, 96) and batch.targets.shape == (4, 32)
        np.testing.assert_array_equal(batch.loss_weights, batch.target_segments > 0)
        assert (batch.inputs[batch.input_segments == 0] == 0).all()
        for (b, _), inputs, targets, there, target in rows(batch):
            assert inputs[-1] == EOS == targets[-1] and EOS not in inputs[:-1]
            positions = batch.input_positions[b][there]
            np.testing.assert_array_equal(positions, np.arange(len(inputs)))
            positions = batch.target_positions[b][target]
            np.testing.assert_array_equal(positions, np.arange(len(targets)))
            texts.append(TOKENIZER.decode(restore(inputs, targets, TOKENIZER)))
    total = sum(len(text) for text in texts)
    # only tails shorter than a span are left out
    assert total >= sum(len(d.text) for d in DOCUMENTS) - 3 * len(DOCUMENTS)
    whole = "\n".join(texts)
    assert all(f"document {i} " in whole for i in range(37))


@pytest.mark.parametrize("skip", [0, 1, 7, 23])
def test_resumed_equals_uninterrupted(skip):
    stream = batches(CORPUS, TOKENIZER, **SHAPE)
    for _ in range(skip):
        next(stream)
    state = stream.get_state()
    expected = list(itertools.islice(stream, 4))
    other = batches(CORPUS, TOKENIZER, **SHAPE)
    other.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, list(itertools.islice(other, 4)), expected)


def test_the_seed_decides():
    def first(seed):
        return next(batches(CORPUS, TOKENIZER, **SHAPE | {"seed": seed}))

    jax.tree.map(np.testing.assert_array_equal, first(1), first(1))
    assert not np.array_equal(first(1).inputs, first(2).inputs)


def test_shards_are_disjoint_and_complete():
    def texts(shard):
        stream = batches(CORPUS, TOKENIZER, repeat=False, shard=shard, **SHAPE)
        return [i.tobytes() for batch in stream for _, i, *_ in rows(batch)]

    parts = [texts((i, 3)) for i in range(3)]
    assert sorted(text for part in parts for text in part) == sorted(texts((0, 1)))


def test_pad_prompts():
    prompts = [Prompt("hello", "yes"), Prompt("a longer one", "no")]
    batch = pad_prompts(prompts, TOKENIZER, input_length=16, target_length=8)
    assert TOKENIZER.decode(batch.inputs[0]) == "hello"
    assert batch.input_segments.sum() == 5 + 1 + 12 + 1
    assert batch.loss_weights.sum() == 4 + 3
    with pytest.raises(ValueError, match=r"arith '7' are 41 tokens long, more than the 16"):
        pad_prompts(
            [Prompt("x" * 40, "y", task="arith", id="7")],
            TOKENIZER,
            input_length=16,
            target_length=8,
        )


def test_long_prompts_keep_the_question():
    ids = tokenize_prompt(
        Prompt("old " * 50 + "question?", "answer " * 9),
        TOKENIZER,
        input_length=24,
        target_length=8,
    )
    assert TOKENIZER.decode(ids["inputs"]).endswith("question?") and len(ids["inputs"]) == 24
    assert TOKENIZER.decode(ids["targets"]) == "answer "


def test_unigram_entropy():
    batch = pad_prompts([Prompt("q", "abab" * 8)], TOKENIZER, input_length=4, target_length=64)
    # 16 a, 16 b and one end of sequence
    p = np.array([16, 16, 1]) / 33
    assert np.isclose(unigram_entropy([batch], 384), -(p * np.log(p)).sum())
