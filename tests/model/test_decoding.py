"""Arguments of `generate`: one text or several, and values that it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moekit as mk
from moekit.generation_config import GenerationSettings
from moekit.model import decoding, sampling
from moekit.model.batching import encode_inputs
from moekit.model.decoding import CHUNK, generate_ids


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
        ({"temperature": -0.5}, r"temperature is -0.5; use 0 or a finite number"),
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


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_streamed_pieces_join_to_the_answer(model, temperature):
    settings = dict(max_new_tokens=3 * CHUNK + 1, temperature=temperature, seed=3)
    answer = mk.generate(model, "What is 3 + 4?", **settings)
    pieces = mk.generate(model, "What is 3 + 4?", stream=True, **settings)
    assert iter(pieces) is pieces
    assert "".join(pieces) == answer


def test_chunks_share_one_program(model):
    settings = dict(max_new_tokens=5 * CHUNK, temperature=2.0)
    sampling.programs.cache_clear()
    mk.generate(model, "a", **settings)
    assert "".join(mk.generate(model, "b", stream=True, **settings))
    mk.generate(model, "c", stop="\n", **settings)
    graphdef = nnx.graphdef(model)
    programs = sampling.programs(graphdef, 5 * CHUNK, sample=True, top_k=0, nucleus=False)
    assert sampling.programs.cache_info().misses == 1
    assert programs.start._cache_size() == programs.advance._cache_size() == 1


def test_an_answer_ends_before_a_stop_text(model):
    settings = dict(max_new_tokens=4 * CHUNK, temperature=2.0)
    texts = ["a", "b", "c"]
    whole = mk.generate(model, texts, **settings)
    stops = [answer[3:5] for answer in whole[:2]]
    answers = mk.generate(model, texts, stop=stops, **settings)
    for answer, full in zip(answers, whole, strict=True):
        places = [full.find(stop) for stop in stops if stop in full]
        assert answer == full[: min(places, default=len(full))]
    assert len(answers[0]) <= 3 and len(answers[1]) <= 3
    (stop,) = stops[:1]
    alone = mk.generate(model, "a", stop=stop, **settings)
    assert alone == "".join(mk.generate(model, "a", stop=(stop,), stream=True, **settings))
    assert stop not in alone


def test_decoding_ends_when_every_answer_has_stopped(model, monkeypatch):
    steps = []
    decode = decoding._decode_group

    def counted(*arguments):
        for tokens in decode(*arguments):
            steps.append(len(tokens))
            yield tokens

    monkeypatch.setattr(decoding, "_decode_group", counted)
    settings = dict(max_new_tokens=8 * CHUNK, temperature=2.0)
    first = mk.generate(model, "a", **settings)[0]
    assert len(steps) == 1  # without a stop text, one loop
    steps.clear()
    assert mk.generate(model, "a", stop=first, **settings) == ""
    assert len(steps) <= 2


def test_streams_are_checked_before_they_start(model):
    with pytest.raises(ValueError, match="stream=True is for one text"):
        mk.generate(model, ["a"], stream=True)
    with pytest.raises(ValueError, match="a stop text is empty"):
        mk.generate(model, "a", stop=["b", ""])
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        mk.generate(model, "a", stream=True, max_new_tokens=0)
    with pytest.raises(ValueError, match="lone surrogate"):
        mk.generate(model, "\ud800", stream=True)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_one_number_that_is_not_finite_is_named_also_where_it_is_not_used(model, value):
    broken = mk.with_config(model, model.cfg)
    embedding = broken.embedding_vd[...]
    broken.embedding_vd[...] = embedding.at[-1, 0].set(value)
    message = r"parameters of t5-nano are not finite.*first such parameter is embedding_vd:"
    with pytest.raises(ValueError, match=message):
        mk.generate(broken, "text", max_new_tokens=8)
    with pytest.raises(ValueError, match=message):
        next(mk.generate(broken, "text", max_new_tokens=8, stream=True))


def test_a_beam_of_one_and_top_k_of_one_are_greedy(model):
    texts = ["What is 3 + 4?", "a", "a longer text than the others, of another length" * 3]
    greedy = mk.generate(model, texts, max_new_tokens=12)
    assert mk.generate(model, texts, max_new_tokens=12, num_beams=1) == greedy
    assert mk.generate(model, texts, max_new_tokens=12, temperature=1.5, top_k=1) == greedy
    assert mk.generate(model, texts, max_new_tokens=12, temperature=1.5, top_p=1e-6) == greedy


def test_what_else_is_in_the_batch_changes_no_answer():
    cfg = mk.preset("st-nano").replace(
        d_model=32, d_ff=64, encoder_layers=1, decoder_layers=1, dispatch="dropless",
        num_experts=4, encoder_moe_layers=1, decoder_moe_layers=1,
    )  # fmt: skip
    model = mk.EncoderDecoder(cfg, seed=0)
    texts = ["one", "two words", "three words here", "x" * 100]
    for settings in ({}, {"temperature": 1.0, "top_k": 20}, {"num_beams": 3}):
        alone = [mk.generate(model, texts[0], max_new_tokens=10, **settings)]
        together = mk.generate(model, texts, max_new_tokens=10, **settings)
        assert together[:1] == alone


def test_beams_that_cannot_be_streamed_or_sampled_are_refused(model):
    with pytest.raises(ValueError, match="stream=True with num_beams=2"):
        mk.generate(model, "a", stream=True, num_beams=2)
    with pytest.raises(ValueError, match="beam search does not sample"):
        mk.generate(model, "a", num_beams=2, temperature=1.0)
    with pytest.raises(ValueError, match="top_k is 5, but temperature is 0"):
        mk.generate(model, "a", top_k=5)


def test_settings_left_out_are_those_of_the_configuration(model):
    generation = GenerationSettings(
        max_new_tokens=5, num_beams=2, length_normalization="transformers"
    )
    own = mk.with_config(model, model.cfg.replace(generation=generation))
    answer = mk.generate(
        model,
        "a",
        max_new_tokens=5,
        num_beams=2,
        length_penalty=0.6,
        length_normalization="transformers",
    )
    assert mk.generate(own, "a") == answer
