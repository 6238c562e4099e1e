import pickle

import pytest
import sentencepiece
from hypothesis import given, settings, strategies as st

from moekit.data.batch import tokenize_prompt
from moekit.data.flan import flan_mixture
from moekit.data.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "ing")]
TEXT = [
    " ".join(SYLLABLES[i * j % 112] + SYLLABLES[(i + 3 * j) % 112] for j in range(1, 9)) + "."
    for i in range(600)
]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "small.model"
    return train_sentencepiece(TEXT, path, vocab_size=640)


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eos_id, 0, 0]) == text
    assert all(3 <= i < 259 for i in ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(), max_size=4).map("\n".join))
def test_pieces_round_trip(pieces, text):
    text = text.replace("\u2581", " ")  # SentencePiece's own mark of a space
    ids = pieces.encode(text)
    assert pieces.decode([*ids, pieces.eos_id, 0]) == text
    assert len(pieces.encode(f"{text}\n\n{text}")) == 2 * len(ids) + 2  # lines do not touch
    assert pickle.loads(pickle.dumps(pieces)).encode(text) == ids


def test_t5s_kind_folds_whitespace(tmp_path):
    path = tmp_path / "t5.model"
    with path.open("wb") as file:  # as T5's own: normalised, no byte pieces
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(TEXT),
            model_writer=file,
            vocab_size=300,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    tokenizer = SentencePieceTokenizer(path)
    for text in TEXT[:9]:
        loose = text.replace(" ", "\n\n  ", 3) + "\n"
        assert tokenizer.decode(tokenizer.encode(loose)) == text


def test_special_ids_are_t5s(pieces):
    for tokenizer in (ByteTokenizer(), pieces):
        assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
        assert tokenizer.vocab_size % 128 == 0
        assert tokenizer.sentinel(0) == tokenizer.sentinel(99) + 99 < tokenizer.vocab_size
        assert tokenizer.decode([tokenizer.sentinel(7)]) == "<extra_id_7>"
        with pytest.raises(ValueError, match="sentinel 100"):
            tokenizer.sentinel(100)
    assert ByteTokenizer().vocab_size == 384


def test_trained_pieces(pieces):
    assert pieces.vocab_size == 640
    text = "The quick brown fox."
    assert pieces.decode(pieces.encode(text)) == text
    strange = "fox \u4e2d\U0001f600"  # byte fallback: nothing is unknown
    assert pieces.unk_id not in pieces.encode(strange)
    assert pieces.decode(pieces.encode(strange)) == strange
    same = train_sentencepiece(TEXT, pieces.path.with_name("again.model"), vocab_size=640)
    assert same.encode(text) == pieces.encode(text)


def test_loading(pieces, tmp_path):
    assert load_tokenizer("byte") == ByteTokenizer()
    assert load_tokenizer(str(pieces.path)).digest() == pieces.digest()
    assert load_tokenizer(pieces) is pieces
    with pytest.raises(ValueError, match="tokenizer='byte'"):
        load_tokenizer(None)
    with pytest.raises(FileNotFoundError, match=r"\.model"):
        load_tokenizer(str(tmp_path / "none.model"))
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        SentencePieceTokenizer(broken)


def test_bad_training_arguments(tmp_path):
    with pytest.raises(ValueError, match="multiple of 128"):
        train_sentencepiece(TEXT, tmp_path / "m.model", vocab_size=1000)
    with pytest.raises(ValueError, match="more text"):
        train_sentencepiece(["a b c"], tmp_path / "m.model", vocab_size=8192)
    assert not list(tmp_path.iterdir())


def test_formatted_examples_round_trip(pieces):
    names = ("word_problem", "boolean", "count_letter", "zone_region", "unicode_name")
    for prompt in flan_mixture(dict.fromkeys(names, 1.0)).sample(150):
        for tokenizer in (ByteTokenizer(), pieces):
            pair = tokenize_prompt(prompt, tokenizer, input_length=9999, target_length=9999)
            assert tokenizer.decode(pair["inputs"]) == prompt.input.replace("\u2581", " ")
            assert tokenizer.decode(pair["targets"]) == prompt.target.replace("\u2581", " ")
