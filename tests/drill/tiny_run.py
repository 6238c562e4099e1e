"""The run that the drill interrupts: a tiny model, a text file, and its command line."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.training.checkpoint import Checkpoints
from moekit.training.verify import verify_all

STEPS = 60
SAVE_EVERY = 4
MAX_SECONDS = 240  # of any command; a longer one hangs
SIZES = ("d_model=16", "d_ff=32", "encoder_layers=1", "decoder_layers=1")
TIMES = ("tokens_per_second", "time", "seconds")  # what differs between equal runs


@dataclass(frozen=True)
class Drill:
    """Where and how the drill works.

    Args:
      folder: in which it writes everything.
      short: a few faults of each kind.
    """

    folder: Path
    seed: int
    short: bool

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def reference(self) -> Path:
        """The folder of the run that was never interrupted."""
        return self.folder / "uninterrupted"

    def random(self, name: str) -> random.Random:
        """Random numbers of one fault: the same with every order of faults."""
        return random.Random(f"{self.seed} {name}")

    def empty_folder(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def write_text(path: Path) -> None:
    lines = []
    for number in range(400):
        lines.append(f"Number {number} is followed by {number + 1}, then by {number + 2}.\n")
    path.write_text("".join(lines))


class Command:
    """A running `moekit train`.

    Args:
      workdir: of the run.
      flags: further ones.
      devices: number of virtual devices.
    """

    def __init__(
        self, drill: Drill, workdir: Path, flags: Sequence[str] = (), *, devices: int = 1
    ) -> None:
        self.workdir = workdir
        arguments = [sys.executable, "-m", "moekit.cli", "train", "--workdir", str(workdir)]
        arguments += ["--preset", "switch-nano", "--corpus", str(drill.text)]
        for size in SIZES:
            arguments += ["--set", size]
        arguments += ["--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--keep", "3"]
        arguments += ["--log-every", "1", "--batch-tokens", "384"]
        arguments += ["--input-length", "32", "--target-length", "16"]
        self._output = drill.folder / f"{workdir.name}-{time.monotonic_ns()}.txt"
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [*arguments, *flags],
                env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_running(self) -> bool:
        return self.process.poll() is None

    def output(self) -> str:
        return self._output.read_text()

    def last_line(self) -> str:
        lines = self.output().strip().splitlines()
        return lines[-1] if lines else ""

    def num_logged(self) -> int:
        return len(logged_steps(self.workdir))

    def wait_until_logged(self, count: int) -> bool:
        """Wait until the log has so many rows; false if the run ended before."""
        while self.num_logged() < count:
            if not self.is_running():
                return False
            time.sleep(0.005)
        return True

    def wait(self, seconds: float = MAX_SECONDS) -> int:
        """The exit code; a process that hangs is killed."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"no end after {seconds:g} s: {self.last_line()}") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def problem(self, code: int, line: str = "") -> str:
        """How the end of the process differs from an exit code and a text in its last line."""
        found = self.process.returncode
        if "Traceback" in self.output():
            return f"a traceback: {self.last_line()}"
        if found != code:
            return f"exit code {found} instead of {code}: {self.last_line()}"
        if line not in self.last_line():
            return f"{line!r} is not in {self.last_line()!r}"
        return ""


def finish(drill: Drill, workdir: Path, flags: Sequence[str] = ()) -> str:
    """Run the command to its end; returns the problem."""
    command = Command(drill, workdir, flags)
    command.wait()
    return command.problem(0)


def logged_steps(workdir: Path) -> list[int]:
    """The steps of all complete rows of the log."""
    return [row["step"] for row in rows(workdir)]


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of the log, without what differs between equal runs."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # it is being written
        if "loss" in row:
            found.append({key: value for key, value in row.items() if key not in TIMES})
    return found


def newest_step(workdir: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    return Checkpoints(workdir / "checkpoints").latest() or 0


def is_saving(workdir: Path) -> bool:
    """Whether a part of a checkpoint that is not complete is in the folder."""
    return any((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def same_run(workdir: Path, reference: Path) -> bool:
    """Whether two runs have equal logs and equal arrays in their last checkpoints."""
    return rows(workdir) == rows(reference) and last_digests(workdir) == last_digests(reference)


def last_digests(workdir: Path) -> dict[str, Any]:
    checkpoints = Checkpoints(workdir / "checkpoints")
    metadata = checkpoints.read_metadata(checkpoints.latest())
    return metadata["manifest"]["arrays"]


def damage_found(workdir: Path) -> str:
    """What `moekit runs verify` says of the first damaged checkpoint; empty if all are good."""
    for verdict in verify_all(workdir):
        if verdict.damage:
            return f"checkpoint {verdict.step}: {verdict.damage}"
    return ""
