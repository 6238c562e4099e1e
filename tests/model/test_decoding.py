"""Decoding: batches of similar length, greedy decoding, sampling."""

import jax
import numpy as np
import pytest

import moekit as mk
from moekit.data.batch import pad_pairs
from moekit.data.tokenizer import EOS
from moekit.model.batching import bucket_length, length_groups, num_rows
from moekit.model.decoding import generate_ids


@pytest.fixture(scope="module")
def model() -> mk.EncoderDecoder:
    cfg = mk.preset("st-nano").replace(d_model=16, d_ff=32, eval_capacity_factor=8.0)
    return mk.EncoderDecoder(cfg, seed=0)


@pytest.mark.parametrize("mesh", [None, {"data": 2, "expert": 4}], ids=str)
def test_batches_hold_fewer_long_texts_and_split_over_the_mesh(mesh):
    mesh = mesh and mk.make_mesh(**mesh)
    lengths = [5000, 60, 3000, 61, 700, 2000, 65] * 3
    parts = [3] * 21
    groups = list(length_groups(lengths, 4096, 16, parts, mesh))
    assert sorted(i for group, _, _ in groups for i in group) == list(range(21))
    shards = 8 if mesh else 1
    for group, size, rows in groups:
        assert size == bucket_length(max(lengths[i] for i in group), 4096)
        assert rows == num_rows(size, 16, mesh)
        assert len(group) <= rows <= 16 and rows % shards == 0
        assert rows == shards or rows * size**2 <= 2**23
        assert sum(parts[i] for i in group) <= 64


def test_greedy_decoding_equals_argmax_of_the_whole(model):
    texts, tokenizer = ["one", "a longer text than that"], mk.ByteTokenizer()
    inputs = [[*tokenizer.encode(text), EOS] for text in texts]
    outputs = generate_ids(model, inputs, max_new_tokens=8)
    for ids, alone in zip(inputs, outputs, strict=True):
        np.testing.assert_array_equal(generate_ids(model, [ids], max_new_tokens=8)[0], alone)
    assert mk.generate(model, texts, max_new_tokens=8) == [tokenizer.decode(ids) for ids in outputs]
    pairs = [{"inputs": a, "targets": b} for a, b in zip(inputs, outputs, strict=True)]
    batch = pad_pairs(pairs, input_length=64, target_length=8)
    best = np.asarray(jax.jit(lambda batch: model(batch).logits)(batch)).argmax(-1)
    for row, ids in zip(best, outputs, strict=True):
        length = [*ids, EOS].index(EOS) + 1
        np.testing.assert_array_equal(row[:length], ids[:length])


def test_sampling_depends_on_the_seed_alone(model):
    a, b, c = (
        mk.generate(model, ["text"] * 3, temperature=1.0, seed=seed, max_new_tokens=8)
        for seed in (1, 1, 2)
    )
    assert a == b != c
    with pytest.raises(ValueError, match="temperature is -1"):
        mk.generate(model, ["x"], temperature=-1.0)
    with pytest.raises(ValueError, match="is 5001 tokens long, more than the 4096"):
        mk.generate(model, ["x" * 5000])
