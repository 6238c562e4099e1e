"""Seeds that are trained side by side are those that are trained alone."""

import jax
import numpy as np
import pytest
from flax import nnx

import moekit as mk
from moekit.data.text import Corpus, Document
from moekit.training.seeds import train_seeds

TEXT = Corpus(
    "text",
    lambda split: [Document(f"{split} {n} is followed by {n + 1}. " * 3) for n in range(90)],
)
CONFIG = mk.TrainConfig(
    steps=4,
    batch_tokens=8 * 80,
    input_length=64,
    target_length=16,
    learning_rate=1e-2,
    log_every=2,
    eval_every=3,
)


def model(seed: int, **changes: object) -> mk.EncoderDecoder:
    cfg = mk.preset("switch-nano").replace(
        d_model=16,
        d_ff=32,
        encoder_layers=1,
        decoder_layers=1,
        decoder_moe_layers=0,
        router="loss-free",
        dropout=0.1,
    )
    return mk.EncoderDecoder(cfg.replace(**changes), seed=seed)


def test_seeds_side_by_side_equal_seeds_alone():
    seeds = (3, 5)
    together = train_seeds([model(seed) for seed in seeds], TEXT, CONFIG, seeds, eval_source=TEXT)
    for seed, found in zip(seeds, together, strict=True):
        alone = mk.train(model(seed), TEXT, CONFIG.replace(seed=seed), eval_source=TEXT)
        for name in ("loss", "grad_norm", "encoder_dropped", "valid_loss"):
            expected = [row[name] for row in alone.metrics.rows if name in row]
            rows = [row[name] for row in found.rows if name in row]
            np.testing.assert_allclose(rows, expected, rtol=1e-4)
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, atol=2e-3),
            nnx.to_pure_dict(nnx.state(found.model)),
            nnx.to_pure_dict(nnx.state(alone.model)),
        )
    first, second = (found.rows[0]["loss"] for found in together)
    assert abs(first - second) > 1e-4


@pytest.mark.parametrize(
    ("models", "seeds", "message"),
    [
        ([0], [0, 1], "1 models for 2 seeds"),
        ([0, 1], [2, 2], "give each seed once"),
    ],
)
def test_models_that_do_not_fit_their_seeds(models, seeds, message):
    with pytest.raises(ValueError, match=message):
        train_seeds([model(seed) for seed in models], TEXT, CONFIG, seeds)


def test_another_configuration_or_a_mesh_is_refused():
    with pytest.raises(ValueError, match="another configuration"):
        train_seeds([model(0), model(1, d_ff=16)], TEXT, CONFIG, [0, 1])
    meshed = mk.EncoderDecoder(model(0).cfg, mesh=mk.make_mesh(data=8))
    with pytest.raises(ValueError, match="leave out the mesh"):
        train_seeds([meshed], TEXT, CONFIG, [0])
