"""Checkpoints (orbax): arrays, data position and configurations of one step, written atomically."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from moekit.config import ModelConfig
from moekit.distributed import allgather_objects, is_first, run_on_first
from moekit.model.convert import is_transformers_folder, load_transformers
from moekit.model.convert_hub import download_model, is_hub_id
from moekit.model.convert_tokenizer import check_tokenizer, copy_tokenizer
from moekit.model.convert_write import new_folder
from moekit.model.transformer import EncoderDecoder
from moekit.moe.routing import Router
from moekit.training.state import abstract_model

METADATA = "meta"  # the name of the JSON item
WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by the bytes of an array's numbers
logger = logging.getLogger(__name__)


class Checkpoints:
    """Numbered checkpoints in a folder. A write that fails leaves the former ones as they were.

    Raises:
      OSError: the folder cannot be written, or processes do not share it.
    """

    def __init__(self, folder: str | Path, keep: int = 1):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True
        )
        try:
            run_on_first(lambda: self.folder.mkdir(parents=True, exist_ok=True))
            if not all(allgather_objects(self.folder.is_dir())):
                raise OSError("choose a folder on a disk that all processes share")
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise OSError(f"cannot write checkpoints to {folder}: {error}") from None

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return [
            step
            for step in sorted(self._manager.all_steps())
            if (self.folder / str(step) / METADATA).is_dir()
        ]

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def require_room(self, copies: int, items: dict[str, Any]) -> None:
        """Raise OSError unless the disk has room for that many more checkpoints of these arrays."""
        array_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(items))
        # JSON, indices and block sizes are added to the arrays
        needed = copies * (1.05 * array_bytes + 2**18)

        def measure() -> None:
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(
                    f"{self.folder} has {free / 1e6:,.1f} MB free, checkpoints need "
                    f"{needed / 1e6:,.1f} MB: make room or choose another workdir; former "
                    "checkpoints are intact"
                )

        run_on_first(measure)

    def save(self, step: int, metadata: dict[str, Any], items: dict[str, Any]) -> None:
        """Write named trees of arrays and JSON-ready metadata; returns when they are on disk.

        Raises:
          OSError: the disk is full or not writable; former checkpoints remain.
        """
        self.require_room(1, items)
        metadata = metadata | {"checksums": {name: checksums(items[name]) for name in items}}
        arguments = {METADATA: ocp.args.JsonSave(metadata)}
        for name, arrays in items.items():
            arguments[name] = ocp.args.StandardSave(arrays)
        try:
            self._manager.save(step, args=ocp.args.Composite(**arguments), force=True)
            self._manager.wait_until_finished()
        except (
            Exception
        ) as error:  # tensorstore has its own exceptions, for example for a full disk
            raise OSError(
                f"could not write checkpoint {step} to {self.folder}: {first_line(error)}. Former "
                "checkpoints are intact; make room (or choose another workdir) and run the same "
                "command again"
            ) from None

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata of a checkpoint.

        Raises:
          ValueError: it is damaged.
        """
        arguments = {METADATA: ocp.args.JsonRestore()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        except Exception as error:
            raise self._damaged(step, first_line(error)) from None
        if not isinstance(restored[METADATA], dict) or "model" not in restored[METADATA]:
            raise self._damaged(step, "its metadata is incomplete")
        return restored[METADATA]

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Named trees of arrays with the shapes, types and shardings of `abstract`.

        Raises:
          ValueError: other shapes were saved, or the checkpoint is damaged.
        """
        saved = self.metadata(step).get("checksums", {})
        restored = {}
        for name, tree in abstract.items():
            try:
                restored[name] = _restore_arrays(self.folder / str(step) / name, tree)
            except Exception as error:
                otherwise = "does not fit this model or "
                raise self._damaged(step, first_line(error), otherwise) from None
            if name in saved and saved[name] != checksums(restored[name]):
                raise self._damaged(step, f"the arrays of {name} are not those that were saved")
        return restored

    def _damaged(self, step: int, reason: str, otherwise: str = "") -> ValueError:
        others = [other for other in self.steps() if other != step]
        fix = f"delete the folder {self.folder / str(step)}"
        if others:
            fix += f" to use checkpoint {others[-1]}"
        return ValueError(
            f"checkpoint {step} in {self.folder} {otherwise}is damaged ({reason}): {fix}"
        )

    def close(self) -> None:
        self._manager.close()


def _restore_arrays(path: Path, abstract: Any) -> Any:
    """The arrays of one item. Buffers of those that are being read hold a tenth of the item, or its
    largest array."""
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)]
    buffer_bytes = max(1.1 * max(sizes), 0.1 * sum(sizes)) + 2**20
    handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=buffer_bytes / 1e9)
    with ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.StandardRestore(abstract))


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def checksums(tree: Any) -> dict[str, int]:
    """A number for every array, which changes when a byte of it does.

    The sum of its 32-bit words, modulo 2^32, is the same for every sharding.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # one array at a time: a backend may copy it
    return {jax.tree_util.keystr(path): int(_word_sum(array)) for path, array in leaves}


@jax.jit
def _word_sum(array: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(array, WORDS[array.dtype.itemsize])
    return jnp.sum(words, dtype=jnp.uint32)


def describe_differences(saved: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The fields in which two configurations differ, as text; empty if there are none."""
    differences = []
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            differences.append(f"{name}: {saved.get(name)!r} there, {wanted.get(name)!r} here")
    return ", ".join(differences)


def to_json(values: dict[str, Any]) -> dict[str, Any]:
    """Values as they are read back from a JSON file (tuples become lists)."""
    return json.loads(json.dumps(values))


def save(path: str | Path, model: EncoderDecoder) -> None:
    """Write a model with its configuration; `load` reads it back.

    Raises:
      OSError: the disk is full or not writable.
    """
    checkpoints = Checkpoints(path)
    newest = checkpoints.latest()
    step = 0 if newest is None else newest + 1
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


def _checkpoint_folder(path: Path) -> Path:
    """The folder itself, or that of the checkpoints in a run's workdir."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def is_native_folder(path: Path) -> bool:
    """Whether a folder holds checkpoints that `save` or `train` wrote."""
    folder = _checkpoint_folder(path)
    return folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())


def load(
    path: str | Path,
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
    if not Path(path).exists() and is_hub_id(str(path)):
        path = download_model(str(path))
    path = Path(path)
    if is_transformers_folder(path):
        model = load_transformers(path, mesh)
        _check_config(path, to_json(model.cfg.to_dict()), cfg)
        return model
    folder = _checkpoint_folder(path)
    if not is_native_folder(path):
        raise FileNotFoundError(f"no checkpoint in {path}: give a folder written by train or save")
    checkpoints = Checkpoints(folder)
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{path} has no step {step}, only {steps}")
    if not steps:
        raise FileNotFoundError(f"{path} has no complete checkpoint: the folders there are damaged")
    if step is None:
        step = steps[-1]
    saved = checkpoints.metadata(step)["model"]
    _check_config(path, saved, cfg)
    if cfg is None:
        cfg = ModelConfig.from_dict(saved, router)
    abstract = abstract_model(lambda: EncoderDecoder(cfg, mesh=mesh), mesh)
    model = restore_model(checkpoints, step, abstract)
    checkpoints.close()
    return model


def _check_config(path: Path, saved: dict[str, Any], expected: ModelConfig | None) -> None:
    if expected is not None and saved != to_json(expected.to_dict()):
        difference = describe_differences(saved, to_json(expected.to_dict()))
        raise ValueError(f"{path} holds a model of another configuration ({difference})")


def restore_model(checkpoints: Checkpoints, step: int, model: EncoderDecoder) -> EncoderDecoder:
    """A model of shapes and shardings with the arrays of a checkpoint in their place."""
    graphdef, state = nnx.split(model)
    restored = checkpoints.restore(step, {"model": nnx.to_pure_dict(state)})
    nnx.replace_by_pure_dict(state, restored["model"])
    return nnx.merge(graphdef, state)
