"""Faults while a run trains: stop, skip, rollback, report; stalled input and signals.

All runs but those that skip share one compiled step.
"""

import logging
import os
import signal
import threading
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moekit as mk
from moekit.data import loader
from moekit.data.text import Corpus, Document
from moekit.training import trainer
from moekit.training.checkpoint import Checkpoints
from moekit.training.guards import MAX_ROLLBACKS, NonFiniteLoss, TrainingFault
from moekit.training.run_data import RunData, StalledInput
from moekit.training.signals import Stopped
from moekit.training.step import compiled_step

TEXT = Corpus(
    "text",
    lambda split: [Document(f"{split} {n} is followed by {n + 1}. " * 3) for n in range(90)],
)
CONFIG = mk.TrainConfig(
    steps=5, batch_tokens=8 * 80, input_length=64, target_length=16, save_every=1, log_every=2
)


def model():
    cfg = mk.preset("switch-nano").replace(
        d_model=16,
        d_ff=32,
        encoder_layers=1,
        decoder_layers=1,
        decoder_moe_layers=0,
        router="loss-free",
    )
    return mk.EncoderDecoder(cfg)


def same(first, second):
    first, second = nnx.state(first), nnx.state(second)
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), first, second)
    return all(jax.tree.leaves(equal))


def saved_steps(workdir):
    return Checkpoints(workdir / "checkpoints", keep=9).steps()


def faults(run):
    return [row["fault"] for row in run.metrics.rows if "fault" in row]


@pytest.fixture
def poison(monkeypatch):
    """Puts NaN into a row of the batches with these numbers, counted over all that are read."""

    def start(*numbers):
        read = RunData.read_batch
        count = iter(range(1, 1000))

        def read_poisoned(data):
            batch = read(data)
            if next(count) not in numbers:
                return batch
            weights = batch.loss_weights.at[3, 0].set(jnp.nan)
            return replace(batch, loss_weights=weights)

        monkeypatch.setattr(RunData, "read_batch", read_poisoned)

    return start


def test_a_row_with_nan_stops_the_run_and_only_good_steps_are_saved(tmp_path, poison):
    poison(3)
    with pytest.raises(NonFiniteLoss, match=r"loss is nan.* at step 3 \(batch 3 of seed 0, exam"):
        mk.train(model(), TEXT, CONFIG, workdir=tmp_path)
    assert saved_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("save_every", [2, 0])
def test_nan_is_noticed_a_step_later_without_log_or_checkpoint(tmp_path, poison, save_every):
    poison(3)
    config = CONFIG.replace(steps=50, log_every=50, save_every=50, eval_every=save_every)
    calls = []
    with pytest.raises(NonFiniteLoss, match="at step 3 "):
        mk.train(
            model(),
            TEXT,
            config,
            callbacks=[lambda step, model: calls.append(step) or {}],
        )
    assert calls == ([2] if save_every else [])


def test_a_parameter_that_is_nan_names_its_layer():
    broken = model()
    kernel = broken.encoder.blocks[-1].moe.router.w_de
    kernel[...] = kernel[...].at[0, 0, 0].set(jnp.nan)
    message = "router logits are not finite from encoder MoE layer 0 on, at step 1"
    with pytest.raises(NonFiniteLoss, match=message):
        mk.train(broken, TEXT, CONFIG)


def test_a_skipped_update_leaves_everything_as_it_was(tmp_path, poison):
    config = CONFIG.replace(on_nonfinite="skip")
    two_steps = mk.train(model(), TEXT, config.replace(steps=2))
    poison(3)
    run = mk.train(model(), TEXT, config.replace(steps=3), workdir=tmp_path)
    assert same(run.model, two_steps.model)
    (fault,) = faults(run)
    assert "at step 3 (batch 3 of seed 0" in fault and "its update is skipped" in fault
    assert saved_steps(tmp_path) == [2, 3]
    finished = mk.train(model(), TEXT, config, workdir=tmp_path)
    assert np.isfinite(finished.metrics.last("loss")) and not same(finished.model, run.model)


def test_skipping_ends_after_ten_steps(poison):
    poison(*range(1, 100))
    config = CONFIG.replace(on_nonfinite="skip", steps=50)
    with pytest.raises(NonFiniteLoss, match=r"at step 10 .*10 updates in a row were skipped"):
        mk.train(model(), TEXT, config)


def test_a_rollback_continues_with_the_data_in_another_order(tmp_path, poison):
    config = CONFIG.replace(on_nonfinite="rollback")
    straight = mk.train(model(), TEXT, config.replace(log_every=1), workdir=tmp_path / "a")
    poison(4)
    run = mk.train(model(), TEXT, config.replace(log_every=1), workdir=tmp_path / "b")
    (fault,) = faults(run)
    assert "rolled back to step 3, training continues with data order 1" in fault
    steps, found = run.metrics["loss"]
    _, expected = straight.metrics["loss"]
    assert steps == [1, 2, 3, 4, 5]
    assert found[:3] == expected[:3] and found[3] != expected[3]
    saved = Checkpoints(tmp_path / "b/checkpoints", keep=9)
    assert saved.metadata(5)["data_order"] == 1
    longer = config.replace(steps=7, log_every=1)
    resumed = mk.train(model(), TEXT, longer, workdir=tmp_path / "b")
    poison(4)
    whole = mk.train(model(), TEXT, longer, workdir=tmp_path / "c")
    assert same(resumed.model, whole.model)


def test_rollbacks_are_bounded(tmp_path, poison):
    poison(*range(3, 100))
    config = CONFIG.replace(on_nonfinite="rollback")
    with pytest.raises(NonFiniteLoss, match=f"the fault after {MAX_ROLLBACKS} rollbacks"):
        mk.train(model(), TEXT, config, workdir=tmp_path)
    assert saved_steps(tmp_path) == [1, 2]


def test_a_fault_before_the_first_checkpoint_cannot_be_rolled_back(tmp_path, poison):
    poison(1)
    config = CONFIG.replace(on_nonfinite="rollback")
    with pytest.raises(NonFiniteLoss, match="there is no checkpoint to return to"):
        mk.train(model(), TEXT, config, workdir=tmp_path)


@pytest.mark.parametrize("policy", ["report", "stop", "rollback"])
def test_a_spike(tmp_path, monkeypatch, caplog, policy):
    original = compiled_step
    count = iter(range(1, 100))

    def spiking_step(model, config):
        step = original(model, config)

        def update(state, batch):
            state, report = step.update(state, batch)
            if next(count) == 25:
                report["health"] = report["health"].at[0].set(1000.0)
            return state, report

        return step._replace(update=update)

    monkeypatch.setattr(trainer, "compiled_step", spiking_step)
    config = CONFIG.replace(steps=30, save_every=10, log_every=10, on_spike=policy)
    if policy == "stop":
        with pytest.raises(TrainingFault, match=r"loss spike: 1000 .* at step 25") as error:
            mk.train(model(), TEXT, config, workdir=tmp_path)
        assert not isinstance(error.value, NonFiniteLoss) and saved_steps(tmp_path) == [10, 20]
        return
    with caplog.at_level(logging.WARNING):
        run = mk.train(model(), TEXT, config, workdir=tmp_path)
    (fault,) = faults(run)
    consequence = "training continues" if policy == "report" else "rolled back to step 20"
    assert "at step 25 (batch 25 of seed 0" in fault and consequence in fault
    assert fault in caplog.text and saved_steps(tmp_path) == [20, 30]


def test_a_collapsed_router_is_reported_with_its_layer():
    collapsed = model()
    bias = collapsed.encoder.blocks[-1].moe.router.bias_e
    bias[...] = bias[...].at[..., 2].set(1e3)
    (fault,) = faults(mk.train(collapsed, TEXT, CONFIG))
    assert "encoder MoE layer 0 sends nearly all tokens to one expert" in fault
    assert "at step 1 (batch 1 of seed 0" in fault
    assert faults(mk.train(model(), TEXT, CONFIG)) == []


@pytest.fixture
def stall(monkeypatch):
    """Lets the input stop after a number of batches; returns to it when the test ends."""
    released = threading.Event()
    monkeypatch.setattr(loader, "_SECONDS_TO_CLOSE", 0.1)
    monkeypatch.setattr(loader, "_SECONDS_BETWEEN_CALLS", 0.05)

    def start(num_batches):
        read = loader._RowsIterator.__next__
        count = iter(range(1000))

        def read_or_stall(rows):
            if next(count) >= num_batches:
                released.wait()
                raise StopIteration
            return read(rows)

        monkeypatch.setattr(loader._RowsIterator, "__next__", read_or_stall)

    yield start
    released.set()


@pytest.mark.parametrize("num_batches", [0, 3])
def test_stalled_input_is_named_after_the_run_was_saved(tmp_path, stall, num_batches):
    stall(num_batches)
    config = CONFIG.replace(save_every=0, stall_seconds=4.0)
    kept = f"saved at step {num_batches}" if num_batches else "nothing saved yet"
    start = time.monotonic()
    message = rf"no batch arrived in 4 s after step {num_batches}.*stall_seconds; {kept}"
    with pytest.raises(StalledInput, match=message):
        mk.train(model(), TEXT, config, workdir=tmp_path)
    assert time.monotonic() - start < 60
    assert saved_steps(tmp_path) == [num_batches][:num_batches]


def test_a_signal_while_input_is_waited_for_saves_at_once(tmp_path, stall):
    stall(3)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    ready = threading.Event()

    def start_timer(row):
        if not ready.is_set():
            ready.set()
            timer.start()

    config = CONFIG.replace(save_every=0, log_every=1)
    with pytest.raises(Stopped, match="saved at step 3"):
        mk.train(model(), TEXT, config, workdir=tmp_path, on_log=start_timer)


def test_signals_do_not_stop_the_waiting_for_input(monkeypatch):
    """A signal may arrive at any moment, also when the time until the next look is up."""
    monkeypatch.setattr(loader, "_SECONDS_BETWEEN_CALLS", 0.01)
    released = threading.Event()

    def no_elements():
        released.wait()
        yield from ()

    reader = loader._ReadAhead(no_elements())
    handled = []

    def handle(number, frame):
        handled.append(number)
        time.sleep(0.008)

    def on_wait(seconds):
        if len(handled) > 50:
            raise StalledInput

    former = signal.signal(signal.SIGALRM, handle)
    timer = threading.Timer(20, released.set)  # the test fails after it instead of hanging
    timer.start()
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.017)
    try:
        with pytest.raises(StalledInput):
            reader.next(on_wait)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        timer.cancel()
        released.set()
        reader.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_saves_and_the_run_continues(tmp_path, number):
    def send(row):
        if row["step"] == 2:
            os.kill(os.getpid(), number)

    config = CONFIG.replace(save_every=0, log_every=1)
    with pytest.raises(Stopped, match="saved at step 3") as stopped:
        mk.train(model(), TEXT, config, workdir=tmp_path, on_log=send)
    assert stopped.value.exit_code == 128 + number
    assert not (tmp_path / "run.lock").exists()
    finished = mk.train(model(), TEXT, config, workdir=tmp_path)
    assert same(finished.model, mk.train(model(), TEXT, config).model)
