"""The training loop: log, progress, evaluation, checkpoints, guards."""

import functools
import itertools
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from tqdm import tqdm

from moekit.config import TrainConfig
from moekit.data.batch import Batch
from moekit.data.loader import batches
from moekit.data.statistics import DataStatistics
from moekit.data.tokenizer import Tokenizer, load_tokenizer
from moekit.distributed import gathered, is_first, join_rows, share_of_rows
from moekit.model.transformer import EncoderDecoder
from moekit.sharding import batch_shards
from moekit.training.checkpoint import Checkpoints, differing, restore_model, to_json
from moekit.training.metrics import Metrics
from moekit.training.optim import schedule
from moekit.training.step import compiled_step, token_losses

EVAL_BATCHES = 16  # of a validation loss
_CALLS = itertools.count(1)
# settings that a resumed run may alter
_MAY_CHANGE = ["steps", "log_every", "eval_every", "save_every", "keep", "remat", "data_workers"]
Callback = Callable[[int, EncoderDecoder], dict[str, float]]


@dataclass(frozen=True)
class Run:
    """What training leaves: the model (the one given, now trained), its log, where it is kept, and
    what it read in this session, by task and cluster."""

    model: EncoderDecoder
    metrics: Metrics
    config: TrainConfig
    workdir: Path | None
    data: DataStatistics


class NonFiniteLoss(ValueError):
    """The loss became NaN or infinite."""


@functools.lru_cache(maxsize=16)
def _compiled_eval(graphdef):
    def sums(state, batch):
        out = nnx.merge(graphdef, state)(batch)
        return token_losses(out.logits, batch.targets, batch.loss_weights)

    return jax.jit(sums)


def evaluate_loss(model: EncoderDecoder, stream: Sequence[Batch]) -> dict[str, float]:
    """Cross-entropy (nats a target token) and next-token accuracy: ratios of sums.

    On several hosts the stream holds this process's part of each batch's rows.
    """
    graphdef, state = nnx.split(model)
    step, total = _compiled_eval(graphdef), None
    for batch in stream:
        # one at a time: collectives in flight starve each other of a small machine's threads
        sums = jax.block_until_ready(step(state, join_rows(batch, model.mesh)))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    count = float(total["count"])
    loss, hits = float(total["cross_entropy"]), float(total["hits"])
    return {"valid_loss": loss / count, "valid_accuracy": hits / count}


class _Trainer:
    """The state of a run between steps."""

    def __init__(self, model, source, config, tokenizer, workdir):
        self.model, self.config, self.source = model, config, source
        self.tokenizer = tokenizer
        self.shape = {
            "input_length": config.input_length,
            "target_length": config.target_length,
            "batch_size": config.batch_size,
            "shard": share_of_rows(model.mesh),
        }
        workers = config.data_workers
        self.stream = batches(source, tokenizer, seed=config.seed, workers=workers, **self.shape)
        self.ahead, self.position = None, self.stream.get_state()
        _, params, rest = nnx.split(model, nnx.Param, ...)
        # copies: the compiled step reuses its arguments' memory, the caller keeps the model
        self.params, self.rest = jax.tree.map(jnp.copy, (params, rest))
        timeless = config.replace(
            seed=0, log_every=1, eval_every=0, save_every=0, keep=1, data_workers=0
        )
        if config.schedule in ("constant", "rsqrt"):
            timeless = timeless.replace(steps=1)  # one program for runs of any length
        self.step = compiled_step(model, timeless)
        self.opt_state = self.step.start(self.params)
        self.schedule, self.done = schedule(config), 0
        self.workdir = Path(workdir) if workdir else None
        self.checkpoints = None
        self.metrics = Metrics(self.workdir / "metrics.jsonl" if workdir and is_first() else None)
        self.pending: list[dict] = []
        self.counts = self.data = self.stream.take_statistics()
        self.key = jax.random.key(config.seed)

    def advance(self) -> None:
        batch = self.ahead or self.read()
        key = jax.random.fold_in(self.key, self.done)
        self.params, self.rest, self.opt_state, report = self.step.update(
            self.params, self.rest, self.opt_state, batch, key
        )
        self.pending.append(report)
        self.done += 1
        self.position = self.stream.get_state()
        self.counts += self.stream.take_statistics()
        # the next batch is read and sent while the device computes
        self.ahead = self.read() if self.done < self.config.steps else None
        if self.model.mesh is not None and jax.default_backend() == "cpu":
            # collectives of two steps in flight starve each other of a small machine's threads
            jax.block_until_ready(report)

    def read(self) -> Batch:
        return join_rows(next(self.stream), self.model.mesh)

    def flush(self, since: float) -> dict:
        """Log the mean of the steps since a time; the only wait for the device."""
        reports = jax.device_get(self.pending)
        seconds = time.perf_counter() - since
        row = {key: float(np.mean([r[key] for r in reports])) for key in reports[0]}
        self.pending = []
        step_tokens = self.config.batch_size * (
            self.config.input_length + self.config.target_length
        )
        if not np.isfinite(row["loss"]):
            raise NonFiniteLoss(
                f"loss is {row['loss']} at step {self.done} (learning rate "
                f"{self.rate():.3g}): lower learning_rate, set clip_norm=1.0 or raise warmup_steps"
                + ("; the last checkpoint is kept" if self.checkpoints else "")
            )
        row |= {
            "step": self.done,
            "learning_rate": self.rate(),
            "tokens": self.done * step_tokens,
            "tokens_per_second": len(reports) * step_tokens / seconds,
            **self.what_was_read(),
        }
        self.metrics.add(row)
        return row

    def what_was_read(self) -> dict:
        """On all hosts since the last call: totals, and tokens of each cluster."""
        parts = gathered([self.counts.rows, self.counts.table.tolist()])
        copies = jax.process_count() // self.shape["shard"][1]  # processes that read the same
        counts = replace(
            self.counts,
            rows=sum(rows for rows, _ in parts) // copies,
            table=np.sum([table for _, table in parts], 0) // copies,
        )
        self.data, self.counts = self.data + counts, self.stream.take_statistics()
        clusters = counts.to_dict()["clusters"].items()
        tokens = {name: c["input_tokens"] + c["target_tokens"] for name, c in clusters}
        return counts.row() | {"cluster_tokens": tokens}

    def rate(self) -> float:
        return float(self.schedule(max(0, self.done - 1)))

    def sync(self) -> None:
        """Put the current parameters into the caller's model (copies: the step donates its own)."""
        nnx.update(self.model, *jax.tree.map(jnp.copy, (self.params, self.rest)))

    def validate(self, eval_source, callbacks: Sequence[Callback]) -> dict:
        self.sync()
        row = {}
        if eval_source is not None:
            stream = batches(
                eval_source, self.tokenizer, seed=0, split="valid", repeat=False, **self.shape
            )
            some = [batch for batch, _ in zip(stream, range(EVAL_BATCHES), strict=False)]
            stream.close()
            longest = max(gathered(len(some)))  # processes may run out of rows at different times
            blank = jax.tree.map(np.zeros_like, some[0]) if len(some) < longest else None
            row |= evaluate_loss(self.model, some + [blank] * (longest - len(some)))
        for callback in callbacks:
            row |= callback(self.done, self.model)
        if row:
            self.metrics.add({"step": self.done, **row})
        return row

    def facts(self) -> dict:
        """What a checkpoint must agree on to be resumed."""
        config = asdict(self.config)
        for name in _MAY_CHANGE:
            config.pop(name)
        if self.config.schedule in ("cosine", "linear"):
            config["steps"] = self.config.steps
        return to_json(
            {
                "model": self.model.cfg.to_dict(),
                "train": config,
                "source": self.source.digest(),
                "tokenizer": self.tokenizer.digest(),
            }
        )

    def _optimizer_leaves(self) -> dict:
        return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(self.opt_state))}

    def _arrays(self) -> dict:
        """What a checkpoint holds."""
        model = nnx.to_pure_dict(nnx.merge_state(self.params, self.rest))
        return {"model": model, "optimizer": self._optimizer_leaves()}

    def open(self, resume: bool) -> None:
        """Prepare the folder; take up its newest checkpoint if there is one."""
        self.checkpoints = Checkpoints(self.workdir / "checkpoints", keep=self.config.keep)
        step, config = self.checkpoints.latest(), self.config
        saves = -(-config.steps // config.save_every) if config.save_every else 1
        if (step or 0) < config.steps:
            # a new one is written before the oldest goes
            copies = min(saves, config.keep + 1) - len(self.checkpoints.steps())
            self.checkpoints.require_room(copies, **self._arrays())
        if step is None:
            self.metrics.keep_until(-1)
            return
        if not resume:
            raise ValueError(
                f"{self.workdir} already holds a run at step {step}: choose another workdir, "
                "delete it, or resume it"
            )
        meta, facts = self.checkpoints.meta(step), self.facts()
        # its tokenizer is a path; what lies there is compared by its digest
        meta["model"]["tokenizer"] = facts["model"]["tokenizer"]
        for name in facts:
            if meta[name] != facts[name]:
                what = (
                    differing(meta[name], facts[name])
                    if isinstance(facts[name], dict)
                    else f"{meta[name]} there, {facts[name]} here"
                )
                raise ValueError(
                    f"{self.workdir} holds a run of another {name} configuration ({what}): choose "
                    "another workdir or the same configuration"
                )
        restore_model(self.checkpoints, step, self.model)
        _, params, rest = nnx.split(self.model, nnx.Param, ...)
        self.params, self.rest = jax.tree.map(jnp.copy, (params, rest))
        restored = self.checkpoints.restore(step, optimizer=self._optimizer_leaves())
        leaves = [restored["optimizer"][str(i)] for i in range(len(restored["optimizer"]))]
        self.opt_state = jax.tree.unflatten(jax.tree.structure(self.opt_state), leaves)
        self.stream.set_state(meta["stream"])
        self.position, self.done = self.stream.get_state(), step
        if self.metrics.path and self.metrics.path.exists():
            self.metrics = Metrics.load(self.metrics.path)
        self.metrics.keep_until(step)

    def save(self) -> None:
        if self.checkpoints is not None and self.checkpoints.latest() != self.done:
            parts = gathered(self.position)
            meta = self.facts() | {"stream": {k: v for part in parts for k, v in part.items()}}
            self.checkpoints.save(self.done, meta, **self._arrays())

    def close(self) -> None:
        self.stream.close()
        if self.checkpoints is not None:
            self.checkpoints.close()


def _check(model: EncoderDecoder, config: TrainConfig, tokenizer: Tokenizer) -> None:
    cfg = model.cfg
    if config.input_length > cfg.max_length:
        raise ValueError(
            f"input_length {config.input_length} exceeds {cfg.name}'s max_length {cfg.max_length}: "
            "shorten it or use cfg.replace(max_length=...)"
        )
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, {cfg.name} only {cfg.vocab_size}: use "
            f"cfg.replace(vocab_size={tokenizer.vocab_size})"
        )
    shards = batch_shards(model.mesh)
    if config.batch_size % shards:
        unit = math.lcm(8, shards)  # a batch rounds its rows down to a multiple of 8
        rows = -(-config.batch_size // unit) * unit
        raise ValueError(
            f"a batch of {config.batch_size} rows cannot be split over {shards} devices: use "
            f"batch_tokens={rows * (config.input_length + config.target_length)}"
        )
    if config.freeze and not cfg.num_experts:
        raise ValueError(f"{cfg.name} is dense: there is no {' or '.join(config.freeze)} to freeze")
    if jax.process_count() > 1 and (model.mesh is None or model.mesh.size != jax.device_count()):
        raise ValueError(
            f"{jax.process_count()} processes train together: build the model on a mesh of all "
            f"{jax.device_count()} devices (make_mesh)"
        )


def _check_alike(facts: dict) -> None:
    first, *others = gathered(facts)
    for number, other in enumerate(others, 1):
        if names := [name for name in first if first[name] != other[name]]:
            raise ValueError(
                f"process {number} has another {' and '.join(names)} than process 0: give all the "
                "same code, data and options"
            )


def train(
    model: EncoderDecoder,
    source: Any,
    config: TrainConfig = TrainConfig(),  # noqa: B008  frozen
    *,
    workdir: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    eval_source: Any = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = True,
) -> Run:
    """Train a model in place on a `Mixture` or `Corpus` and return the run.

    Args:
      workdir: keeps metrics.jsonl and checkpoints; a second call with the same arguments resumes
        from the newest and equals a run that was never interrupted.
      tokenizer: default the one that the model's configuration names.
      eval_source: its "valid" split gives valid_loss every eval_every steps and at the end.
      callbacks: (step, model) -> {name: value}, called and logged at the same times.

    Raises:
      ValueError: lengths, vocabulary, batch or workdir do not fit the model; the loss diverges.
      OSError: workdir cannot be written.
    """
    tokenizer = tokenizer or load_tokenizer(model.cfg.tokenizer)
    _check(model, config, tokenizer)
    trainer = _Trainer(model, source, config, tokenizer, workdir)
    if jax.process_count() > 1:
        _check_alike(trainer.facts())
    if workdir:
        trainer.open(resume)
    bar = {"desc": f"train {model.cfg.name}", "unit": "step", "total": config.steps}
    quiet = {} if is_first() else {"disable": True}
    with _Stop() as stop, tqdm(initial=trainer.done, **bar, **quiet) as bar:
        try:
            _loop(trainer, bar, stop, eval_source, callbacks)
        finally:
            trainer.sync()
            trainer.close()
    return Run(model, trainer.metrics, config, trainer.workdir, trainer.data)


def _loop(trainer: _Trainer, bar, stop, eval_source, callbacks) -> None:
    config, since = trainer.config, time.perf_counter()
    while trainer.done < config.steps:
        trainer.advance()
        done, last = trainer.done, trainer.done == config.steps
        stopping = stop.agreed()
        bar.update()
        if done % config.log_every == 0 or last or stopping:
            row = trainer.flush(since)
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s")
            since = time.perf_counter()
        paused = time.perf_counter()
        if last or (config.eval_every and done % config.eval_every == 0):
            trainer.validate(eval_source, callbacks)
        if last or stopping or (config.save_every and done % config.save_every == 0):
            trainer.save()
        since += time.perf_counter() - paused  # the rate is of training alone
        if stopping:
            kept = f"saved at step {done}" if trainer.checkpoints else "no workdir, nothing saved"
            raise KeyboardInterrupt(kept)


class _Stop:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the current step.

    On several hosts a SIGTERM to one of them stops all after the same step: jax listens for it.
    """

    asked = False

    def __enter__(self):
        self._former = {}
        if jax.process_count() > 1:
            return self
        try:
            for sig in (signal.SIGINT, signal.SIGTERM):
                self._former[sig] = signal.signal(sig, self._ask)
        except ValueError:
            pass  # not the main thread: signals are somebody else's
        return self

    def agreed(self) -> bool:
        """Whether to stop now; to be asked after every step."""
        if jax.process_count() > 1:
            # calls since the start of the process, for a notice may come before the first step
            return multihost_utils.reached_preemption_sync_point(next(_CALLS))
        return self.asked

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(number, self._former[number])  # a second one acts at once

    def __exit__(self, *_):
        for sig, handler in self._former.items():
            signal.signal(sig, handler)
