"""Figures of recorded results: studies and evaluations, read from their JSON files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moekit.analysis import plots
from moekit.analysis.specialization import Specialization
from moekit.data.paths import require_file, require_file_name
from moekit.training.metrics import Metrics

# of the recorded pretraining over seeds
PRETRAINING_STEP = 1332
PRETRAINED_MODELS = {
    "dense": "dense (t5-nano)",
    "one": "switch with one expert",
    "switch": "switch, 8 experts",
    "nodrop": "switch, nothing dropped",
    "hash_nodrop": "hash router, nothing dropped",
    "top2": "top-2 of half width",
    "st": "st-nano",
    "encoder_only": "switch, sparse in the encoder only",
    "wide": "dense with all experts' parameters",
}
LOSS = "validation loss (nats a target token)"
DAMAGED = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)
SHARES = ("score", "low", "high", "chance", "majority")
MAX_BYTES = 64 << 20  # of a record


def figures(
    results: Path = Path("assets/results"), out: Path = Path("assets/figures")
) -> list[Path]:
    """Draw the figures of every record again: studies, evaluations, pretraining over seeds.

    Raises:
      FileNotFoundError: the folder has no results.
      ValueError: a file is not a record, a damaged one, or one of more than 64 MiB; the message
        names it.
    """
    paths: list[Path] = []
    for path in sorted(Path(results).glob("*.json")):
        require_file(path, MAX_BYTES)
        try:
            record = json.loads(path.read_text())
            if record["kind"] == "study":
                paths += draw_study(record, path.stem, Path(out))
            elif record["kind"] == "evaluation":
                paths.append(draw_evaluation(record, path.stem, Path(out)))
            elif record["kind"] == "pretraining":
                figure = plot_recorded_seeds(record, PRETRAINING_STEP)
                paths.append(plots.save_figure(figure, Path(out) / f"{path.stem}.png"))
        except DAMAGED as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"{path} is not a record of `moekit study` or `moekit eval --out`, or is damaged "
                f"({problem[:200]}): record it again or remove it"
            ) from None
    if not paths:
        raise FileNotFoundError(f"no recorded study in {results}: `moekit study` makes one")
    return paths


def draw_evaluation(record: dict[str, Any], name: str, folder: Path) -> Path:
    """Draw the scores that `moekit eval --out` recorded; returns the file."""
    if not isinstance(record["model"], str) or not record["suites"]:
        raise ValueError("it has no model's name, or no suites")
    _check_scores(record["suites"])
    average = record["normalised_average"]["score"]
    title = f"{record['model']}, normalised average {average:.1%}"
    figure = plots.plot_scores({record["model"]: record["suites"]}, title)
    return plots.save_figure(figure, folder / f"{name}-scores.png")


def _check_scores(suites: list[dict[str, Any]]) -> None:
    """Check that the scores of a record are shares."""
    for suite in suites:
        for row in (suite["mean"], *suite["tasks"]):
            for name in SHARES:
                if not 0 <= row[name] <= 1:
                    raise ValueError(f"{name} of {row['task']!r} is {row[name]}, not a share")


def seed_losses(record: dict[str, Any], step: int) -> dict[str, list[float]]:
    """Validation losses of the seeds of each model of a pretraining record after a step."""
    losses = {}
    for variant, name in PRETRAINED_MODELS.items():
        for run in record["runs"]:
            if run["variant"] == variant and run["setting"] == "base":
                after = [each for each in run["checkpoints"] if each["step"] == step]
                losses[name] = after[0]["valid_loss"]
    return losses


def plot_recorded_seeds(record: dict[str, Any], step: int) -> Figure:
    """The validation losses of a pretraining record after a step, one dot per seed."""
    losses = seed_losses(record, step)
    dense = np.mean(losses[PRETRAINED_MODELS["dense"]])
    switch = np.mean(losses[PRETRAINED_MODELS["switch"]])
    wide = np.mean(losses[PRETRAINED_MODELS["wide"]])
    title = (
        f"Step {step:,}, mean difference from dense:\n{switch - dense:+.3f} nats for switch, "
        f"{wide - dense:+.3f} nats with all experts' parameters for every token"
    )
    return plots.plot_seeds(losses, LOSS, title)


def draw_study(results: dict[str, Any], name: str, folder: Path) -> list[Path]:
    """Draw everything that a study recorded; returns the files, whose names begin with `name`."""
    for family in results["models"]:
        require_file_name(family, "the model name")
    prefix = str(folder / name)
    paths = [
        plots.save_figure(_pretraining(results), f"{prefix}-pretraining.png"),
        plots.save_figure(_tuning(results), f"{prefix}-tuning.png"),
        plots.save_figure(_scores(results), f"{prefix}-scores.png"),
    ]
    for family, model in results["models"].items():
        for stage in ("before", "after"):
            routing = model[f"routing_{stage}"]
            if routing:
                title = f"{model['config']['name']}, {stage} tuning"
                load, domains = _load(routing, title), _domains(routing, title)
                paths.append(plots.save_figure(load, f"{prefix}-{family}-load-{stage}.png"))
                paths.append(plots.save_figure(domains, f"{prefix}-{family}-domains-{stage}.png"))
    return paths


def _curves(results: dict[str, Any], stage: str) -> dict[str, Metrics]:
    """The log of a stage of every model, by the model's name."""
    models = results["models"].values()
    return {model["config"]["name"]: Metrics(rows=model[stage]) for model in models}


def _pretraining(results: dict[str, Any]) -> Figure:
    entropy = [("unigram entropy of the targets", float(results["unigram_entropy"]))]
    curves = _curves(results, "pretrain")
    return plots.plot_learning_curves(curves, "valid_loss", LOSS, "Pretraining", entropy)


def _tuning(results: dict[str, Any]) -> Figure:
    curves = _curves(results, "tune")
    return plots.plot_learning_curves(curves, "valid_loss", LOSS, "Instruction tuning")


def _scores(results: dict[str, Any]) -> Figure:
    groups = {}
    for stage in ("before", "after"):
        for model in results["models"].values():
            _check_scores(model[stage])
            groups[f"{model['config']['name']}, {stage} tuning"] = model[stage]
    return plots.plot_scores(groups, "Zero-shot, before and after instruction tuning")


def _load(routing: dict[str, Any], title: str) -> Figure:
    loads = {stack: np.array(load) for stack, load in routing["load"].items()}
    return plots.plot_load(loads, title)


def _domains(routing: dict[str, Any], title: str) -> Figure:
    domains = routing["domains"]
    result = Specialization(
        labels=tuple(domains["labels"]),
        share=np.array(domains["share"]),
        low=np.array(domains["low"]),
        high=np.array(domains["high"]),
        chance=np.array(domains["chance"]),
        p_value=np.array(domains["p_value"]),
    )
    return plots.plot_specialization(result, title)
