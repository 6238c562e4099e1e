"""Task files in the official schema of NIv2, wherever they lie in a data folder."""

import logging

import pytest

import moekit as mk
from moekit.data.mirror import Mirror


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
    mirror = Mirror(tmp_path)
    (train,), (test,) = mirror.niv2("train"), mirror.niv2("test")
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


def test_few_labels_need_many_rows(tmp_path, put):
    put("niv2/task1_x.json", task_file(6))  # six answers of six rows are no classification
    assert not Mirror(tmp_path).niv2("train")[0].examples("train")[0].options


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
        (task_file(Instances=[{"id": "a", "input": "x", "output": ["y"]}] * 2), "a' was there"),
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
    assert not counted or "was there" in message
