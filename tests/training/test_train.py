"""Training: losses, freezing, resuming, checkpoints, failures."""

import json
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import moekit as mk
from moekit.config import TrainConfig
from moekit.data.loader import batches
from moekit.data.text import Corpus, Document
from moekit.sharding import MESH_AXES
from moekit.training.checkpoint import Checkpoints
from moekit.training.loop import NonFiniteLoss, _Trainer, token_losses

TEXT = Corpus(
    "text", lambda split: [Document(f"{split} {i} is followed by {i + 1}. " * 3) for i in range(90)]
)
CONFIG = TrainConfig(
    steps=4,
    batch_tokens=4 * 80,
    input_length=64,
    target_length=16,
    learning_rate=1e-2,
    save_every=2,
    log_every=2,
)


def model(flavour="st", seed=0, **changes):
    cfg = mk.preset(f"{flavour}-nano").replace(d_model=16, d_ff=32, **changes)
    return mk.EncoderDecoder(cfg, seed=seed)


def arrays(model):
    return {
        "/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(model))
    }


def same(a, b):
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_losses_against_numpy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    targets, weights = rng.integers(0, 5, (2, 3)), np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    smooth = 0.9 * nll + 0.1 * (log_z[..., None] - logits).mean(-1)
    found = token_losses(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights), 0.1)
    assert float(found["cross_entropy"]) == pytest.approx((nll * weights).sum(), rel=1e-5)
    assert float(found["objective"]) == pytest.approx((smooth * weights).sum(), rel=1e-5)
    assert float(found["z"]) == pytest.approx((log_z**2 * weights).sum(), rel=1e-5)
    assert float(found["count"]) == 3
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    assert float(found["cross_entropy"]) == pytest.approx(float((expected * weights).sum()), 1e-5)


@pytest.mark.parametrize("flavour", ["t5", "switch", "ec", "st"])
def test_training_lowers_the_loss(flavour):
    config = CONFIG.replace(steps=30, learning_rate=3e-2, save_every=0, log_every=5)
    run = mk.train(model(flavour), TEXT, config, eval_source=TEXT)
    losses = run.metrics["loss"][1]
    assert losses[-1] < losses[0] - 0.3
    assert run.metrics.last("valid_loss") < losses[0]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    options = {"dropout": 0.1, "expert_dropout": 0.1}
    straight = mk.train(model(**options), TEXT, CONFIG.replace(steps=6), workdir=tmp_path / "a")
    mk.train(model(**options), TEXT, CONFIG, workdir=tmp_path / "b")
    other = model(seed=9, **options)  # whatever it holds is replaced
    resumed = mk.train(other, TEXT, CONFIG.replace(steps=6), workdir=tmp_path / "b")
    assert same(straight.model, resumed.model)
    assert straight.metrics["loss"] == resumed.metrics["loss"]
    again = mk.train(model(**options), TEXT, CONFIG.replace(steps=6), workdir=tmp_path / "b")
    assert same(again.model, resumed.model)
    assert same(mk.load(tmp_path / "b"), resumed.model)
    assert not same(mk.load(tmp_path / "b", step=4), resumed.model)
    with pytest.raises(FileNotFoundError, match=r"no step 5, only \[4, 6\]"):
        mk.load(tmp_path / "b", step=5)


@pytest.mark.parametrize(
    ("freeze", "moving"),
    [(("router",), "experts"), (("experts",), "router"), (("moe",), "embedding")],
)
def test_frozen_parts_keep_every_bit(freeze, moving):
    before = arrays(model())
    config = CONFIG.replace(freeze=freeze, save_every=0, weight_decay=0.1, optimizer="adamw")
    after = arrays(mk.train(model(), TEXT, config).model)
    parts = {"router": "moe/router", "experts": "moe/experts", "moe": "moe/"}
    frozen = [name for name in before if parts[freeze[0]] in name]
    assert frozen and all(np.array_equal(before[n], after[n]) for n in frozen)
    others = [name for name in before if moving in name]
    assert others and not any(np.array_equal(before[n], after[n]) for n in others)


def test_loss_free_bias_moves_against_the_load():
    trained = mk.train(
        model("switch", router="loss-free"), TEXT, CONFIG.replace(save_every=0)
    ).model
    bias = trained.encoder.blocks[-1].moe.router.bias_e[...]
    assert 0 < float(jnp.abs(bias).max()) <= 4 * 1e-3 + 1e-9


def test_another_configuration_is_refused_and_nothing_is_lost(tmp_path):
    mk.train(model(), TEXT, CONFIG, workdir=tmp_path)
    log = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"another train configuration.*learning_rate: 0.01 there"):
        mk.train(model(), TEXT, CONFIG.replace(learning_rate=0.5), workdir=tmp_path)
    with pytest.raises(ValueError, match=r"another model configuration.*dropout"):
        mk.train(model(dropout=0.2), TEXT, CONFIG, workdir=tmp_path)
    with pytest.raises(ValueError, match="already holds a run at step 4"):
        mk.train(model(), TEXT, CONFIG, workdir=tmp_path, resume=False)
    with pytest.raises(ValueError, match=r"another configuration.*d_model"):
        mk.load(tmp_path, cfg=mk.preset("st-nano"))
    assert (tmp_path / "metrics.jsonl").read_text() == log
    mk.load(tmp_path)


def test_a_failed_write_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"a": 1}, model={"w": jnp.arange(3.0)})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(
        OSError, match=r"could not write checkpoint 2.*Former checkpoints are intact"
    ):
        checkpoints.save(2, {"a": 2}, model={"w": jnp.arange(3.0)})
    assert checkpoints.latest() == 1
    restored = checkpoints.restore(1, model={"w": jnp.zeros(3)})
    np.testing.assert_array_equal(restored["model"]["w"], jnp.arange(3.0))


def test_a_disk_without_room_is_reported_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr("moekit.training.checkpoint.shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"has 2.0 MB free, checkpoints need \d.* make room"):
        mk.train(model(), TEXT, CONFIG, workdir=tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert Checkpoints(tmp_path / "checkpoints").latest() is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_workdir(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError):
        mk.train(model(), TEXT, CONFIG, workdir=tmp_path / "run")


def test_a_model_is_saved_and_loaded(tmp_path):
    first = model(seed=3)
    mk.save(tmp_path / "m", first)
    again = mk.load(tmp_path / "m")
    assert again.cfg == first.cfg and same(again, first)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        mk.load(tmp_path)
    mesh = mk.make_mesh(expert=4, data=2)
    assert same(mk.load(tmp_path / "m", mesh=mesh), first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_length": 8192, "batch_tokens": 16384}, "exceeds st-nano's max_length 4096"),
        ({"freeze": ("router",)}, "is dense"),
    ],
)
def test_settings_that_do_not_fit_the_model(changes, message):
    which = "t5" if "freeze" in changes else "st"
    with pytest.raises(ValueError, match=message):
        mk.train(model(which), TEXT, CONFIG.replace(**changes))


@pytest.mark.parametrize("shape", [(1, 8, 1), (3, 2, 1)], ids=str)
def test_rows_must_divide_the_mesh(shape):
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, MESH_AXES)
    sharded = mk.EncoderDecoder(mk.preset("st-nano").replace(d_model=16, d_ff=32), mesh=mesh)
    message = rf"batch of 4 rows cannot be split over {devices.size} devices"
    with pytest.raises(ValueError, match=message) as error:
        mk.train(sharded, TEXT, CONFIG)
    advised = int(str(error.value).rpartition("batch_tokens=")[2])
    assert CONFIG.replace(batch_tokens=advised).batch_size % devices.size == 0


def test_divergence_is_reported():
    with pytest.raises(NonFiniteLoss, match=r"loss is (nan|inf).*lower learning_rate"):
        mk.train(model(), TEXT, CONFIG.replace(steps=40, learning_rate=1e30, save_every=0))


def test_metrics_survive_a_cut_line_and_draw(tmp_path):
    run = mk.train(model(), TEXT, CONFIG, workdir=tmp_path, eval_source=TEXT)
    path = tmp_path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == run.metrics.rows and rows[0]["step"] == 2
    assert {"loss", "tokens_per_second", "encoder_dropped", "balance"} <= rows[0].keys()
    logged = [row for row in rows if "examples" in row]
    assert sum(row["examples"] for row in logged) == run.data.row()["examples"] > 0
    tokens = run.data.row()["input_tokens"] + run.data.row()["target_tokens"]
    assert sum(sum(row["cluster_tokens"].values()) for row in logged) == tokens
    assert run.data.rows == CONFIG.steps * CONFIG.batch_size
    path.write_text(path.read_text()[:-20])
    assert mk.Metrics.load(path).rows == rows[:-1]
    with pytest.raises(KeyError, match="this run logged"):
        run.metrics["lss"]
    assert len(run.metrics.plot().axes) >= 4


def test_every_mesh_trains_alike():
    """Also with every layer computed again in the backward pass."""
    config = CONFIG.replace(batch_tokens=8 * 80, save_every=0, log_every=1, steps=3)
    room = {"capacity_factor": 8.0, "eval_capacity_factor": 8.0}
    cfg = mk.preset("st-nano").replace(d_model=16, d_ff=32, **room)
    expected, *others = [
        mk.train(mk.EncoderDecoder(cfg, mesh=mesh), TEXT, config.replace(remat=remat)).metrics
        for mesh, remat in (
            (None, "none"),
            (mk.make_mesh(data=2, expert=4), "full"),
            (mk.make_mesh(data=2, expert=2, model=2), "dots"),
        )
    ]
    for metrics in others:
        for name in ("encoder_max_violation", "decoder_dropped"):
            np.testing.assert_allclose(metrics[name][1][0], expected[name][1][0], rtol=1e-6)
        for name in ("loss", "grad_norm"):
            # Adafactor divides small gradients by their size, and their rounding errors with them:
            # after a step, a token may sit on the other side of a choice
            np.testing.assert_allclose(metrics[name][1], expected[name][1], rtol=1e-3)


def test_one_program_serves_all_steps():
    model = mk.EncoderDecoder(mk.preset("st-nano"), mesh=mk.make_mesh(expert=8))
    trainer = _Trainer(model, TEXT, CONFIG.replace(batch_tokens=8 * 80), mk.ByteTokenizer(), None)
    for _ in range(3):
        trainer.advance()
    assert trainer.step.update._cache_size() == 1


def test_stream_is_a_function_of_seed_and_step():
    shape = {"input_length": 64, "target_length": 16, "batch_size": 4}
    a, b = (next(batches(TEXT, mk.ByteTokenizer(), seed=s, **shape)) for s in (1, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    c = next(batches(TEXT, mk.ByteTokenizer(), seed=2, **shape))
    assert not np.array_equal(a.inputs, c.inputs)
