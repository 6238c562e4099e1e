"""Answers of ours and of transformers with the same random weights: greedy and four beams."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moekit as mk
from moekit.model.decoding import generate_ids

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

QUESTIONS = 32
NEW_TOKENS = 64
VOCABULARY = 64
SIZES = dict(vocab_size=VOCABULARY, d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2)
SPARSE = dict(num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)


def peer(family: str) -> Any:
    """A random model of transformers."""
    torch.manual_seed(0)
    if family == "t5":
        config = transformers.T5Config(**SIZES, decoder_start_token_id=0)
        return transformers.T5ForConditionalGeneration(config).eval()
    config = transformers.SwitchTransformersConfig(
        **SIZES, **SPARSE, num_experts=4, decoder_start_token_id=0
    )
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


def questions() -> list[list[int]]:
    """Token ids of mixed lengths that end in end of sequence."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 40, QUESTIONS)
    return [[*generator.integers(3, VOCABULARY, n - 1).tolist(), 1] for n in lengths]


@pytest.mark.parametrize("family", ["t5", "switch"])
@pytest.mark.parametrize("num_beams", [1, 4])
def test_answers_are_equal(family: str, num_beams: int, tmp_path: Path) -> None:
    model = peer(family)
    model.get_input_embeddings().weight.data[0] = 0  # or padding echoes itself
    model.save_pretrained(tmp_path)
    inputs = questions()
    width = max(map(len, inputs))
    ids = torch.tensor([each + [0] * (width - len(each)) for each in inputs])
    with torch.no_grad():
        theirs = model.generate(
            input_ids=ids,
            attention_mask=(ids > 0).long(),
            num_beams=num_beams,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    ours = generate_ids(
        mk.load(tmp_path),
        inputs,
        max_new_tokens=NEW_TOKENS,
        num_beams=num_beams,
        length_penalty=1.0,
        length_normalization="transformers",
    )
    for own, row in zip(ours, theirs[:, 1:].tolist(), strict=True):
        expected = row + [0] * (NEW_TOKENS - len(row))
        assert own.tolist() == expected
    assert len({tuple(own.tolist()) for own in ours}) > 4
