"""The training loop: what is done after each step, and the public function `train`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moekit.config import TrainConfig
from moekit.data.own_mixture import as_source
from moekit.data.statistics import DataStatistics
from moekit.data.tokenizer import Tokenizer, load_tokenizer
from moekit.distributed import is_first, lost_processes_named
from moekit.model.transformer import EncoderDecoder
from moekit.progress import ProgressBar
from moekit.training.checkpoint import to_path
from moekit.training.metrics import Metrics
from moekit.training.run_data import StalledInput
from moekit.training.run_folder import record_start
from moekit.training.run_lock import write_alone
from moekit.training.run_settings import (
    check_processes_agree,
    check_recovery,
    check_settings,
)
from moekit.training.signals import Stopped
from moekit.training.trainer import Callback, OnLog, Trainer


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
      workdir: folder of the log, checkpoints, configuration and environment. A second call with
        the same arguments resumes from the newest checkpoint and equals a run that was never
        interrupted. Learning rate, schedule, warm-up and clip_norm may differ: the run then
        continues with the new ones. Only one process at a time trains in a folder.
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
      TrainingFault: a guard stopped the run (on_nonfinite, on_spike, on_collapse); a ValueError.
        NonFiniteLoss: because of NaN or infinity.
      StalledInput: no batch arrived in stall_seconds; an OSError.
      Stopped: a signal stopped the run, which was saved; a KeyboardInterrupt.
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
        workdir=None if workdir is None else to_path(workdir),
        eval_source=None if eval_source is None else as_source(eval_source),
        callbacks=callbacks,
        on_log=[on_log] if callable(on_log) else on_log,
    )
    check_recovery(config, trainer.workdir)
    if jax.process_count() > 1:
        check_processes_agree(trainer.settings())
    with lost_processes_named(), write_alone(trainer.workdir) as trainer.lock:
        trainer.start(resume)
        if trainer.metrics.path is not None:
            record_start(trainer.workdir, trainer.settings())
        with trainer.stop, progress_bar(trainer) as bar:
            try:
                run_steps(trainer, bar)
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


def run_steps(trainer: Trainer, bar: ProgressBar) -> None:
    """Do the remaining steps; log, save and validate when it is due, in this order."""
    config = trainer.config
    start = time.perf_counter()
    while trainer.num_done < config.steps:
        former = trainer.num_done
        stall = do_step(trainer, bar)
        trainer.notice_failed_save()
        step = trainer.num_done
        is_last = step == config.steps
        stopping = trainer.stop.should_stop() or stall is not None
        logs = stopping or is_due(step, config.log_every, is_last)
        saves = stopping or is_due(step, config.save_every, is_last)
        validates = step > former and is_due(step, config.eval_every, is_last)
        # the newest step is still being computed: it is read where it would be waited for anyway
        waits = logs or saves or validates
        if trainer.check_steps(0 if waits else 1, with_parameters=saves):
            bar.reset_to(trainer.num_done)
            start = time.perf_counter()
            continue
        row = None
        if logs and trainer.pending:
            row = trainer.log(time.perf_counter() - start)
            rate = row["tokens_per_second"]
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {rate:,.0f} tokens/s")
            start = time.perf_counter()
        pause = time.perf_counter()
        if saves:
            trainer.save(is_last=stopping or is_last)
        # after saving: a callback may raise
        if row is not None:
            trainer.report(row)
        if validates:
            with bar.compiling(trainer, "validation", steps=0):
                trainer.validate()
        start += time.perf_counter() - pause  # tokens_per_second is that of the steps alone
        if stall is not None:
            raise StalledInput(f"{stall}; {trainer.describe_saved()}")
        if stopping:
            raise Stopped(trainer.describe_saved(), trainer.stop.number)


def do_step(trainer: Trainer, bar: ProgressBar) -> StalledInput | None:
    """One step, which the bar counts; compilation is waited for, to leave it out of the times.

    Returns:
      the error if no batch arrived for the next step: the run has to be saved before it is raised.
    """
    try:
        with bar.compiling(trainer.step.update) as compiles:
            trainer.advance()
            if compiles:
                jax.block_until_ready(trainer.pending)
        bar.update()
    except Stopped:
        pass  # while a batch was waited for: should_stop is true
    except StalledInput as stall:
        if jax.process_count() > 1:
            raise  # the others cannot save with this one
        return stall
    return None
