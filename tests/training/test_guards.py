"""Settings that do not fit, resumed settings, faults and their messages."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moekit as mk
from moekit.config import TrainConfig
from moekit.moe.stats import LayerStats
from moekit.sharding import MESH_AXES
from moekit.training.guards import (
    COLLAPSE,
    NOT_FINITE,
    SPIKE,
    BatchId,
    Guard,
    all_finite,
    describe_kept,
    describe_spike,
    health,
)
from moekit.training.run_settings import (
    FORMAT,
    check_batch,
    check_recovery,
    check_same_run,
    check_settings,
)

CONFIG = TrainConfig(batch_tokens=4 * 80, input_length=64, target_length=16)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("st", {"input_length": 8192, "batch_tokens": 16384}, "exceeds st-nano's max_length 4096"),
        ("t5", {"freeze": ("router",)}, "t5-nano is dense: there is no router to freeze"),
        ("t5", {"freeze": ("all_but_router",)}, "t5-nano is dense: there is no router to train"),
    ],
)
def test_settings_that_do_not_fit_the_model(name, changes, message):
    model = mk.EncoderDecoder(mk.preset(f"{name}-nano").replace(d_model=16, d_ff=32))
    with pytest.raises(ValueError, match=message):
        check_settings(model, CONFIG.replace(**changes), mk.ByteTokenizer())


def test_a_tokenizer_with_more_ids_than_the_model():
    cfg = mk.preset("t5-nano").replace(d_model=16, d_ff=32, vocab_size=100)
    with pytest.raises(ValueError, match=r"tokenizer has \d+ ids, t5-nano only 100"):
        check_settings(mk.EncoderDecoder(cfg), CONFIG, mk.ByteTokenizer())


@pytest.mark.parametrize("shape", [(1, 8, 1), (3, 2, 1)], ids=str)
def test_rows_must_divide_the_mesh(shape):
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, MESH_AXES)
    cfg = mk.preset("st-nano").replace(d_model=16, d_ff=32)
    message = rf"batch of 4 rows cannot be split over {devices.size} devices"
    with pytest.raises(ValueError, match=message) as error:
        check_settings(mk.EncoderDecoder(cfg, mesh=mesh), CONFIG, mk.ByteTokenizer())
    advised = int(str(error.value).rpartition("batch_tokens=")[2])
    check_batch(CONFIG.replace(batch_tokens=advised), devices.size)


def settings(model="t5-nano", source="a", tokenizer="b", **changes):
    return {
        "format": FORMAT,
        "model": mk.preset(model).to_dict(),
        "train": CONFIG.replace(**changes).to_dict(),
        "source": source,
        "tokenizer": tokenizer,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 10, "log_every": 3, "save_every": 2, "keep": 1, "data_workers": 1},
        {"learning_rate": 1e-5},
        {"schedule": "cosine", "warmup_steps": 5},
        {"clip_norm": 1.0},
    ],
)
def test_settings_that_a_resumed_run_may_change(tmp_path, caplog, changes):
    check_same_run(tmp_path, settings(), settings(**changes))
    assert ("is resumed with other settings" in caplog.text) == ("steps" not in changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "st-nano"}, "another model configuration.*num_experts: 0 there, 8 here"),
        ({"optimizer": "adamw"}, "another train configuration.*'adafactor' there, 'adamw' here"),
        ({"seed": 1}, "another train configuration.*seed: 0 there, 1 here"),
        ({"source": "c"}, "another source configuration"),
        ({"tokenizer": "c"}, "another tokenizer configuration"),
    ],
)
def test_settings_that_a_resumed_run_must_keep(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check_same_run(tmp_path, settings(), settings(**changes))


def test_a_run_of_the_former_format_is_refused(tmp_path):
    saved = settings()
    del saved["format"]
    with pytest.raises(ValueError, match=r"of an earlier moekit.*load its model with mk\.load"):
        check_same_run(tmp_path, saved, settings())


def test_what_is_kept_is_told_truthfully(tmp_path):
    assert "nothing was saved" in describe_kept(None, [])
    assert "no checkpoint was written yet" in describe_kept(tmp_path, [])
    assert f"delete {tmp_path} to start again" in describe_kept(tmp_path, [3])
    several = describe_kept(tmp_path, [3, 6])
    assert "checkpoint of step 6 is kept" in several
    assert f"delete {tmp_path / '6'} to resume from step 3" in several


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_found(value):
    tree = {"a": np.ones((2, 3), np.float32), "b": np.arange(3), "c": np.ones(5, np.float16)}
    assert all_finite(tree)
    tree["a"][1, 2] = value
    assert not all_finite(tree)


CFG = mk.preset("st-nano").replace(
    encoder_layers=2, decoder_layers=1, encoder_moe_layers=2, decoder_moe_layers=1
)
BATCH = BatchId(7, 0, 0, {"0": "[64,[],[]]", "1": "[65,[],[]]"})


def found(guard, *steps):
    """The faults that a guard finds in steps of loss, gradient norm and layers."""
    for values in steps:
        guard.add(1, BATCH, jnp.array(values, jnp.float32))
    return [fault.kind for fault in guard.find()]


def step(loss=2.0, grad_norm=1.0, concentration=(0.1,) * 3, dropped=(0.0,) * 3):
    return [loss, grad_norm, *concentration, *dropped]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_every_step_that_is_not_finite_is_found(name, value):
    guard = Guard(CFG)
    assert found(guard, step(), step(**{name: value}), step(**{name: value})) == [NOT_FINITE] * 2
    assert guard.num_skipped == 2
    assert found(guard, step()) == [] and guard.num_skipped == 0


def test_a_fault_names_step_batch_and_layer():
    guard = Guard(CFG)
    values = step(loss=np.nan, concentration=(0.1, np.nan, np.nan))
    guard.add(7, BATCH, jnp.array(values))
    assert guard.find(num_unread=1) == []
    (fault,) = guard.find()
    assert "not finite from encoder MoE layer 1 on, at step 7" in str(fault)
    assert "(batch 7 of seed 0, examples up to 65)" in str(fault)
    order_two = BatchId(7, 0, 2, {})
    assert str(order_two) == "batch 7 of seed 0, data order 2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concentration": (0.1, 0.1, 0.95)}, "decoder MoE layer 0 sends nearly all tokens to one"),
        ({"dropped": (0.0, 0.6, 0.0)}, "encoder MoE layer 1 drops 60% of its tokens"),
    ],
)
def test_a_collapse_that_lasts_is_found_once(changes, message):
    guard = Guard(CFG)
    guard.add(1, BATCH, jnp.array(step(**changes)))
    (fault,) = guard.find()
    assert fault.kind == COLLAPSE and message in fault.what
    assert found(guard, step(**changes), step(**changes)) == []
    assert found(guard, step(), step(**changes)) == [COLLAPSE]


def losses(kind):
    """100 losses of a healthy run."""
    rng = np.random.default_rng(0)
    steps = np.arange(100)
    return {
        "falling": 6 * np.exp(-steps / 20) + 2,
        "noisy": 2 + 0.3 * rng.normal(size=100),
        "heavy-tailed": 2 + 0.2 * rng.exponential(size=100),
        "constant": np.full(100, 2.0),
    }[kind]


@pytest.mark.parametrize("kind", ["falling", "noisy", "heavy-tailed", "constant"])
@pytest.mark.parametrize("spike_at", [None, 20, 60, 99])
def test_spikes_are_found_and_noise_is_not(kind, spike_at):
    series = losses(kind)
    if spike_at is not None:
        series[spike_at] += 12.0
    guard = Guard(CFG)
    spikes = [at for at, loss in enumerate(series) if found(guard, step(loss=loss)) == [SPIKE]]
    assert spikes == ([] if spike_at is None else [spike_at])


def test_there_is_no_spike_before_there_is_a_window():
    assert not describe_spike(100.0, [1.0] * 19) and describe_spike(100.0, [1.0] * 20)


def stats(load, dropped, z_sum):
    """Of one layer and four tokens."""
    load = jnp.array([load], jnp.float32)
    one = jnp.ones(1)
    return LayerStats(4 * one, load, load, z_sum * one, dropped * one, one, one, one)


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ([1, 1, 1, 1], 0.0),
        ([4, 0, 0, 0], 1.0),
        ([2, 2, 2, 2], 0.0),  # top 2
        ([4, 4, 0, 0], 1.0),
        ([4, 4, 4, 4], 0.0),  # every token chooses every expert
        ([4], 0.0),
    ],
)
def test_concentration_is_relative_to_what_is_possible(load, expected):
    values = health(jnp.array(3.0), jnp.array(2.0), {"encoder": stats(load, 1.0, 5.0)})
    np.testing.assert_allclose(values, [3.0, 2.0, expected, 0.25])
    broken = health(jnp.array(3.0), jnp.array(2.0), {"encoder": stats(load, 1.0, jnp.inf)})
    np.testing.assert_array_equal(broken, [3.0, 2.0, np.nan, np.nan])


def test_a_rollback_needs_checkpoints(tmp_path):
    config = CONFIG.replace(on_spike="rollback")
    for workdir, save_every in ((None, 5), (tmp_path, 0)):
        with pytest.raises(ValueError, match=r"on_spike=.rollback. returns to a checkpoint: give"):
            check_recovery(config.replace(save_every=save_every), workdir)
    check_recovery(config.replace(save_every=5), tmp_path)


def test_settings_that_a_version_did_not_have_are_at_their_defaults(tmp_path):
    saved = settings()
    for name in ("on_spike", "label_smoothing"):
        del saved["train"][name]
    check_same_run(tmp_path, saved, settings())
    with pytest.raises(ValueError, match=r"label_smoothing: 0.0 there, 0.1 here"):
        check_same_run(tmp_path, saved, settings(label_smoothing=0.1))
    saved["train"]["on_moonlight"] = 1
    with pytest.raises(
        ValueError, match=r"a later moekit, with the settings on_moonlight: upgrade"
    ):
        check_same_run(tmp_path, saved, settings())
