"""A small study, run in parts."""

import json
from dataclasses import replace

import numpy as np
import pytest

import moekit as mk
from moekit.data.packed_rows import PackedRows
from moekit.experiment.cells import Cell
from moekit.experiment.design import read_design
from moekit.experiment.report import pack
from moekit.experiment.runner import StudyRunner
from moekit.experiment.study_data import PackedStudyData, StudyData, shuffled_targets


def test_no_held_out_task_is_in_the_mixture(design_file, tmp_path):
    design = read_design(design_file)
    data = StudyData(design, tmp_path)
    trained = {task.cluster for task in data.mixture.tasks}
    assert not trained.intersection(design.held_out.clusters)
    sets = [data.held_out_tasks(name) for name in ("choosing", "reporting", "final")]
    names = [task.name for tasks in sets for task in tasks]
    assert len(set(names)) == len(names) > 3
    assert not {task.name for task in data.mixture.tasks}.intersection(names)
    with pytest.raises(ValueError, match="unknown set of held-out tasks"):
        data.questions("test", 0)


def test_unknown_clusters_and_tasks_are_named(design_file, tmp_path):
    text = design_file.read_text()
    for old, new, message in (
        ('final = ["cloze"]', 'final = ["close"]', "did you mean 'cloze'"),
        ('tasks = ["owned"]', 'tasks = ["ownd"]', "did you mean 'owned'"),
        ('stage = "tune"', 'stage = "tune"\nmixture_tasks = 99', "mixture_tasks is 99"),
    ):
        design_file.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=message):
            StudyData(read_design(design_file), tmp_path)


def test_shuffled_targets_keep_their_words_and_lose_their_questions():
    tasks = {task.name: task for task in mk.flan_mixture("builtin").tasks}
    for name in ("word_problem", "owned"):
        task = tasks[name]
        examples, shuffled = task.examples("train"), shuffled_targets(task).examples("train")
        kept = np.mean([a.answer == b.answer for a, b in zip(examples, shuffled, strict=True)])
        assert kept < 0.6
        assert [each.fields for each in examples] == [each.fields for each in shuffled]
        if not examples[0].options:
            answers = sorted(each.answer for each in examples)
            assert answers == sorted(each.answer for each in shuffled)
        assert shuffled_targets(task).examples("valid") == task.examples("valid")
        # the same in every process, so that a study can be continued
        assert [each.answer for each in shuffled_targets(task).examples("train")] == [
            each.answer for each in shuffled
        ]


def test_a_study_is_run_in_parts_and_says_what_it_found(design_file, tmp_path):
    out, workdir = tmp_path / "out", tmp_path / "models"
    settings = {"out": out, "workdir": workdir}

    none = mk.study(design_file, minutes=0.0, **settings)
    assert not none.written and none.missing == 21 and not none.findings

    first = mk.study(design_file, only=["pretrained"], seeds=2, **settings)
    assert [path.name for path in first.written] == [
        f"{model}--pretrained--{seed}.json" for model in ("dense", "sparse") for seed in (0, 1)
    ]
    # tuning needs pretrained models: one is here, one is trained again
    runner = StudyRunner(read_design(design_file), out, workdir)
    weights = runner._weights("sparse", "pretrained", 0)
    before = mk.load(weights)
    for path in sorted(weights.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    weights.rmdir()
    second = mk.study(design_file, only=["sparse", "tuned", "direct"], seeds=2, **settings)
    assert [path.name for path in second.written] == [
        f"sparse--{setup}--{seed}.json" for setup in ("direct", "tuned") for seed in (0, 1)
    ]
    again = mk.load(weights)
    for one, other in zip(parameters(before), parameters(again), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)

    third = mk.study(design_file, only=["dense", "tuned"], seeds=2, final=True, **settings)
    assert third.missing == 21 - 10
    questions = {found.question for found in third.findings}
    assert {question.partition(":")[0] for question in questions} == {
        "pretraining",
        "instruction tuning, zero-shot",
    }
    assert len(third.final) == 2
    finals = sorted(path.name for path in (out / "small/final").iterdir())
    assert len(finals) == 8
    assert "instruction tuning" in str(third)

    record = json.loads((out / "small/sparse--direct--1.json").read_text())
    assert record["tasks"]["owned"]["questions"] == 4
    assert record["parameters"]["total"] > record["parameters"]["active"]
    pretrained = runner.cells.read(Cell("sparse", "pretrained", 0))
    assert list(pretrained["held_out"]) == ["choosing", "reporting"]
    assert all("valid_loss" in row or "loss" in row for row in pretrained["training"])
    # cells of other data do not mix with these
    path = out / "small/sparse--direct--1.json"
    path.write_text(json.dumps(record | {"data": record["data"] | {"mixture": "0"}}))
    with pytest.raises(ValueError, match=r"sparse--direct--1\.json was recorded with another mixt"):
        mk.study(design_file, **settings)
    path.write_text(json.dumps(record))
    # nothing is run twice
    assert not mk.study(design_file, only=["dense", "tuned"], seeds=1, **settings).written


def parameters(model: mk.EncoderDecoder) -> list[np.ndarray]:
    import jax
    from flax import nnx

    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))]


def test_packed_data_train_and_measure_as_the_data_do(design_file, tmp_path):
    packed = tmp_path / "small.npz"
    pack(design_file, packed, workdir=tmp_path / "pack", max_rows=64)
    design = read_design(design_file)
    live = StudyData(design, tmp_path / "pack/small")
    data = PackedStudyData(design, packed, tmp_path / "elsewhere")
    assert data.digest() == live.digest()
    for name in ("choosing", "reporting", "final", "owned"):
        assert data.questions(name, 0) == live.questions(name, 0)
    rows = data.source("tuned")
    stream = mk.batches(
        live.source("tuned"),
        live.tokenizer,
        input_length=64,
        target_length=16,
        batch_size=8,
        seed=0,
    )
    batch = next(stream)
    stream.close()
    for name, array in vars(rows.batch(np.arange(8))).items():
        np.testing.assert_array_equal(array, getattr(batch, name), err_msg=name)

    report = mk.study(
        design_file,
        out=tmp_path / "out",
        workdir=tmp_path / "models",
        packed=packed,
        only=["dense", "pretrained", "tuned-finetuned", "tuned"],
        seeds=2,
    )
    assert len(report.written) == 6
    design_file.write_text(design_file.read_text().replace("questions = 4", "questions = 3"))
    with pytest.raises(ValueError, match="packed for another design"):
        PackedStudyData(read_design(design_file), packed, tmp_path)
    packed.write_bytes(packed.read_bytes()[:900])
    with pytest.raises(ValueError, match="no packed study, or is damaged"):
        PackedStudyData(design, packed, tmp_path)


def test_a_packed_order_is_that_of_its_seed():
    ids = np.arange(40, dtype=np.uint16).reshape(20, 2)
    segments = np.array([[1, 2]] * 19 + [[1, 0]], np.uint8)
    rows = PackedRows(ids, segments, ids, segments)
    stream = rows.batches(8, seed=1)
    epoch = np.concatenate([next(stream).inputs[:, 0] for _ in range(2)])
    assert len(set(epoch.tolist())) == 16
    again = rows.batches(8, seed=1)
    np.testing.assert_array_equal(next(again).inputs[:, 0], epoch[:8])
    assert next(rows.batches(8, seed=2)).inputs[:, 0].tolist() != epoch[:8].tolist()
    last = rows.batch(np.array([19]))
    assert last.loss_weights.tolist() == [[1.0, 0.0]]
    assert last.input_positions.tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="20 rows do not fill a batch of 21"):
        next(rows.batches(21, seed=0))
    with pytest.raises(ValueError, match="at most 255"):
        PackedRows.of_stream(iter([replace(last, input_segments=np.array([[300, 1]]))]), 1)
