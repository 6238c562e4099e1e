"""Runs the cells of a study: training side by side, then the outcomes on held-out tasks.

The models that other setups start from are kept in the study's workdir. S is the number of seeds
that are trained side by side.
"""

import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moekit.config import ModelConfig
from moekit.evaluation.likelihood import Likelihood, likelihoods
from moekit.experiment.cells import FINAL, Cell, CellFolder
from moekit.experiment.design import PRETRAINED, Design, Setup, StudyModel
from moekit.experiment.environment import environment
from moekit.experiment.study_data import PackedStudyData, StudyData, StudyQuestion
from moekit.model.transformer import EncoderDecoder, with_config
from moekit.progress import ProgressBar
from moekit.training.model_files import load, save
from moekit.training.seeds import SeedRun, train_seeds

MEASURED = ("choosing", "reporting")  # sets of held-out tasks that every cell is evaluated on
DIGITS = 6  # significant digits of recorded numbers


class TimeIsUp(Exception):
    """The next cells would probably not be finished within the time that was given."""


class StudyRunner:
    """Runs the cells of a design.

    Args:
      out: the cells are written to out/<title>.
      workdir: tokenizer and models are kept in workdir/<title>.
      minutes: no cells are started that would probably take longer than this; None: no limit.
      packed: file with the data, as `pack_study` writes it; by default they are read where they
        are.

    Raises:
      FileNotFoundError: source "local" without a data folder; no such packed file.
      ValueError: a cluster or task that the data do not have.
    """

    def __init__(
        self,
        design: Design,
        out: Path,
        workdir: Path,
        *,
        minutes: float | None = None,
        packed: Path | None = None,
    ):
        self.design = design
        self.cells = CellFolder(design, out)
        self.workdir = workdir / design.title
        if packed:
            self.data = PackedStudyData(design, packed, self.workdir)
        else:
            self.data = StudyData(design, self.workdir)
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.seconds: dict[tuple[str, str], float] = {}  # that a group of cells took

    def run(self, *, seeds: int | None = None, only: Sequence[str] = ()) -> list[Path]:
        """Run what is missing; returns the files of the cells that were run.

        Args:
          seeds: number of seeds of each model; by default all.
          only: names of models and setups; by default all.

        Raises:
          ValueError: an unknown name, or a file of a cell of another design or of other data.
        """
        self._check_data()
        groups = self.cells.missing(seeds=seeds, only=only)
        written: list[Path] = []
        progress = ProgressBar(total=len(groups), desc=f"study {self.design.title}", unit="group")
        try:
            for model, setup, group in groups:
                written += self._run_group(self.design.models[model], setup, group)
                progress.update()
        except TimeIsUp as message:
            ProgressBar.write(str(message))
        finally:
            progress.close()
        return written

    def run_final(self) -> list[Path]:
        """Evaluate every pretrained and tuned model of a finished cell on the final held-out tasks.

        Cells that have been evaluated on them are not evaluated again.

        Raises:
          FileNotFoundError: a model is not in the workdir.
        """
        written = []
        for cell in self.cells.records():
            tuned = cell.setup == PRETRAINED or self.design.setups[cell.setup].stage == "tune"
            if not tuned or self.cells.read(cell, final=True):
                continue
            weights = self._weights(cell.model, cell.setup, cell.seed)
            if not weights.exists():
                raise FileNotFoundError(
                    f"{weights}: no model of seed {cell.seed}: use the workdir in which the study "
                    f"ran, or remove {cell.file_name} to train it again"
                )
            held_out = {FINAL: self._held_out(load(weights), FINAL)}
            described = self._describe(self.design.models[cell.model])
            record = described | {"held_out": held_out}
            written.append(self.cells.write(cell, record, final=True))
        return written

    def _check_data(self) -> None:
        """Check that the finished cells were run on the same data."""
        own = self.data.digest()
        for cell, record in self.cells.records().items():
            different = [name for name in own if record["data"].get(name) != own[name]]
            if different:
                raise ValueError(
                    f"{self.cells.path / cell.file_name} was recorded with another "
                    f"{' and '.join(different)}: use the same data, or another folder for the "
                    "results. The embedded data are those of the installed versions of packages"
                )

    def _run_group(self, model: StudyModel, setup: str, seeds: list[int]) -> list[Path]:
        """Train and measure the cells of some seeds; returns their files."""
        expected = self.seconds.get((model.name, setup), 0.0)
        if time.monotonic() + expected > self.deadline:
            raise TimeIsUp(f"time is up before {model.name}, {setup}, seeds {seeds}")
        start = time.monotonic()
        if setup != PRETRAINED and self.design.setups[setup].stage == "finetune":
            results = self._finetune(model, self.design.setups[setup], seeds)
        else:
            runs = self._train(model, setup, seeds)
            results = [self._measured(run) for run in runs]
        seconds = time.monotonic() - start
        self.seconds[model.name, setup] = seconds
        described = self._describe(model) | {"seconds": round(seconds / len(seeds), 1)}
        paths = []
        for seed, result in zip(seeds, results, strict=True):
            cell = Cell(model.name, setup, seed)
            paths.append(self.cells.write(cell, described | result))
        return paths

    def _train(self, model: StudyModel, setup: str, seeds: list[int]) -> list[SeedRun]:
        """Pretrain or tune the models of some seeds, and keep them in the workdir."""
        if setup == PRETRAINED:
            cfg = self._model_config(model)
            models = [EncoderDecoder(cfg, seed=seed) for seed in seeds]
            config, validation = self.design.pretrain, self.data.validation
        else:
            chosen = self.design.setups[setup]
            models = self._starting_models(model, chosen, seeds)
            config, validation = chosen.training, None
        runs = train_seeds(
            models,
            self.data.source(setup),
            config,
            seeds,
            tokenizer=self.data.tokenizer,
            eval_source=validation,
        )
        for seed, run in zip(seeds, runs, strict=True):
            keep(run.model, self._weights(model.name, setup, seed))
        return runs

    def _starting_models(
        self, model: StudyModel, setup: Setup, seeds: list[int]
    ) -> list[EncoderDecoder]:
        """The models that a setup starts from; those that the workdir lacks are trained again."""
        lacking = [
            seed for seed in seeds if not self._weights(model.name, setup.after, seed).exists()
        ]
        if lacking:
            self._train(model, setup.after, lacking)
        models = [load(self._weights(model.name, setup.after, seed)) for seed in seeds]
        return [with_config(each, each.cfg.replace(**setup.model)) for each in models]

    def _finetune(self, model: StudyModel, setup: Setup, seeds: list[int]) -> list[dict[str, Any]]:
        """Finetune on each task of a setup; the results of every seed."""
        results: list[dict[str, Any]] = [{} for _ in seeds]
        for task in setup.tasks:
            runs = train_seeds(
                self._starting_models(model, setup, seeds),
                self.data.source(setup.name, task),
                setup.training,
                seeds,
                tokenizer=self.data.tokenizer,
            )
            questions = self.data.questions(task, 0)
            for result, run in zip(results, runs, strict=True):
                (outcome,) = measure(run.model, questions).values()
                result[task] = {"training": _rounded(run.rows), **outcome}
        return [{"tasks": result} for result in results]

    def _measured(self, run: SeedRun) -> dict[str, Any]:
        """The log of a trained model, and its outcomes on the held-out tasks."""
        held_out = {name: self._held_out(run.model, name) for name in MEASURED}
        return {"training": _rounded(run.rows), "held_out": held_out}

    def _held_out(self, model: EncoderDecoder, name: str) -> dict[str, dict[str, Any]]:
        """Outcomes on a set of held-out tasks: by number of exemplars, then by task."""
        by_shots = {}
        for shots in self.design.held_out.shots:
            by_shots[str(shots)] = measure(model, self.data.questions(name, shots))
        return by_shots

    def _model_config(self, model: StudyModel) -> ModelConfig:
        return model.config.replace(
            tokenizer=str(self.data.tokenizer_path), vocab_size=self.data.tokenizer.vocab_size
        )

    def _weights(self, model: str, setup: str, seed: int) -> Path:
        """Where a trained model is kept: the digest separates the versions of a design."""
        return self.workdir / model / f"{setup}-{self.design.digest(model, setup)}" / str(seed)

    def _describe(self, model: StudyModel) -> dict[str, Any]:
        """What a cell's numbers depend on besides the design."""
        cfg = self._model_config(model)
        return {
            "parameters": cfg.num_parameters()._asdict(),
            "data": self.data.digest(),
            "environment": environment(),
        }


def keep(model: EncoderDecoder, folder: Path) -> None:
    """Save a model in a folder, which appears when all of it is written."""
    partial = folder.with_name(f"{folder.name}.partial")
    for former in (partial, folder):
        shutil.rmtree(former, ignore_errors=True)
    save(partial, model)
    partial.rename(folder)


def measure(model: EncoderDecoder, questions: Sequence[StudyQuestion]) -> dict[str, dict[str, Any]]:
    """The outcomes of a model by task.

    `loss` is the mean over the questions of the cross-entropy of the right answer (nats a token,
    end of sequence included). `score` is the share of questions whose right option is the most
    likely one (by mean log-probability of its tokens), or, without options, whose answer greedy
    decoding generates. `chance` is the score of picking options at random, `majority` that of
    always giving the most frequent answer.
    """
    found = likelihoods(
        model, [each.input_ids for each in questions], [each.options for each in questions]
    )
    by_task: dict[str, list[tuple[StudyQuestion, list[Likelihood]]]] = {}
    for question, of_options in zip(questions, found, strict=True):
        by_task.setdefault(question.task, []).append((question, of_options))
    outcomes = {}
    for task, results in by_task.items():
        losses, scores, chances = [], [], []
        answers: Counter[tuple[int, ...]] = Counter()
        for question, of_options in results:
            means = [each.log_prob / each.tokens for each in of_options]
            losses.append(-means[question.answer])
            if len(means) > 1:
                scores.append(int(np.argmax(means)) == question.answer)
                chances.append(1 / len(means))
            else:
                scores.append(of_options[0].greedy)
                chances.append(0.0)
            answers[tuple(question.options[question.answer])] += 1
        outcomes[task] = {
            "cluster": results[0][0].cluster,
            "questions": len(results),
            "loss": _digits(np.mean(losses)),
            "score": _digits(np.mean(scores)),
            "chance": _digits(np.mean(chances)),
            "majority": _digits(max(answers.values()) / len(results)),
        }
    return outcomes


def _digits(number: float | int | np.floating) -> float:
    return float(f"{number:.{DIGITS}g}")


def _rounded(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rounded = []
    for row in rows:
        values = {name: _digits(value) for name, value in row.items()}
        rounded.append(values | {"step": row["step"]})
    return rounded
