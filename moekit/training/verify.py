"""Check every checkpoint of folders, without the models that they hold. Nothing is changed."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from moekit.training.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    first_line,
    restore_arrays,
)
from moekit.training.layout import CHECKPOINTS, METADATA, is_step
from moekit.training.manifest import MANIFEST, WORD_SUMS, check_arrays
from moekit.training.state import replicated, with_shardings

RUN_ITEMS = ("model", "optimizer", "progress")
PARTS = (METADATA, *RUN_ITEMS)  # of which a checkpoint has at least one


@dataclass(frozen=True)
class Verdict:
    """What was found about a checkpoint.

    Args:
      damage: what is wrong with it; empty for a good one.
      verified: what was compared: "every array", or less for a checkpoint of an earlier version.
    """

    folder: str
    step: int
    damage: str
    verified: str


def checkpoint_folders(top: Path) -> Iterator[Path]:
    """The folders of checkpoints in a folder: itself, that of a run, those of a folder of runs."""
    for path, folders, files in os.walk(top):
        numbered = [name for name in folders + files if is_step(name)]
        path = Path(path)
        has_parts = any((path / name / part).exists() for name in numbered for part in PARTS)
        if numbered and (has_parts or path.name == CHECKPOINTS):
            yield path
            folders.clear()
        folders.sort()


def verify_all(top: Path) -> Iterator[Verdict]:
    """Check every checkpoint in a folder, of a run, or of a folder of runs.

    The arrays of one item of a checkpoint are in memory at a time.
    """
    for folder in checkpoint_folders(top):
        checkpoints = Checkpoints(folder)
        for step in checkpoints.candidates():
            verdict = verify_step(checkpoints, step)
            # a run that goes on removes its oldest checkpoints
            if (folder / str(step)).exists():
                yield verdict


def verify_step(checkpoints: Checkpoints, step: int) -> Verdict:
    """Check one checkpoint."""
    damage = verified = ""
    try:
        metadata = checkpoints.read_metadata(step)
        verified = what_is_verified(metadata)
        for name in item_names(metadata):
            check_item(metadata, checkpoints.folder / str(step) / name, name)
    except DamagedCheckpoint as error:
        damage = error.reason
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # orbax and tensorstore raise nearly every type
        damage = first_line(error)
    return Verdict(str(checkpoints.folder), step, damage, "" if damage else verified)


def what_is_verified(metadata: dict[str, Any]) -> str:
    if MANIFEST in metadata:
        return "every array"
    if WORD_SUMS in metadata:
        return "sums of arrays (earlier version)"
    return "readable (earlier version)"


def item_names(metadata: dict[str, Any]) -> list[str]:
    """The items that a checkpoint must have."""
    if MANIFEST in metadata:
        return list(metadata[MANIFEST]["arrays"])
    return list(RUN_ITEMS) if "train" in metadata else ["model"]


def check_item(metadata: dict[str, Any], path: Any, name: str) -> None:
    """Raise an exception unless the arrays of an item are those that were saved."""
    if MANIFEST in metadata:
        shapes = saved_shapes(metadata[MANIFEST]["arrays"][name])
    else:
        shapes = described_shapes(path)
    arrays = restore_arrays(path, with_shardings(shapes, replicated(None)))
    check_arrays(metadata, name, arrays)


def saved_shapes(described: dict[str, Any]) -> dict[str, Any]:
    """The tree of an item's shapes, of its manifest."""
    shapes: dict[str, Any] = {}
    for name, array in described.items():
        *parents, last = name.split("/")
        parent = shapes
        for key in parents:
            parent = parent.setdefault(key, {})
        parent[last] = jax.ShapeDtypeStruct(tuple(array["shape"]), jnp.dtype(array["type"]))
    return shapes


def described_shapes(path: Any) -> Any:
    """The tree of an item's shapes, as orbax describes it: for checkpoints without a manifest."""
    handler = ocp.StandardCheckpointHandler()
    try:
        described = handler.metadata(epath.Path(path))
    finally:
        handler.close()
    return getattr(described, "tree", described)
