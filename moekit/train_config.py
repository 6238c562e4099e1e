"""The configuration of a training stage, which needs no jax: `moekit train --help` is immediate."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moekit.checks import (
    bad_field,
    check_choice,
    check_integers,
    check_not_negative,
    check_positive,
    check_rate,
)
from moekit.errors import unknown
from moekit.table import fields_table

ALL_BUT_ROUTER = "all_but_router"
FREEZABLE = ("router", "experts", "moe", ALL_BUT_ROUTER)
OPTIMIZERS = ("adafactor", "adamw")
REMATS = ("none", "dots", "full")
ON_NONFINITE = ("stop", "skip", "rollback")
ON_FAULT = ("report", "stop", "rollback")
ON_SAVE_ERROR = ("stop", "continue")
SCHEDULES = ("constant", "rsqrt", "cosine", "linear")
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class TrainConfig:
    """One training stage.

    A batch holds batch_tokens // (input_length + target_length) rows, from 8 on rounded down to a
    multiple of 8 so that the usual meshes divide it.

    Args:
      steps: Number of training steps.
      batch_tokens: Tokens of a batch, inputs and targets together.
      input_length: Tokens of an encoder row.
      target_length: Tokens of a decoder row.
      optimizer: adafactor or adamw.
      learning_rate: Peak rate; Adafactor multiplies it by each parameter's scale (T5).
      schedule: constant, rsqrt (1 / sqrt(max(step, warmup_steps)), scaled to the peak), cosine or
        linear.
      warmup_steps: Steps in which the rate rises linearly to its peak.
      weight_decay: Decay of the weights per step, times the learning rate.
      clip_norm: Maximum norm of the gradient; by default gradients are not clipped.
      z_loss: Coefficient of log(Z)^2 of the output logits.
      label_smoothing: Share of the target probability that is spread over the vocabulary.
      freeze: Parts that keep their parameters: router, experts, moe (both) or all_but_router, which
        trains the routers alone.
      remat: What the backward pass recomputes: none, dots (all but products with weights) or full
        (every layer from its input).
      seed: Seed of the parameters, the data order and dropout.
      log_every: Steps between rows of the log.
      eval_every: Steps between evaluations; 0 evaluates only at the end.
      save_every: Steps between checkpoints; 0 saves only at the end.
      keep: Number of newest checkpoints to keep.
      keep_every: Checkpoints of multiples of this step are kept for good; 0 for none.
      keep_best: Metric of the log by which the best checkpoint is kept as well, such as valid_loss:
        the lowest of a loss, the highest of another metric.
      on_save_error: What to do if a checkpoint cannot be written, for example on a full disk: stop
        or continue. The last checkpoint of a run must be written.
      data_workers: Processes of a host that read ahead; 0 uses a thread.
      on_nonfinite: What happens when the loss or the gradient norm of a step is NaN or infinite:
        stop, skip (its update is left out) or rollback (to the newest checkpoint, then with the
        data in another order).
      on_spike: What happens when the loss is far above the last steps': report, stop or rollback.
      on_collapse: What happens when a router sends nearly all tokens to one expert, or most tokens
        are dropped: report, stop or rollback.
      stall_seconds: Seconds without a batch after which a run is saved and stopped.

    Raises:
      ValueError: a value out of range, naming the field.
    """

    steps: int = 1000
    batch_tokens: int = 16_384
    input_length: int = 512
    target_length: int = 128
    optimizer: str = "adafactor"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    freeze: tuple[str, ...] = ()
    remat: str = "none"
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    keep_every: int = 0
    keep_best: str | None = None
    on_save_error: str = "stop"
    data_workers: int = 0
    on_nonfinite: str = "stop"
    on_spike: str = "report"
    on_collapse: str = "report"
    stall_seconds: float = 600.0

    def __post_init__(self) -> None:
        owner = "TrainConfig"
        at_least_one = (
            "steps",
            "batch_tokens",
            "input_length",
            "target_length",
            "log_every",
            "keep",
        )
        check_integers(self, owner, minimum=1, fields=at_least_one)
        at_least_zero = ("warmup_steps", "eval_every", "save_every", "keep_every", "data_workers")
        check_integers(self, owner, minimum=0, fields=at_least_zero)
        if not 0 <= self.seed <= MAX_SEED:
            raise bad_field(self, owner, "seed", f"use 0 to {MAX_SEED} (32 bits)")
        check_positive(self, owner, "learning_rate")
        if self.clip_norm is not None:
            check_positive(self, owner, "clip_norm")
        check_not_negative(self, owner, "weight_decay")
        check_not_negative(self, owner, "z_loss")
        check_rate(self, owner, "label_smoothing")
        check_choice(self, "optimizer", OPTIMIZERS)
        check_choice(self, "schedule", SCHEDULES)
        check_choice(self, "remat", REMATS)
        check_choice(self, "on_nonfinite", ON_NONFINITE)
        check_choice(self, "on_spike", ON_FAULT)
        check_choice(self, "on_collapse", ON_FAULT)
        check_positive(self, owner, "stall_seconds")
        check_choice(self, "on_save_error", ON_SAVE_ERROR)
        for part in self.freeze:
            if part not in FREEZABLE:
                raise unknown("part to freeze", part, FREEZABLE)
        if ALL_BUT_ROUTER in self.freeze and {"router", "moe"}.intersection(self.freeze):
            raise ValueError(
                f"freeze is {self.freeze}, which leaves nothing to train: give all_but_router alone"
            )
        if self.batch_tokens < self.input_length + self.target_length:
            raise ValueError(
                f"batch_tokens is {self.batch_tokens}, less than one row of {self.input_length} + "
                f"{self.target_length}; raise it or shorten the lengths"
            )

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        rows = self.batch_tokens // (self.input_length + self.target_length)
        return rows - rows % 8 if rows >= 8 else rows

    def _repr_html_(self) -> str:
        return fields_table(self)._repr_html_()

    def replace(self, **changes: Any) -> "TrainConfig":
        """A copy with changes; ValueError (with near misses) for a field that does not exist."""
        known = {field.name for field in dataclasses.fields(self)}
        for field in changes:
            if field not in known:
                raise unknown("field of TrainConfig", field, known)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = dataclasses.asdict(self)
        values["freeze"] = list(self.freeze)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of `to_dict`."""
        values = dict(values)
        values["freeze"] = tuple(values.get("freeze", ()))
        return cls().replace(**values)


def train_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The training settings of a run; those that its version did not have are at their default.

    Args:
      settings: of the run, as its config.json and its checkpoints hold them.
    """
    return TrainConfig().to_dict() | settings["train"]
