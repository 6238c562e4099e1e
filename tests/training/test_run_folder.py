"""What a run's folder shows: summaries of runs in every state, and their environment."""

import json
import os
from dataclasses import replace

import pytest

import moekit as mk
from moekit.training.metrics import Metrics
from moekit.training.run_folder import (
    ENVIRONMENT,
    environment,
    find_runs,
    read_settings,
    record_start,
    summarize,
)
from moekit.training.run_lock import write_alone

SETTINGS = {
    "model": mk.preset("st-nano").to_dict(),
    "train": mk.TrainConfig(steps=4).to_dict(),
    "source": "a",
    "tokenizer": "b",
}


def add_checkpoint(folder, step):
    path = folder / "checkpoints" / str(step) / "meta" / "metadata"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(SETTINGS))


def make_run(folder, last_step, is_recorded=True):
    folder.mkdir(parents=True)
    if is_recorded:
        record_start(folder, SETTINGS)
    metrics = Metrics(folder / "metrics.jsonl")
    for step in range(1, last_step + 1):
        metrics.add({"step": step, "loss": 4.0 - step})
    metrics.add({"step": last_step, "valid_loss": 2.5})
    add_checkpoint(folder, last_step)
    return folder


@pytest.mark.parametrize("is_recorded", [True, False])  # earlier versions wrote no configuration
@pytest.mark.parametrize(("last_step", "state"), [(2, "stopped"), (4, "finished")])
def test_a_run_that_is_not_running(tmp_path, last_step, state, is_recorded):
    run = make_run(tmp_path / "run", last_step, is_recorded)
    found = summarize(run, "run")
    expected = ("run", "st-nano", last_step, 4, 4.0 - last_step, 2.5, state, ())
    assert replace(found, changed=0.0) == type(found)(*expected[:6], 0.0, *expected[6:])
    assert found.changed > 0
    assert read_settings(run) == SETTINGS


def test_a_run_that_is_running(tmp_path):
    run = make_run(tmp_path / "run", 2)
    with write_alone(run):
        assert summarize(run, "run").state == "running"


def cut_log(run):
    path = run / "metrics.jsonl"
    path.write_text('{"step": 1, "lo\n' + path.read_text())


def lose_settings(run):
    (run / "config.json").write_text("{")
    (run / "checkpoints/2/meta/metadata").write_text("[]")


def huge_numbers(run):
    path = run / "metrics.jsonl"
    nines = "9" * 400
    path.write_text(f'{{"step": {nines}}}\n{{"step": 1, "loss": {nines}}}\n' + path.read_text())


def name_without_letters(run):
    for path in (run / "config.json", run / "checkpoints/2/meta/metadata"):
        path.write_text('{"model": {"name": 3}, "train": {"steps": 2}}')


def pipe_for_settings(run):
    lose_settings(run)
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")


def lose_metadata(run):
    (run / "checkpoints/3").mkdir()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut_log, "line 1 of metrics.jsonl is broken"),
        (huge_numbers, "line 1, 2 of metrics.jsonl is broken"),
        (lose_settings, "its configuration cannot be read"),
        (name_without_letters, "its configuration cannot be read"),
        (pipe_for_settings, "its configuration cannot be read"),
        (lose_metadata, "checkpoint 3 is incomplete"),
    ],
)
def test_damage_is_named_and_the_rest_is_shown(tmp_path, damage, problem):
    run = make_run(tmp_path / "run", 2)
    damage(run)
    found = summarize(run, "run")
    assert (found.state, found.problems) == ("damaged", (problem,))
    assert (found.steps_done, found.loss) == (2, 2.0)


def test_runs_are_found_below_a_folder_and_not_in_each_other(tmp_path):
    runs = [make_run(tmp_path / name, 1) for name in ("a", "b/c", "b/d")]
    make_run(tmp_path / "a/inner", 1)
    (tmp_path / "empty").mkdir()
    assert find_runs(tmp_path) == runs
    assert find_runs(runs[0]) == [runs[0]]
    assert find_runs(tmp_path / "empty") == []


def test_every_start_is_recorded(tmp_path):
    for _ in range(2):
        record_start(tmp_path, SETTINGS)
    lines = (tmp_path / ENVIRONMENT).read_text().splitlines()
    starts = [json.loads(line) for line in lines]
    assert len(starts) == 2
    for start in starts:
        assert start.keys() == environment().keys()
        assert {"jax", "moekit", "python", "numpy"} <= start["versions"].keys()
        assert start["devices"] == {"cpu": 8} and start["processes"] == 1
