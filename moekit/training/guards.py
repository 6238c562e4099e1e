"""Guards of a training run: settings that fit, losses that are finite, signals that stop it."""

import itertools
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool

from moekit.config import TrainConfig
from moekit.data.tokenizer import Tokenizer
from moekit.distributed import allgather_objects
from moekit.model.transformer import EncoderDecoder
from moekit.sharding import batch_shards
from moekit.train_config import ALL_BUT_ROUTER

_SYNC_POINTS = itertools.count(1)  # of this process, over all its runs


class NonFiniteLoss(ValueError):
    """The loss or the parameters became NaN or infinite."""


def check_settings(model: EncoderDecoder, config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raise ValueError for training settings that do not fit the model or its mesh."""
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
    if config.freeze and not cfg.num_experts:
        if ALL_BUT_ROUTER in config.freeze:
            raise ValueError(f"{cfg.name} is dense: there is no router to train")
        raise ValueError(f"{cfg.name} is dense: there is no {' or '.join(config.freeze)} to freeze")
    check_batch(config, batch_shards(model.mesh))
    num_devices = jax.device_count()
    if jax.process_count() > 1 and (model.mesh is None or model.mesh.size != num_devices):
        raise ValueError(
            f"{jax.process_count()} processes train together: build the model on a mesh of all "
            f"{num_devices} devices (make_mesh)"
        )


def check_batch(config: TrainConfig, num_shards: int) -> None:
    """Raise ValueError, with a size that fits, if a batch's rows cannot be sharded."""
    if config.batch_size % num_shards == 0:
        return
    multiple = math.lcm(8, num_shards)  # a batch rounds its rows down to a multiple of 8
    rows = math.ceil(config.batch_size / multiple) * multiple
    tokens = rows * (config.input_length + config.target_length)
    raise ValueError(
        f"a batch of {config.batch_size} rows cannot be split over {num_shards} devices: use "
        f"batch_tokens={tokens}"
    )


def check_processes_agree(settings: dict[str, Any]) -> None:
    """Raise ValueError if a process was started with other settings than process 0."""
    first, *others = allgather_objects(settings)
    for number, other in enumerate(others, 1):
        names = [name for name in first if first[name] != other[name]]
        if names:
            raise ValueError(
                f"process {number} has another {' and '.join(names)} than process 0: give all the "
                "same code, data and options"
            )


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no floating-point array of a tree holds a NaN or an infinity."""
    finite = jnp.array(True)
    for array in jax.tree.leaves(tree):
        if jnp.issubdtype(array.dtype, jnp.floating):
            finite &= jnp.isfinite(array).all()
    return finite


def describe_kept(folder: Path | None, steps: Sequence[int]) -> str:
    """What is left of a run that diverged, and how to continue from it."""
    if folder is None:
        return "nothing was saved, for there is no workdir"
    if not steps:
        return "no checkpoint was written yet, the same workdir can be used again"
    newest = steps[-1]
    how_to_go_back = f"delete {folder} to start again"
    if len(steps) > 1:
        how_to_go_back = f"delete {folder / str(newest)} to resume from step {steps[-2]}"
    return (
        f"the checkpoint of step {newest} is kept and the same workdir resumes from it with the "
        f"new settings; should it diverge again, {how_to_go_back}"
    )


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the current step.

    On several hosts, where jax listens for SIGTERM, one to any of them stops all of them after the
    same step.
    """

    def __init__(self) -> None:
        self._received = False
        self._former_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if jax.process_count() > 1:
            return self
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former_handlers[number] = signal.signal(number, self._receive)
        except ValueError:
            pass  # only the main thread may set handlers
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)

    def should_stop(self) -> bool:
        """Whether to stop now; every process must call it after every step."""
        if jax.process_count() > 1:
            # numbered since the process started: a notice may arrive before the first step
            return multihost_utils.reached_preemption_sync_point(next(_SYNC_POINTS))
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        signal.signal(number, self._former_handlers[number])  # a second signal acts at once
