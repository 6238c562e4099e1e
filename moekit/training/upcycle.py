"""Sparse upcycling of models, of checkpoints, and of training runs with their optimizer state."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from moekit.config import ModelConfig, TrainConfig
from moekit.model.transformer import EncoderDecoder
from moekit.model.upcycle import Names, check_upcycle, origin, upcycle_array, upcycle_model
from moekit.sharding import is_variable
from moekit.training.checkpoint import Checkpoints, to_json
from moekit.training.layout import CHECKPOINTS
from moekit.training.model_files import load
from moekit.training.optim import path_names
from moekit.training.run_settings import FORMAT, program_settings
from moekit.training.state import (
    TrainState,
    abstract_model,
    checkpoint_items,
    split_model,
    state_from_items,
)
from moekit.training.step import compiled_step


def upcycle(
    source: EncoderDecoder | str | Path,
    cfg: ModelConfig,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    workdir: str | Path | None = None,
) -> EncoderDecoder:
    """An MoE model from a dense one (Sparse Upcycling, Komatsuzaki 2022).

    Every expert E_i is a copy of the dense FFN of its layer, routers are new, everything else is
    copied. A sparse layer then computes y = sum_i w_i E_i(x) = (sum_i w_i) FFN(x), with the combine
    weights w_i of the experts that process x. So the outputs are at first the dense model's if the
    weights of a token add up to 1, and no token is dropped:

    - `TopK(k, normalise=True)`, `GShard()`, `Hash()` and `Random()` have such weights. (`GShard`
      leaves second experts out in training, at random: not there.) `TopK(k=1, normalise=True)` has
      them as well, but its router gets a gradient from the balance loss alone.
    - `Switch()`, `TopK(k)`, `LossFree()` and `ExpertChoice()` weight by raw probabilities. Those of
      a new router are about 1 / num_experts, so a sparse layer's output is at first smaller by
      about k / num_experts, and the model has to learn its scale again.
    - `dispatch="dropless"` drops nothing. With capacity, a new router's load is uneven, and a token
      without an expert gets y = 0 (as padding does).

    Args:
      source: a dense model, or what `mk.load` reads. Arrays that stay as they are, are shared with
        a model that is given.
      cfg: the dense model's configuration with another `num_experts`, `encoder_moe_layers`,
        `decoder_moe_layers`, router and the like: model.cfg.replace(..). `expert_d_ff` must be
        `d_ff`, and `extra_d_ff` None: a dense model has no second FFN. Without a `tokenizer` it has
        the dense model's.
      seed: of the routers.
      mesh: parameters are sharded over it; default the dense model's mesh.
      workdir: writes a run there that continues the run in the folder `source`:
        mk.train(model, .., workdir=workdir) with the data and the settings of that run resumes at
        its step. Every expert has the optimizer statistics of its dense FFN, routers start without.

    Raises:
      ValueError: the model is not dense, `cfg` changes more than its FFNs (naming the fields), or
        `workdir` is given and `source` is not a run or `workdir` holds one already.
      FileNotFoundError: there is no checkpoint in `source`.
      OSError: `workdir` cannot be written.
    """
    if workdir is not None:
        return _upcycle_run(source, cfg, Path(workdir), seed=seed, mesh=mesh)
    dense = source if isinstance(source, EncoderDecoder) else load(source, mesh=mesh)
    return upcycle_model(dense, cfg, seed=seed, mesh=mesh)


def _upcycle_run(
    source: Any,
    cfg: ModelConfig,
    workdir: Path,
    *,
    seed: int,
    mesh: Mesh | None,
) -> EncoderDecoder:
    """Write a run that continues the dense run in a folder, and return its model."""
    folder = _run_checkpoints(source, workdir)
    checkpoints = Checkpoints(folder)
    if not checkpoints.candidates():
        raise FileNotFoundError(f"{source} has no checkpoint to upcycle")

    def read(step: int) -> tuple[int, dict[str, Any], EncoderDecoder, TrainState]:
        metadata = checkpoints.metadata(step)
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{source} is a run of an earlier moekit, whose optimizer state has another "
                "layout: leave workdir out to upcycle its model alone"
            )
        dense_cfg = ModelConfig.from_dict(metadata["model"])
        check_upcycle(dense_cfg, cfg)
        abstract = abstract_model(lambda: EncoderDecoder(dense_cfg, mesh=mesh), mesh)
        train_config = TrainConfig.from_dict(metadata["train"])
        return step, metadata, abstract, _restore(checkpoints, step, abstract, train_config)

    step, metadata, abstract, dense_state = checkpoints.read_newest(read)
    config = TrainConfig.from_dict(metadata["train"])
    graphdef, _, _ = split_model(abstract)
    dense = nnx.merge(graphdef, dense_state.params, dense_state.rest)
    model = upcycle_model(dense, cfg, seed=seed, mesh=mesh)
    state = _upcycle_state(dense_state, model, config)
    metadata["model"] = to_json(model.cfg.to_dict())
    _write_run(workdir, step, metadata, state)
    return model


def _run_checkpoints(source: Any, workdir: Path) -> Path:
    """The checkpoints of the run to upcycle; checks that it is one and that `workdir` is free."""
    if isinstance(source, EncoderDecoder) or not (Path(source) / CHECKPOINTS).is_dir():
        given = source.cfg.name if isinstance(source, EncoderDecoder) else source
        raise ValueError(
            f"{given} has no optimizer state: with workdir= give the folder of a training run, or "
            "leave workdir out and use mk.save"
        )
    if (workdir / CHECKPOINTS).is_dir():
        raise ValueError(f"{workdir} already holds a run: choose another workdir or delete it")
    return Path(source) / CHECKPOINTS


def _restore(
    checkpoints: Checkpoints,
    step: int,
    model: EncoderDecoder,
    config: TrainConfig,
) -> TrainState:
    """The training state of a checkpoint; `model` has shapes and shardings alone."""
    abstract = compiled_step(model, program_settings(config)).state
    items = checkpoints.restore(step, checkpoint_items(abstract))
    return state_from_items(abstract, items, {})


def _write_run(
    workdir: Path,
    step: int,
    metadata: dict[str, Any],
    state: TrainState,
) -> None:
    """Write the first checkpoint of a run; `workdir` is removed again if that fails."""
    is_new = not workdir.exists()
    try:
        checkpoints = Checkpoints(workdir / CHECKPOINTS)
        checkpoints.save(step, metadata, checkpoint_items(state))
        checkpoints.close()
    except OSError:
        if is_new:
            shutil.rmtree(workdir, ignore_errors=True)
        raise


def _upcycle_state(
    dense: TrainState,
    model: EncoderDecoder,
    config: TrainConfig,
) -> TrainState:
    """The training state of an upcycled model at the step of the dense state."""
    _, params, rest = split_model(model)
    abstract = compiled_step(model, program_settings(config)).state
    statistics = _statistics(dense)
    parameters = _by_names(params)

    def leaf(path: tuple[Any, ...], wanted: Any) -> Any:
        (shape,) = jax.tree.leaves(wanted)
        statistic = _statistic_names(path_names(path), parameters)
        if statistic is not None:
            array = _upcycle_statistic(statistic, statistics, shape, model.cfg)
            return wanted.replace(array)
        num_updates = jnp.full(shape.shape, dense.step, shape.dtype)
        return jax.device_put(num_updates, shape.sharding)

    optimizer = jax.tree_util.tree_map_with_path(leaf, abstract.optimizer, is_leaf=is_variable)
    return TrainState(dense.step, params, rest, optimizer, dense.key_data)


def _statistics(state: TrainState) -> dict[Names, Array]:
    """The arrays of an optimizer that belong to a parameter, by kind (v_row, mu, ..) and path."""
    parameters = _by_names(state.params)
    statistics = {}
    for names, variable in _by_names(state.optimizer).items():
        statistic = _statistic_names(names, parameters)
        if statistic is not None:
            statistics[statistic] = variable[...]
    return statistics


def _by_names(tree: Any) -> dict[Names, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)
    return {path_names(path): leaf for path, leaf in leaves}


def _statistic_names(names: Names, parameters: dict[Names, Any]) -> Names | None:
    """The end of a path in an optimizer that is a kind and a parameter; None: no parameter's."""
    for start in range(1, len(names)):
        if names[start:] in parameters:
            return names[start - 1 :]
    return None


def _upcycle_statistic(
    statistic: Names,
    dense: dict[Names, Array],
    wanted: jax.ShapeDtypeStruct,
    cfg: ModelConfig,
) -> Array:
    """An array of the sparse optimizer: rows of the dense one's, or zeros as at the start.

    Its first axes are those of the parameter, layers and experts (see `optim.MatrixView`), so that
    it is copied as the parameter is.
    """
    kind, *parameter = statistic
    source = origin(tuple(parameter), cfg)
    if source is None:
        return jnp.zeros(wanted.shape, wanted.dtype, device=wanted.sharding)
    existing = dense[kind, *source.names]
    return upcycle_array(existing, source, wanted.sharding)
