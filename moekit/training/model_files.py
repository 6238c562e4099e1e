"""Models on disk: saved with their configuration, loaded from our folders and transformers'."""

from pathlib import Path
from typing import Any

from etils import epath
from flax import nnx
from jax.sharding import Mesh

from moekit.config import ModelConfig
from moekit.distributed import is_first
from moekit.model.convert import is_transformers_folder, load_transformers
from moekit.model.convert_hub import download_model, is_hub_id
from moekit.model.convert_tokenizer import check_tokenizer, copy_tokenizer
from moekit.model.convert_write import new_folder
from moekit.model.transformer import EncoderDecoder
from moekit.moe.routing import Router
from moekit.training.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    Folder,
    describe_differences,
    to_json,
    to_path,
)
from moekit.training.layout import CHECKPOINTS, is_step
from moekit.training.state import abstract_model


def save(path: str | Path | epath.Path, model: EncoderDecoder) -> None:
    """Write a model with its configuration; `load` reads it back.

    Raises:
      OSError: the disk is full or not writable.
    """
    checkpoints = Checkpoints(path)
    step = 1 + max(checkpoints.candidates(), default=-1)
    arrays = nnx.to_pure_dict(nnx.state(model))
    checkpoints.save(step, {"model": model.cfg.to_dict()}, {"model": arrays})
    checkpoints.close()


def save_whole(path: str | Path, model: EncoderDecoder) -> None:
    """`save` into a new folder, with the tokenizer; it appears when all of it is written.

    Raises:
      FileExistsError: the folder exists.
      OSError: the disk is full or not writable.
    """
    path = Path(path).absolute()
    check_tokenizer(model.cfg.tokenizer)
    num_bytes = 4 * model.cfg.num_parameters().total
    with new_folder(path, num_bytes) as folder:
        cfg = model.cfg
        if is_first():
            copied = copy_tokenizer(cfg.tokenizer, folder)
            if copied not in (None, "byte"):
                cfg = cfg.replace(tokenizer=str(path / Path(copied).name))
        graphdef, state = nnx.split(model)
        renamed = nnx.merge(graphdef, state)
        renamed.cfg = cfg
        save(folder, renamed)


def _checkpoint_folder(path: Folder) -> Folder:
    """The folder itself, or that of the checkpoints in a run's workdir."""
    return path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path


def is_native_folder(path: Folder) -> bool:
    """Whether a folder holds checkpoints that `save` or `train` wrote."""
    folder = _checkpoint_folder(path)
    return folder.is_dir() and any(is_step(child.name) for child in folder.iterdir())


def load(
    path: str | Path | epath.Path,
    *,
    step: int | None = None,
    cfg: ModelConfig | None = None,
    router: Router | None = None,
    mesh: Mesh | None = None,
) -> EncoderDecoder:
    """The model in a folder that `save` or `train` wrote, or in one of transformers.

    Arrays are read straight into their shards; no other copy of the parameters is made. T5,
    T5 v1.1, Flan-T5 and Switch Transformers are read from their safetensors or torch files (without
    torch), in float32, with their tokenizer and generation settings. The public Switch checkpoints
    are pretrained only: until they are tuned, they answer with gibberish.

    Args:
      path: a folder, or the name of a model on the Hugging Face hub, as google/flan-t5-small.
      step: default the newest checkpoint.
      cfg: expected configuration.
      router: the router of your own that the model was trained with: a checkpoint stores its name.
      mesh: parameters are sharded over it.

    Raises:
      FileNotFoundError: there is no checkpoint, or none of that step.
      ConnectionError: a name of the hub without a network.
      ValueError: the checkpoint is damaged or of another configuration (naming the fields), it
        needs a router of its author, or it is of another model family.
    """
    if is_hub_id(str(path)) and not Path(path).exists():
        path = download_model(str(path))
    folder = to_path(path)
    is_native = is_native_folder(folder)  # a run also has a config.json
    if not is_native and isinstance(folder, Path) and is_transformers_folder(folder):
        model = load_transformers(folder, mesh)
        _check_config(path, to_json(model.cfg.to_dict()), cfg)
        return model
    if not is_native:
        raise FileNotFoundError(f"no checkpoint in {path}: give a folder written by train or save")
    checkpoints = Checkpoints(_checkpoint_folder(folder))

    def read(step: int) -> EncoderDecoder:
        return _load_step(checkpoints, step, cfg, router, mesh)

    if step is None:
        return checkpoints.read_newest(read)
    others = checkpoints.candidates()
    if step not in others:
        raise FileNotFoundError(f"{path} has no step {step}, only {others}")
    try:
        return read(step)
    except DamagedCheckpoint as error:
        raise ValueError(f"{error}: leave step out to load the newest good one") from None


def _load_step(
    checkpoints: Checkpoints,
    step: int,
    cfg: ModelConfig | None,
    router: Router | None,
    mesh: Mesh | None,
) -> EncoderDecoder:
    saved = checkpoints.metadata(step)["model"]
    _check_config(checkpoints.folder, saved, cfg)
    if cfg is None:
        try:
            cfg = ModelConfig.from_dict(saved, router)
        except (TypeError, KeyError, AttributeError) as error:
            reason = f"its metadata has no configuration: {error}"
            raise DamagedCheckpoint(checkpoints.folder, step, reason) from None
    abstract = abstract_model(lambda: EncoderDecoder(cfg, mesh=mesh), mesh)
    return restore_model(checkpoints, step, abstract)


def _check_config(path: Any, saved: dict[str, Any], expected: ModelConfig | None) -> None:
    if expected is not None and saved != to_json(expected.to_dict()):
        difference = describe_differences(saved, to_json(expected.to_dict()))
        raise ValueError(f"{path} holds a model of another configuration ({difference})")


def restore_model(checkpoints: Checkpoints, step: int, model: EncoderDecoder) -> EncoderDecoder:
    """A model of shapes and shardings with the arrays of a checkpoint in their place."""
    graphdef, state = nnx.split(model)
    restored = checkpoints.restore(step, {"model": nnx.to_pure_dict(state)})
    nnx.replace_by_pure_dict(state, restored["model"])
    return nnx.merge(graphdef, state)
