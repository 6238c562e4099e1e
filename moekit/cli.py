"""moekit <verb>: the verbs are the functions in moekit/commands; tyro reads their signatures.

Only the module of the verb in use is imported, so that `moekit --help` starts without jax.
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from moekit.commands.environment import use_cpu_without_accelerator
from moekit.commands.output import escape, print_messages
from moekit.errors import unknown

VERBS = {
    "doctor": "Report versions, devices, the data found and what is missing.",
    "tour": "Execute the notebooks in their small setting.",
    "train": "Train a preset or a checkpoint on a mixture or a corpus.",
    "upcycle": "Make an MoE checkpoint from a dense one.",
    "convert": "Convert a checkpoint of transformers into one of moekit, or the reverse.",
    "generate": "Answer texts with a checkpoint.",
    "chat": "Ask a checkpoint questions, one a line; answers are streamed.",
    "eval": "Evaluate a checkpoint on suites and average them.",
    "trace": "Trace the routing of a checkpoint: balance, load, specialization.",
    "runs": "List, compare and verify runs: moekit runs --help.",
    "plan": "Compile a training step for a TPU slice: memory, time, collectives, verdict.",
    "data": "List, describe, fetch and check data: moekit data --help.",
    "bench": "Time a layer, a step, the input pipeline: moekit bench --help.",
    "study": "Run a study over models, setups and seeds, and print what it found.",
    "figures": "Redraw the figures of recorded results.",
}
FLAGS = ConstructorRegistry()


class EmptyPath(OSError):
    """A path flag got an empty text, which pathlib would read as the current folder."""


def _to_path(words: list[str]) -> Path:
    if not words[0].strip():
        raise EmptyPath("a path is empty: name a file or folder, or write . for the current one")
    return Path(words[0])


@FLAGS.primitive_rule
def _path_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Read paths as tyro does, but refuse an empty one."""
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_to_path,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def overview() -> str:
    """The text of `moekit --help`."""
    verbs = "\n".join(f"  {verb:8} {summary}" for verb, summary in VERBS.items())
    return (
        "usage: moekit VERB [FLAGS]\n\n"
        "FLAN-MoE in JAX: sharded Mixture-of-Experts layers, FLAN mixtures, routing analysis.\n\n"
        f"verbs:\n{verbs}\n\n"
        "`moekit VERB --help` lists the flags of a verb; every verb has --json.\n"
        "MOEKIT_TRACEBACK=1 shows the whole traceback of an error."
    )


def command(verb: str) -> Callable[..., int] | dict[str, Callable[..., int]]:
    """The function of a verb, or the functions of its own verbs."""
    if verb not in VERBS:
        raise unknown("verb", verb, VERBS)
    return importlib.import_module(f"moekit.commands.{verb}").COMMAND


def run(argv: list[str]) -> int:
    """Run a command line; returns the exit code.

    Raises:
      ValueError: an unknown verb, and what the verb raises.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0 if argv else 2
    verb, *flags = argv
    program = f"moekit {verb}"
    function = command(verb)
    if not isinstance(function, dict):
        return tyro.cli(function, prog=program, args=flags, registry=FLAGS)
    wants_help = flags[:1] in (["-h"], ["--help"])
    if verb == "bench" and not wants_help and (not flags or flags[0].startswith("-")):
        flags = ["layer", *flags]
    if verb == "runs" and not wants_help and (not flags or flags[0] not in function):
        flags = ["list", *flags]
    if flags and not wants_help and flags[0] not in function:
        raise unknown(f"verb of {verb}", flags[0], function)
    return tyro.extras.subcommand_cli_from_dict(
        function, prog=program, description=VERBS[verb], args=flags, registry=FLAGS
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command line and turn errors into one line on stderr.

    Returns:
      0; 1 where a check found faults; 2 for a mistake of the user's; 130, 143 or 129 when
      Ctrl-C, SIGTERM or SIGHUP interrupted it.
    """
    use_cpu_without_accelerator()
    print_messages()
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt as interrupt:
        print(f"stopped: {interrupt}" if str(interrupt) else "stopped", file=sys.stderr)
        return getattr(interrupt, "exit_code", 130)  # a run's: 128 + the signal
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (ValueError, OSError) as error:
        if os.environ.get("MOEKIT_TRACEBACK"):
            raise
        return _fail(str(error))
    except (RuntimeError, AssertionError):
        from moekit.commands.devices import missing_device

        problem = missing_device()
        if problem is None or os.environ.get("MOEKIT_TRACEBACK"):
            raise
        return _fail(problem)


def _fail(problem: str) -> int:
    line = " ".join(problem.split())
    print(f"error: {escape(line)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
