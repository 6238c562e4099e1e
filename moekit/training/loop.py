"""The training loop: steps, log, validation, checkpoints."""

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moekit.config import TrainConfig
from moekit.data.batch import Batch, stack_rows
from moekit.data.loader import batches
from moekit.data.own_mixture import as_source
from moekit.data.statistics import DataStatistics
from moekit.data.tokenizer import Tokenizer, load_tokenizer
from moekit.distributed import allgather_objects, is_first, make_global_batch, process_shard
from moekit.model.transformer import EncoderDecoder
from moekit.progress import ProgressBar
from moekit.training.checkpoint import Checkpoints, describe_differences, to_json
from moekit.training.guards import (
    NonFiniteLoss,
    StopSignal,
    all_finite,
    check_processes_agree,
    check_settings,
    describe_kept,
)
from moekit.training.metrics import Metrics
from moekit.training.optim import schedule
from moekit.training.state import (
    TrainState,
    checkpoint_items,
    copy_arrays,
    split_model,
    state_from_items,
)
from moekit.training.step import compiled_step, token_losses

VALIDATION_BATCHES = 16
FORMAT = 2  # of a run's checkpoints; 1 had other optimizer states
LEARNING_RATE_SETTINGS = ("learning_rate", "schedule", "warmup_steps", "clip_norm")
LOOP_SETTINGS = ("steps", "log_every", "eval_every", "save_every", "keep", "remat", "data_workers")
Callback = Callable[[int, EncoderDecoder], dict[str, float]]
OnLog = Callable[[dict[str, Any]], Any]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Result of `train`.

    Args:
      model: the model given, trained in place.
      metrics: the log of the whole run.
      data: statistics of the data that this call read.
    """

    model: EncoderDecoder
    metrics: Metrics
    config: TrainConfig
    workdir: Path | None
    data: DataStatistics


@functools.lru_cache(maxsize=16)
def _compiled_losses(graphdef: nnx.GraphDef) -> Callable[[nnx.State, Batch], dict[str, Any]]:
    def losses(state: nnx.State, batch: Batch) -> dict[str, Any]:
        output = nnx.merge(graphdef, state)(batch)
        return token_losses(output.logits, batch.targets, batch.loss_weights)

    return jax.jit(losses)


def evaluate_loss(model: EncoderDecoder, stream: Sequence[Batch]) -> dict[str, float]:
    """Cross-entropy (nats a target token) and next-token accuracy: ratios of sums.

    On several hosts the stream holds this process's shard of each batch.
    """
    graphdef, state = nnx.split(model)
    losses = _compiled_losses(graphdef)
    totals = {"cross_entropy": 0.0, "hits": 0.0, "count": 0.0}
    for batch in stream:
        sums = losses(state, make_global_batch(batch, model.mesh))
        # one batch at a time: concurrent collectives compete for the threads of a small machine
        sums = jax.device_get(sums)
        for name in totals:
            totals[name] += float(sums[name])
    return {
        "valid_loss": totals["cross_entropy"] / totals["count"],
        "valid_accuracy": totals["hits"] / totals["count"],
    }


def program_settings(config: TrainConfig) -> TrainConfig:
    """The configuration without what does not change the compiled step: runs share programs."""
    config = config.replace(seed=0, log_every=1, eval_every=0, save_every=0, keep=1, data_workers=0)
    if config.schedule in ("constant", "rsqrt"):
        config = config.replace(steps=1)  # these do not depend on the length of a run
    return config


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
        self.shard = process_shard(model.mesh)
        self.stream = self.read_split(source, "train", seed=config.seed, repeat=True)
        self.validation = self.read_validation(eval_source)
        self.step = compiled_step(model, program_settings(config))
        self.learning_rate = schedule(config)
        self.state: TrainState | None = None
        self.num_done = 0  # the state's step, on the host
        self.next_batch: Batch | None = None
        self.pending: list[dict[str, Any]] = []  # reports of the steps since the last log row
        self.unlogged = self.stream.take_statistics()
        self.data = self.unlogged
        logs = workdir is not None and is_first()
        self.metrics = Metrics(workdir / "metrics.jsonl" if logs else None)
        self.checkpoints: Checkpoints | None = None

    # Data

    def read_split(self, source: Any, split: str, *, seed: int, repeat: bool) -> Any:
        return batches(
            source,
            self.tokenizer,
            input_length=self.config.input_length,
            target_length=self.config.target_length,
            batch_size=self.config.batch_size,
            seed=seed,
            split=split,
            repeat=repeat,
            shard=self.shard,
            workers=self.config.data_workers if repeat else 0,
        )

    def read_validation(self, eval_source: Any) -> list[Batch]:
        """The first batches of a source's "valid" split; none without a source."""
        if eval_source is None:
            return []
        try:
            stream = self.read_split(eval_source, "valid", seed=0, repeat=False)
            found = list(itertools.islice(stream, VALIDATION_BATCHES))
        except (TypeError, ValueError, LookupError) as error:
            raise ValueError(f"eval_source has no usable valid split: {error}") from error
        stream.close()
        # processes may run out of rows at different times: fill up with empty batches
        num_batches = max(allgather_objects(len(found)))
        if num_batches == 0:
            raise ValueError(
                "eval_source has no examples in its valid split: pass a source that has some, or "
                "no eval_source"
            )
        num_rows = self.config.batch_size // self.shard[1]
        blank = stack_rows([[]] * num_rows, (self.config.input_length, self.config.target_length))
        return found + [blank] * (num_batches - len(found))

    def read_batch(self) -> Batch:
        return make_global_batch(next(self.stream), self.model.mesh)

    # Steps

    def advance(self) -> None:
        """Do one step; does not wait for the device."""
        batch = self.read_batch() if self.next_batch is None else self.next_batch
        state, report = self.step.update(replace(self.state, position={}), batch)
        self.state = replace(state, position=self.stream.get_state())
        self.num_done += 1
        self.pending.append(report)
        self.unlogged += self.stream.take_statistics()
        # the next batch is read while the device computes
        self.next_batch = self.read_batch() if self.num_done < self.config.steps else None
        if self.model.mesh is not None and jax.default_backend() == "cpu":
            # concurrent collectives compete for the threads of a small machine
            jax.block_until_ready(report)

    def current_rate(self) -> float:
        return float(self.learning_rate(max(0, self.num_done - 1)))

    def check_finite(self) -> None:
        """Raise NonFiniteLoss if the loss of a step since the last log row is not finite."""
        self.pending = jax.device_get(self.pending)  # waits for the device
        first_step = self.num_done - len(self.pending) + 1
        for step, report in enumerate(self.pending, first_step):
            if not math.isfinite(report["loss"]):
                raise self.diverged(f"loss is {report['loss']} at step {step}")

    def diverged(self, what: str) -> NonFiniteLoss:
        steps = [] if self.checkpoints is None else self.checkpoints.steps()
        folder = None if self.checkpoints is None else self.checkpoints.folder
        return NonFiniteLoss(
            f"{what} (learning rate {self.current_rate():.3g}): lower learning_rate, set "
            f"clip_norm=1.0 or raise warmup_steps; {describe_kept(folder, steps)}"
        )

    def log(self, seconds: float) -> dict[str, Any]:
        """Add a row of means over the steps since the last one, which took that many seconds."""
        self.check_finite()
        row: dict[str, Any] = {}
        for key in self.pending[0]:
            row[key] = float(np.mean([report[key] for report in self.pending]))
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
        copies = jax.process_count() // self.shard[1]
        counts = replace(
            self.unlogged,
            rows=sum(rows for rows, _ in by_process) // copies,
            table=np.sum([table for _, table in by_process], axis=0) // copies,
        )
        self.data += counts
        self.unlogged = self.stream.take_statistics()
        cluster_tokens = {
            name: of_cluster["input_tokens"] + of_cluster["target_tokens"]
            for name, of_cluster in counts.to_dict()["clusters"].items()
        }
        return counts.row() | {"cluster_tokens": cluster_tokens}

    def validate(self) -> None:
        """Evaluate the validation batches and the callbacks; log what they return."""
        self.update_model(copy_arrays)
        row: dict[str, Any] = {}
        if self.validation:
            row |= evaluate_loss(self.model, self.validation)
        for callback in self.callbacks:
            row |= callback(self.num_done, self.model)
        if row:
            row["step"] = self.num_done
            self.metrics.add(row)
            self.report(row)

    def report(self, row: dict[str, Any]) -> None:
        """Call on_log with a copy of a row that is written already.

        If one raises, a checkpoint is saved first. Of several processes only this one would save,
        so that there the periodic checkpoints are what is left.
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
        newest = None
        if self.workdir is not None:
            self.checkpoints = Checkpoints(self.workdir / "checkpoints", keep=self.config.keep)
            newest = self.checkpoints.latest()
            self.require_room(newest or 0)
        if newest is None:
            self.metrics.keep_until(-1)
            _, params, rest = split_model(self.model)
            # copies, which the steps may donate: the caller keeps the model's arrays
            params, rest = copy_arrays((params, rest))
            state = self.step.start(params, rest, self.config.seed)
            self.state = replace(state, position=self.stream.get_state())
            return
        if not resume:
            raise ValueError(
                f"{self.workdir} already holds a run at step {newest}: choose another workdir, "
                "delete it, or resume it"
            )
        self.restore(newest)

    def require_room(self, num_done: int) -> None:
        """Raise OSError unless the checkpoints of the remaining steps fit on the disk."""
        config = self.config
        if num_done >= config.steps:
            return
        num_saves = math.ceil(config.steps / config.save_every) if config.save_every else 1
        # a new checkpoint is written before the oldest is deleted
        num_kept = min(num_saves, config.keep + 1)
        num_new = num_kept - len(self.checkpoints.steps())
        self.checkpoints.require_room(num_new, checkpoint_items(self.step.state))

    def restore(self, step: int) -> None:
        """Continue from a checkpoint of this run.

        Raises:
          ValueError: the checkpoint is damaged, or of a run with other settings.
        """
        metadata = self.checkpoints.metadata(step)
        check_same_run(self.workdir, metadata, self.settings())
        items = self.checkpoints.restore(step, checkpoint_items(self.step.state))
        self.stream.set_state(metadata["stream"])
        self.state = state_from_items(self.step.state, items, self.stream.get_state())
        self.num_done = step
        if self.metrics.path is not None and self.metrics.path.exists():
            self.metrics = Metrics.load(self.metrics.path)
        self.metrics.keep_until(step)

    def save(self) -> None:
        """Write a checkpoint, if there is a workdir and the state is finite."""
        if self.checkpoints is None or self.checkpoints.latest() == self.num_done:
            return
        self.check_finite()
        if not all_finite(self.state.params):
            raise self.diverged(f"the parameters are not finite after step {self.num_done}")
        position: dict[str, str] = {}
        for of_process in allgather_objects(self.state.position):
            position |= of_process
        metadata = self.settings() | {"stream": position}
        self.checkpoints.save(self.num_done, metadata, checkpoint_items(self.state))

    def close(self) -> None:
        """Hand the trained parameters to the caller's model and close files."""
        self.update_model(lambda arrays: arrays)
        self.stream.close()
        if self.checkpoints is not None:
            self.checkpoints.close()


def check_same_run(workdir: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError if a checkpoint belongs to a run with other settings."""
    if saved.get("format", 1) != FORMAT:
        raise ValueError(
            f"{workdir} holds a run of an earlier moekit, whose optimizer state has another layout "
            "(attention kernels and experts were factored otherwise): finish it with that version, "
            "or load its model with mk.load and train it in a new workdir"
        )
    # the tokenizer's path may differ; its digest is compared
    saved_model = saved["model"] | {"tokenizer": wanted["model"]["tokenizer"]}
    differences = {
        "model": describe_differences(saved_model, wanted["model"]),
        "train": describe_differences(fixed_settings(saved), fixed_settings(wanted)),
        "source": describe_differences({"digest": saved["source"]}, {"digest": wanted["source"]}),
        "tokenizer": describe_differences(
            {"digest": saved["tokenizer"]}, {"digest": wanted["tokenizer"]}
        ),
    }
    for name, difference in differences.items():
        if difference:
            raise ValueError(
                f"{workdir} holds a run of another {name} configuration ({difference}): choose "
                "another workdir or the same configuration"
            )
    changed = describe_differences(rate_settings(saved), rate_settings(wanted))
    if changed:
        logger.warning("%s is resumed with other settings (%s)", workdir, changed)


def fixed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The training settings that a resumed run may not change."""
    may_change = LOOP_SETTINGS + LEARNING_RATE_SETTINGS
    return {name: value for name, value in settings["train"].items() if name not in may_change}


def rate_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings["train"][name] for name in LEARNING_RATE_SETTINGS}


def train(
    model: EncoderDecoder,
    source: Any,
    config: TrainConfig = TrainConfig(),  # noqa: B008  frozen
    *,
    workdir: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    eval_source: Any = None,
    callbacks: Sequence[Callback] = (),
    on_log: OnLog | Sequence[OnLog] = (),
    resume: bool = True,
) -> Run:
    """Train a model in place on a `Mixture`, a `Corpus` or your own rows and return the run.

    Args:
      source: a `Mixture`, a `Corpus`, a `Task`, or what `mk.task` reads: a path, a list of dicts, a
        DataFrame, a data set. A text file or a folder of them is read as by `mk.corpus`.
      workdir: folder of metrics.jsonl and checkpoints. A second call with the same arguments
        resumes from the newest checkpoint and equals a run that was never interrupted. Learning
        rate, schedule, warm-up and clip_norm may differ: the run then continues with the new ones.
      tokenizer: default the one that the model's configuration names.
      eval_source: likewise; its "valid" split gives valid_loss every eval_every steps and at the
        end.
      callbacks: (step, model) -> {name: value}, called and logged at the same times, after the
        checkpoint of that step was written.
      on_log: function or functions that get every row of the log on process 0, after it was
        written: `LivePlot()`, `TensorBoard(..)`, `WandB(..)` or your own. If one raises, the state
        is saved first (with a workdir, on a single process). A method `close` is called at the
        end of the run.

    Raises:
      ValueError: lengths, vocabulary, batch, eval_source or workdir do not fit.
      NonFiniteLoss: the loss diverged; a ValueError.
      OSError: workdir cannot be written.
    """
    if workdir == "":
        raise ValueError('workdir is "": give a folder, or None to keep nothing on disk')
    tokenizer = tokenizer or load_tokenizer(model.cfg.tokenizer)
    check_settings(model, config, tokenizer)
    trainer = Trainer(
        model,
        as_source(source),
        config,
        tokenizer,
        workdir=None if workdir is None else Path(workdir),
        eval_source=None if eval_source is None else as_source(eval_source),
        callbacks=callbacks,
        on_log=[on_log] if callable(on_log) else on_log,
    )
    if jax.process_count() > 1:
        check_processes_agree(trainer.settings())
    trainer.start(resume)
    with StopSignal() as stop, progress_bar(trainer) as bar:
        try:
            run_steps(trainer, stop, bar)
        finally:
            trainer.close()
            trainer.close_on_log()
    return Run(model, trainer.metrics, config, trainer.workdir, trainer.data)


def progress_bar(trainer: Trainer) -> ProgressBar:
    """A bar on process 0."""
    if not is_first():
        return ProgressBar(disable=True)
    return ProgressBar(
        desc=f"train {trainer.model.cfg.name}",
        unit="step",
        initial=trainer.num_done,
        total=trainer.config.steps,
    )


def is_due(step: int, every: int, last: bool) -> bool:
    """Whether something is due after a step; `every` 0 means only after the last one."""
    return last or (every > 0 and step % every == 0)


def run_steps(trainer: Trainer, stop: StopSignal, bar: ProgressBar) -> None:
    """Do the remaining steps; log, save and validate when it is due, in this order."""
    config = trainer.config
    start = time.perf_counter()
    while trainer.num_done < config.steps:
        with bar.compiling(trainer.step.update) as compiles:
            trainer.advance()
            if compiles:
                jax.block_until_ready(trainer.pending)
        bar.update()
        step = trainer.num_done
        is_last = step == config.steps
        stopping = stop.should_stop()
        row = None
        if stopping or is_due(step, config.log_every, is_last):
            row = trainer.log(time.perf_counter() - start)
            rate = row["tokens_per_second"]
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {rate:,.0f} tokens/s")
            start = time.perf_counter()
        pause = time.perf_counter()
        if stopping or is_due(step, config.save_every, is_last):
            trainer.save()
        # after saving: a callback may raise
        if row is not None:
            trainer.report(row)
        if is_due(step, config.eval_every, is_last):
            with bar.compiling(trainer, "validation", steps=0):
                trainer.validate()
        start += time.perf_counter() - pause  # tokens_per_second is that of the steps alone
        if stopping:
            saved = trainer.checkpoints is not None
            raise KeyboardInterrupt(
                f"saved at step {step}" if saved else "no workdir, nothing saved"
            )
