import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moekit.data.span_corruption import chunk_length, restore, span_corruption
from moekit.data.text import Corpus, Document
from moekit.data.tokenizer import EOS, ByteTokenizer

TOKENIZER = ByteTokenizer()


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 700), seed=st.integers(0, 10**6))
def test_round_trip_and_rate(length, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 259, length).astype(np.int32)
    inputs, targets = span_corruption(tokens, rng, tokenizer=TOKENIZER)
    np.testing.assert_array_equal(restore(inputs, targets, TOKENIZER), tokens)
    if length > 1:
        spans = (targets >= TOKENIZER.sentinel(99)).sum()
        hidden = len(targets) - spans
        assert hidden == max(1, min(round(0.15 * length), length - 1))
        assert len(inputs) == length - hidden + spans
        assert inputs[0] == tokens[0]  # a visible span comes first
        if length > 60 and spans < 100:
            assert abs(hidden / spans - 3) < 0.5


def test_t5_lengths():
    assert chunk_length(512, 114) == 568


def test_chunks_cover_the_text_and_fit():
    text = "".join(chr(97 + i % 26) for i in range(1000))
    corpus = Corpus("one", lambda split: [Document(text, "a"), Document(text[:40], "b")])
    data = corpus.token_pairs(
        TOKENIZER, input_length=128, target_length=32, seed=0, shuffle=False, repeat=False
    )
    pieces = []
    for pair in data:
        assert len(pair["inputs"]) <= 128 and len(pair["targets"]) <= 32
        assert pair["inputs"][-1] == EOS == pair["targets"][-1]
        pieces.append(TOKENIZER.decode(restore(pair["inputs"], pair["targets"], TOKENIZER)))
    assert "".join(pieces) == text + text[:40]


def test_spans_are_drawn_anew_each_epoch_but_fixed_by_the_seed():
    corpus = Corpus("x", lambda split: [Document("some words to hide " * 4)])
    kwargs = {"input_length": 128, "target_length": 32}
    stream = corpus.token_pairs(TOKENIZER, seed=1, **kwargs)
    again = corpus.token_pairs(TOKENIZER, seed=1, **kwargs)
    np.testing.assert_array_equal(stream[0]["targets"], again[0]["targets"])
    assert not all(np.array_equal(stream[0]["targets"], stream[i]["targets"]) for i in (1, 2, 3))


def test_empty_text_and_split_are_errors():
    with pytest.raises(ValueError, match=r"'chapter 3'.*empty"):
        Document("  \n", "chapter 3", "books")
    with pytest.raises(ValueError, match="no documents in split 'valid'"):
        Corpus("none", lambda split: []).documents("valid")
