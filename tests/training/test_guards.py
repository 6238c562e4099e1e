"""Settings that do not fit, resumed settings, messages of runs that diverged."""

import math
import os
import signal

import jax
import numpy as np
import pytest

import moekit as mk
from moekit.config import TrainConfig
from moekit.sharding import MESH_AXES
from moekit.training.guards import all_finite, describe_kept
from moekit.training.run_settings import FORMAT, check_batch, check_same_run, check_settings
from moekit.training.signals import StopSignal

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


def test_the_second_signal_acts_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        assert not stop.should_stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.should_stop()
        os.kill(os.getpid(), signal.SIGINT)
