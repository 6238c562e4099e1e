"""Fetching into a data folder, and checking one: every fault is named."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moekit.cli import main
from moekit.data.catalogue import catalogue
from moekit.data.check import check
from moekit.data.fetch import as_text, fetch, plan
from moekit.data.files import sha256

DATA = os.environ.get("MOEKIT_DATA")
ROOT = Path(__file__).parents[2]
RTE = "nyu-mll/glue/rte"


@pytest.fixture
def hub(put, tmp_path):
    """A folder in place of the hub; and the data folder to fill."""
    row = {"sentence1": "one", "sentence2": "two", "label": 1}
    for split, n in (("train", 400), ("validation", 50), ("test", 9)):
        put(f"hub/{RTE}/{split}/0000.parquet", [row | {"idx": i} for i in range(n)])
    ready = {"inputs": "Q", "targets": "A", "task_source": "CoT", "task_name": "cot_qed"}
    put("hub/conceptofmind/cot_submix_original/data/train-00000-of-00001.parquet", [ready] * 30)
    root = tmp_path / "data"
    root.mkdir()
    return str(tmp_path / "hub"), root


def test_fetch_shows_sizes_and_fills_a_folder(hub, capsys):
    origin, root = hub
    items = plan(["rte", "cot"], origin)
    (train,) = [item for item in items if "train" in item.path and item.source == "rte"]
    assert train.path == f"hub/{RTE}/train/0000.parquet"
    assert train.bytes == (Path(origin) / RTE / "train/0000.parquet").stat().st_size
    assert len(items) == 3 and not any(root.iterdir())  # rte's test answers are not published
    argv = ["data", "fetch", "rte", "cot", "--origin", f"file://{origin}", "--to", str(root)]
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert "nothing was fetched" in captured.err and "3 files" in captured.err
    assert main([*argv, "--yes", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert sorted(entry["rows"] for entry in entries) == [30, 50, 400]
    assert json.loads((root / "manifest.json").read_text()) == entries
    for entry in entries:
        assert sha256(root / entry["path"]) == entry["sha256"]
    assert main(["data", "check", str(root)]) == 0
    assert "480 rows" in capsys.readouterr().out


def test_what_is_there_is_not_fetched_again_unless_it_is_damaged(hub):
    origin, root = hub
    items = plan(["rte"], origin)
    fetch(items, root, origin)
    path, source = root / items[0].path, Path(origin) / RTE / "train/0000.parquet"
    assert path.read_bytes() == source.read_bytes()
    path.chmod(0o644)
    stamp = path.stat().st_ctime_ns
    fetch(items, root, origin)
    assert path.stat().st_ctime_ns == stamp
    path.write_bytes(b"x" * path.stat().st_size)
    fetch(items, root, origin)
    assert path.read_bytes() == source.read_bytes()
    source.write_bytes(source.read_bytes()[:100])
    path.unlink()
    with pytest.raises(OSError, match="arrived damaged"):
        fetch(items, root, origin)
    assert not path.exists()


def test_sets_that_are_not_available_are_left_out(hub, caplog):
    items = plan(["gsm8k", "rte"], hub[0])
    assert {item.source for item in items} == {"rte"} and "gsm8k is left out" in caplog.text


def test_licences_are_listed(put, tmp_path, capsys):
    row = {"dialogue": "a: hi", "summary": "They greet.", "id": "1"}
    put("hub/knkarthick/samsum/default/train/0000.parquet", [row])
    (tmp_path / "data").mkdir()
    items = plan(["samsum"], str(tmp_path / "hub"))
    assert "CC BY-NC-ND 4.0" in as_text(items)
    (entry,) = fetch(items, tmp_path / "data", str(tmp_path / "hub"))
    assert entry["licence"] == "CC BY-NC-ND 4.0"


def test_the_list_is_immediate_without_network(monkeypatch):
    monkeypatch.delenv("MOEKIT_DATA", raising=False)
    monkeypatch.setattr("moekit.data.hub_files.repository_info", None)  # a call would fail
    monkeypatch.setattr("moekit.data.datasets.download", None)
    rows = {(entry.kind, entry.name): entry for entry in catalogue(None)}
    assert rows["suite", "builtin"].here and not rows["suite", "mmlu"].here
    assert "asdiv" in rows["suite", "reasoning"].about
    for name, licence in (("asdiv", "CC BY-NC 4.0"), ("anli_r2", "CC BY-NC 4.0")):
        assert licence in rows["hub source", name].about


def test_what_cannot_be_fetched(hub):
    origin, root = hub
    with pytest.raises(FileNotFoundError, match=r"has no files main/train/\*\.parquet"):
        plan(["gsm8k"], origin)
    with pytest.raises(ConnectionError, match="network"):
        plan(["gsm8k"])
    with pytest.raises(ValueError, match="did you mean 'rte'"):
        plan(["rtee"], origin)
    items = [item for item in plan(["rte"], origin)]
    huge = [type(items[0])(**{**vars(items[0]), "bytes": 10**18})]
    with pytest.raises(OSError, match="bytes free, 1,000,000,000,000,000,000 are needed"):
        fetch(huge, root, origin)


def test_every_fault_is_named_by_file_and_row(tmp_path, put, capsys):
    meta = {"task": "task1_a", "split": "train", "definition": "Do.", "categories": ["QA"]}
    put("niv2/tasks.jsonl.gz", [meta, meta | {"task": 3}])
    rows = [{"id": str(i), "input": f"in {i}", "output": ["a"]} for i in range(5)]
    rows += [{"input": "x"}, rows[0], {"input": "", "output": []}]
    put("niv2/train/task1_a.jsonl.gz", rows)
    put("niv2/task2_broken.json", {"Instances": []})
    put("cot/x.tsv", []).write_text("q\ta\tr\nq\ta\n\ta\tr\n")
    choice = {"question": "q", "context": "c", "choices": ["a", "b"]}
    put("mc/boolq/train.jsonl.gz", [choice | {"answer": n} for n in (0, 2, "a", 1, -1)])
    put("mc/boolq/test.jsonl.gz", [choice | {"answer": 1}])
    put("dolly/train.jsonl.gz", [{"instruction": "i", "context": "", "response": " "}])
    put("t0/x.jsonl", [{"inputs": "a", "targets": "b"}, {"inputs": "a"}])
    put("text/books/train.parquet", [{"text": "t", "title": "x"}, {"text": " ", "title": "y"}])
    put("hub/nyu-mll/glue/rte/train/0.parquet", [{"sentence1": "a", "label": 1}])
    put("templates/a.yaml", []).write_text("templates:\n  x: !T\n    jinja: no bars\n    name: n\n")
    half = put("gsm8k/train.jsonl.gz", [{"question": "q", "answer": "4"}] * 9)
    half.write_bytes(half.read_bytes()[:-9])
    entries = [{"path": "gone.txt", "bytes": 3, "sha256": "0"}]
    for name, change in (
        ("mc/boolq/test.jsonl.gz", {"bytes": 1}),
        ("t0/x.jsonl", {"sha256": "0"}),
        ("text/books/train.parquet", {"rows": 3}),
    ):
        path = tmp_path / name
        entry = {"path": name, "bytes": path.stat().st_size, "sha256": sha256(path), "rows": 2}
        entries.append(entry | change)
    put("manifest.json", entries)
    assert main(["data", "check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    for fault in (
        "niv2/tasks.jsonl.gz:2: field 'task' is int",
        "niv2/train/task1_a.jsonl.gz:6: field 'output' is missing",
        "niv2/train/task1_a.jsonl.gz:7: id '0' occurred before",
        "niv2/train/task1_a.jsonl.gz:8: no output text",
        "niv2/task2_broken.json: no Definition",
        "cot/x.tsv:2: 2 columns instead of 3",
        "mc/boolq/train.jsonl.gz:2: answer '2' (int) is not one of 2",
        "mc/boolq/train.jsonl.gz:3: answer 'a' (str) is not",
        "mc/boolq/train.jsonl.gz:5: answer '-1' (int) is not",
        "dolly/train.jsonl.gz:1: example train/1: the answer is empty",
        "t0/x.jsonl:2: no target text",
        "text/books/train.parquet:2: document 'y'",
        "hub/nyu-mll/glue/rte/train: column 'sentence2' is missing",
        "templates/a.yaml: template 'n' has no target",
        "gsm8k/train.jsonl.gz:10: the file is truncated",
        "gone.txt: is in the manifest but missing",
        "bytes instead of 1",
        "t0/x.jsonl: another sha256",
        "text/books/train.parquet: 2 rows instead of 3",
    ):
        assert fault in out
    assert main(["data", "check", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["faults"]
    assert len({(f["path"], f["row"], f["problem"]) for f in found}) == len(found) >= 19


def test_a_manifest_that_is_none(tmp_path, put):
    put("manifest.json", {"path": "x"})
    (fault,) = check(tmp_path).faults
    assert fault.path == "manifest.json" and "expected a list" in fault.problem
    put("manifest.json", [{"path": "x", "bytes": "3", "sha256": "0"}])
    (fault,) = check(tmp_path).faults
    assert "field 'bytes' is str" in fault.problem


@pytest.mark.skipif(not DATA, reason="needs MOEKIT_DATA")
def test_the_data_folder_is_sound():
    # in a process of its own, where nobody checks the type of every call
    command = [sys.executable, "-m", "moekit.cli", "data", "check", "--json"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    report = json.loads(done.stdout)
    assert report["faults"] == [] and report["listed"] > 100
    counted = {}
    for entry in json.loads((Path(DATA) / "manifest.json").read_text()):
        path = Path(DATA) / entry["path"]
        if path.name.endswith(".jsonl.gz"):
            with gzip.open(path) as file:
                counted[entry["path"]] = (sum(1 for _ in file), entry["rows"])
    assert all(found == stated for found, stated in counted.values()) and counted
