"""Damage to the newest checkpoint of a run: kinds of damage, and single bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from in_process import KEPT, NEWEST, BeforeAndAfter, resume_and_compare
from tiny_run import Drill
from trial import Trial

from moekit.training.checkpoint import Checkpoints, DamagedCheckpoint
from moekit.training.state import replicated, with_shardings
from moekit.training.verify import saved_shapes, verify_step


def largest_file(folder: Path) -> Path:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


# Kinds of damage: each changes the newest checkpoint; the one before it is given


def cut_arrays(newest: Path, former: Path) -> None:
    path = largest_file(newest / "model")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty_arrays(newest: Path, former: Path) -> None:
    largest_file(newest / "model").write_bytes(b"")


def delete_arrays(newest: Path, former: Path) -> None:
    largest_file(newest / "optimizer").unlink()


def zero_a_block(newest: Path, former: Path) -> None:
    path = largest_file(newest / "model")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(len(content[middle : middle + 4096]))
    path.write_bytes(content)


def mix_items(newest: Path, former: Path) -> None:
    shutil.rmtree(newest / "optimizer")
    shutil.copytree(former / "optimizer", newest / "optimizer")


def mix_metadata(newest: Path, former: Path) -> None:
    shutil.rmtree(newest / "meta")
    shutil.copytree(former / "meta", newest / "meta")


def delete_item(newest: Path, former: Path) -> None:
    shutil.rmtree(newest / "progress")


def delete_metadata(newest: Path, former: Path) -> None:
    shutil.rmtree(newest / "meta")


def cut_metadata(newest: Path, former: Path) -> None:
    path = newest / "meta/metadata"
    path.write_text(path.read_text()[:300])


def edit_metadata(newest: Path, former: Path) -> None:
    path = newest / "meta/metadata"
    metadata = json.loads(path.read_text())
    metadata["data_order"] = 1
    path.write_text(json.dumps(metadata))


def empty_checkpoint(newest: Path, former: Path) -> None:
    shutil.rmtree(newest)
    newest.mkdir()


def file_instead(newest: Path, former: Path) -> None:
    shutil.rmtree(newest)
    newest.write_text("not a checkpoint")


def former_renamed(newest: Path, former: Path) -> None:
    shutil.rmtree(newest)
    shutil.copytree(former, newest)


KINDS: tuple[Callable[[Path, Path], None], ...] = (
    cut_arrays,
    zero_a_block,
    mix_items,
    edit_metadata,
    empty_checkpoint,
    empty_arrays,
    delete_arrays,
    mix_metadata,
    delete_item,
    delete_metadata,
    cut_metadata,
    file_instead,
    former_renamed,
)


def kinds_of_damage(drill: Drill, runs: BeforeAndAfter) -> list[Trial]:
    """Damage the newest checkpoint and resume: the one before it is used, the run ends equal."""
    trials = []
    for damage in KINDS[:4] if drill.short else KINDS:
        workdir = runs.copy(f"damaged-{damage.__name__}")
        checkpoints = workdir / "checkpoints"
        damage(checkpoints / str(NEWEST), checkpoints / str(KEPT))
        problem = "" if verify_step(Checkpoints(checkpoints), NEWEST).damage else "not verified"
        trial = resume_and_compare(runs, workdir, warning=f"checkpoint {KEPT} is used")
        if not (checkpoints / f"{NEWEST}.damaged").exists():
            problem = problem or "not set aside"
        problem = problem or trial.problem
        described = f"{damage.__name__}: {problem}" if problem else ""
        trials.append(Trial("recovered", NEWEST - KEPT, trial.equal, described))
    return trials


def flipped_bits(drill: Drill, runs: BeforeAndAfter) -> list[Trial]:
    """Flip one bit of a file: the checkpoint is refused, or what is read is what was saved.

    `moekit runs verify` must agree. Half of the bits are drawn by file, half by byte.
    """
    random_numbers = drill.random("bits")
    source = runs.before / "checkpoints" / str(NEWEST)
    good = read_all(source.parent)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    trials = []
    for number in range(10 if drill.short else 50):
        (path,) = random_numbers.choices(files, sizes if number % 2 else None)
        folder = drill.empty_folder("flipped")
        shutil.copytree(source, folder / str(NEWEST))
        flipped = folder / str(NEWEST) / path.relative_to(source)
        content = bytearray(flipped.read_bytes())
        bit = random_numbers.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        flipped.write_bytes(content)
        trial = judge_flipped(folder, good)
        where = f"bit {bit} of {path.relative_to(source)}: "
        problem = where + trial.problem if trial.problem else ""
        trials.append(Trial(trial.outcome, problem=problem))
    return trials


def judge_flipped(folder: Path, good: list[np.ndarray]) -> Trial:
    is_damaged = bool(verify_step(Checkpoints(folder), NEWEST).damage)
    try:
        found = read_all(folder)
    except DamagedCheckpoint:
        problem = "" if is_damaged else "refused, but verified"
        return Trial("refused", problem=problem)
    if not same_arrays(found, good):
        return Trial("loaded", problem="other numbers are loaded")
    return Trial("unharmed", problem="loaded, but not verified" if is_damaged else "")


def same_arrays(found: list[np.ndarray], good: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(found, good, strict=True))


def read_all(folder: Path) -> list[np.ndarray]:
    """All arrays of the newest checkpoint."""
    checkpoints = Checkpoints(folder)
    described = checkpoints.read_metadata(NEWEST)["manifest"]["arrays"]
    abstract = {}
    for name, arrays in described.items():
        abstract[name] = with_shardings(saved_shapes(arrays), replicated(None))
    restored = checkpoints.restore(NEWEST, abstract)
    return [np.asarray(array) for array in jax.tree.leaves(restored)]


def all_damaged(drill: Drill, runs: BeforeAndAfter) -> list[Trial]:
    """Damage all checkpoints: the run is refused and nothing is renamed."""
    workdir = runs.copy("all-damaged")
    checkpoints = workdir / "checkpoints"
    steps = sorted(path.name for path in checkpoints.iterdir())
    for step in steps:
        empty_arrays(checkpoints / step, checkpoints / step)
    try:
        runs.train(workdir)
    except DamagedCheckpoint as error:
        problem = "" if "copy a good one here" in str(error) else str(error)
    else:
        problem = "the run continued"
    if sorted(path.name for path in checkpoints.iterdir()) != steps:
        problem = problem or "checkpoints were renamed"
    return [Trial("refused", problem=problem)]
