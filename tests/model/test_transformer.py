"""The model: causality, packing, padding, decoding, rematerialization, sharding.

Compiling takes nearly all of the time, so a flavour's programs are shared: two models ("tight"
drops tokens, "roomy" drops none) and batches of one shape.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moekit as mk
from moekit.data.batch import pad_pairs
from moekit.model import stack
from moekit.model.incremental import decode_token, start_cache
from moekit.model.relative_bias import relative_bucket
from moekit.model.transformer import EncoderDecoder, shift_right, with_config
from moekit.training.step import auxiliary_losses, token_losses
from moekit.training.validation import evaluate_loss

FLAVOURS = ("t5", "switch", "gshard", "ec", "st")
SPARSE = FLAVOURS[1:]
ROOMY = {"capacity_factor": 8.0, "eval_capacity_factor": 8.0}  # no drops: rows are independent
SETTINGS = {"roomy": ROOMY, "tight": {"eval_capacity_factor": 0.25, "min_capacity": 1}}
ONE_LAYER = {"encoder_layers": 1, "decoder_layers": 1}


def small(flavour, **changes):
    return mk.preset(f"{flavour}-nano").replace(d_model=32, d_ff=64, **changes)


@functools.cache
def model_of(flavour, setting="roomy"):
    if setting == "roomy":
        return mk.EncoderDecoder(small(flavour, **ROOMY), seed=1)
    return with_config(model_of(flavour), small(flavour, **SETTINGS[setting]))


def random_pairs(n=4, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"inputs": rng.integers(3, 300, 5 + 3 * i), "targets": rng.integers(3, 300, 4 + i)}
        for i in range(n)
    ]


def padded(pairs, input_length=48, target_length=24):
    batch = pad_pairs(pairs, input_length=input_length, target_length=target_length)
    return jax.tree.map(jnp.asarray, batch)


@nnx.jit
def forward(model, batch, key=None):
    return model(batch, key=key)


def logits_of(model, batch):
    return np.asarray(forward(model, batch).logits)


def split_parameters(model):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, batch, key=None, remat="none"):
        out = nnx.merge(graphdef, params, rest)(batch, key=key, remat=remat)
        return token_losses(out.logits, batch.targets, batch.loss_weights)["objective"]

    return params, loss


def test_golden_buckets():
    distance = np.array([0, -1, 1, 7, -7, 8, -16, 16, 64, -128, 500])
    both = relative_bucket(distance, bidirectional=True)
    assert both.tolist() == [0, 1, 17, 23, 7, 24, 10, 26, 30, 15, 31]
    past = relative_bucket(np.array([0, 5, -1, -15, -16, -20, -128, -900]), bidirectional=False)
    assert past.tolist() == [0, 0, 1, 15, 16, 17, 31, 31]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_no_decoder_sees_the_future(flavour, setting):
    model, batch = model_of(flavour, setting), padded(random_pairs())
    before = logits_of(model, batch)
    for t in (3, 8):
        # the last row: later in token order
        targets = batch.targets.at[-1, t:].add(77) % 300
        after = logits_of(model, dataclasses.replace(batch, targets=targets))
        np.testing.assert_allclose(after[-1, : t + 1], before[-1, : t + 1], atol=1e-5)
        if t + 1 < 7:
            assert np.abs(after[-1, t + 1 : 7] - before[-1, t + 1 : 7]).max() > 1e-4


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_packed_examples_equal_the_same_examples_alone(flavour):
    model, pairs = model_of(flavour), random_pairs(3)
    alone = logits_of(model, padded(random_pairs()))
    row = {
        field: np.concatenate([pair[field] for pair in pairs]) for field in ("inputs", "targets")
    }
    packed = padded([row, *random_pairs(3, seed=9)])
    arrays = {}
    for side, field in (("input", "inputs"), ("target", "targets")):
        lengths = [len(pair[field]) for pair in pairs]
        segments = np.repeat([1, 2, 3], lengths)
        positions = np.concatenate([np.arange(length) for length in lengths])
        for name, values in (("segments", segments), ("positions", positions)):
            old = getattr(packed, f"{side}_{name}")
            arrays[f"{side}_{name}"] = old.at[0, : len(values)].set(values)
    together = logits_of(model, dataclasses.replace(packed, **arrays))[0]
    start = 0
    for index, pair in enumerate(pairs):
        length = len(pair["targets"])
        own = together[start : start + length]
        np.testing.assert_allclose(own, alone[index, :length], atol=2e-5)
        start += length


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_padding_changes_nothing(flavour):
    model, pairs = model_of(flavour, "tight"), random_pairs()
    batch, longer = padded(pairs), padded(pairs, 80, 40)
    longer = jax.tree.map(lambda x: jnp.pad(x, ((0, 3), (0, 0))), longer)
    few, many = forward(model, batch), forward(model, longer)
    real = np.asarray(batch.target_segments > 0)
    logits = np.asarray(many.logits)[:4, :24]
    np.testing.assert_allclose(np.asarray(few.logits)[real], logits[real], atol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), few.stats, many.stats
    )
    losses = [
        token_losses(out.logits, each.targets, each.loss_weights)
        for out, each in ((few, batch), (many, longer))
    ]
    for name, value in losses[0].items():
        assert float(losses[1][name]) == pytest.approx(float(value), rel=1e-5)


@pytest.mark.parametrize("flavour", [name for name in FLAVOURS if name != "ec"])
def test_cached_decoding_equals_teacher_forcing(flavour):
    # Expert Choice is left out: only its encoder differs, its decoder has the router of gshard
    model, batch = model_of(flavour), padded(random_pairs())
    expected = logits_of(model, batch)
    states = model.decoder.layer_states()

    def start(model, states, batch):
        encoded = model.encode(batch.inputs, batch.input_segments)
        return start_cache(model, states, encoded, rows=1, length=12)

    cache = nnx.jit(start)(model, states, batch)
    step = nnx.jit(decode_token)
    read = shift_right(batch.targets, batch.target_positions)
    for t in range(4):  # every row has at least four targets
        logits, cache = step(model, states, read[:, t, None], cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=2e-5)


@pytest.mark.parametrize("name", sorted(mk.PRESETS))
def test_parameters_are_what_was_counted(name):
    cfg = mk.preset(name)
    state = nnx.state(nnx.eval_shape(lambda: EncoderDecoder(cfg)), nnx.Param)
    counted = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state))
    assert counted == cfg.num_parameters().total


def test_t5_1_0_ties_and_scales_its_output():
    cfg = small("t5", activation="relu", tied_logits=True)
    model, batch = mk.EncoderDecoder(cfg, seed=0), padded(random_pairs())
    names = {str(path[-1]) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert "head_dv" not in names and not any("wg" in name for name in names)
    total = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert total == cfg.num_parameters().total
    logits = logits_of(model, batch)
    scaled = with_config(model, cfg)
    scaled.embedding_vd[...] = scaled.embedding_vd[...].at[350].multiply(2.0)
    ratio = logits_of(scaled, batch)[..., 350] / logits[..., 350]
    assert not (batch.targets == 350).any() and not (batch.inputs == 350).any()
    np.testing.assert_allclose(ratio, 2.0, rtol=1e-4)


@pytest.mark.parametrize("flavour", SPARSE)
def test_every_router_and_expert_learns(flavour):
    model = mk.EncoderDecoder(small(flavour, **ROOMY, **ONE_LAYER), seed=5)
    params, loss = split_parameters(model)
    grads = jax.jit(jax.grad(loss))(params, padded(random_pairs(8), 32, 16))
    for name in ("encoder", "decoder"):
        for leaf in jax.tree.leaves(grads[name]["blocks"][0]["moe"]):
            assert np.isfinite(leaf).all() and float(jnp.abs(leaf).max()) > 0


def test_any_layer_of_a_block_may_be_sparse():
    cfg = small("switch", **ROOMY).replace(encoder_layers=2, decoder_layers=3, sparse_layer=1)
    model = mk.EncoderDecoder(cfg, seed=1)
    sparse = {
        name: [layer.moe is not None for layer in getattr(model, name).blocks]
        for name in ("encoder", "decoder")
    }
    assert sparse == {"encoder": [False, True], "decoder": [False, True, False]}
    output = forward(model, padded(random_pairs()))
    assert {name: stats.load.shape for name, stats in output.stats.items()} == {
        "encoder": (1, 8),
        "decoder": (1, 8),
    }
    counted = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert counted == cfg.num_parameters().total


def test_a_loop_over_blocks_equals_unrolled_blocks(monkeypatch):
    # two blocks of two layers each in the encoder
    cfg = small("st", encoder_layers=4, encoder_moe_layers=2, decoder_layers=1)
    params, loss = split_parameters(mk.EncoderDecoder(cfg, seed=8))
    batch, key = padded(random_pairs()), jax.random.key(0)

    def run():
        lowered = jax.jit(lambda *args: jax.value_and_grad(loss)(*args)).lower(params, batch, key)
        return lowered.compile()(params, batch, key), lowered.as_text().count("stablehlo.while")

    (unrolled_loss, unrolled), num_loops = run()
    monkeypatch.setattr(stack, "platform", lambda: "tpu")
    (looped_loss, looped), num_more_loops = run()
    assert num_more_loops > num_loops
    np.testing.assert_allclose(unrolled_loss, looped_loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(unrolled), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-6)


def test_full_rematerialization_saves_memory():
    cfg = small("t5", encoder_layers=8, decoder_layers=1)
    params, loss = split_parameters(mk.EncoderDecoder(cfg))
    batch = padded(random_pairs(32), 256, 128)

    def temporaries(remat):
        grad = jax.jit(jax.grad(functools.partial(loss, batch=batch, remat=remat)))
        return grad.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("full") < temporaries("none") / 2


def test_dropout_needs_a_key_and_depends_on_it():
    model = mk.EncoderDecoder(small("st", dropout=0.3, **ONE_LAYER), seed=6)
    batch = padded(random_pairs())
    quiet = logits_of(model, batch)
    first, second, again = (
        np.asarray(forward(model, batch, jax.random.key(seed)).logits) for seed in (0, 1, 0)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3 and np.abs(first - quiet).max() > 1e-3


def test_auxiliary_losses_are_means_over_layers_of_both_stacks():
    stats = forward(model_of("st", "tight"), padded(random_pairs())).stats
    layers = jnp.concatenate([each.balance_loss() for each in stats.values()])
    found = auxiliary_losses(small("st", balance_loss=0.5, router_z_loss=0.25), stats)
    assert float(found["balance"]) == pytest.approx(0.5 * float(layers.mean()))
    assert float(found["router_z"]) > 0
    assert auxiliary_losses(small("t5"), {}) == {"balance": 0, "router_z": 0}


def test_another_configuration_keeps_the_parameters_and_refuses_other_shapes():
    model = model_of("st")
    changed = with_config(model, small("st", dropout=0.3))
    assert changed.cfg.dropout == 0.3 and changed.decoder.dropout_rate == 0.3
    jax.tree.map(np.testing.assert_array_equal, nnx.state(changed), nnx.state(model))
    with pytest.raises(ValueError, match=r"ffn/wg_df from \(1, 32, 64\) to \(1, 32, 128\)"):
        with_config(model, small("st").replace(d_ff=128))
    with pytest.raises(ValueError, match=r"head_dv from .* to None"):
        with_config(model, small("st", tied_logits=True))


@pytest.mark.parametrize("flavour", ["t5", "st"])
def test_a_mesh_of_eight_equals_one_device(flavour):
    cfg, batch = small(flavour, **ROOMY, **ONE_LAYER), padded(random_pairs(8), 32, 16)
    mesh = mk.make_mesh(data=2, expert=4)
    one, many = mk.EncoderDecoder(cfg, seed=8), mk.EncoderDecoder(cfg, seed=8, mesh=mesh)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), nnx.state(one), nnx.state(many)
    )
    alone, together = evaluate_loss(one, [batch]), evaluate_loss(many, [batch])
    assert alone == pytest.approx(together, rel=1e-4)
    if flavour == "st":
        weight = many.encoder.blocks[-1].moe.experts.wi_edf[...]
        assert weight.addressable_shards[0].data.shape[1] == cfg.num_experts // 4
