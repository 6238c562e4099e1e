"""moekit runs: list the runs in a folder, compare some of them, verify their checkpoints."""

import json as json_format
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro

from moekit.commands.output import AsJson, prepare_file, print_result
from moekit.table import Table
from moekit.train_config import train_settings
from moekit.training.metrics import Metrics
from moekit.training.run_folder import (
    RunSummary,
    find_runs,
    is_run,
    read_metrics,
    read_settings,
    summarize,
)

HEADINGS = ("run", "model", "state", "steps", "loss", "valid loss", "changed")


def list_runs(
    folder: Annotated[Path, tyro.conf.Positional] = Path("runs"), *, json: AsJson = False
) -> int:
    """List the runs in a folder: model, state, steps done and planned, last losses.

    A run is running, finished, stopped (the command that started it resumes it) or damaged.

    Args:
      folder: Folder of runs, or one run.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: name the folder of your runs")
    runs = find_runs(folder)
    if not runs:
        raise FileNotFoundError(f"{folder} holds no run: name a folder that moekit train wrote to")
    summaries = []
    for run in runs:
        name = folder.name if run == folder else str(run.relative_to(folder))
        summaries.append(summarize(run, name))
    result = [asdict(summary) for summary in summaries]
    print_result(result, str(runs_table(summaries)), json)
    return 0


def runs_table(summaries: list[RunSummary]) -> Table:
    """One row for each run, and a note for each problem."""
    rows = []
    notes = []
    for run in summaries:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed))
        steps = f"{run.steps_done}/{run.steps or '?'}"
        loss = _shown(run.loss)
        valid_loss = _shown(run.valid_loss)
        rows.append((run.name, run.model, run.state, steps, loss, valid_loss, changed))
        notes += [f"{run.name}: {problem}" for problem in run.problems]
    return Table(HEADINGS, rows, notes=notes, num_left=3)


def _shown(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def compare(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    *,
    key: str = "loss",
    out: Path = Path("runs.png"),
    json: AsJson = False,
) -> int:
    """Show where the configurations of runs differ, and plot their curves.

    Args:
      runs: Folders of two or more runs.
      key: Logged quantity that is plotted, such as loss, valid_loss or encoder_dropped.
      out: Figure to write: .png or .svg.
    """
    if len(runs) < 2:
        raise ValueError("a comparison needs two or more runs: moekit runs compare A B")
    if len(set(runs)) < len(runs):
        raise ValueError("a run is named twice: name each run once")
    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"--out is {out}: name a .png or .svg file")
    prepare_file(out)
    settings = {str(run): flatten(_settings(run)) for run in runs}
    metrics = {str(run): _metrics(run, key) for run in runs}
    from moekit.analysis.plots.results import plot_learning_curves
    from moekit.analysis.plots.style import save_figure

    save_figure(plot_learning_curves(metrics, key), out)
    differences = setting_differences(settings)
    last = {name: of_run.last(key) for name, of_run in metrics.items()}
    rows = [(setting, *map(_cell, values)) for setting, values in differences.items()]
    rows.append((f"last {key}", *(f"{value:.4f}" for value in last.values())))
    table = Table(("setting", *settings), rows, notes=[f"figure: {out}"])
    result = {"differences": differences, "last": last, "figure": str(out)}
    print_result(result, str(table), json)
    return 0


def _settings(run: Path) -> dict[str, Any]:
    if not is_run(run):
        raise FileNotFoundError(f"{run} holds no run: name a folder that moekit train wrote to")
    found = read_settings(run)
    if found is None:
        raise ValueError(f"the configuration of {run} cannot be read: leave that run out")
    return found


def _metrics(run: Path, key: str) -> Metrics:
    metrics = read_metrics(run)
    logged = metrics.keys()
    if key not in logged:
        known = ", ".join(sorted(logged)) or "nothing"
        raise ValueError(f"{run} did not log {key!r}, only {known}: choose another --key")
    _, values = metrics[key]
    if not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"{run} logged {key!r} that is no number: choose another --key")
    return metrics


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their names: those of the model and of training as model.NAME and train.NAME."""
    flat = {f"model.{name}": value for name, value in settings["model"].items()}
    flat |= {f"train.{name}": value for name, value in train_settings(settings).items()}
    for name in ("source", "tokenizer"):
        flat[f"{name} digest"] = settings.get(name)
    return flat


def setting_differences(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values of all runs for every setting that is not the same in all."""
    names: dict[str, None] = {}
    for of_run in settings.values():
        names |= dict.fromkeys(of_run)
    differences = {}
    for name in names:
        values = [of_run.get(name) for of_run in settings.values()]
        if any(value != values[0] for value in values):
            differences[name] = values
    return differences


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json_format.dumps(value)


def verify(folder: Annotated[Path, tyro.conf.Positional], *, json: AsJson = False) -> int:
    """Check every checkpoint of a run: exit code 1 if one is damaged. Nothing is changed.

    Args:
      folder: A run, a folder of checkpoints, or a folder of runs.
    """
    import jax

    # a run that is training has the accelerator
    jax.config.update("jax_platforms", "cpu")
    from moekit.training.verify import verify_all

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: name the folder of a run")
    verdicts = list(verify_all(folder))
    if not verdicts:
        raise FileNotFoundError(f"{folder} holds no checkpoint: name the folder of a run")
    damaged = [verdict for verdict in verdicts if verdict.damage]
    rows = []
    for verdict in verdicts:
        state = "damaged" if verdict.damage else "good"
        found = verdict.damage or f"{verdict.verified} verified"
        rows.append((verdict.folder, str(verdict.step), state, found))
    summary = f"{len(verdicts)} checkpoints, {len(damaged)} damaged"
    table = Table(("folder", "step", "state", "found"), rows, notes=[summary], num_left=4)
    print_result([asdict(verdict) for verdict in verdicts], str(table), json)
    return 1 if damaged else 0


COMMAND = {"list": list_runs, "compare": compare, "verify": verify}
