"""Task files in the official schema of NIv2, wherever they lie in a data folder."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moekit as mk
from moekit.data import niv2
from moekit.data.datasets import Access, dataset, dataset_task
from moekit.data.niv2 import niv2_tasks
from moekit.data.published import bbh_tasks
from moekit.data.tables import Rows

DATA = os.environ.get("MOEKIT_DATA")


def task_file(n=30, category="Sums", **changes):
    """A task file as the official repository has them."""
    shown = {"input": "in x", "output": "out x", "explanation": "as said"}
    content = {
        "Contributors": ["A. Person"],
        "Source": ["somewhere"],
        "URL": ["https://example.org"],
        "Categories": [category],
        "Reasoning": [],
        "Definition": ["Say it", "again."],
        "Input_language": ["English"],
        "Output_language": ["English"],
        "Instruction_language": ["English"],
        "Domains": ["Web"],
        "Positive Examples": [shown, shown | {"input": "in y"}, {"input": 3}],
        "Negative Examples": [],
        "Instances": [
            {"id": f"t-{i}", "input": f"in {i}", "output": [f"out {i}", f"also {i}"]}
            for i in range(n)
        ],
        "Instance License": ["Apache 2.0"],
    }
    return content | changes


@pytest.fixture
def repository(put):
    """The official repository as a folder: tasks and split lists."""

    def repository(at):
        put(f"{at}tasks/task001_sum.json", task_file())
        put(f"{at}tasks/task002_nli.json", task_file(category="Entailment"))
        put(f"{at}tasks/task003_left_out.json", task_file())
        put(f"{at}tasks/task700_mmlu.json", task_file())
        for name, listed in (
            ("train", ["task001_sum", "task700_mmlu"]),
            ("test", ["task002_nli", "task999_not_here"]),
            ("excluded", ["task003_left_out"]),
        ):
            path = put(f"{at}splits/default/{name}_tasks.txt", [])
            path.write_text("".join(f"{task}\n" for task in listed))

    return repository


def names(tasks):
    return [task.name.removeprefix("niv2/") for task in tasks]


@pytest.mark.parametrize("at", ["", "niv2/", "natural-instructions-2.8/", "raw/niv2/"])
def test_the_official_repository_drops_in(tmp_path, repository, at):
    repository(at)
    (train,), (test,) = niv2_tasks(tmp_path, "train"), niv2_tasks(tmp_path, "test")
    assert names([train, test]) == ["task001_sum", "task002_nli"]
    assert test.held_out and not train.held_out and train.cluster == "Sums"
    assert train.sources == ("somewhere",) and train.splits == ("train", "valid")
    rows = [*train.examples("train"), *train.examples("valid")]
    assert sorted(e.id for e in rows) == sorted(f"t-{i}" for i in range(30))
    assert 1 <= len(train.examples("valid")) <= 5
    (first,) = [e for e in rows if e.id == "t-0"]
    assert first.fields == {"definition": "Say it again.", "input": "in 0"}
    assert first.references == ("out 0", "also 0") and first.domain == "Web"
    assert len(test.examples("test")) == 30
    assert [e.fields["input"] for e in test.examples("train")] == ["in x", "in y"]
    assert "niv2/task002_nli" not in mk.flan_mixture("flan2022", data_dir=tmp_path).rates


@pytest.mark.parametrize("at", ["niv2/", "niv2/tasks/", "tasks/", ""])
def test_an_unseen_file_is_trained_on_and_scored(tmp_path, put, at):
    meta = {"task": "task1_own", "split": "train", "definition": "Do.", "categories": ["QA"]}
    put("niv2/tasks.jsonl.gz", [meta])
    rows = [{"id": str(i), "input": f"in {i}", "output": ["a"]} for i in range(20)]
    put("niv2/train/task1_own.jsonl.gz", rows)
    put("niv2/valid/task1_own.jsonl.gz", rows[:2])
    put(f"{at}task1_own.json", task_file())  # the folder's own layout comes first
    labels = [{"input": f"Is {i}?", "output": ["yes" if i % 2 else "no"]} for i in range(40)]
    put(f"{at}task4321_new.json", task_file(Instances=labels, **{"Categories": ["Yes or no"]}))
    mixture = mk.flan_mixture("flan-t5", data_dir=tmp_path)
    own, new = mixture.tasks
    assert names([own, new]) == ["task1_own", "task4321_new"] and own.cluster == "QA"
    assert "Yes or no" in str(mixture.describe())
    assert new.examples("valid")[0].options == ("no", "yes")
    prompt = next(p for p in mixture.sample(50) if p.task == new.name)
    assert "Say it again." in prompt.input
    valid = mk.suite("niv2-valid", data_dir=tmp_path)
    assert names(valid.tasks) == ["task1_own", "task4321_new"]


def test_a_large_file_stays_on_disk(tmp_path, put, monkeypatch):
    labels = [{"input": f"Is {i}?", "output": ["yes" if i % 2 else "no"]} for i in range(40)]
    put("niv2/task1_words.json", task_file())
    put("niv2/task2_labels.json", task_file(Instances=labels))
    small = niv2_tasks(tmp_path, "train")
    monkeypatch.setattr(niv2, "LARGE", 0)
    large = niv2_tasks(tmp_path, "train")
    for one, other in zip(small, large, strict=True):
        for split in ("valid", "train"):
            assert isinstance(other.examples(split), Rows)
            assert list(one.examples(split)) == list(other.examples(split))


def test_both_layouts_give_the_same_examples(tmp_path, put):
    content = task_file()
    meta = {"task": "task1_x", "split": "train", "definition": "Say it again."}
    meta |= {"categories": ["Sums"], "domains": ["Web"], "source": ["somewhere"]}
    put("own/niv2/tasks.jsonl.gz", [meta])
    put("own/niv2/train/task1_x.jsonl.gz", content["Instances"])
    put("official/tasks/task1_x.json", content)
    (own,), (official,) = (niv2_tasks(tmp_path / at, "train") for at in ("own", "official"))
    assert (own.name, own.cluster, own.sources) == (
        official.name,
        official.cluster,
        official.sources,
    )
    for split in ("train", "valid"):
        assert own.examples(split) == official.examples(split)


def test_tasks_travel_to_other_processes(tmp_path, put):
    put("niv2/task1_x.json", task_file())
    put("t0/rows.jsonl", [{"inputs": f"i {i}", "targets": "t"} for i in range(9)])
    put("cot/x.jsonl", [{"question": f"q{i}", "answer": "a", "rationale": "r"} for i in range(9)])
    code = """
import pickle, sys, cloudpickle
from moekit.data import niv2
from moekit.data.flan import flan_mixture
for niv2.LARGE in (niv2.LARGE, 0):
    tasks = flan_mixture("flan2022", data_dir=sys.argv[1]).tasks
    assert len(tasks) == 3
    for task in tasks:
        fresh = pickle.loads(cloudpickle.dumps(task))
        assert list(fresh.examples("train")) == list(task.examples("train"))
        used = pickle.loads(cloudpickle.dumps(task))
        assert list(used.examples("train")) == list(task.examples("train"))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_few_labels_need_many_rows(tmp_path, put):
    put("niv2/task1_x.json", task_file(6))  # six answers of six rows are no classification
    assert not niv2_tasks(tmp_path, "train")[0].examples("train")[0].options


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected an object"),
        ({"Instances": []}, "no Definition"),
        (task_file(Definition="text"), "Definition is not a list"),
        (task_file(Categories=[3]), "Categories is not a list"),
        (task_file(0), "no usable rows"),
        (task_file(Instances=[{"input": "x"}]), r":1: field 'output' is missing"),
        (task_file(Instances=[{"input": "x", "output": [" "]}]), ":1: no output text"),
        (task_file(Instances=[{"input": "x", "output": [3]}]), "field 'output' is list"),
        (task_file(Instances="none"), "Instances is not a list"),
        (
            task_file(Instances=[{"id": "a", "input": "x", "output": ["y"]}] * 2),
            "a' occurred before",
        ),
    ],
)
def test_a_broken_file_is_named_or_left_out(tmp_path, put, caplog, content, message):
    put("niv2/task1_good.json", task_file())
    put("niv2/task2_bad.json", content)
    with pytest.raises(ValueError, match=rf"task2_bad\.json.*{message}"):
        mk.flan_mixture("flan2022", data_dir=tmp_path)
    with caplog.at_level(logging.WARNING, "moekit"):
        mixture = mk.flan_mixture("flan2022", data_dir=tmp_path, on_error="skip")
    assert "niv2/task1_good" in mixture.rates and "task2_bad" in caplog.text
    counted = [t for t in mixture.tasks if t.name == "niv2/task2_bad"]
    assert not counted or "occurred" in message


@pytest.mark.skipif(not DATA, reason="needs MOEKIT_DATA")
def test_original_files_load_to_the_rows_of_their_counterparts():
    root, raw = Path(DATA), Path(DATA) / "raw"
    for family, names in (("cot", ("strategyqa", "qasc")), ("mmlu", ("mmlu",))):
        for name in names:
            theirs = rows_of(dataset_task(dataset(name), Access(raw)))
            own = rows_of(dataset_task(dataset(name), Access(root)))
            if family == "cot":  # whole files
                # strategyqa is read from its own files there, with its test split
                assert len(own & theirs) > 0.99 * len(theirs)
                assert name != "qasc" or own == theirs
            else:  # cut, and a quarter of ours is withheld
                assert theirs and len(own & theirs) > 0.6 * len(theirs)
    own_tasks = {task.name: task for task in bbh_tasks(root)}
    for task in bbh_tasks(raw):
        theirs = rows_of(task)
        assert 0 < len(theirs) <= 60
        assert len(rows_of(own_tasks[task.name]) & theirs) > 0.6 * len(theirs)
    counterparts = {task.name: task for task in niv2_tasks(root, "train")}
    tasks = niv2_tasks(raw, "train")
    assert len(tasks) == 3
    for task in tasks:
        # ours is a sample; ids tell which rows are the same
        own, theirs = ({e.id: e for e in every(t)} for t in (counterparts[task.name], task))
        both = own.keys() & theirs.keys()
        assert both and all(own[i] == theirs[i] for i in both)
        assert task.cluster == counterparts[task.name].cluster


def every(task):
    return [e for split in task.splits for e in task.examples(split)]


def rows_of(task):
    return {(e.fields["question"], e.answer) for e in every(task) if "shot" not in e.id}


@pytest.mark.parametrize("name", ["../../../outside/secret", "a/b", "/etc/passwd", ".."])
def test_a_task_name_does_not_lead_out_of_the_folder(tmp_path, put, name):
    meta = {"task": name, "split": "train", "definition": "Do.", "categories": ["QA"]}
    put("data/niv2/tasks.jsonl.gz", [meta])
    put("outside/secret.jsonl.gz", [{"input": "x", "output": ["secret"]}])
    with pytest.raises(ValueError, match=r"tasks\.jsonl\.gz:1: .*leads out of the data folder"):
        niv2_tasks(tmp_path / "data", "train")
    assert niv2_tasks(tmp_path / "data", "train", "skip") == []
    with pytest.raises(ValueError, match=r"unknown task|leads out"):
        mk.flan_mixture({f"niv2/{name}": 1.0}, data_dir=tmp_path / "data", on_error="skip")


def test_one_task_opens_no_others(tmp_path, put):
    put("niv2/task1_a.json", task_file())
    put("niv2/task2_b.json", {"Instances": []})  # malformed
    mixture = mk.flan_mixture({"niv2/task1_a": 1.0}, data_dir=tmp_path)
    assert mixture.rates == {"niv2/task1_a": 1.0}
