"""Faults from outside of a run's process: kills, signals, disks, a second writer."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tiny_run import (
    SAVE_EVERY,
    Command,
    Drill,
    damage_found,
    finish,
    is_saving,
    newest_step,
    rows,
    same_run,
)
from trial import Trial

KILLS_OF_A_RUN = 5
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
MAX_ATTEMPTS = 5
BLOCK = 2**16  # bytes


class NotPossible(Exception):
    """This system does not let the drill cause a fault."""


# Kills


def kills_during_saves(drill: Drill) -> list[Trial]:
    return kills(drill, "save")


def kills_at_steps(drill: Drill) -> list[Trial]:
    return kills(drill, "step")


def kills_at_starts(drill: Drill) -> list[Trial]:
    return kills(drill, "start")


def kills(drill: Drill, moment: str) -> list[Trial]:
    """Kill runs (SIGKILL) again and again, then let them end."""
    random_numbers = drill.random(moment)
    num_runs, num_kills = (1, 1) if drill.short else (2, KILLS_OF_A_RUN)
    trials = []
    for number in range(num_runs):
        workdir = drill.empty_folder(f"killed-{moment}-{number}")
        found = [kill_at(drill, workdir, moment, random_numbers) for _ in range(num_kills)]
        trials += compare_with_reference(drill, workdir, found)
    return trials


def compare_with_reference(drill: Drill, workdir: Path, trials: list[Trial]) -> list[Trial]:
    """Let an interrupted run end; the trials with what came of it."""
    problem = finish(drill, workdir) or damage_found(workdir)
    equal = same_run(workdir, drill.reference)
    return [replace(trial, equal=equal, problem=trial.problem or problem) for trial in trials]


def kill_at(drill: Drill, workdir: Path, moment: str, random_numbers: random.Random) -> Trial:
    """Start or resume a run and kill it."""
    for _ in range(MAX_ATTEMPTS):
        command = Command(drill, workdir)
        wait_for_moment(command, moment, random_numbers)
        if not command.is_running():
            return Trial("not killed", problem=f"it ended before: {command.last_line()}")
        command.kill()
        if moment != "save" or is_saving(workdir):
            break
    else:
        return Trial("not killed", problem=f"in {MAX_ATTEMPTS} attempts no kill met a save")
    logged = rows(workdir)
    lost = max(0, len(logged) - newest_step(workdir))
    problem = ""
    if lost >= 2 * SAVE_EVERY:
        problem = f"{lost} steps lost, with a checkpoint every {SAVE_EVERY}"
    return Trial("recovered", lost, problem=problem)


def wait_for_moment(command: Command, moment: str, random_numbers: random.Random) -> None:
    if moment == "start":
        time.sleep(random_numbers.uniform(0.5, 8))
        return
    resumed = newest_step(command.workdir)
    if not command.wait_until_logged(resumed + random_numbers.randint(1, 6)):
        return
    if moment == "save":
        while command.is_running() and not is_saving(command.workdir):
            time.sleep(0.001)
        time.sleep(random_numbers.uniform(0, 0.05))


# Signals


def signals(drill: Drill) -> list[Trial]:
    """Stop one run by one signal after the other, and resume it each time."""
    random_numbers = drill.random("signals")
    numbers = list(SIGNALS) * (1 if drill.short else 2)
    random_numbers.shuffle(numbers)
    workdir = drill.empty_folder("stopped")
    found = [stop_by(drill, workdir, number, random_numbers) for number in numbers]
    return compare_with_reference(drill, workdir, found)


def stop_by(drill: Drill, workdir: Path, number: int, random_numbers: random.Random) -> Trial:
    command = Command(drill, workdir)
    resumed = newest_step(workdir)
    command.wait_until_logged(resumed + random_numbers.randint(1, 6))
    command.process.send_signal(number)
    command.wait()
    saved = newest_step(workdir)
    problem = command.problem(SIGNALS[number], f"stopped: saved at step {saved}")
    return Trial("recovered", len(rows(workdir)) - saved, problem=problem)


# Disks


@contextmanager
def small_disk(drill: Drill, megabytes: int) -> Iterator[Path]:
    """An empty file system in memory."""
    folder = drill.empty_folder("disk")
    options = f"size={megabytes}m"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise NotPossible("no right to mount a tmpfs here") from None
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk has no room for a checkpoint, but for rows of the log."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(BLOCK))
        except OSError:
            file.truncate(max(0, path.stat().st_size - BLOCK))


def disk_full(drill: Drill) -> list[Trial]:
    """Fill the disk while runs train: one stops and is resumed, one continues."""
    with small_disk(drill, 12) as disk:
        trials = [full_and_stop(drill, disk / "stop", disk / "filler")]
        shutil.rmtree(disk / "stop")
        if not drill.short:
            trials.append(full_and_continue(drill, disk / "continue", disk / "filler"))
        return trials


def full_and_stop(drill: Drill, workdir: Path, filler: Path) -> Trial:
    command = Command(drill, workdir)
    command.wait_until_logged(10)
    fill(filler)
    command.wait()
    problem = command.problem(2, "error: ") or damage_found(workdir)
    lost = len(rows(workdir)) - newest_step(workdir)
    filler.unlink()
    problem = problem or finish(drill, workdir)
    return Trial("recovered", lost, same_run(workdir, drill.reference), problem)


def full_and_continue(drill: Drill, workdir: Path, filler: Path) -> Trial:
    command = Command(drill, workdir, ["--on-save-error", "continue"])
    command.wait_until_logged(10)
    fill(filler)
    while command.is_running() and "training continues" not in command.output():
        time.sleep(0.05)
    filler.unlink()
    command.wait()
    problem = command.problem(0)
    return Trial("recovered", 0, same_run(workdir, drill.reference), problem)


def read_only(drill: Drill) -> list[Trial]:
    """Start a run in a folder that cannot be written, and resume one there."""
    with small_disk(drill, 12) as disk:
        shutil.copytree(drill.reference, disk / "run")
        os.sync()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        trials = []
        for workdir in (disk / "run", disk / "new"):
            command = Command(drill, workdir, ["--steps", "70"])
            command.wait()
            trials.append(Trial("refused", problem=command.problem(2, "Read-only file system")))
        return trials


# Two writers


def two_runs(drill: Drill) -> list[Trial]:
    """Start a second run in the folder of one that trains."""
    workdir = drill.empty_folder("shared")
    first = Command(drill, workdir)
    first.wait_until_logged(2)
    second = Command(drill, workdir)
    second.wait()
    problem = second.problem(2, f"is in use by process {first.process.pid} on ")
    first.wait()
    problem = problem or first.problem(0) or damage_found(workdir)
    return [Trial("refused", 0, same_run(workdir, drill.reference), problem)]
