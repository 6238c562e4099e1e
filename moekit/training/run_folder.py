"""What a run's folder holds besides checkpoints: configuration, environment and log.

config.json: settings of the model and of training, digests of data and tokenizer.
environment.jsonl: one line for each start: versions, devices, command, git commit.
metrics.jsonl: the log.
checkpoints/: one folder for each step.
run.lock: the process that trains there.
"""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.data.paths import require_file
from moekit.installed import installed_versions
from moekit.training.layout import CHECKPOINTS, METADATA, METADATA_FILE, is_step
from moekit.training.metrics import LOG, Metrics, read_rows
from moekit.training.run_lock import read_writer

CONFIG = "config.json"
ENVIRONMENT = "environment.jsonl"
MAX_SETTINGS = 16 << 20  # bytes of a configuration
MAX_DEPTH = 3  # of folders within the one in which runs are looked for


def record_start(folder: Path, settings: dict[str, Any]) -> None:
    """Write the configuration of a run and add a line about this start of it."""
    partial = folder / f"{CONFIG}.partial"
    partial.write_text(json.dumps(settings, indent=1) + "\n")
    partial.replace(folder / CONFIG)
    with (folder / ENVIRONMENT).open("a") as file:
        file.write(json.dumps(environment()) + "\n")


def environment() -> dict[str, Any]:
    """Where and how this process runs, JSON-ready."""
    import jax

    kinds = [device.device_kind for device in jax.devices()]
    devices = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": sys.argv,
        "git_commit": git_commit(),
        "versions": installed_versions(),
        "devices": devices,
        "processes": jax.process_count(),
    }


@functools.lru_cache(maxsize=1)
def git_commit() -> str:
    """The commit of the current folder, with "-dirty" after changes; empty without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


@dataclass(frozen=True)
class RunSummary:
    """What a run's folder shows without reading its arrays.

    Args:
      name: of the folder, below the one in which runs were looked for.
      model: name of its configuration; empty if unknown.
      steps_done: number of the newest step that was logged or saved.
      steps: number of steps of the whole run; 0 if unknown.
      loss, valid_loss: the newest; None before the first.
      changed: when something was logged or saved last, seconds since 1970.
      state: running, finished, stopped or damaged.
      problems: what is damaged.
    """

    name: str
    model: str
    steps_done: int
    steps: int
    loss: float | None
    valid_loss: float | None
    changed: float
    state: str
    problems: tuple[str, ...]


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of `train`."""
    has_log = (folder / LOG).is_file() or (folder / CONFIG).is_file()
    return has_log or any(_checkpoint_steps(folder))


def find_runs(folder: Path) -> list[Path]:
    """The runs in a folder and up to three levels below it, in the order of their names."""
    if is_run(folder):
        return [folder]
    found = []
    for path, names, _ in os.walk(folder):
        current = Path(path)
        depth = len(current.relative_to(folder).parts)
        if current != folder and is_run(current):
            found.append(current)
            names.clear()
        elif depth == MAX_DEPTH:
            names.clear()
    return sorted(found)


def summarize(folder: Path, name: str) -> RunSummary:
    """The summary of a run."""
    problems = []
    settings = read_settings(folder)
    if settings is None:
        problems.append("its configuration cannot be read")
        settings = {"model": {}, "train": {}}
    rows, broken = read_log(folder)
    if broken:
        lines = ", ".join(map(str, broken[:5])) + (" .." if len(broken) > 5 else "")
        problems.append(f"line {lines} of {LOG} is broken")
    saved = list(_checkpoint_steps(folder))
    incomplete = [step for step in saved if not _metadata_path(folder, step).exists()]
    if incomplete:
        problems.append(f"checkpoint {', '.join(map(str, incomplete))} is incomplete")
    complete = set(saved) - set(incomplete)
    steps_done = max([row["step"] for row in rows] + list(complete), default=0)
    steps = settings["train"].get("steps", 0)
    is_finished = steps > 0 and steps_done >= steps and bool(complete)
    state = "finished" if is_finished else "stopped"
    if problems:
        state = "damaged"
    if read_writer(folder) is not None:
        state = "running"
    return RunSummary(
        name=name,
        model=settings["model"].get("name", ""),
        steps_done=steps_done,
        steps=steps,
        loss=_last(rows, "loss"),
        valid_loss=_last(rows, "valid_loss"),
        changed=_changed(folder),
        state=state,
        problems=tuple(problems),
    )


def read_log(folder: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a run's log and the numbers of its broken lines; none without a log."""
    path = folder / LOG
    return read_rows(path) if path.is_file() else ([], [])


def read_metrics(folder: Path) -> Metrics:
    """The log of a run, without its broken lines."""
    rows, _ = read_log(folder)
    return Metrics(rows=rows)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of a run: of its configuration, else of its newest readable checkpoint.

    Runs of earlier versions have no config.json.
    """
    paths = [folder / CONFIG]
    for step in sorted(_checkpoint_steps(folder), reverse=True):
        paths.append(_metadata_path(folder, step))
    for path in paths:
        try:
            require_file(path, MAX_SETTINGS)
            found = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            continue
        if _is_settings(found):
            return found
    return None


def _is_settings(values: Any) -> bool:
    if not isinstance(values, dict):
        return False
    model, train = values.get("model"), values.get("train")
    if not isinstance(model, dict) or not isinstance(train, dict):
        return False
    return isinstance(model.get("name", ""), str) and isinstance(train.get("steps"), int)


def _metadata_path(folder: Path, step: int) -> Path:
    return folder / CHECKPOINTS / str(step) / METADATA / METADATA_FILE


def _checkpoint_steps(folder: Path) -> Iterator[int]:
    """The steps of all checkpoints, also of incomplete ones."""
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_dir():
        for path in checkpoints.iterdir():
            if is_step(path.name) and path.is_dir():
                yield int(path.name)


def _changed(folder: Path) -> float:
    paths = [folder / LOG, folder / CONFIG, folder / CHECKPOINTS]
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def _last(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return values[-1] if values else None
