"""moekit study: the cells of a study that are missing, and what it found."""

from pathlib import Path
from typing import Annotated

import tyro

from moekit.commands.environment import keep_compiled_programs, keep_freed_memory
from moekit.commands.flags import names, require_at_least
from moekit.commands.output import AsJson, prepare_file, print_result


def study(
    file: Annotated[Path, tyro.conf.Positional],
    *,
    out: Path = Path("runs/studies"),
    workdir: Path = Path("runs/study-models"),
    seeds: int | None = None,
    only: str = "",
    minutes: float | None = None,
    final: bool = False,
    pack: Path | None = None,
    pack_rows: int = 100_000,
    packed: Path | None = None,
    json: AsJson = False,
) -> int:
    """Run what is missing of a study that a TOML file describes, and print what it found.

    The same command goes on with a study that was interrupted.

    Args:
      file: The design, such as assets/studies/nano.toml.
      out: Folder for the results: a small JSON file for each model, setup and seed.
      workdir: Folder for the tokenizer and the models that further setups start from.
      seeds: Run that many seeds of each model; by default all that the file names.
      only: Names of models and setups to run, separated by commas; by default all.
      minutes: Stop before cells that would not be finished within this time.
      final: Evaluate the finished models on the final held-out tasks. Do this once, at the end.
      pack: Write the study's data to this .npz file, for a machine without them, and run nothing.
      pack_rows: Rows of each training in such a file, at most; longer trainings repeat them.
      packed: Read the data from such a file.
    """
    require_at_least(1, seeds=seeds, pack_rows=pack_rows)
    require_at_least(0, minutes=minutes)
    keep_freed_memory()
    keep_compiled_programs()
    from moekit.experiment.report import pack as pack_data, study as run_study

    if pack:
        prepare_file(pack)
        num_bytes = pack_data(file, pack, workdir=workdir, max_rows=pack_rows)
        result = {"packed": str(pack), "bytes": num_bytes}
        print_result(result, f"{pack}: {num_bytes / 1e6:.1f} MB", json)
        return 0
    report = run_study(
        file,
        out=out,
        workdir=workdir,
        seeds=seeds,
        only=names(only),
        minutes=minutes,
        final=final,
        packed=packed,
    )
    print_result(report.to_dict(), str(report), json)
    return 0


COMMAND = study
