"""A run between two steps: its state, batches, log and checkpoints, and what happens at a fault."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moekit.config import TrainConfig
from moekit.data.batch import Batch
from moekit.data.tokenizer import Tokenizer
from moekit.distributed import allgather_objects, is_first
from moekit.model.transformer import EncoderDecoder
from moekit.training.checkpoint import Checkpoints, to_json
from moekit.training.guards import (
    COLLAPSE,
    MAX_ROLLBACKS,
    MAX_SKIPPED,
    NOT_FINITE,
    SPIKE,
    BatchId,
    Fault,
    Guard,
    TrainingFault,
    all_finite,
    describe_kept,
)
from moekit.training.layout import CHECKPOINTS
from moekit.training.metrics import LOG, Metrics
from moekit.training.optim import schedule
from moekit.training.retention import BestCheckpoint
from moekit.training.run_data import RunData, StalledInput
from moekit.training.run_lock import RunLock
from moekit.training.run_settings import (
    FORMAT,
    check_same_run,
    program_settings,
)
from moekit.training.signals import Stopped, StopSignal
from moekit.training.state import (
    TrainState,
    checkpoint_items,
    copy_arrays,
    split_model,
    state_from_items,
)
from moekit.training.step import compiled_step
from moekit.training.validation import evaluate_loss

Callback = Callable[[int, EncoderDecoder], dict[str, float]]
OnLog = Callable[[dict[str, Any]], Any]
logger = logging.getLogger(__name__)


class Trainer:
    """A run between two steps: its state, its stream of batches, its log and its checkpoints."""

    def __init__(
        self,
        model: EncoderDecoder,
        source: Any,
        config: TrainConfig,
        tokenizer: Tokenizer,
        *,
        workdir: Path | None = None,
        eval_source: Any = None,
        callbacks: Sequence[Callback] = (),
        on_log: Sequence[OnLog] = (),
    ):
        self.model = model
        self.source = source
        self.config = config
        self.tokenizer = tokenizer
        self.workdir = workdir
        self.callbacks = callbacks
        self.on_log = on_log if is_first() else ()
        self.stop = StopSignal()
        self.reader = RunData(source, eval_source, config, tokenizer, model.mesh, self.check_wait)
        self.lock: RunLock | None = None  # of the workdir, on process 0
        self.step = compiled_step(model, program_settings(config))
        self.learning_rate = schedule(config)
        self.state: TrainState | None = None
        self.num_done = 0  # the state's step, on the host
        self.next_batch: Batch | None = None
        self.pending: list[dict[str, Any]] = []  # reports of the steps since the last log row
        self.guard = Guard(model.cfg)
        self.num_rollbacks = 0
        self.unlogged = self.reader.stream.take_statistics()
        self.data = self.unlogged
        logs = workdir is not None and is_first()
        self.metrics = Metrics(workdir / LOG if logs else None)
        self.checkpoints: Checkpoints | None = None
        self.saved_step: int | None = None  # of the newest checkpoint

    # Steps

    def advance(self) -> None:
        """Do one step; does not wait for the device.

        Raises:
          StalledInput: no batch arrived in time. The state is that of the last step that was done.
          Stopped: a signal arrived while a batch was waited for; likewise.
        """
        batch = self.reader.read_batch() if self.next_batch is None else self.next_batch
        self.next_batch = None
        state, report = self.step.update(replace(self.state, position={}), batch)
        position = self.reader.stream.get_state()
        self.state = replace(state, position=position)
        self.num_done += 1
        batch_id = BatchId(self.num_done, self.config.seed, self.reader.order, position)
        self.guard.add(self.num_done, batch_id, report.pop("health"))
        self.pending.append(report)
        self.unlogged += self.reader.stream.take_statistics()
        if self.model.mesh is not None and jax.default_backend() == "cpu":
            # concurrent collectives compete for the threads of a small machine
            jax.block_until_ready(report)
        # the next batch is read while the device computes
        if self.num_done < self.config.steps:
            self.next_batch = self.reader.read_batch()

    def check_wait(self, seconds: float) -> None:
        """Called while a batch is waited for.

        With several processes, a signal to one of them does not stop it here.
        """
        if self.stop.number and jax.process_count() == 1:
            raise Stopped("", self.stop.number)
        if seconds > self.config.stall_seconds:
            raise StalledInput(
                f"no batch arrived in {self.config.stall_seconds:g} s after step {self.num_done}: "
                "look whether the disk or the network of the training data answers, or raise "
                "stall_seconds"
            )

    def current_rate(self) -> float:
        return float(self.learning_rate(max(0, self.num_done - 1)))

    # Faults

    def check_steps(self, num_unread: int, *, with_parameters: bool) -> bool:
        """Act on the faults of all steps but the newest `num_unread`, and of the parameters.

        Returns:
          whether the run returned to an earlier step.

        Raises:
          TrainingFault: the run has to stop; NonFiniteLoss because of NaN or infinity.
        """
        policies = {
            NOT_FINITE: self.config.on_nonfinite,
            SPIKE: self.config.on_spike,
            COLLAPSE: self.config.on_collapse,
        }
        for fault in self.guard.find(num_unread):
            policy = policies[fault.kind]
            if policy == "stop":
                raise self.stopped_by(fault)
            if policy == "rollback":
                self.roll_back(fault)
                return True
            if policy == "skip" and self.guard.num_skipped >= MAX_SKIPPED:
                raise self.stopped_by(fault, f"{MAX_SKIPPED} updates in a row were skipped; ")
            consequence = "its update is skipped" if policy == "skip" else "training continues"
            self.record_fault(fault.step, f"{fault}: {consequence}")
        checks_parameters = with_parameters and self.config.on_nonfinite == "rollback"
        if checks_parameters and not all_finite(self.state.params):
            self.roll_back(self.parameter_fault())
            return True
        return False

    def record_fault(self, step: int, what: str) -> None:
        """Warn of a fault and log it."""
        if is_first():
            logger.warning("%s", what)
        self.metrics.add({"step": step, "fault": what})

    def stopped_by(self, fault: Fault, reason: str = "") -> TrainingFault:
        steps, folder = [], None
        if self.checkpoints is not None:
            self.checkpoints.settle()
            steps, folder = self.checkpoints.steps(), self.checkpoints.folder
        return fault.error(
            f"{reason}the learning rate is {self.current_rate():.3g}; lower learning_rate, set "
            f"clip_norm=1.0 or raise warmup_steps; {describe_kept(folder, steps)}"
        )

    def roll_back(self, fault: Fault) -> None:
        """Return to the newest checkpoint and continue with the data in another order."""
        if self.checkpoints is None or not self.saved_steps():
            raise self.stopped_by(fault, "there is no checkpoint to return to; ")
        if self.num_rollbacks == MAX_ROLLBACKS:
            raise self.stopped_by(fault, f"this is the fault after {MAX_ROLLBACKS} rollbacks; ")
        self.num_rollbacks += 1
        order = self.reader.order + 1
        self.checkpoints.read_newest(self.restore, set_aside=True)
        self.reader.change_order(order)
        self.state = replace(self.state, position=self.reader.stream.get_state())
        self.next_batch = None
        self.pending = []
        self.guard.forget()
        step = self.num_done
        self.record_fault(
            step, f"{fault}: rolled back to step {step}, training continues with data order {order}"
        )

    def parameter_fault(self) -> Fault:
        order = self.reader.order
        batch = BatchId(self.num_done, self.config.seed, order, self.state.position)
        what = "the parameters are not finite after the update"
        return Fault(NOT_FINITE, self.num_done, what, batch)

    # Log and validation

    def log(self, seconds: float) -> dict[str, Any]:
        """Add a row of means over the steps since the last one, which took that many seconds.

        Steps whose update was skipped are left out of the means.
        """
        reports = jax.device_get(self.pending)  # waits for the device
        trained = [report for report in reports if is_finite(report)]
        row: dict[str, Any] = {}
        for key in reports[0]:
            row[key] = float(np.mean([report[key] for report in trained or reports]))
        step_tokens = self.config.batch_size * (
            self.config.input_length + self.config.target_length
        )
        row["step"] = self.num_done
        row["learning_rate"] = self.current_rate()
        row["tokens"] = self.num_done * step_tokens
        row["tokens_per_second"] = len(self.pending) * step_tokens / seconds
        row |= self.take_data_statistics()
        self.pending = []
        self.metrics.add(row)
        return row

    def take_data_statistics(self) -> dict[str, Any]:
        """What all hosts read since the last call: totals, and tokens of each cluster."""
        by_process = allgather_objects([self.unlogged.rows, self.unlogged.table.tolist()])
        # processes that differ along the model axis only read the same rows
        copies = jax.process_count() // self.reader.shard[1]
        counts = replace(
            self.unlogged,
            rows=sum(rows for rows, _ in by_process) // copies,
            table=np.sum([table for _, table in by_process], axis=0) // copies,
        )
        self.data += counts
        self.unlogged = self.reader.stream.take_statistics()
        cluster_tokens = {
            name: of_cluster["input_tokens"] + of_cluster["target_tokens"]
            for name, of_cluster in counts.to_dict()["clusters"].items()
        }
        return counts.row() | {"cluster_tokens": cluster_tokens}

    def validate(self) -> None:
        """Evaluate the validation batches and the callbacks; log what they return."""
        self.update_model(copy_arrays)
        row: dict[str, Any] = {}
        if self.reader.validation:
            row |= evaluate_loss(self.model, self.reader.validation)
        for callback in self.callbacks:
            row |= callback(self.num_done, self.model)
        if row:
            row["step"] = self.num_done
            self.metrics.add(row)
            self.report(row)

    def report(self, row: dict[str, Any]) -> None:
        """Call on_log with a copy of a row that is written already.

        If one raises, a checkpoint is saved first. Not with several processes: only this one
        would save, so the run keeps its periodic checkpoints alone.
        """
        try:
            for function in self.on_log:
                function(dict(row))
        except Exception:
            if jax.process_count() == 1:
                self.save()
            raise

    def close_on_log(self) -> None:
        """Call the method `close` of the on_log functions that have one."""
        for function in self.on_log:
            if hasattr(function, "close"):
                function.close()

    def update_model(self, prepare: Callable[[Any], Any]) -> None:
        """Put the current parameters into the caller's model.

        They must be copied (`prepare`) where training continues: a step donates its state.
        """
        nnx.update(self.model, *prepare((self.state.params, self.state.rest)))

    # Checkpoints

    def settings(self) -> dict[str, Any]:
        """What identifies the run: a checkpoint of other settings is not resumed."""
        return to_json(
            {
                "format": FORMAT,
                "model": self.model.cfg.to_dict(),
                "train": self.config.to_dict(),
                "source": self.source.digest(),
                "tokenizer": self.tokenizer.digest(),
            }
        )

    def start(self, resume: bool) -> None:
        """Restore the newest checkpoint of the workdir, or begin at step 0."""
        found: list[int] = []
        if self.workdir is not None:
            self.checkpoints = self.open_checkpoints(self.workdir)
            found = self.checkpoints.candidates()
        if found and not resume:
            raise ValueError(
                f"{self.workdir} already holds a run at step {found[-1]}: choose another workdir, "
                "delete it, or resume it"
            )
        if found:
            self.checkpoints.read_newest(self.restore, set_aside=True)
        else:
            self.begin()
        if self.checkpoints is not None:
            self.checkpoints.prepare_writing()
            self.require_room(self.num_done)

    def open_checkpoints(self, workdir: Path) -> Checkpoints:
        config = self.config
        best = None
        if config.keep_best is not None:
            best = BestCheckpoint(config.keep_best, self.best_scores)
        return Checkpoints(workdir / CHECKPOINTS, config.keep, config.keep_every, best)

    def best_scores(self) -> dict[int, float]:
        """The metric by which checkpoints are kept, by step; from the log of process 0."""
        name = self.config.keep_best
        scores = [[row["step"], row[name]] for row in self.metrics.rows if name in row]
        return dict(allgather_objects(scores)[0])

    def begin(self) -> None:
        """Start at step 0 with the model's parameters."""
        self.metrics.keep_until(-1)
        _, params, rest = split_model(self.model)
        # copies, which the steps may donate: the caller keeps the model's arrays
        params, rest = copy_arrays((params, rest))
        state = self.step.start(params, rest, self.config.seed)
        self.state = replace(state, position=self.reader.stream.get_state())

    def require_room(self, num_done: int) -> None:
        """Raise OSError unless the checkpoints of the remaining steps fit on the disk."""
        config = self.config
        if num_done >= config.steps:
            return
        num_saves = math.ceil(config.steps / config.save_every) if config.save_every else 1
        # a new checkpoint is written before the oldest is deleted
        num_kept = config.keep + 1
        if config.keep_every:
            num_kept += config.steps // config.keep_every
        if config.keep_best is not None:
            num_kept += 1
        num_kept = min(num_saves, num_kept)
        num_new = num_kept - len(self.checkpoints.steps())
        self.checkpoints.require_room(num_new, checkpoint_items(self.step.state))

    def restore(self, step: int) -> None:
        """Continue from a checkpoint of this run.

        Raises:
          DamagedCheckpoint, OtherRun: it is damaged, or of a run with other settings.
        """
        metadata = self.checkpoints.metadata(step)
        check_same_run(self.workdir, metadata, self.settings())
        items = self.checkpoints.restore(step, checkpoint_items(self.step.state))
        self.reader.set_state(metadata.get("data_order", 0), metadata["stream"])
        position = self.reader.stream.get_state()
        self.state = state_from_items(self.step.state, items, position)
        self.num_done = self.saved_step = step
        if self.metrics.path is not None and self.metrics.path.exists():
            self.metrics = Metrics.load(self.metrics.path)
        self.metrics.keep_until(step)

    def save(self, is_last: bool = False) -> None:
        """Begin to write a checkpoint, if there is a workdir and the state is finite.

        Args:
          is_last: return when it is on disk.

        Raises:
          OSError: this checkpoint or the one before could not be written, and on_save_error is
            stop; with is_last always.
        """
        if self.checkpoints is None or self.num_done == 0:
            return
        self.wait_for_save()
        if self.saved_step == self.num_done:
            return
        if self.lock is not None:
            self.lock.require()
        if not all_finite(self.state.params):
            raise self.stopped_by(self.parameter_fault())
        self.saved_step = self.num_done
        try:
            self.write_checkpoint(is_last)
        except OSError as error:
            self.handle_save_error(error, is_last)

    def write_checkpoint(self, wait: bool) -> None:
        position: dict[str, str] = {}
        for of_process in allgather_objects(self.state.position):
            position |= of_process
        metadata = self.settings() | {"stream": position, "data_order": self.reader.order}
        items = checkpoint_items(self.state)
        self.checkpoints.save(self.num_done, metadata, items, wait=wait)

    def wait_for_save(self) -> None:
        """Wait for the checkpoint that is being written."""
        try:
            self.checkpoints.wait()
        except OSError as error:
            self.handle_save_error(error, is_last=False)

    def notice_failed_save(self) -> None:
        """Handle a save that failed in the background.

        With several processes, only this one may know of it: it is handled before the next save.
        """
        if self.checkpoints is None or jax.process_count() > 1:
            return
        if not self.checkpoints.is_writing():
            self.wait_for_save()

    def handle_save_error(self, error: OSError, is_last: bool) -> None:
        self.saved_step = None
        if is_last or self.config.on_save_error == "stop":
            raise error
        logger.warning("%s; training continues (on_save_error=continue)", error)

    def saved_steps(self) -> list[int]:
        """The steps of the checkpoints on disk, after the one that is being written."""
        self.wait_for_save()
        return self.checkpoints.steps()

    def describe_saved(self) -> str:
        """What a run that ends early leaves."""
        if self.checkpoints is None:
            return "no workdir, nothing saved"
        newest = self.checkpoints.latest()
        return "nothing saved yet" if newest is None else f"saved at step {newest}"

    def close(self) -> None:
        """Hand the trained parameters to the caller's model and close files."""
        self.update_model(lambda arrays: arrays)
        self.reader.stream.close()
        if self.checkpoints is not None:
            self.checkpoints.close()


def is_finite(report: dict[str, Any]) -> bool:
    """Whether the update of a step was finite."""
    return math.isfinite(report["loss"]) and math.isfinite(report["grad_norm"])
