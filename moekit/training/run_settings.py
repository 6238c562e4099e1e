"""What must fit before a run starts or continues: settings, model, data, former checkpoints."""

import logging
import math
from pathlib import Path
from typing import Any

import jax

from moekit.config import TrainConfig
from moekit.data.tokenizer import Tokenizer
from moekit.distributed import allgather_objects
from moekit.model.transformer import EncoderDecoder
from moekit.sharding import batch_shards
from moekit.train_config import ALL_BUT_ROUTER, train_settings
from moekit.training.checkpoint import OtherRun, describe_differences

FORMAT = 2  # of a run's checkpoints; 1 had other optimizer states
LEARNING_RATE_SETTINGS = ("learning_rate", "schedule", "warmup_steps", "clip_norm")
LOOP_SETTINGS = (
    "steps",
    "log_every",
    "eval_every",
    "save_every",
    "keep",
    "keep_every",
    "keep_best",
    "on_save_error",
    "remat",
    "data_workers",
    "on_nonfinite",
    "on_spike",
    "on_collapse",
    "stall_seconds",
)
SAME_OR_OTHER = "choose another workdir or the same configuration"
REMEDIES = {
    "model": SAME_OR_OTHER,
    "train": SAME_OR_OTHER,
    "source": "examples, templates, rates or order of the training data changed; use the data that "
    "the run started with, or load its model with mk.load and train it in another workdir",
    "tokenizer": "use the tokenizer that the run started with, or another workdir",
}
logger = logging.getLogger(__name__)


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


def check_recovery(config: TrainConfig, workdir: Path | None) -> None:
    """Raise ValueError if a rollback is configured without checkpoints to return to."""
    for name in ("on_nonfinite", "on_spike", "on_collapse"):
        if getattr(config, name) == "rollback" and (workdir is None or not config.save_every):
            raise ValueError(
                f'{name}="rollback" returns to a checkpoint: give a workdir and a save_every'
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


def program_settings(config: TrainConfig) -> TrainConfig:
    """The configuration without what does not change the compiled step: runs share programs."""
    unused = TrainConfig()
    config = config.replace(
        seed=0,
        log_every=1,
        eval_every=0,
        save_every=0,
        keep=1,
        keep_every=0,
        keep_best=None,
        on_save_error=unused.on_save_error,
        data_workers=0,
        on_nonfinite="skip" if config.on_nonfinite == "skip" else "stop",
        on_spike=unused.on_spike,
        on_collapse=unused.on_collapse,
        stall_seconds=unused.stall_seconds,
    )
    if config.schedule in ("constant", "rsqrt"):
        config = config.replace(steps=1)  # these do not depend on the length of a run
    return config


def check_same_run(workdir: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise OtherRun (a ValueError) if a checkpoint belongs to a run with other settings."""
    if saved.get("format", 1) != FORMAT:
        raise OtherRun(
            f"{workdir} holds a run of an earlier moekit, whose optimizer state has another layout "
            "(attention kernels and experts were factored otherwise): finish it with that version, "
            "or load its model with mk.load and train it in a new workdir"
        )
    # the tokenizer's path may differ; its digest is compared
    saved_model = saved["model"] | {"tokenizer": wanted["model"]["tokenizer"]}
    check_known(workdir, saved)
    differences = {
        "model": describe_differences(saved_model, wanted["model"]),
        "train": describe_differences(fixed_settings(saved), fixed_settings(wanted)),
        "source": describe_digests(saved["source"], wanted["source"]),
        "tokenizer": describe_digests(saved["tokenizer"], wanted["tokenizer"]),
    }
    for name, difference in differences.items():
        if difference:
            raise OtherRun(
                f"{workdir} holds a run of another {name} configuration ({difference}): "
                f"{REMEDIES[name]}"
            )
    changed = describe_differences(rate_settings(saved), rate_settings(wanted))
    if changed:
        logger.warning("%s is resumed with other settings (%s)", workdir, changed)


def check_known(workdir: Path, saved: dict[str, Any]) -> None:
    """Raise ValueError if a run has training settings that this version does not know."""
    known = TrainConfig().to_dict()
    unknown = sorted(saved["train"].keys() - known.keys())
    if unknown:
        raise ValueError(
            f"{workdir} holds a run of a later moekit, with the settings {', '.join(unknown)}: "
            "upgrade moekit, or choose another workdir"
        )


def describe_digests(saved: str, wanted: str) -> str:
    return describe_differences({"digest": saved}, {"digest": wanted})


def fixed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The training settings that a resumed run may not change."""
    may_change = LOOP_SETTINGS + LEARNING_RATE_SETTINGS
    of_run = train_settings(settings)
    return {name: value for name, value in of_run.items() if name not in may_change}


def rate_settings(settings: dict[str, Any]) -> dict[str, Any]:
    of_run = train_settings(settings)
    return {name: of_run[name] for name in LEARNING_RATE_SETTINGS}
