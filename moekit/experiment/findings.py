"""The findings of a study, computed from the cells that have been run.

Losses are in nats a token of the targets, scores in points (per cent of the questions). An effect
is positive where the paper's finding holds. S seeds, T tasks, N validations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from moekit.analysis.effects import (
    Effect,
    difference_of_gains,
    effect,
    precision_weights,
    seeds_needed,
)
from moekit.experiment.cells import FINAL, Cell, CellFolder
from moekit.experiment.design import (
    DIRECT,
    PRETRAINED,
    TUNED,
    TUNED_THEN_FINETUNED,
    Comparison,
)
from moekit.table import Table

REPORTING = "reporting"
LOSS, SCORE = "loss", "score"
UNITS = {LOSS: "nats", SCORE: "points"}


@dataclass(frozen=True)
class Finding:
    """One question to a pair of models, and its answer.

    Args:
      question: what is asked; a positive effect answers it with yes.
      unit: of the effect: nats (a token) or points.
      tasks: number of tasks that the effect is a mean over.
      seeds_needed: paired seeds that would show the design's smallest effect of interest.
    """

    question: str
    sparse: str
    dense: str
    unit: str
    tasks: int
    effect: Effect
    seeds_needed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"answer": self.effect.holds}


class Outcomes:
    """The outcomes of the cells that have been run, as arrays.

    Args:
      held_out: the set of held-out tasks: "reporting" or "final".
    """

    def __init__(self, cells: CellFolder, held_out: str = REPORTING):
        self.cells = cells
        self.name = held_out
        self.records = cells.records(final=held_out == FINAL)

    @property
    def shots(self) -> tuple[int, ...]:
        return self.cells.design.held_out.shots

    @property
    def tuned_setups(self) -> list[str]:
        """The setups of the instruction stage, whose models are measured on held-out tasks."""
        setups = self.cells.design.setups.values()
        return [setup.name for setup in setups if setup.stage == "tune"]

    def seeds(self, model: str, setup: str) -> list[int]:
        """The seeds for which a cell has been run."""
        return self.common_seeds((model, setup))

    def validation_curve(self, model: str) -> tuple[Int[ndarray, "N"], Float[ndarray, "S N"]]:
        """The steps of pretraining at which the validation loss was measured, and the losses."""
        curves = []
        for seed in self.seeds(model, PRETRAINED):
            rows = self.records[Cell(model, PRETRAINED, seed)]["training"]
            measured = [row for row in rows if "valid_loss" in row]
            curves.append([row["valid_loss"] for row in measured])
        steps = [int(row["step"]) for row in measured]
        return np.array(steps), np.array(curves)

    def common_seeds(self, *cells: tuple[str, str]) -> list[int]:
        """The seeds for which all of these (model, setup) have been run."""
        found = [
            {cell.seed for cell in self.records if (cell.model, cell.setup) == each}
            for each in cells
        ]
        return sorted(set.intersection(*found))

    def validation_loss(
        self, model: str, setup: str, seeds: Sequence[int]
    ) -> Float[ndarray, "S 1"]:
        """The last validation loss of each seed's training."""
        losses = []
        for seed in seeds:
            rows = self.records[Cell(model, setup, seed)]["training"]
            losses.append([row["valid_loss"] for row in rows if "valid_loss" in row][-1])
        return np.array(losses)[:, None]

    def held_out(
        self, model: str, setup: str, seeds: Sequence[int], shots: int, outcome: str
    ) -> Float[ndarray, "S T"]:
        """An outcome of each seed on the held-out tasks."""
        return _outcomes(
            [
                self.records[Cell(model, setup, seed)]["held_out"][self.name][str(shots)]
                for seed in seeds
            ],
            outcome,
        )

    def finetuned(
        self, model: str, setup: str, seeds: Sequence[int], outcome: str
    ) -> Float[ndarray, "S T"]:
        """An outcome of each seed on the tasks that it was finetuned on."""
        tasks = [self.records[Cell(model, setup, seed)]["tasks"] for seed in seeds]
        return _outcomes(tasks, outcome)


def _outcomes(
    by_seed: Sequence[Mapping[str, Mapping[str, Any]]], outcome: str
) -> Float[ndarray, "S T"]:
    names = sorted(by_seed[0])
    values = np.array([[tasks[name][outcome] for name in names] for tasks in by_seed])
    return 100 * values if outcome == SCORE else values


def findings(cells: CellFolder, pilot: CellFolder | None = None) -> list[Finding]:
    """What the study found, for every comparison of its design that has two seeds or more.

    Args:
      pilot: cells of a study of the same held-out tasks with other seeds; the tasks of the
        difference of gains are then weighted by their precision there.
    """
    outcomes = Outcomes(cells)
    weights = _pilot_weights(pilot) if pilot else None
    found: list[Finding] = []
    for pair in cells.design.comparisons:
        found += _premise(outcomes, pair)
        found += _finetuning(outcomes, pair)
        found += _tuning(outcomes, pair, weights)
    smallest = cells.design.smallest_effect
    if smallest is None:
        return found
    return [_with_seeds_needed(each, smallest) for each in found]


def final_findings(cells: CellFolder) -> list[Finding]:
    """The differences of gains on the final held-out tasks."""
    outcomes = Outcomes(cells, FINAL)
    found: list[Finding] = []
    for pair in cells.design.comparisons:
        found += _tuning(outcomes, pair, None)
    return found


def _premise(outcomes: Outcomes, pair: Comparison) -> list[Finding]:
    """Whether the sparse model is better after pretraining."""
    seeds = outcomes.common_seeds((pair.sparse, PRETRAINED), (pair.dense, PRETRAINED))
    if len(seeds) < 2:
        return []
    dense = outcomes.validation_loss(pair.dense, PRETRAINED, seeds)
    sparse = outcomes.validation_loss(pair.sparse, PRETRAINED, seeds)
    question = "pretraining: is the sparse model's validation loss lower?"
    return [_finding(question, pair, LOSS, effect(dense - sparse), tasks=1)]


def _finetuning(outcomes: Outcomes, pair: Comparison) -> list[Finding]:
    """The paper's setups (i) and (iii): which model is better after finetuning on a task."""
    found = []
    directions = {
        DIRECT: ("finetuned directly: is the sparse model worse?", 1),
        TUNED_THEN_FINETUNED: ("finetuned after tuning: is the sparse model better?", -1),
    }
    for setup, (question, sign) in directions.items():
        seeds = outcomes.common_seeds((pair.sparse, setup), (pair.dense, setup))
        if len(seeds) < 2:
            continue
        sparse = outcomes.finetuned(pair.sparse, setup, seeds, LOSS)
        dense = outcomes.finetuned(pair.dense, setup, seeds, LOSS)
        values = sign * (sparse - dense)
        found.append(_finding(question, pair, LOSS, effect(values), tasks=values.shape[1]))
    return found


def _tuning(
    outcomes: Outcomes,
    pair: Comparison,
    weights: Sequence[float] | None,
) -> list[Finding]:
    """The paper's setup (ii): whether the sparse model gains more from instruction tuning."""
    needed = _before_and_after(pair)
    seeds = outcomes.common_seeds(*needed)
    if len(seeds) < 2:
        return []
    found = []
    for outcome in (LOSS, SCORE):
        for count in outcomes.shots:
            values = [outcomes.held_out(*each, seeds, count, outcome) for each in needed]
            if outcome == SCORE:
                values = [-each for each in values]  # a gain is a fall of the loss or of the errors
            result = difference_of_gains(*values, weights if outcome == LOSS else None)
            how = "zero-shot" if count == 0 else f"{count}-shot"
            question = f"instruction tuning, {how}: does the sparse model gain more?"
            found.append(_finding(question, pair, outcome, result, tasks=values[0].shape[1]))
    return found


def _before_and_after(pair: Comparison) -> list[tuple[str, str]]:
    """The cells of a difference of gains: before and after tuning, the sparse model first."""
    return [(model, setup) for model in (pair.sparse, pair.dense) for setup in (PRETRAINED, TUNED)]


def _finding(question: str, pair: Comparison, outcome: str, result: Effect, tasks: int) -> Finding:
    return Finding(question, pair.sparse, pair.dense, UNITS[outcome], tasks, result)


def _with_seeds_needed(found: Finding, smallest: float) -> Finding:
    """A finding in nats with the number of seeds for the smallest effect of interest."""
    if found.unit != UNITS[LOSS] or not found.effect.sd > 0:
        return found
    return replace(found, seeds_needed=seeds_needed(found.effect.sd, smallest))


def _pilot_weights(pilot: CellFolder) -> list[float]:
    """The precision of each reporting task's difference of gains in a pilot."""
    outcomes = Outcomes(pilot)
    needed = _before_and_after(pilot.design.comparisons[0])
    seeds = outcomes.common_seeds(*needed)
    sparse_before, sparse_after, dense_before, dense_after = (
        outcomes.held_out(*each, seeds, 0, LOSS) for each in needed
    )
    return precision_weights((sparse_before - sparse_after) - (dense_before - dense_after))


def findings_table(found: Sequence[Finding]) -> Table:
    """One row for each finding; `needed` are the seeds for the smallest effect of interest."""
    rows = []
    for each in found:
        result = each.effect
        digits = 3 if each.unit == UNITS[LOSS] else 1
        number = "{:+." + str(digits) + "f}"
        rows.append(
            (
                f"{each.sparse} vs {each.dense}",
                each.question,
                f"{number.format(result.mean)} {each.unit}",
                f"{number.format(result.low)} to {number.format(result.high)}",
                f"{result.sd:.{digits}f}",
                str(len(result.per_seed)),
                "" if each.seeds_needed is None else str(each.seeds_needed),
                result.holds,
            )
        )
    headings = ("models", "question", "effect", "95 % interval", "sd", "seeds", "needed", "answer")
    return Table(headings, rows, num_left=2)
