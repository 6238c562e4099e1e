"""Training: losses, resuming, what is on disk when something fails.

Most tests share one model and one compiled step: compiling takes most of their time.
"""

import json
import os
import shutil
from dataclasses import replace

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
from moekit.training import trainer
from moekit.training.checkpoint import Checkpoints
from moekit.training.guards import NonFiniteLoss
from moekit.training.run_settings import program_settings
from moekit.training.step import compiled_step, token_losses


def documents(split):
    return [Document(f"{split} {number} is followed by {number + 1}. " * 3) for number in range(90)]


TEXT = Corpus("text", documents)
CONFIG = TrainConfig(
    steps=4,
    batch_tokens=8 * 80,
    input_length=64,
    target_length=16,
    learning_rate=1e-2,
    save_every=2,
    log_every=2,
)


def model(family="switch", seed=0, mesh=None, **changes):
    """The smallest model of a family, with dropout unless `changes` say otherwise."""
    cfg = mk.preset(f"{family}-nano").replace(
        d_model=16,
        d_ff=32,
        encoder_layers=1,
        decoder_layers=1,
        decoder_moe_layers=0,
        dropout=0.1,
        expert_dropout=0.1,
    )
    return mk.EncoderDecoder(cfg.replace(**changes), seed=seed, mesh=mesh)


def arrays(model):
    state = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}


def same(first, second):
    first, second = arrays(first), arrays(second)
    assert first.keys() == second.keys()
    return all(np.array_equal(first[name], second[name]) for name in first)


def saved_steps(workdir):
    return Checkpoints(workdir / "checkpoints", keep=9).steps()


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


@pytest.mark.parametrize("family", ["t5", "switch", "ec", "st"])
def test_training_lowers_the_loss(family):
    config = CONFIG.replace(steps=30, learning_rate=3e-2, save_every=0, log_every=5)
    decoder_moe_layers = mk.preset(f"{family}-nano").replace(decoder_layers=1).decoder_moe_layers
    small = model(family, decoder_moe_layers=decoder_moe_layers)
    run = mk.train(small, TEXT, config, eval_source=TEXT)
    losses = run.metrics["loss"][1]
    assert losses[-1] < losses[0] - 0.3
    assert run.metrics.last("valid_loss") < losses[0]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    longer = CONFIG.replace(steps=6)
    straight = mk.train(model(), TEXT, longer, workdir=tmp_path / "a")
    mk.train(model(), TEXT, CONFIG, workdir=tmp_path / "b")
    other = model(seed=9)  # its parameters are replaced
    resumed = mk.train(other, TEXT, longer, workdir=tmp_path / "b")
    assert resumed.model is other and same(straight.model, resumed.model)
    assert straight.metrics["loss"] == resumed.metrics["loss"]
    again = mk.train(model(), TEXT, longer, workdir=tmp_path / "b")
    assert same(again.model, resumed.model)
    assert same(mk.load(tmp_path / "b"), resumed.model)
    assert not same(mk.load(tmp_path / "b", step=4), resumed.model)
    with pytest.raises(FileNotFoundError, match=r"no step 5, only \[4, 6\]"):
        mk.load(tmp_path / "b", step=5)


def test_another_configuration_is_refused_and_nothing_is_lost(tmp_path):
    mk.train(model(), TEXT, CONFIG, workdir=tmp_path)
    log = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"another train configuration.*z_loss: 0.0001 there"):
        mk.train(model(), TEXT, CONFIG.replace(z_loss=0.5), workdir=tmp_path)
    with pytest.raises(ValueError, match=r"another model configuration.*dropout"):
        mk.train(model(dropout=0.2), TEXT, CONFIG, workdir=tmp_path)
    with pytest.raises(ValueError, match="already holds a run at step 4"):
        mk.train(model(), TEXT, CONFIG, workdir=tmp_path, resume=False)
    assert (tmp_path / "metrics.jsonl").read_text() == log
    assert saved_steps(tmp_path) == [2, 4]


def test_the_log_counts_what_was_read(tmp_path):
    run = mk.train(model(), TEXT, CONFIG, workdir=tmp_path, eval_source=TEXT)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == run.metrics.rows and rows[0]["step"] == 2
    assert {"loss", "tokens_per_second", "encoder_dropped", "balance"} <= rows[0].keys()
    logged = [row for row in rows if "examples" in row]
    assert sum(row["examples"] for row in logged) == run.data.row()["examples"] > 0
    tokens = run.data.row()["input_tokens"] + run.data.row()["target_tokens"]
    assert sum(sum(row["cluster_tokens"].values()) for row in logged) == tokens
    assert run.data.rows == CONFIG.steps * CONFIG.batch_size
    assert len(run.metrics.plot().axes) >= 4


def only_train(split):
    return documents(split) if split == "train" else []


def no_valid_split(split):
    if split != "train":
        raise ValueError(f"there is no split {split!r}")
    return documents(split)


@pytest.mark.parametrize("read", [only_train, no_valid_split])
def test_an_eval_source_without_valid_examples_is_refused_before_step_1(tmp_path, read):
    with pytest.raises(ValueError, match=r"eval_source has no .*valid split"):
        mk.train(model(), TEXT, CONFIG, workdir=tmp_path, eval_source=Corpus("other", read))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save_every", [0, 2])
def test_a_callback_that_raises_loses_no_training(tmp_path, save_every):
    def callback(step, model):
        raise RuntimeError(f"broken at {step}")

    config = CONFIG.replace(save_every=save_every, eval_every=2 if save_every else 0)
    first_due = save_every or config.steps
    with pytest.raises(RuntimeError, match=f"broken at {first_due}"):
        mk.train(model(), TEXT, config, workdir=tmp_path, callbacks=[callback])
    assert saved_steps(tmp_path) == [first_due]
    finished = mk.train(model(), TEXT, config, workdir=tmp_path)
    assert same(mk.load(tmp_path), finished.model)


def test_an_empty_workdir_is_refused():
    with pytest.raises(ValueError, match='workdir is ""'):
        mk.train(model(), TEXT, CONFIG, workdir="")


def poison_after(monkeypatch, step_number, what):
    """Let the parameters or the loss become NaN in a step, without another program."""
    original = compiled_step

    def poisoned_step(model, config):
        step = original(model, config)

        def update(state, batch):
            number = int(state.step) + 1
            state, report = step.update(state, batch)
            if number == step_number and what == "loss":
                report["health"] = report["health"].at[0].set(jnp.nan)
            if number == step_number and what == "parameters":
                state = replace(state, params=jax.tree.map(lambda x: x * jnp.nan, state.params))
            return state, report

        return step._replace(update=update)

    monkeypatch.setattr(trainer, "compiled_step", poisoned_step)


@pytest.mark.parametrize(
    ("what", "message"),
    [("loss", "loss is nan at step 3"), ("parameters", "not finite after the update at step 3")],
)
def test_only_finite_states_are_saved(tmp_path, monkeypatch, what, message):
    config = CONFIG.replace(save_every=1, log_every=10)
    with monkeypatch.context() as patch:
        poison_after(patch, 3, what)
        with pytest.raises(NonFiniteLoss, match=message) as error:
            mk.train(model(), TEXT, config, workdir=tmp_path)
    assert "the checkpoint of step 2 is kept" in str(error.value)
    assert "to resume from step 1" in str(error.value)
    assert saved_steps(tmp_path) == [1, 2]
    finished = mk.train(model(), TEXT, config, workdir=tmp_path)
    assert same(finished.model, mk.train(model(), TEXT, CONFIG).model)


@pytest.mark.parametrize("with_workdir", [True, False])
def test_divergence_before_the_first_checkpoint(tmp_path, monkeypatch, with_workdir):
    poison_after(monkeypatch, 1, "loss")
    kept = "no checkpoint was written yet" if with_workdir else "nothing was saved"
    with pytest.raises(NonFiniteLoss, match=rf"lower learning_rate.*{kept}"):
        mk.train(model(), TEXT, CONFIG, workdir=tmp_path if with_workdir else None)


def test_a_disk_without_room_is_reported_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr("moekit.training.checkpoint.shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"has 1.0 MB free, checkpoints need \d.* make room"):
        mk.train(model(), TEXT, CONFIG, workdir=tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert saved_steps(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_workdir(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError):
        mk.train(model(), TEXT, CONFIG, workdir=tmp_path / "run")


def test_loss_free_bias_moves_against_the_load():
    config = CONFIG.replace(save_every=0)
    trained = mk.train(model("switch", router="loss-free"), TEXT, config).model
    bias = trained.encoder.blocks[-1].moe.router.bias_e[...]
    assert 0 < float(jnp.abs(bias).max()) <= 4 * 1e-3 + 1e-9


def test_all_but_the_router_can_be_frozen():
    config = CONFIG.replace(save_every=0, freeze=("all_but_router",), weight_decay=0.1)
    trained = model("switch", router="loss-free")
    before = arrays(trained)
    mk.train(trained, TEXT, config)
    for name, array in arrays(trained).items():
        assert np.array_equal(array, before[name]) == ("moe/router/" not in name), name


def test_every_mesh_trains_alike_with_one_program():
    """Also with every layer computed again in the backward pass."""
    config = CONFIG.replace(save_every=0, log_every=1, steps=3)
    settings = {"capacity_factor": 8.0, "eval_capacity_factor": 8.0, "decoder_moe_layers": 1}
    runs = []
    for mesh, remat in (
        (None, "none"),
        (mk.make_mesh(data=2, expert=4), "full"),
        (mk.make_mesh(data=2, expert=2, model=2), "dots"),
    ):
        trained = model("st", mesh=mesh, dropout=0.0, expert_dropout=0.0, **settings)
        run = mk.train(trained, TEXT, config.replace(remat=remat))
        step = compiled_step(trained, program_settings(run.config))
        assert step.update._cache_size() == 1
        runs.append(run.metrics)
    expected, *others = runs
    for metrics in others:
        for name in ("encoder_max_violation", "decoder_dropped"):
            np.testing.assert_allclose(metrics[name][1][0], expected[name][1][0], rtol=1e-6)
        for name in ("loss", "grad_norm"):
            # Adafactor divides small gradients by their size, and their rounding errors with them:
            # after a step, a token may choose another expert
            np.testing.assert_allclose(metrics[name][1], expected[name][1], rtol=1e-3)


def test_stream_is_a_function_of_seed_and_step():
    def first_batch(seed):
        stream = batches(
            TEXT, mk.ByteTokenizer(), input_length=64, target_length=16, batch_size=4, seed=seed
        )
        return next(stream)

    jax.tree.map(np.testing.assert_array_equal, first_batch(1), first_batch(1))
    assert not np.array_equal(first_batch(1).inputs, first_batch(2).inputs)


class Listener:
    """What on_log got, and what the file held at that time."""

    def __init__(self, path):
        self.path = path
        self.rows = []
        self.num_closed = 0

    def __call__(self, row):
        lines = self.path.read_text().splitlines()
        assert json.loads(lines[-1]) == row
        self.rows.append(row)
        row.clear()  # a copy

    def close(self):
        self.num_closed += 1


@pytest.mark.parametrize("alone", [True, False])
def test_on_log_gets_every_row_after_it_was_written(tmp_path, alone):
    listener = Listener(tmp_path / "metrics.jsonl")
    run = mk.train(
        model(),
        TEXT,
        CONFIG.replace(eval_every=2),
        workdir=tmp_path,
        eval_source=TEXT,
        on_log=listener if alone else [listener, lambda row: None],
    )
    assert len(listener.rows) == len(run.metrics.rows) == 4 and listener.num_closed == 1
    assert [row["step"] for row in run.metrics.rows] == [2, 2, 4, 4]


@pytest.mark.parametrize("key", ["loss", "valid_loss"])
def test_an_on_log_that_raises_loses_no_step(tmp_path, key):
    def stop_at_three(row):
        if key in row and row["step"] == 3:
            raise RuntimeError("broken at 3")

    config = CONFIG.replace(save_every=0, log_every=1, eval_every=1)
    listener = Listener(tmp_path / "metrics.jsonl")
    with pytest.raises(RuntimeError, match="broken at 3"):
        mk.train(
            model(),
            TEXT,
            config,
            workdir=tmp_path,
            eval_source=TEXT,
            on_log=[listener, stop_at_three],
        )
    assert saved_steps(tmp_path) == [3] and listener.num_closed == 1
    finished = mk.train(model(), TEXT, config, workdir=tmp_path, eval_source=TEXT)
    assert same(finished.model, mk.train(model(), TEXT, CONFIG).model)
