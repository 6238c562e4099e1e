"""Checkpoints (orbax): arrays, data position and configurations of one step.

They are written atomically and in the background, and verified when they are read (manifest.py).
"""

import json
import logging
import re
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from moekit.data.paths import require_file
from moekit.distributed import allgather_objects, run_on_first
from moekit.training.layout import METADATA, METADATA_FILE, is_step
from moekit.training.manifest import (
    add_manifest,
    check_arrays,
    check_metadata,
    count_bytes,
    different_arrays,
    without_manifest,
)
from moekit.training.retention import BestCheckpoint, retention_policy

Folder = Path | epath.Path  # epath for gs://
logger = logging.getLogger(__name__)


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be read, or that is not what was saved."""

    def __init__(self, folder: Folder, step: int, reason: str):
        super().__init__(f"checkpoint {step} in {folder} is damaged ({reason})")
        self.step = step
        self.reason = reason


class OtherRun(ValueError):
    """A checkpoint of a run with other settings."""


def to_path(path: str | Path | epath.Path) -> Folder:
    """A local path, also of a file:// address, or the path of a gs:// address.

    Raises:
      OSError: a package that the address needs is missing.
    """
    # pathlib turns gs://bucket into gs:/bucket
    address = re.fullmatch(r"(\w\w+):/+(.*)", str(path))
    if address is None:
        return Path(path)
    scheme, rest = address.groups()
    if scheme == "file":
        return Path("/" + rest)
    remote = epath.Path(f"{scheme}://{rest}")
    try:
        remote.exists()
    except ImportError as error:
        raise OSError(f"cannot read {remote}: {first_line(error)}") from None
    return remote


class Checkpoints:
    """Numbered checkpoints in a folder. A write that fails leaves the former ones as they were.

    Reading changes nothing: the folder is created by the first write.

    Args:
      keep: number of newest checkpoints that remain when one is written.
      keep_every: checkpoints of multiples of this step remain as well; 0 for none.
      best: keeps the best checkpoint as well.
    """

    def __init__(
        self,
        folder: str | Path | epath.Path,
        keep: int = 1,
        keep_every: int = 0,
        best: BestCheckpoint | None = None,
    ):
        hide_repeated_errors()
        path = to_path(folder)
        self.folder = path.absolute() if isinstance(path, Path) else path
        self._policy = retention_policy(keep, keep_every, best)
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None  # the step that is written in the background

    # Reading

    def candidates(self) -> list[int]:
        """The numbers of all files and folders that are named like a checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        names = [child.name for child in self.folder.iterdir()]
        return sorted(int(name) for name in names if is_step(name))

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order; their arrays are not verified."""
        return [step for step in self.candidates() if self._is_complete(step)]

    def _is_complete(self, step: int) -> bool:
        path = self.folder / str(step)
        return ocp.utils.is_checkpoint_finalized(path) and (path / METADATA).is_dir()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata of a checkpoint, verified.

        Raises:
          DamagedCheckpoint: it is not what was saved.
        """
        return without_manifest(self.read_metadata(step))

    def read_metadata(self, step: int) -> dict[str, Any]:
        """The metadata of a checkpoint with its manifest, verified."""

        def read() -> dict[str, Any]:
            path = self.folder / str(step) / METADATA / METADATA_FILE
            require_files(path.parent)
            metadata = json.loads(path.read_text())
            check_metadata(metadata, step)
            return metadata

        return self._attempt(step, read)

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Named trees of arrays with the shapes, types and shardings of `abstract`, verified.

        Raises:
          ValueError: other shapes or types were saved.
          DamagedCheckpoint: an array is not what was saved.
        """
        metadata = self.read_metadata(step)
        for name, tree in abstract.items():
            differences = different_arrays(metadata, name, tree)
            if differences:
                raise ValueError(
                    f"checkpoint {step} in {self.folder} does not fit this model: "
                    f"{len(differences)} arrays of {name} differ, the first is {differences[0]}"
                )
        restored = {}
        for name, tree in abstract.items():
            restored[name] = self._restore_item(metadata, step, name, tree)
        return restored

    def _restore_item(self, metadata: dict[str, Any], step: int, name: str, abstract: Any) -> Any:
        def read() -> Any:
            return restore_arrays(self.folder / str(step) / name, abstract)

        def check() -> None:
            check_arrays(metadata, name, arrays)

        arrays = self._attempt(step, read)
        # digests need all processes: none computes them unless each has its arrays
        self._attempt(step, check)
        return arrays

    def _attempt(self, step: int, action: Callable[[], Any]) -> Any:
        """Call a function that reads a checkpoint; what fails on one process, fails on each."""
        found = reason = None
        try:
            found = action()
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # the device is too small
        except Exception as error:  # orbax and tensorstore raise nearly every type
            reason = first_line(error)
        reasons = [each for each in allgather_objects(reason) if each is not None]
        if reasons:
            raise DamagedCheckpoint(self.folder, step, reasons[0])
        return found

    def read_newest(self, read: Callable[[int], Any], *, set_aside: bool = False) -> Any:
        """The result of a function for the newest checkpoint that it can read.

        Args:
          read: gets the step; raises DamagedCheckpoint, or OtherRun for a checkpoint that does not
            belong here.
          set_aside: rename the newer ones, which it could not read, to "120.damaged".

        Raises:
          DamagedCheckpoint: all are damaged; nothing is renamed.
          OtherRun: no checkpoint belongs to the run.
        """
        refused: dict[int, str] = {}
        other_run: OtherRun | None = None
        for step in reversed(self.candidates()):
            try:
                found = read(step)
            except DamagedCheckpoint as error:
                refused[step] = error.reason
            except OtherRun as error:
                refused[step] = "it belongs to another run"
                other_run = other_run or error
            else:
                self._report_refused(refused, step, set_aside)
                return found
        if other_run is not None:
            raise other_run
        raise self._none_is_good(refused)

    def _report_refused(self, refused: dict[int, str], used: int, set_aside: bool) -> None:
        for step, reason in refused.items():
            renamed = self.set_aside(step) if set_aside else None
            logger.warning(
                "checkpoint %d in %s is damaged (%s)%s: checkpoint %d is used, %d steps earlier",
                step,
                self.folder,
                reason,
                f" and now named {renamed}" if renamed else "",
                used,
                step - used,
            )

    def _none_is_good(self, refused: dict[int, str]) -> DamagedCheckpoint:
        newest = max(refused)
        others = len(refused) - 1
        reason = refused[newest]
        if others:
            reason += f"; the {others} before it are damaged, too"
        reason += "; copy a good one here, or choose another folder"
        return DamagedCheckpoint(self.folder, newest, reason)

    def set_aside(self, step: int) -> str | None:
        """Rename a checkpoint so that it is no longer one; returns the name if it was possible."""
        name = f"{step}.damaged"
        number = 1
        while (self.folder / name).exists():
            number += 1
            name = f"{step}.damaged-{number}"
        try:
            run_on_first(lambda: (self.folder / str(step)).rename(self.folder / name))
        except OSError as error:
            logger.warning("cannot rename %s: %s", self.folder / str(step), first_line(error))
            return None
        if self._manager is not None:
            self._manager.reload()
        return name

    # Writing

    def prepare_writing(self) -> None:
        """Create the folder, remove what an interrupted write left in it.

        Raises:
          OSError: the folder cannot be written, or processes do not share it.
        """
        if self._manager is not None:
            return
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy, create=False, cleanup_tmp_directories=True
        )
        try:
            run_on_first(lambda: self.folder.mkdir(parents=True, exist_ok=True))
            if not all(allgather_objects(self.folder.is_dir())):
                raise OSError("choose a folder on a disk that all processes share")
            for step in self.candidates():
                if not self._is_complete(step):
                    path = self.folder / str(step)
                    logger.warning("%s is no checkpoint: renamed %s", path, self.set_aside(step))
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, handler_registry=_save_handlers()
            )
        except OSError as error:
            raise OSError(f"cannot write checkpoints to {self.folder}: {error}") from None

    def require_room(self, copies: int, items: dict[str, Any]) -> None:
        """Raise OSError unless the disk has room for that many more checkpoints of these arrays."""
        if not isinstance(self.folder, Path):
            return  # a bucket has no size
        # JSON, indices and block sizes are added to the arrays
        needed = copies * (1.05 * count_bytes(items) + 2**18)

        def measure() -> None:
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(
                    f"{self.folder} has {free / 1e6:,.1f} MB free, checkpoints need "
                    f"{needed / 1e6:,.1f} MB: make room or choose another workdir; former "
                    "checkpoints are intact"
                )

        run_on_first(measure)

    def save(
        self, step: int, metadata: dict[str, Any], items: dict[str, Any], *, wait: bool = True
    ) -> None:
        """Write named trees of arrays and JSON-ready metadata, after a save that is in progress.

        Args:
          wait: return when they are on disk; otherwise they are written in the background. The
            arrays may be donated then: orbax copies them to the host or holds their buffers, which
            XLA does not overwrite while they are held.

        Raises:
          OSError: the disk is full or not writable; former checkpoints remain.
        """
        self.wait()
        self.prepare_writing()
        self.require_room(1, items)
        arguments = {METADATA: ocp.args.JsonSave(add_manifest(metadata, step, items))}
        for name, arrays in items.items():
            arguments[name] = ocp.args.PyTreeSave(arrays)
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**arguments), force=True)
        except Exception as error:  # tensorstore has its own, for example for a full disk
            raise self._could_not_write(first_line(error)) from None
        if wait:
            self.wait()

    def is_writing(self) -> bool:
        """Whether a checkpoint is being written in the background on this process."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Wait until the checkpoint that is written in the background is on disk.

        Raises:
          OSError: it could not be written; former checkpoints remain.
        """
        if self._saving is None:
            return
        reason = None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            reason = first_line(error)
        reasons = [each for each in allgather_objects(reason) if each is not None]
        if reasons:
            raise self._could_not_write(reasons[0])
        self._saving = None

    def _could_not_write(self, reason: str) -> OSError:
        step = self._saving
        self._saving = None
        self._manager = None  # the next save starts with a new one, which removes what is left
        return OSError(
            f"could not write checkpoint {step} to {self.folder}: {reason}. Former checkpoints are "
            "intact; make room (or choose another workdir) and run the same command again"
        )

    def settle(self) -> None:
        """Wait for a save in progress; a failure is logged, as another error is raised."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            self._saving = None
        except Exception as error:
            logger.warning("%s", self._could_not_write(first_line(error)))

    def close(self) -> None:
        """Wait as `settle` does, and end the threads that write."""
        self.settle()
        if self._manager is not None:
            self._manager.close()
            self._manager = None


def hide_repeated_errors() -> None:
    """Leave out what orbax and asyncio log, in many lines, of errors that are raised as well."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_repeated)


def _is_not_repeated(record: logging.LogRecord) -> bool:
    if not record.exc_info:
        return True
    if record.name == "asyncio":  # it logs the exceptions of tasks that nobody waits for
        files = [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
    else:
        files = [record.pathname]
    return not any("orbax" in Path(file).parts for file in files)


def _save_handlers() -> Any:
    """How orbax writes items: without compression, which would need twice the memory and time."""
    arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
    text = ocp.JsonCheckpointHandler(filename=METADATA_FILE)
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(None, ocp.args.PyTreeSave, arrays)
    registry.add(None, ocp.args.JsonSave, text)
    return registry


def restore_arrays(path: Folder, abstract: Any) -> Any:
    """The arrays of one item. Buffers of those that are being read hold a tenth of the item, or its
    largest array."""
    require_files(path)
    largest = max(count_bytes(leaf) for leaf in jax.tree.leaves(abstract))
    buffer_bytes = max(1.1 * largest, 0.1 * count_bytes(abstract)) + 2**20
    # without a Checkpointer, which waits for the other processes also where one of them failed
    handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=buffer_bytes / 1e9)
    try:
        return handler.restore(epath.Path(path), args=ocp.args.StandardRestore(abstract))
    finally:
        handler.close()


def require_files(folder: Folder) -> None:
    """Check that nothing in a local folder is a named pipe or a device, which orbax would open.

    Raises:
      OSError, ValueError: something is neither a file nor a folder.
    """
    if isinstance(folder, Path):
        for path in folder.rglob("*"):
            if not path.is_dir():
                require_file(path)


def first_line(error: BaseException) -> str:
    """The first line of what caused an error: orbax and tensorstore describe it in many lines."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


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
