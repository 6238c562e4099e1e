"""Checkpoints (orbax): model, optimizer, data position and configurations in one, written whole."""

import json
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from moekit.config import ModelConfig
from moekit.distributed import first_does, gathered
from moekit.model.transformer import EncoderDecoder


class Checkpoints:
    """Numbered checkpoints in a folder. A write that fails leaves the former ones as they were."""

    def __init__(self, folder: str | Path, keep: int = 1):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True
        )
        try:
            first_does(lambda: self.folder.mkdir(parents=True, exist_ok=True))
            if not all(gathered(self.folder.is_dir())):
                raise OSError("choose a folder on a disk that all processes share")
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise OSError(f"cannot write checkpoints to {folder}: {error}") from None

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def require_room(self, copies: int, **items: dict) -> None:
        """OSError unless the disk has room for so many more checkpoints of these arrays."""
        # json, indices and block sizes come on top of the arrays
        needed = copies * (1.05 * sum(leaf.nbytes for leaf in jax.tree.leaves(items)) + 2**18)

        def measure():
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(
                    f"{self.folder} has {free / 1e6:,.1f} MB free, checkpoints need "
                    f"{needed / 1e6:,.1f} MB: make room or choose another workdir; former "
                    "checkpoints are intact"
                )

        first_does(measure)

    def save(self, step: int, meta: dict, **items: dict) -> None:
        """Write named nested dicts of arrays and JSON-ready facts; returns when they are on disk.

        Raises:
          OSError: the disk is full or not writable; former checkpoints remain.
        """
        self.require_room(1, **items)
        arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **arrays)
        try:
            self._manager.save(step, args=args, force=True)
            self._manager.wait_until_finished()
        except Exception as error:  # tensorstore reports a full disk in types of its own
            reason = str(error).splitlines()[0][:200] or type(error).__name__
            raise OSError(
                f"could not write checkpoint {step} to {self.folder}: {reason}. Former checkpoints "
                "are intact; make room (or choose another workdir) and run the same command again"
            ) from None

    def meta(self, step: int) -> dict:
        restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return restored["meta"]

    def restore(self, step: int, **like: dict) -> dict:
        """Named arrays of a checkpoint with the shapes, types and shardings of `like`."""
        args = {
            name: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, item))
            for name, item in like.items()
        }
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise ValueError(
                f"checkpoint {step} in {self.folder} does not fit this model or is damaged: "
                f"{str(error).splitlines()[0][:200]}"
            ) from None

    def close(self) -> None:
        self._manager.close()


def differing(saved: dict, wanted: dict) -> str:
    """The fields in which two configurations differ, as text."""
    fields = sorted(k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k))
    return ", ".join(f"{k}: {saved.get(k)!r} there, {wanted.get(k)!r} here" for k in fields)


def to_json(values: dict) -> dict:
    """As it will come back from a JSON file (tuples become lists)."""
    return json.loads(json.dumps(values))


def save(path: str | Path, model: EncoderDecoder) -> None:
    """Write a model with its configuration; `load` reads it back."""
    checkpoints = Checkpoints(path)
    step = checkpoints.latest()
    arrays = nnx.to_pure_dict(nnx.state(model))
    meta = {"model": model.cfg.to_dict()}
    checkpoints.save(0 if step is None else step + 1, meta, model=arrays)
    checkpoints.close()


def load(
    path: str | Path,
    *,
    step: int | None = None,
    cfg: ModelConfig | None = None,
    mesh: Mesh | None = None,
) -> EncoderDecoder:
    """The model of a folder that `save` or `train` wrote.

    Args:
      step: default the newest checkpoint.
      cfg: expected configuration (needed for a router of your own).

    Raises:
      FileNotFoundError: no checkpoint there, or none of that step.
      ValueError: a checkpoint of another configuration (naming the fields that differ).
    """
    path = Path(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not folder.is_dir() or not any(child.name.isdigit() for child in folder.iterdir()):
        raise FileNotFoundError(f"no checkpoint in {path}: give a folder written by train or save")
    checkpoints = Checkpoints(folder)
    if step not in (None, *checkpoints.steps()):
        raise FileNotFoundError(f"{path} has no step {step}, only {checkpoints.steps()}")
    step = checkpoints.latest() if step is None else step
    saved = checkpoints.meta(step)["model"]
    if cfg is not None and (difference := differing(saved, to_json(cfg.to_dict()))):
        raise ValueError(f"{path} holds a model of another configuration ({difference})")
    model = EncoderDecoder(cfg or ModelConfig.from_dict(saved), mesh=mesh)
    restore_model(checkpoints, step, model)
    checkpoints.close()
    return model


def restore_model(checkpoints: Checkpoints, step: int, model: EncoderDecoder) -> None:
    """Put a checkpoint's parameters into a model."""
    state = nnx.state(model)
    restored = checkpoints.restore(step, model=nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored["model"])
    nnx.update(model, state)
