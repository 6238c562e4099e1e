"""Output logits are float32, and accuracy is that of argmax decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moekit as mk
from moekit.training.step import token_losses


def accuracy(logits, targets):
    sums = token_losses(logits, targets, jnp.ones(targets.shape))
    return float(sums["hits"] / sums["count"])


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_bfloat16_models_are_float32(tied):
    cfg = mk.preset("t5-nano").replace(
        dtype="bfloat16", tied_logits=tied, vocab_size=32_128, encoder_layers=1, decoder_layers=1
    )
    model = mk.EncoderDecoder(cfg, seed=0)
    states = 3 * jax.random.normal(jax.random.key(0), (2, 64, cfg.d_model))
    states = states.astype(jnp.bfloat16)
    logits = model.logits(states)
    assert logits.dtype == jnp.float32

    head = model.embedding_vd[...].T if tied else model.head_dv[...]
    scale = cfg.d_model**-0.5 if tied else 1.0
    scaled = (states.astype(jnp.float32) * scale).astype(jnp.bfloat16)
    head = head.astype(jnp.bfloat16)
    exact = np.asarray(scaled, np.float64) @ np.asarray(head, np.float64)
    np.testing.assert_allclose(logits, exact, atol=1e-5 * np.abs(exact).max())

    second, first = np.moveaxis(np.argsort(exact, -1)[..., -2:], -1, 0)
    assert accuracy(logits, jnp.asarray(first)) == 1
    assert accuracy(logits, jnp.asarray(second)) == 0


def test_the_head_of_a_bfloat16_model_learns():
    cfg = mk.preset("t5-nano").replace(dtype="bfloat16", tied_logits=True)
    models = {"bfloat16": mk.EncoderDecoder(cfg, seed=0)}
    models["float32"] = mk.with_config(models["bfloat16"], cfg.replace(dtype="float32"))
    states = jax.random.normal(jax.random.key(0), (1, 8, cfg.d_model))
    cotangent = jax.random.normal(jax.random.key(1), (1, 8, cfg.vocab_size))

    def summed(states, dtype):
        return jnp.sum(models[dtype].logits(states.astype(dtype)) * cotangent)

    exact = jax.grad(summed)(states, "float32")
    rounded = jax.grad(summed)(states, "bfloat16")
    np.testing.assert_allclose(rounded, exact, atol=0.03 * float(jnp.abs(exact).max()))


def test_a_tie_is_a_hit_only_where_argmax_is_the_target():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.integers(0, 3, (4, 32, 8)), jnp.float32)  # most positions have ties
    targets = jnp.asarray(rng.integers(0, 8, (4, 32)))
    expected = np.mean(np.argmax(np.asarray(logits), -1) == np.asarray(targets))
    assert accuracy(logits, targets) == pytest.approx(expected)
    assert accuracy(jnp.zeros((1, 8, 8)), jnp.arange(8)[None]) == pytest.approx(1 / 8)
