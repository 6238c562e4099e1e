import itertools
import json

import jax
import numpy as np
import pytest

from moekit.data.batch import pad_prompts, tokenize_prompt, unigram_entropy
from moekit.data.loader import batches
from moekit.data.mixture import Mixture, PromptFormats
from moekit.data.span_corruption import restore
from moekit.data.tasks import Example, Prompt, Task, Template
from moekit.data.text import Corpus, Document
from moekit.data.tokenizer import EOS, ByteTokenizer

TOKENIZER = ByteTokenizer()
DOCUMENTS = [
    Document(f"document {i} speaks of {i * i} and " * (1 + i % 5), str(i)) for i in range(37)
]
CORPUS = Corpus("test", lambda split: DOCUMENTS)
EXAMPLES = [Example(str(i), {"q": f"what is {i} times {i}?"}, str(i * i)) for i in range(90)]
MIXTURE = Mixture(
    "test",
    tuple(
        Task(
            name, cluster, lambda split, n=n: EXAMPLES[:n], (Template("{q}"), Template("Say: {q}"))
        )
        for name, cluster, n in (("a", "x", 90), ("b", "x", 20), ("c", "y", 3))
    ),
    (6.0, 3.0, 1.0),
    (PromptFormats(),) * 3,
    ("test",) * 3,
)
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


def together(n, states=None, source=CORPUS, **changes):
    """Global batches of n processes."""
    streams = [batches(source, TOKENIZER, shard=(i, n), **SHAPE | changes) for i in range(n)]
    for stream in streams if states else ():
        stream.set_state(states)
    return streams, (
        jax.tree.map(lambda *x: np.concatenate(x), *parts) for parts in zip(*streams, strict=True)
    )


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("source", [CORPUS, MIXTURE], ids=["corpus", "mixture"])
@pytest.mark.parametrize(("skip", "hosts"), [(0, (1, 2)), (1, (2, 1)), (7, (1, 1)), (23, (1, 4))])
def test_resumed_equals_uninterrupted_on_any_hosts(source, skip, hosts):
    _, whole = together(1, source=source)
    expected = list(itertools.islice(whole, skip + 3))
    before, stream = together(hosts[0], source=source)
    same(list(itertools.islice(stream, skip)), expected[:skip])
    states = {k: v for each in before for k, v in each.get_state().items()}
    states = json.loads(json.dumps(states))
    _, after = together(hosts[1], states, source=source)
    same(list(itertools.islice(after, 3)), expected[skip:])


def test_a_state_is_small_and_does_not_grow():
    stream = batches(MIXTURE, TOKENIZER, **SHAPE)
    sizes = []
    for _ in range(60):
        next(stream)
        sizes.append(len(json.dumps(stream.get_state())))
    assert max(sizes[30:]) < 2 * max(sizes[:30]) < 10_000


def test_workers_change_nothing():
    stream = batches(MIXTURE, TOKENIZER, workers=2, **SHAPE)
    expected = list(itertools.islice(batches(MIXTURE, TOKENIZER, **SHAPE), 4))
    same([next(stream), next(stream)], expected[:2])
    stream.set_state(stream.get_state())
    same([next(stream), next(stream)], expected[2:])
    stream.close()


class Broken:
    """A source of examples of equal size, one of which cannot be read."""

    bad = 10

    def token_pairs(self, *_, **__):
        return self

    def labels(self, split):
        return (("broken", "none"),)

    def __len__(self):
        return 100

    def __getitem__(self, i):
        if i == self.bad:
            raise OSError("disk gone")
        return {"inputs": np.ones(90), "targets": np.ones(30), "task": 0, "truncated": 0}


def test_errors_reach_the_caller():
    with pytest.raises(OSError, match="disk gone"):
        next(batches(Broken(), TOKENIZER, **SHAPE))
    Broken.bad = -1
    with pytest.raises(ValueError, match=r"\(90, 30\) tokens do not fit a row of \[80 32\]"):
        next(batches(Broken(), TOKENIZER, **SHAPE | {"input_length": 80, "batch_size": 1}))
    with pytest.raises(ValueError, match="cannot share evenly: use numbers that divide 4"):
        batches(CORPUS, TOKENIZER, shard=(0, 3), **SHAPE)


def test_the_seed_decides():
    def first(source, seed):
        return next(batches(source, TOKENIZER, **SHAPE | {"seed": seed}))

    for source in (CORPUS, MIXTURE):
        same(first(source, 1), first(source, 1))
        assert not np.array_equal(first(source, 1).inputs, first(source, 2).inputs)


def test_one_pass_is_shared_without_loss():
    def texts(n):
        streams = [
            batches(CORPUS, TOKENIZER, repeat=False, shard=(i, n), **SHAPE) for i in range(n)
        ]
        return sorted(i.tobytes() for each in streams for b in each for _, i, *_ in rows(b))

    assert texts(1) == texts(2) == texts(4)


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
