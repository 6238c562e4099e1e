"""The drill: causes faults while tiny runs train, and prints what became of the runs.

    python tests/drill --seed 1 --only kills,signals --short

Returns 1 if a run was not recovered or refused as designed.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = tempfile.mkdtemp(prefix="moekit-drill-")
# jax reads its environment when it is imported; the processes of the runs have the same
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{FOLDER}/compiled"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import damage
import hosts
import in_process
import interruptions
from tiny_run import Drill, finish, write_text
from trial import Record, Trial, table

from moekit.commands.output import print_messages

LONG = ("hosts",)  # in the short form only if --only names them
Cause = Callable[..., list[Trial]]
# names that --only selects, what the table says, and the functions
COMMANDS: tuple[tuple[str, str, Cause], ...] = (
    ("kills", "kill -9 during a save", interruptions.kills_during_saves),
    ("kills", "kill -9 between steps", interruptions.kills_at_steps),
    ("kills", "kill -9 while starting", interruptions.kills_at_starts),
    ("signals", "SIGTERM, SIGINT, SIGHUP", interruptions.signals),
    ("disk", "disk full", interruptions.disk_full),
    ("readonly", "read-only folder", interruptions.read_only),
    ("writers", "two runs in one folder", interruptions.two_runs),
    ("hosts", "one of two hosts killed", hosts.one_killed),
    ("hosts", "one of two hosts late", hosts.one_late),
    ("hosts", "one of two hosts different", hosts.one_different),
    ("hosts", "another number of processes", hosts.other_number),
)
IN_PROCESS: tuple[tuple[str, str, Cause], ...] = (
    ("damage", "damaged checkpoint", damage.kinds_of_damage),
    ("damage", "all checkpoints damaged", damage.all_damaged),
    ("damage", "broken line in the log", in_process.broken_log),
    ("bits", "one flipped bit", damage.flipped_bits),
    ("nan", "NaN", in_process.not_finite),
    ("stall", "stalled input", in_process.stalled_input),
    ("mesh", "another mesh on resume", in_process.other_mesh),
)


def parse_arguments() -> argparse.Namespace:
    names = sorted({name for name, _, _ in COMMANDS + IN_PROCESS})
    parser = argparse.ArgumentParser(description="Cause faults in tiny runs.")
    parser.add_argument("--seed", type=int, default=0, help="of moments, sizes and bits")
    choices = ", ".join(names)
    parser.add_argument("--only", default="", help=f"faults, such as kills,bits: {choices}")
    parser.add_argument("--short", action="store_true", help="a few faults of each kind")
    arguments = parser.parse_args()
    usual = [name for name in names if not (arguments.short and name in LONG)]
    arguments.only = arguments.only.split(",") if arguments.only else usual
    unknown = sorted(set(arguments.only) - set(names))
    if unknown:
        parser.error(f"unknown fault {unknown[0]}: choose from {choices}")
    return arguments


def record(fault: str, cause: Cause, *arguments: Any) -> Record:
    """Cause a fault; an exception of the drill itself is a problem as well."""
    start = time.monotonic()
    skipped = ""
    try:
        trials = cause(*arguments)
    except interruptions.NotPossible as error:
        trials, skipped = [], str(error)
    except Exception as error:
        trials = [Trial("failed", problem=f"{type(error).__name__}: {error}")]
    seconds = time.monotonic() - start
    print(f"{fault}: {seconds:.0f} s", flush=True)
    return Record(fault, trials, seconds, skipped)


def main() -> int:
    arguments = parse_arguments()
    # in the background, or under nohup, the runs would inherit that these are ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    print_messages()  # as the command line does
    drill = Drill(Path(FOLDER), arguments.seed, arguments.short)
    print(f"seed {drill.seed}, everything is written to {drill.folder}", flush=True)
    write_text(drill.text)
    commands = [each for each in COMMANDS if each[0] in arguments.only]
    in_this_process = [each for each in IN_PROCESS if each[0] in arguments.only]
    # one process at a time computes beside this one: machines with two cores
    with ThreadPoolExecutor(max_workers=1) as other:
        futures = []
        if commands:
            futures.append(other.submit(run_reference, drill))
        for _, fault, cause in commands:
            futures.append(other.submit(record, fault, cause, drill))
        records = []
        if in_this_process:
            runs = in_process.BeforeAndAfter(drill)
        for _, fault, cause in in_this_process:
            records.append(record(fault, cause, drill, runs))
        found = [future.result() for future in futures]
    records = [each for each in found if each is not None] + records
    print(table(records))
    problems = [problem for each in records for problem in each.problems()]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def run_reference(drill: Drill) -> None:
    """The run that nothing interrupts."""
    problem = finish(drill, drill.reference)
    if problem:
        raise RuntimeError(problem)


if __name__ == "__main__":
    sys.exit(main())
