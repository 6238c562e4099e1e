"""Faults that leave the process alive: a run of a few steps, which is damaged and resumed."""

import contextlib
import logging
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax.numpy as jnp
import numpy as np
from tiny_run import Drill, rows, same_run
from trial import Trial

import moekit as mk
from moekit.data import loader
from moekit.training.guards import NonFiniteLoss
from moekit.training.run_data import RunData, StalledInput

KEPT, NEWEST, STEPS = 4, 6, 8  # the checkpoint before the newest, the newest, the end
CONFIG = mk.TrainConfig(
    steps=STEPS,
    batch_tokens=8 * 48,
    input_length=32,
    target_length=16,
    save_every=2,
    keep=9,
    log_every=1,
)
STALL_SECONDS = 4.0


class Warnings(logging.Handler):
    """The text of all warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


@contextlib.contextmanager
def caught_warnings() -> Iterator[Warnings]:
    handler = Warnings()
    logger = logging.getLogger("moekit")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


class BeforeAndAfter:
    """A run of eight steps, and the same run as it was after six."""

    def __init__(self, drill: Drill) -> None:
        self.drill = drill
        self.after = drill.empty_folder("after")
        self.train(self.after)
        self.before = drill.folder / "before"
        shutil.copytree(self.after, self.before, ignore=shutil.ignore_patterns(str(STEPS)))

    def copy(self, name: str) -> Path:
        """A copy of the run after six steps."""
        workdir = self.drill.folder / name
        return Path(shutil.copytree(self.before, workdir))

    def train(self, workdir: Path, mesh: Any = None, **changes: Any) -> Any:
        model = tiny_model(mesh)
        corpus = mk.corpus(self.drill.text)
        return mk.train(model, corpus, CONFIG.replace(**changes), workdir=workdir)


def tiny_model(mesh: Any = None) -> Any:
    cfg = mk.preset("switch-nano").replace(d_model=16, d_ff=32, encoder_layers=1, decoder_layers=1)
    return mk.EncoderDecoder(cfg, mesh=mesh)


def resume_and_compare(runs: BeforeAndAfter, workdir: Path, warning: str = "") -> Trial:
    """Resume a run; it must warn and end as the uninterrupted one."""
    with caught_warnings() as warnings:
        try:
            runs.train(workdir)
        except Exception as error:
            return Trial("failed", problem=f"{type(error).__name__}: {error}")
    problem = ""
    if warning not in warnings.text:
        problem = f"{warning!r} is not in {warnings.text!r}"
    return Trial("recovered", equal=same_run(workdir, runs.after), problem=problem)


def broken_log(drill: Drill, runs: BeforeAndAfter) -> list[Trial]:
    """Cut the last line of the log: a resumed run writes it again."""
    workdir = runs.copy("broken-log")
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text()[:-100])
    return [resume_and_compare(runs, workdir)]


# Numbers that are not finite


@contextlib.contextmanager
def poisoned_batch(number: int) -> Iterator[None]:
    """NaN in a row of the batch with this number, of those that are read from now on."""
    read = RunData.read_batch
    num_read = 0

    def read_poisoned(data: RunData) -> Any:
        nonlocal num_read
        batch = read(data)
        num_read += 1
        if num_read != number:
            return batch
        weights = batch.loss_weights.at[3, 0].set(jnp.nan)
        return replace(batch, loss_weights=weights)

    with patch.object(RunData, "read_batch", read_poisoned):
        yield


def not_finite(drill: Drill, runs: BeforeAndAfter) -> list[Trial]:
    """NaN in a batch under all policies, and in a parameter."""
    trials = [nan_stops(runs)]
    if not drill.short:
        trials += [nan_is_skipped(runs), nan_is_rolled_back(runs), nan_in_a_parameter(runs)]
    return trials


def nan_stops(runs: BeforeAndAfter) -> Trial:
    """The run stops, names the step, keeps good checkpoints only, and is resumed without NaN."""
    workdir = runs.drill.empty_folder("nan-stop")
    problem = "the run continued"
    with caught_warnings(), poisoned_batch(5):
        try:
            runs.train(workdir)
        except NonFiniteLoss as error:
            problem = "" if "at step 5 (batch 5 of seed 0" in str(error) else str(error)
    trial = resume_and_compare(runs, workdir)
    return replace(trial, problem=problem or trial.problem)


def nan_is_skipped(runs: BeforeAndAfter) -> Trial:
    workdir = runs.drill.empty_folder("nan-skip")
    with caught_warnings() as warnings, poisoned_batch(5):
        run = runs.train(workdir, on_nonfinite="skip")
    problem = ""
    if "at step 5" not in warnings.text or "its update is skipped" not in warnings.text:
        problem = f"no warning: {warnings.text}"
    is_good = np.isfinite(run.metrics.last("loss")) and rows(workdir)[:4] == rows(runs.after)[:4]
    return Trial("recovered", equal=bool(is_good), problem=problem)


def nan_is_rolled_back(runs: BeforeAndAfter) -> Trial:
    workdir = runs.drill.empty_folder("nan-rollback")
    with caught_warnings() as warnings, poisoned_batch(6):
        run = runs.train(workdir, on_nonfinite="rollback")
    problem = ""
    if "at step 6" not in warnings.text or "rolled back to step 4" not in warnings.text:
        problem = f"no warning: {warnings.text}"
    is_good = np.isfinite(run.metrics.last("loss")) and rows(workdir)[:4] == rows(runs.after)[:4]
    return Trial("recovered", 1, bool(is_good), problem)


def nan_in_a_parameter(runs: BeforeAndAfter) -> Trial:
    workdir = runs.drill.empty_folder("nan-parameter")
    model = tiny_model()
    kernel = model.encoder.blocks[-1].moe.router.w_de
    kernel[...] = kernel[...].at[0, 0, 0].set(jnp.nan)
    problem = "the run continued"
    try:
        mk.train(model, mk.corpus(runs.drill.text), CONFIG, workdir=workdir)
    except NonFiniteLoss as error:
        problem = "" if "encoder MoE layer 0 on, at step 1" in str(error) else str(error)
    if list((workdir / "checkpoints").iterdir()):
        problem = problem or "a checkpoint was written"
    return Trial("refused", problem=problem)


# Input and mesh


def stalled_input(drill: Drill, runs: BeforeAndAfter) -> list[Trial]:
    """The input stops after some batches: the run is saved, ends in time, and is resumed."""
    workdir = drill.empty_folder("stalled")
    released = threading.Event()
    read = loader._RowsIterator.__next__
    num_read = 0

    def read_or_stall(iterator: Any) -> Any:
        nonlocal num_read
        if num_read == 5:
            released.wait()
            raise StopIteration
        num_read += 1
        return read(iterator)

    problem = "the run continued"
    with patch.object(loader._RowsIterator, "__next__", read_or_stall):
        try:
            runs.train(workdir, stall_seconds=STALL_SECONDS)
        except StalledInput as error:
            problem = "" if f"no batch arrived in {STALL_SECONDS:g} s" in str(error) else str(error)
        finally:
            released.set()
    if len(rows(workdir)) == 0:
        problem = problem or "nothing was saved"
    trial = resume_and_compare(runs, workdir)
    return [replace(trial, problem=problem or trial.problem)]


def other_mesh(drill: Drill, runs: BeforeAndAfter) -> list[Trial]:
    """Resume on a mesh of four devices what one device began, and continue on one device."""
    workdir = runs.copy("other-mesh")
    problem = ""
    try:
        runs.train(workdir, mk.make_mesh(data=2, expert=2))
        longer = drill.folder / "after-longer"
        shutil.copytree(runs.after, longer)
        for folder in (workdir, longer):
            runs.train(folder, steps=STEPS + 2)
        equal = same_losses(workdir, longer)
    except Exception as error:
        equal, problem = None, f"{type(error).__name__}: {error}"
    return [Trial("recovered", equal=equal, problem=problem)]


def same_losses(workdir: Path, reference: Path) -> bool:
    """Whether losses are equal up to the order of sums, which another mesh changes."""
    found = [row["loss"] for row in rows(workdir)]
    expected = [row["loss"] for row in rows(reference)]
    return len(found) == len(expected) and np.allclose(found, expected, rtol=1e-4)
