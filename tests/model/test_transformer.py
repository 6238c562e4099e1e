"""The model: causality, packing, padding, decoding, counting, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moekit as mk
from moekit.data.batch import pad_pairs
from moekit.model import stack
from moekit.model.relative_bias import relative_bucket
from moekit.model.transformer import EncoderDecoder, shift_right, with_config
from moekit.training.loop import evaluate_loss, token_losses
from moekit.training.step import auxiliary_losses

FLAVOURS = ("t5", "switch", "gshard", "ec", "st")
SPARSE = FLAVOURS[1:]
ROOM = {"capacity_factor": 8.0, "eval_capacity_factor": 8.0}  # no drops: rows are independent


def small(flavour, **changes):
    return mk.preset(f"{flavour}-nano").replace(d_model=32, d_ff=64, **changes)


def pairs(n=4, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"inputs": rng.integers(3, 300, 5 + 3 * i), "targets": rng.integers(3, 300, 4 + i)}
        for i in range(n)
    ]


def padded(some, input_length=20, target_length=12):
    batch = pad_pairs(some, input_length=input_length, target_length=target_length)
    return jax.tree.map(jnp.asarray, batch)


def logits_of(model, batch):
    return np.asarray(nnx.jit(lambda m, b: m(b).logits)(model, batch))


def test_golden_buckets():
    distance = np.array([0, -1, 1, 7, -7, 8, -16, 16, 64, -128, 500])
    both = relative_bucket(distance, bidirectional=True)
    assert both.tolist() == [0, 1, 17, 23, 7, 24, 10, 26, 30, 15, 31]
    past = relative_bucket(np.array([0, 5, -1, -15, -16, -20, -128, -900]), bidirectional=False)
    assert past.tolist() == [0, 0, 1, 15, 16, 17, 31, 31]


@pytest.mark.parametrize("factor", [0.25, 4.0])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_no_decoder_sees_the_future(flavour, factor):
    cfg = small(flavour, eval_capacity_factor=factor, min_capacity=1)
    model, batch = mk.EncoderDecoder(cfg, seed=1), padded(pairs())
    before = logits_of(model, batch)
    for t in (3, 8):
        # the last row: later in token order
        targets = batch.targets.at[-1, t:].add(77) % 300
        changed = jax.tree.map(lambda x: x, batch)
        object.__setattr__(changed, "targets", targets)
        after = logits_of(model, changed)
        np.testing.assert_allclose(after[-1, : t + 1], before[-1, : t + 1], atol=1e-5)
        if t + 1 < 7:
            assert np.abs(after[-1, t + 1 : 7] - before[-1, t + 1 : 7]).max() > 1e-4


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_packed_examples_equal_lonely_ones(flavour):
    model, some = mk.EncoderDecoder(small(flavour, **ROOM), seed=2), pairs(3)
    alone = logits_of(model, padded(some, 64, 32))
    rows = {}
    for field in ("inputs", "targets"):
        rows[field] = np.concatenate([pair[field] for pair in some])
    packed = pad_pairs([rows], input_length=64, target_length=32)
    for side, field in (("input", "inputs"), ("target", "targets")):
        lengths = [len(pair[field]) for pair in some]
        ids = np.repeat([1, 2, 3], lengths)
        positions = np.concatenate([np.arange(n) for n in lengths])
        getattr(packed, f"{side}_segments")[0, : len(ids)] = ids
        getattr(packed, f"{side}_positions")[0, : len(ids)] = positions
    together, at = logits_of(model, packed)[0], 0
    for row, pair in enumerate(some):
        n = len(pair["targets"])
        np.testing.assert_allclose(together[at : at + n], alone[row, :n], atol=2e-5)
        at += n


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_padding_changes_nothing(flavour):
    model, some = mk.EncoderDecoder(small(flavour, min_capacity=1), seed=3), pairs()
    small_batch, big = padded(some), padded(some, 40, 24)
    big = jax.tree.map(lambda x: jnp.pad(x, ((0, 3), (0, 0))), big)
    a, b = model(small_batch), model(big)
    real = small_batch.target_segments > 0
    np.testing.assert_allclose(a.logits[real], b.logits[:4, :12][real], atol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), a.stats, b.stats)
    losses = [evaluate_loss(model, [batch]) for batch in (small_batch, big)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_cached_decoding_equals_teacher_forcing(flavour):
    model, batch = mk.EncoderDecoder(small(flavour, **ROOM), seed=4), padded(pairs())
    if flavour == "ec":
        pytest.skip("encoder's Expert Choice is the same; its decoder is switch, tested above")
    expected = logits_of(model, batch)
    encoded = model.encode(jnp.asarray(batch.inputs), jnp.asarray(batch.input_segments))
    cache = model.start_cache(encoded, 12)
    step = nnx.jit(lambda m, tokens, cache: m.decode_step(tokens, cache))
    read = shift_right(batch.targets, batch.target_positions)
    for t in range(4):  # every row has at least four targets
        logits, cache = step(model, jnp.asarray(read[:, t]), cache)
        np.testing.assert_allclose(logits, expected[:, t], atol=2e-5)


@pytest.mark.parametrize("name", sorted(mk.PRESETS))
def test_parameters_are_what_was_counted(name):
    cfg = mk.preset(name)
    state = nnx.state(nnx.eval_shape(lambda: EncoderDecoder(cfg)), nnx.Param)
    counted = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state))
    assert counted == cfg.num_parameters().total


def test_t5_1_0_ties_and_scales_its_output():
    cfg = small("t5", activation="relu", tied_logits=True)
    model, batch = mk.EncoderDecoder(cfg, seed=0), padded(pairs())
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
    model, batch = mk.EncoderDecoder(small(flavour, **ROOM), seed=5), padded(pairs(8), 32, 16)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        out = nnx.merge(graphdef, params, rest)(batch)
        return token_losses(out.logits, batch.targets, batch.loss_weights)["objective"]

    grads = jax.jit(jax.grad(loss))(params)
    for name in ("encoder", "decoder"):
        moe = grads[name]["blocks"][len(grads[name]["blocks"]) - 1]["moe"]
        for leaf in jax.tree.leaves(moe):
            assert np.isfinite(leaf).all() and float(jnp.abs(leaf).max()) > 0


def test_a_loop_over_layers_equals_the_same_layers_in_a_row(monkeypatch):
    depth = {"encoder_layers": 4, "decoder_layers": 4}
    depth |= {"encoder_moe_layers": 2, "decoder_moe_layers": 2}
    model, batch = mk.EncoderDecoder(small("st", **depth), seed=8), padded(pairs())
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        out = nnx.merge(graphdef, params, rest)(batch, key=jax.random.key(0))
        return token_losses(out.logits, batch.targets, batch.loss_weights)["objective"]

    def program():
        step = jax.jit(jax.value_and_grad(lambda params: loss(params)))
        return step(params), step.lower(params).as_text().count("stablehlo.while")

    (row, row_grads), fewer = program()
    monkeypatch.setattr(stack, "platform", lambda: "tpu")
    (loop, loop_grads), loops = program()
    assert loops > fewer
    np.testing.assert_allclose(row, loop, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (row_grads, loop_grads)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-6)


def test_what_is_computed_again_takes_the_memory_of_one_unit():
    cfg = small("t5", encoder_layers=4, decoder_layers=4)
    model, batch = mk.EncoderDecoder(cfg), padded(pairs(32), 256, 128)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def temporaries(remat):
        def loss(params):
            logits = nnx.merge(graphdef, params, rest)(batch, remat=remat).logits
            return token_losses(logits, batch.targets, batch.loss_weights)["objective"]

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("full") < temporaries("none") / 2


def test_dropout_needs_a_key_and_depends_on_it():
    model, batch = mk.EncoderDecoder(small("st", dropout=0.3), seed=6), padded(pairs())
    quiet = model(batch).logits
    one, two = (model(batch, key=jax.random.key(i)).logits for i in (0, 1))
    np.testing.assert_array_equal(one, model(batch, key=jax.random.key(0)).logits)
    assert np.abs(one - two).max() > 1e-3 and np.abs(one - quiet).max() > 1e-3


def test_auxiliary_losses_are_means_over_layers_of_both_stacks():
    cfg = small("st", balance_loss=0.5, router_z_loss=0.25)
    out = mk.EncoderDecoder(cfg, seed=7)(padded(pairs()))
    layers = [s.balance_loss() for s in out.stats.values()]
    found = auxiliary_losses(cfg, out.stats)
    assert float(found["balance"]) == pytest.approx(0.5 * float(jnp.concatenate(layers).mean()))
    assert float(found["router_z"]) > 0
    assert auxiliary_losses(small("t5"), {}) == {"balance": 0, "router_z": 0}


@pytest.mark.parametrize("flavour", ["t5", "st"])
def test_a_mesh_of_eight_equals_one_device(flavour):
    cfg, batch = small(flavour, **ROOM), padded(pairs(8), 32, 16)
    mesh = mk.make_mesh(data=2, expert=4)
    one, many = mk.EncoderDecoder(cfg, seed=8), mk.EncoderDecoder(cfg, seed=8, mesh=mesh)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *map(nnx.state, (one, many))
    )
    alone, together = evaluate_loss(one, [batch]), evaluate_loss(many, [batch])
    assert alone == pytest.approx(together, rel=1e-4)
    if flavour == "st":
        weight = many.encoder.blocks[-1].moe.experts.wi_edf[...]
        assert weight.addressable_shards[0].data.shape[1] == cfg.num_experts // 4
