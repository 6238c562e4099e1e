"""Prompted rows of many kinds, in files of many kinds, become tasks that stay on disk."""

import logging

import numpy as np
import pytest

import moekit as mk
from moekit.data.instructions import instruction_tasks
from moekit.data.tables import Rows

N = 60
P3 = [
    {
        "inputs": [i, 2, 3],
        "inputs_pretokenized": f"Which of a or b? {i}",
        "targets": [4],
        "targets_pretokenized": "\n" + "ab"[i % 2] + " ",
        "answer_choices": ["a", "b"],
    }
    for i in range(N)
]
KINDS = {
    "p3": (P3, "Which of a or b? 7", "b", ("a", "b")),
    "ready": ([{"inputs": f"Q {i}", "targets": f"A {i}"} for i in range(N)], "Q 7", "A 7", ()),
    "promptsource": ([{"input": f"Q {i}", "target": f"A {i}"} for i in range(N)], "Q 7", "A 7", ()),
    "prompt": ([{"prompt": f"Q {i}", "completion": f"A{i}"} for i in range(N)], "Q 7", "A7", ()),
    "alpaca": (
        [{"instruction": "Do", "input": f"in {i}", "output": f"out {i}"} for i in range(N)],
        "Do\nin 7",
        "out 7",
        (),
    ),
    "choices": (
        [{"question": f"Q {i}", "choices": ["x", "y"], "answer": i % 2} for i in range(N)],
        "Q 7",
        "y",
        ("x", "y"),
    ),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_rows_and_files(tmp_path, put, kind, suffix):
    rows, text, answer, options = KINDS[kind]
    put(f"t0/one{suffix}", rows)
    (task,) = instruction_tasks(tmp_path, "t0")
    assert task.name == "t0/one" and isinstance(task.examples("train"), Rows)
    found = [*task.examples("train"), *task.examples("valid")]
    assert len(found) == N and 0 < len(task.examples("valid")) < N / 4
    (seventh,) = [e for e in found if e.fields["instruction"] == text]
    assert (seventh.answer, seventh.options) == (answer, options)
    assert len(task.templates) == (10 if kind in ("alpaca", "choices") else 1)
    prompts = mk.flan_mixture("flan2022", data_dir=tmp_path).sample(20)
    assert all(p.target and p.task == "t0/one" for p in prompts)


def test_csv_with_a_header_references_and_context(tmp_path, put):
    put("dialog/a.csv", [{"input": f'say "{i}", please\nnow', "output": i} for i in range(9)])
    reading = [{"context": f"c {i}", "question": "q?", "answers": ["a", "b"]} for i in range(9)]
    put("dialog/b.jsonl", reading)
    one, two = instruction_tasks(tmp_path, "dialog")
    found = [*one.examples("train"), *one.examples("valid")]
    assert {(e.fields["instruction"], e.answer) for e in found} == {
        (f'say "{i}", please\nnow', str(i)) for i in range(9)
    }
    example = two.examples("train")[0]
    assert example.references == ("a", "b") and example.fields["question"] == "q?"
    assert mk.format_prompt(two, example).input.startswith(example.fields["context"] + "\n\nq?")


def test_a_file_of_many_tasks_and_a_folder_of_splits(tmp_path, put):
    put(
        "flan2021/part.jsonl",
        [
            {"inputs": f"i{i}", "targets": "t", "task_name": name, "template_type": "zs_opt"}
            for i in range(30)
            for name in ("glue/rte:2.0.0", "squad/v1.1:3.0.0")
        ],
    )
    for split, n in (("train", 20), ("validation", 4), ("test", 3)):
        rows = [{"inputs": f"{split} {i}", "targets": "t"} for i in range(n)]
        put(f"flan2021/folder/{split}-00000.parquet", rows)
    tasks = {t.name: t for t in instruction_tasks(tmp_path, "flan2021")}
    assert {n: t.cluster for n, t in tasks.items()} == {
        "flan2021/glue/rte:2.0.0": "entailment",
        "flan2021/squad/v1.1:3.0.0": "reading comprehension",
        "flan2021/folder": "flan2021",
    }
    folder = tasks["flan2021/folder"]
    assert {s: len(folder.examples(s)) for s in folder.splits} == {
        "train": 20,
        "valid": 4,
        "test": 3,
    }


def test_wrong_answers_of_p3_are_left_out(tmp_path, put):
    rows = [row | {"is_correct": i % 3 == 0, "weight": 1.0} for i, row in enumerate(P3)]
    put("p3/x_score_eval.jsonl", rows)
    (task,) = instruction_tasks(tmp_path, "t0")
    assert len(task.examples("train")) + len(task.examples("valid")) == N / 3


def test_a_changed_file_is_read_again(tmp_path, put):
    put("t0/x.jsonl", KINDS["ready"][0])
    first = mk.flan_mixture("flan2022", data_dir=tmp_path)
    before = first.digest()
    put("t0/x.jsonl", KINDS["ready"][0][:30])
    second = mk.flan_mixture("flan2022", data_dir=tmp_path)
    assert first.tasks[0].train_size > second.tasks[0].train_size
    assert before == first.digest() != second.digest()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"inputs": "x"}, "no target text"),
        ({"inputs": "x", "targets": " "}, "no target text"),
        ({"inputs": "x", "targets": None}, "no target text"),
        ({"inputs": "x", "targets": True}, "no target text"),
        ({"inputs": [1, 2], "targets": "y"}, "no input text"),
        ({"inputs": " ", "targets": "y"}, "no input text"),
        ({"question": "x", "choices": ["a"], "answer": 1}, "answer 1 is not one of 1 options"),
        ([1], "expected an object"),
    ],
)
def test_bad_rows(tmp_path, put, caplog, bad, message):
    put("t0/x.jsonl", [*KINDS["ready"][0], bad])
    with pytest.raises(ValueError, match=rf"x\.jsonl:61: {message}"):
        mk.flan_mixture("flan2022", data_dir=tmp_path)
    with caplog.at_level(logging.WARNING, "moekit"):
        mixture = mk.flan_mixture("flan2022", data_dir=tmp_path, on_error="skip")
    assert "skipped 1 malformed of 61 rows" in caplog.text
    (task,) = mixture.tasks
    assert len(task.examples("train")) + len(task.examples("valid")) == N


def test_rows_give_way_to_the_next_usable_one(caplog):
    import datasets

    table = datasets.Dataset.from_dict({"x": [0, 1, 2, 3]})

    def make(row, number):
        if row["x"] % 2:
            raise ValueError("odd")
        return mk.Example(str(row["x"]), {}, "a")

    rows = Rows(table, np.arange(4), make)
    assert [rows[i].id for i in range(4)] == ["0", "2", "2", "0"]
    assert [rows[np.int64(-1)].id, len(rows)] == ["0", 4] and "odd" in caplog.text
    with pytest.raises(IndexError):
        rows[4]
    with pytest.raises(ValueError, match="no usable rows"):
        Rows(table, np.array([1, 3]), make)[0]


def test_two_files_of_one_task(tmp_path, put):
    put("t0/x.jsonl", KINDS["ready"][0])
    put("t0/x.parquet", KINDS["ready"][0])
    with pytest.raises(ValueError, match=r"x\.parquet.* has task x already"):
        mk.flan_mixture("flan2022", data_dir=tmp_path)
