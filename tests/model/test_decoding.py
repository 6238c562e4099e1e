"""Arguments of `generate`: one text or several, and values that it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

import moekit as mk
from moekit.model.batching import encode_inputs
from moekit.model.decoding import generate_ids


@pytest.fixture(scope="module")
def model():
    cfg = mk.preset("t5-nano").replace(d_model=32, d_ff=64, encoder_layers=1, decoder_layers=1)
    return mk.EncoderDecoder(cfg, seed=0)


def test_one_text_gives_one_text_and_a_list_gives_a_list(model):
    answer = mk.generate(model, "What is 3 + 4?", max_new_tokens=8)
    assert isinstance(answer, str)
    for texts in (["What is 3 + 4?"], ("What is 3 + 4?",)):
        assert mk.generate(model, texts, max_new_tokens=8) == [answer]
    both = mk.generate(model, ["", "What is 3 + 4?"], max_new_tokens=8)
    assert len(both) == 2 and both[1] == answer
    assert mk.generate(model, [], max_new_tokens=8) == []
    assert isinstance(mk.generate(model, "", max_new_tokens=8), str)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; use 1 or more"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; use 1 or more"),
        ({"batch_size": 0}, "batch_size is 0; use 1 or more"),
        ({"batch_size": -3}, "batch_size is -3; use 1 or more"),
        ({"temperature": -0.5}, r"temperature is -0.5; use 0 \(greedy\)"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
    ],
)
def test_settings_out_of_range_are_refused(model, setting, message):
    with pytest.raises(ValueError, match=message):
        mk.generate(model, "text", **setting)
    with pytest.raises(ValueError, match=message):
        mk.generate(model, [], **setting)
    with pytest.raises(ValueError, match=message):
        generate_ids(model, [[5, 1]], **({"max_new_tokens": 4} | setting))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["fine", "\ud800"], r"text 1 has a lone surrogate, U\+D800, at character 0"),
        (["ab\udfff", "fine"], r"text 0 has a lone surrogate, U\+DFFF, at character 2"),
        ("ab\ud83d", r"text 0 has a lone surrogate, U\+D83D, at character 2"),
        (["fine", "x" * 5000], "text 1 .* is 5001 tokens long, more than the 4096"),
    ],
)
def test_texts_that_cannot_be_read_are_named(model, texts, message):
    with pytest.raises(ValueError, match=message):
        mk.generate(model, texts)


def test_valid_unicode_is_read():
    texts = ["", "\U0001f600", "\ue000", "caf\u00e9\n\x00"]
    rows = encode_inputs(texts, mk.ByteTokenizer(), 64)
    assert [mk.ByteTokenizer().decode(row) for row in rows] == texts
    assert all(row[-1] == 1 for row in rows)


def test_answers_end_at_the_end_of_sequence(model):
    ids = generate_ids(model, [[5, 1], [6, 7, 1]], max_new_tokens=8)
    for row in ids:
        assert row.shape == (8,)
        after = np.cumsum(row == 1) - (row == 1)  # ends of sequence before each position
        assert not row[after > 0].any()


def test_a_model_of_nan_parameters_is_refused(model):
    broken = mk.with_config(model, model.cfg)
    broken.embedding_vd[...] = jnp.full_like(broken.embedding_vd[...], jnp.nan)
    with pytest.raises(ValueError, match="parameters of t5-nano are not finite"):
        mk.generate(broken, "text", max_new_tokens=8)
