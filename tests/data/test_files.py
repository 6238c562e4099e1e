"""Rows, text and the data folder: what is wrong is named with file and line."""

import gzip
import json
import logging

import pyarrow
import pyarrow.parquet as parquet
import pytest

import moekit as mk
from moekit.data import files
from moekit.data.files import data_dir, read_manifest, read_rows

SCHEMA = {"question": str, "answer": int}
GOOD = [{"question": f"q{i}", "answer": i} for i in range(40)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_good_rows(tmp_path, name):
    assert read_rows(write(tmp_path / name, GOOD), SCHEMA) == GOOD


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": "x"}, "field 'answer' is missing"),
        ({"question": 3, "answer": 3}, "field 'question' is int"),
        ({"question": "x", "answer": True}, "field 'answer' is bool"),
        ([1, 2], "expected an object"),
        ('{"question": ', "not JSON"),
    ],
)
def test_a_malformed_row_is_named_or_skipped_and_counted(tmp_path, caplog, bad, message):
    path = write(tmp_path / "a.jsonl.gz", [*GOOD[:3], bad, *GOOD[3:], bad])
    with pytest.raises(ValueError, match=rf"a\.jsonl\.gz:4: {message}.*skip"):
        read_rows(path, SCHEMA)
    with caplog.at_level(logging.WARNING, "moekit"):
        assert read_rows(path, SCHEMA, on_error="skip") == GOOD
    assert "skipped 2 malformed of 42 rows" in caplog.text
    with pytest.raises(ValueError, match="did you mean 'skip'"):
        read_rows(path, SCHEMA, on_error="skp")


def test_truncated_gzip_names_the_line(tmp_path):
    whole = write(tmp_path / "a.jsonl.gz", GOOD).read_bytes()
    for size in (len(whole) - 9, len(whole) // 2):
        (tmp_path / "a.jsonl.gz").write_bytes(whole[:size])
        for on_error in ("stop", "skip"):
            with pytest.raises(ValueError, match=r"a\.jsonl\.gz:\d+: the file is truncated"):
                read_rows(tmp_path / "a.jsonl.gz", SCHEMA, on_error=on_error)
    (tmp_path / "a.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(ValueError, match="truncated or not gzip"):
        read_rows(tmp_path / "a.jsonl.gz", SCHEMA)


def test_tables_missing_files_and_empty_files(tmp_path):
    (tmp_path / "a.tsv").write_text("one\t1\ntwo\n")
    with pytest.raises(ValueError, match=r"a\.tsv:2: 1 columns instead of 2"):
        read_rows(tmp_path / "a.tsv", {"q": str, "a": str}, columns=("q", "a"))
    (tmp_path / "b.csv").write_text('"x, y",1\n')
    rows = read_rows(tmp_path / "b.csv", {"q": str, "a": str}, columns=("q", "a"))
    assert rows == [{"q": "x, y", "a": "1"}]
    with pytest.raises(FileNotFoundError, match="the data folder is incomplete"):
        read_rows(tmp_path / "c.jsonl", SCHEMA)
    with pytest.raises(ValueError, match="no usable rows"):
        read_rows(write(tmp_path / "d.jsonl", []), SCHEMA)


def test_no_data_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MOEKIT_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="set the environment variable MOEKIT_DATA"):
        data_dir()
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        mk.flan_mixture("flan2022", data_dir=tmp_path / "nowhere")
    monkeypatch.setenv("MOEKIT_DATA", str(tmp_path))
    assert data_dir() == tmp_path
    with pytest.raises(FileNotFoundError, match="has no books"):
        mk.corpus("books")
    with pytest.raises(FileNotFoundError, match="holds no instruction data"):
        mk.flan_mixture("flan2022")
    with pytest.raises(ValueError, match="unknown corpus 'bookz': did you mean 'books'"):
        mk.corpus("bookz")


def texts(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)


def test_text_folders(tmp_path):
    rows = [{"text": f"text {i}", "title": f"t{i}"} for i in range(120)]
    texts(tmp_path / "text/books", "train-0.parquet", rows)
    texts(tmp_path / "text/speeches", "train.parquet", rows[:4])
    texts(tmp_path / "text/speeches", "valid.parquet", rows[4:6])
    corpus = mk.corpus("books,speeches", tmp_path)
    assert corpus.domains == ("books", "speeches")
    assert len(corpus.documents("valid")) == 3 + 2 and len(corpus.documents("train")) == 117 + 4
    texts(tmp_path / "text/books", "train-1.parquet", [*rows[:3], {"text": " ", "title": "bad"}])
    with pytest.raises(ValueError, match=r"train-1\.parquet:4: document 'bad' .* is empty"):
        mk.corpus("books", tmp_path).documents("train")
    (tmp_path / "text/speeches/train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        mk.corpus("speeches", tmp_path).documents("train")


def data_folder(root):
    """A data folder with a few rows of every family."""
    meta = [
        {"task": f"task{i}", "split": split, "definition": "Do it.", "categories": [category]}
        for i, (split, category) in enumerate([("train", "QA"), ("train", "Sum"), ("test", "NLI")])
    ]
    write(root / "niv2/tasks.jsonl.gz", meta)
    free = [{"id": f"n{i}", "input": f"in {i}", "output": [f"out {i}", "other"]} for i in range(30)]
    label = [{"id": f"l{i}", "input": f"in {i}", "output": ["yn"[i % 2]]} for i in range(12)]
    for name, rows in (("task0", free), ("task1", label)):
        write(root / f"niv2/train/{name}.jsonl.gz", rows)
        write(root / f"niv2/valid/{name}.jsonl.gz", rows[:4])
    write(root / "niv2/test/task2.jsonl.gz", label)
    thought = [
        {"question": f"q{i}?", "answer": str(i), "rationale": f"Because {i}"} for i in range(6)
    ]
    write(root / "cot/sums.jsonl.gz", thought)
    choice = [
        {"question": f"q{i}?", "choices": ["a", "b", "c"], "answer": i % 3, "context": "Text."}
        for i in range(9)
    ]
    for split in ("train", "test"):
        write(root / f"mc/boolq/{split}.jsonl.gz", choice)
        write(
            root / f"gsm8k/{split}.jsonl.gz", [{"question": "q", "answer": "4", "solution": "2+2"}]
        )
    dolly = {"instruction": "Say", "context": "c", "response": "r", "category": "open"}
    for split in ("train", "valid"):
        write(root / f"dolly/{split}.jsonl.gz", [dolly] * 3)
    bbh = [{"input": "Which?\nOptions:\n(A) x\n(B) y", "target": "(B)"}] * 4
    write(root / "bbh/things.jsonl.gz", bbh)
    return root


def test_bad_answers_name_the_row(tmp_path):
    root = data_folder(tmp_path)
    write(root / "mc/boolq/test.jsonl.gz", [{"question": "q", "choices": ["a"], "answer": 1}])
    with pytest.raises(
        ValueError, match=r"test\.jsonl\.gz:1: answer .1. .int. is not one of 1 options"
    ):
        mk.suite("boolq", data_dir=root).tasks[0].examples("test")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.tsv", "a.csv"])
def test_a_row_beyond_the_limit_is_refused_before_it_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "MAX_ROW", 1000)
    path = write(tmp_path / name, ["ok\t1", "x" * 5000])
    if "jsonl" in name:
        path = write(tmp_path / name, [GOOD[0], '{"question": "' + "x" * 5000])
    schema = SCHEMA if "jsonl" in name else {"question": str}
    columns = () if "jsonl" in name else ("question", "answer")[: 2 if "tsv" in name else 1]
    for on_error in ("stop", "skip"):
        with pytest.raises(ValueError, match=r":2: the row is longer than 1,000 characters"):
            read_rows(path, schema, columns=columns, on_error=on_error)


def test_a_bomb_is_refused_with_bounded_memory(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(12):
            file.write(b"x" * (16 << 20))  # one line of 192 MB
    with pytest.raises(ValueError, match="longer than"):
        read_rows(path, SCHEMA)


def test_a_large_json_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE", 100)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        read_rows(path, SCHEMA)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_a_manifest_does_not_lead_out_of_the_folder(tmp_path, name):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps([{"path": name, "bytes": 1, "sha256": "0"}]))
    with pytest.raises(ValueError, match="leads out of the data folder"):
        read_manifest(path)
