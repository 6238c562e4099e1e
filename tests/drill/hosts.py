"""Two processes of one run, as on two hosts: one is lost, late, or different."""

import shutil
import socket
import time
from pathlib import Path

from in_process import same_losses
from tiny_run import Command, Drill, finish, newest_step
from trial import Trial

from moekit.training.checkpoint import Checkpoints
from moekit.training.layout import CHECKPOINTS

SECONDS_TO_END = 60  # within which the other process must have ended
LATE_SECONDS = 20
ON_TWO = ("--mesh", "data=2")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def flags(port: int, number: int) -> list[str]:
    place = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process-id", str(number)]
    return [*ON_TWO, *place]


def start_both(drill: Drill, workdir: Path) -> list[Command]:
    port = free_port()
    return [Command(drill, workdir, flags(port, number)) for number in range(2)]


def end_both(commands: list[Command], code: int = 0, line: str = "") -> str:
    """Wait for the end of a run; returns how it differs from an exit code and a last line."""
    problem = ""
    for command in commands:
        command.wait()
        problem = problem or command.problem(code, line)
    return problem


def one_killed(drill: Drill) -> list[Trial]:
    """Kill process 1: process 0 ends in time and names it; both are started again."""
    workdir = drill.empty_folder("one-killed")
    first, second = start_both(drill, workdir)
    first.wait_until_logged(10)
    second.kill()
    first.wait(SECONDS_TO_END)
    problem = first.problem(3, "error: process 1 is gone")
    lost = first.num_logged() - newest_step(workdir)
    problem = problem or end_both(start_both(drill, workdir))
    return [Trial("recovered", lost, same_losses(workdir, drill.reference), problem)]


def one_late(drill: Drill) -> list[Trial]:
    """Start process 1 later: both train."""
    workdir = drill.empty_folder("one-late")
    port = free_port()
    first = Command(drill, workdir, flags(port, 0))
    time.sleep(LATE_SECONDS)
    second = Command(drill, workdir, flags(port, 1))
    problem = end_both([first, second])
    return [Trial("recovered", 0, same_losses(workdir, drill.reference), problem)]


def one_different(drill: Drill) -> list[Trial]:
    """Give process 1 another learning rate: both end, and say in what they differ."""
    workdir = drill.empty_folder("one-different")
    port = free_port()
    first = Command(drill, workdir, flags(port, 0))
    second = Command(drill, workdir, [*flags(port, 1), "--learning-rate", "0.5"])
    problem = end_both([first, second], 2, "process 1 has another train than process 0")
    return [Trial("refused", problem=problem)]


def other_number(drill: Drill) -> list[Trial]:
    """Two processes continue the run of one, and one process that of two."""
    trials = []
    workdir = drill.empty_folder("two-then-one")
    problem = end_both(start_both(drill, workdir))
    keep_until(workdir, 52)
    problem = problem or finish(drill, workdir)
    trials.append(Trial("recovered", 0, same_losses(workdir, drill.reference), problem))
    workdir = drill.folder / "one-then-two"
    shutil.copytree(drill.reference, workdir)
    keep_until(workdir, 52)
    problem = end_both(start_both(drill, workdir))
    trials.append(Trial("recovered", 0, same_losses(workdir, drill.reference), problem))
    return trials


def keep_until(workdir: Path, step: int) -> None:
    """Delete the checkpoints after a step."""
    folder = workdir / CHECKPOINTS
    for saved in Checkpoints(folder).steps():
        if saved > step:
            shutil.rmtree(folder / str(saved))
