"""Several seeds of one configuration, trained side by side in one compiled program.

A model of nano size leaves an accelerator mostly idle: one program that steps several of them has
larger products. Two CPU cores are busy with one model; there seeds side by side take as long as
one after the other, or longer. There are no checkpoints: a study records its finished models, and
runs an interrupted cell again. S is the number of seeds, the first axis of all arrays.
"""

import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moekit.config import ModelConfig, TrainConfig
from moekit.data.batch import Batch
from moekit.data.own_mixture import as_source
from moekit.data.packed_rows import PackedRows
from moekit.data.tokenizer import Tokenizer, load_tokenizer
from moekit.model.transformer import EncoderDecoder
from moekit.progress import ProgressBar
from moekit.training.optim import make_optimizer
from moekit.training.run_data import VALIDATION_BATCHES, RunData
from moekit.training.run_settings import check_settings, program_settings
from moekit.training.state import TrainState, split_model
from moekit.training.step import make_init, make_update
from moekit.training.validation import evaluate_loss


class SeedRun(NamedTuple):
    """One seed of a finished training.

    Args:
      model: the trained model.
      rows: its log, as in `Run.metrics.rows`: rows of training losses (means since the last row),
        and rows with `valid_loss`.
    """

    model: EncoderDecoder
    rows: list[dict[str, Any]]


def train_seeds(
    models: Sequence[EncoderDecoder],
    source: Any,
    config: TrainConfig,
    seeds: Sequence[int],
    *,
    tokenizer: Tokenizer | None = None,
    eval_source: Any = None,
) -> list[SeedRun]:
    """Train models of one configuration, each on the data order and random numbers of its seed.

    Every model ends with the parameters that `train` would give it with `config.replace(seed=..)`,
    apart from rounding.

    Args:
      models: of one configuration, without a mesh; they are updated in place.
      source: what `train` accepts, or `PackedRows`; `eval_source` too.
      config: of all runs; its own seed is not used. log_every and eval_every say when rows are
        logged; what it says of checkpoints and faults is not used.
      seeds: one for each model.

    Raises:
      ValueError: models and seeds do not belong together, a model has a mesh or another
        configuration, or a loss is not finite (the message names the seed).
    """
    check_models(models, seeds)
    tokenizer = tokenizer or load_tokenizer(models[0].cfg.tokenizer)
    check_settings(models[0], config, tokenizer)
    data = [open_data(source, eval_source, config, seed, tokenizer) for seed in seeds]
    validation = data[0].validation  # the same for all seeds

    start, update = compiled_programs(models[0].cfg, program_settings(config))
    params = stack([split_model(model)[1] for model in models])
    rest = stack([split_model(model)[2] for model in models])
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    step, optimizer_state, key_data = start(params, keys)
    state = TrainState(step, params, rest, optimizer_state, key_data)

    logs: list[list[dict[str, Any]]] = [[] for _ in seeds]
    pending: list[dict[str, Any]] = []
    progress = ProgressBar(
        desc=f"train {len(seeds)} x {models[0].cfg.name}", unit="step", total=config.steps
    )
    for number in range(1, config.steps + 1):
        batch = stack_on_host([next(of_seed.stream) for of_seed in data])
        with progress.compiling(update):
            state, report = update(state, batch)
        report.pop("health")
        pending.append(report)
        progress.update()
        is_last = number == config.steps
        if is_last or number % config.log_every == 0:
            log_losses(logs, pending, number, seeds)
            pending = []
        if validation and (is_last or (config.eval_every and number % config.eval_every == 0)):
            put_back(models, state)
            for log, model in zip(logs, models, strict=True):
                log.append({"step": number} | evaluate_loss(model, validation))
    progress.close()
    for of_seed in data:
        of_seed.stream.close()
    put_back(models, state)
    return [SeedRun(model, rows) for model, rows in zip(models, logs, strict=True)]


@functools.lru_cache(maxsize=32)
def compiled_programs(
    cfg: ModelConfig, config: TrainConfig
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The start of an optimizer and the update of a state, for seeds along the first axis.

    They are kept, so that the next seeds of a configuration are not traced and compiled again.
    """
    graphdef, params, _ = split_model(nnx.eval_shape(lambda: EncoderDecoder(cfg)))
    optimizer = make_optimizer(config, params)
    start = jax.jit(jax.vmap(make_init(optimizer)))
    update = jax.jit(jax.vmap(make_update(graphdef, optimizer, config)), donate_argnums=0)
    return start, update


def check_models(models: Sequence[EncoderDecoder], seeds: Sequence[int]) -> None:
    """Raise ValueError unless the models can be trained in one program, one for each seed."""
    if not models or len(models) != len(seeds):
        raise ValueError(f"{len(models)} models for {len(seeds)} seeds: give one model a seed")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {list(seeds)}: give each seed once")
    for model in models:
        if model.mesh is not None:
            raise ValueError("seeds are trained side by side on one device: leave out the mesh")
        if model.cfg != models[0].cfg:
            raise ValueError(
                f"{model.cfg.name} has another configuration than {models[0].cfg.name}: train the "
                "seeds of one configuration together"
            )


class SeedData(NamedTuple):
    """What one seed reads."""

    stream: Generator[Batch, None, None]
    validation: Sequence[Batch]


def open_data(
    source: Any, eval_source: Any, config: TrainConfig, seed: int, tokenizer: Tokenizer
) -> SeedData:
    """The batches of a seed, in the order in which `train` reads them, and those of validation.

    Packed rows come in an order of the seed, too.

    Raises:
      ValueError: packed rows of other lengths than the configuration's, or fewer than a batch.
    """
    if isinstance(source, PackedRows):
        lengths = source.inputs.shape[1], source.targets.shape[1]
        if lengths != (config.input_length, config.target_length):
            raise ValueError(
                f"rows were packed for lengths {lengths}, but the configuration says "
                f"{(config.input_length, config.target_length)}: pack them again"
            )
        validation = []
        if eval_source is not None:
            validation = eval_source.in_order(config.batch_size, VALIDATION_BATCHES)
        return SeedData(source.batches(config.batch_size, seed), validation)
    if eval_source is not None:
        eval_source = as_source(eval_source)
    config = config.replace(seed=seed)
    run_data = RunData(as_source(source), eval_source, config, tokenizer, None, ignore_wait)
    return SeedData(read(run_data), run_data.validation)


def read(run_data: RunData) -> Generator[Batch, None, None]:
    """The training batches, and the end of their readers when it is closed."""
    try:
        while True:
            yield next(run_data.stream)
    finally:
        run_data.stream.close()


def ignore_wait(seconds: float) -> None:
    """Called while a batch is waited for."""


def stack_on_host(batches: Sequence[Batch]) -> Batch:
    """One batch of arrays with a first axis of length S: one transfer to the device."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def stack(trees: Sequence[Any]) -> Any:
    """One tree of arrays with a first axis of length S."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def put_back(models: Sequence[EncoderDecoder], state: TrainState) -> None:
    """Update every model with its slice of the parameters."""
    for index, model in enumerate(models):
        own = jax.tree.map(lambda leaf, index=index: leaf[index], (state.params, state.rest))
        nnx.update(model, *own)


def log_losses(
    logs: Sequence[list[dict[str, Any]]],
    pending: Sequence[dict[str, Any]],
    step: int,
    seeds: Sequence[int],
) -> None:
    """Add a row of means over the steps since the last row to the log of each seed."""
    reports = jax.device_get(list(pending))
    for index, (log, seed) in enumerate(zip(logs, seeds, strict=True)):
        row: dict[str, Any] = {"step": step}
        for name in reports[0]:
            row[name] = float(np.mean([report[name][index] for report in reports]))
        if not math.isfinite(row["loss"]):
            raise ValueError(
                f"the loss of seed {seed} is {row['loss']} before step {step}: lower learning_rate "
                "or set clip_norm=1.0"
            )
        log.append(row)
