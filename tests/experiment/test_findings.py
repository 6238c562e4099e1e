"""Findings against numbers computed by hand from the cells' files."""

import json
from pathlib import Path

import numpy as np
import pytest

from moekit.experiment.cells import Cell, CellFolder
from moekit.experiment.design import read_design
from moekit.experiment.findings import final_findings, findings, findings_table
from moekit.experiment.report import _reruns
from moekit.experiment.study_figures import draw_findings

SETUPS = ("pretrained", "tuned", "direct")
TASKS = ("owned", "prefix", "mentioned")


def outcome(loss: float, score: float) -> dict:
    return {"cluster": "matching", "questions": 4, "loss": loss, "score": score, "metric": "m"}


@pytest.fixture
def cells(design_file, tmp_path: Path) -> CellFolder:
    """Random outcomes for three seeds of two models."""
    folder = CellFolder(read_design(design_file), tmp_path / "results")
    generator = np.random.default_rng(0)
    for model in ("sparse", "dense"):
        for setup in SETUPS:
            for seed in range(3):
                by_task = {task: outcome(*generator.random(2).tolist()) for task in TASKS}
                if setup == "direct":
                    record = {"tasks": {"owned": by_task["owned"]}}
                else:
                    rows = [{"step": 1, "valid_loss": 9.0}, {"step": 2, "loss": 1.0}]
                    rows.append({"step": 2, "valid_loss": float(generator.random())})
                    record = {"training": rows, "held_out": {"reporting": {"0": by_task}}}
                folder.write(Cell(model, setup, seed), record)
    return folder


def recorded(cells: CellFolder, model: str, setup: str, seed: int) -> dict:
    return json.loads((cells.path / f"{model}--{setup}--{seed}.json").read_text())


def mean(cells: CellFolder, model: str, setup: str, seed: int, name: str) -> float:
    tasks = recorded(cells, model, setup, seed)["held_out"]["reporting"]["0"].values()
    return sum(task[name] for task in tasks) / len(tasks)


def test_findings_are_the_means_over_the_files(cells):
    by_question = {}
    for found in findings(cells):
        assert (found.sparse, found.dense) == ("sparse", "dense")
        by_question[found.question.partition(":")[0], found.unit] = found
    seeds = range(3)

    gains = [
        (mean(cells, "sparse", "pretrained", s, "loss") - mean(cells, "sparse", "tuned", s, "loss"))
        - (mean(cells, "dense", "pretrained", s, "loss") - mean(cells, "dense", "tuned", s, "loss"))
        for s in seeds
    ]
    found = by_question["instruction tuning, zero-shot", "nats"]
    assert found.tasks == len(TASKS)
    np.testing.assert_allclose(found.effect.per_seed, gains)
    assert found.effect.mean == pytest.approx(np.mean(gains))

    rises = [
        (
            mean(cells, "sparse", "tuned", s, "score")
            - mean(cells, "sparse", "pretrained", s, "score")
        )
        - (
            mean(cells, "dense", "tuned", s, "score")
            - mean(cells, "dense", "pretrained", s, "score")
        )
        for s in seeds
    ]
    found = by_question["instruction tuning, zero-shot", "points"]
    np.testing.assert_allclose(found.effect.per_seed, 100 * np.array(rises))

    def last_loss(model: str, seed: int) -> float:
        return recorded(cells, model, "pretrained", seed)["training"][-1]["valid_loss"]

    found = by_question["pretraining", "nats"]
    expected = [last_loss("dense", s) - last_loss("sparse", s) for s in seeds]
    np.testing.assert_allclose(found.effect.per_seed, expected)

    def direct(model: str, seed: int) -> float:
        return recorded(cells, model, "direct", seed)["tasks"]["owned"]["loss"]

    found = by_question["finetuned directly", "nats"]
    expected = [direct("sparse", s) - direct("dense", s) for s in seeds]
    np.testing.assert_allclose(found.effect.per_seed, expected)
    assert len(by_question) == 4  # nothing was run after tuning
    assert "unclear" in str(findings_table(list(by_question.values())))
    assert final_findings(cells) == []


def test_the_seeds_for_the_smallest_effect_follow_from_the_spread(cells, design_file):
    text = design_file.read_text()
    design_file.write_text(text.replace("vocab_size", "smallest_effect = 0.1\nvocab_size", 1))
    design = CellFolder(read_design(design_file), cells.path.parent)
    for found in findings(design):
        if found.unit == "points":
            assert found.seeds_needed is None
            continue
        # (1.96 + 0.84)^2 sd^2 / effect^2 paired seeds
        assert found.seeds_needed == pytest.approx(7.85 * (found.effect.sd / 0.1) ** 2, abs=1)
    assert all(found.seeds_needed is None for found in findings(cells))


def test_only_seeds_that_both_models_have_are_compared(cells):
    (cells.path / "sparse--tuned--1.json").unlink()
    tuning = [each for each in findings(cells) if "instruction tuning" in each.question]
    assert {len(each.effect.per_seed) for each in tuning} == {2}
    (cells.path / "dense--pretrained--2.json").unlink()
    assert all("finetuned directly" not in each.question or each for each in findings(cells))
    assert not [each for each in findings(cells) if "instruction tuning" in each.question]


def test_cells_of_another_design_and_damaged_ones_are_named(cells, design_file):
    path = cells.path / "dense--tuned--0.json"
    text = path.read_text()
    for damaged in ("", "{}", "[]", '{"kind": "evaluation"}', text[:-40]):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"dense--tuned--0\.json is not a cell"):
            findings(cells)
    path.write_text(text)
    design_file.write_text(design_file.read_text().replace("questions = 4", "questions = 40"))
    changed = CellFolder(read_design(design_file), cells.path.parent)
    with pytest.raises(ValueError, match="recorded with another design"):
        findings(changed)


def test_a_rerun_is_held_against_the_published_seeds(cells, tmp_path):
    again = CellFolder(cells.design, tmp_path / "again")
    inside = {task: outcome(0.5, 0.5) for task in TASKS}
    outside = {task: outcome(9.0, 0.5) for task in TASKS}
    for seed, by_task in enumerate((inside, outside)):
        record = {"training": [], "held_out": {"reporting": {"0": by_task}}}
        again.write(Cell("dense", "tuned", seed), record)
    first, second = _reruns(again, cells)
    assert (first.within, second.within) == (True, False)
    losses = [mean(cells, "dense", "tuned", seed, "loss") for seed in range(3)]
    assert (first.low + first.high) / 2 == pytest.approx(np.mean(losses))


def test_figures_are_drawn_alike_for_the_same_cells(cells, tmp_path):
    names = {"findings-nats", "findings-points", "pretraining", "losses"}
    first = draw_findings(cells, None, tmp_path / "first")
    second = draw_findings(cells, None, tmp_path / "second")
    assert {path.name for path in first} == {f"small-{name}.png" for name in names}
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
