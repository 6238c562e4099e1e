"""The command line as a user meets it: one clear line and exit code 2 for every mistake."""

import gzip
import json
import os
import re
import subprocess
import sys

import pytest

import moekit as mk
from moekit import cli
from moekit.cli import main

SMALL = ["--steps", "2", "--batch-tokens", "320", "--input-length", "64", "--target-length", "16"]


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept_for_training_on_a_cpu_alone(monkeypatch):
    names = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(cli, "_accelerated", lambda: True)
    cli._keep_freed_memory()
    assert not set(names) & set(os.environ)
    monkeypatch.setattr(cli, "_accelerated", lambda: False)
    cli._keep_freed_memory()
    # a process that starts from here maps no block of its own: freed, it would be given back
    code = "import ctypes; c = ctypes.CDLL(None); c.malloc(1 << 27); c.malloc_stats()"
    report = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert re.search(r"max mmap regions = +0$", report, re.M) and set(names) <= set(os.environ)


def test_train_eval_and_resume(tmp_path, capsys):
    code, out, _ = run(capsys, "train", "--workdir", tmp_path / "r", *SMALL, "--json")
    assert code == 0 and json.loads(out)["step"] == 2
    code, out, _ = run(capsys, "train", "--workdir", tmp_path / "r", "--steps", 3, *SMALL[2:])
    assert code == 0 and "step 3" in out
    record = tmp_path / "results/eval.json"
    asked = ["--suite", "builtin,builtin-heldin", "--limit", 1, "--options", "False"]
    code, out, _ = run(
        capsys, "eval", "--checkpoint", tmp_path / "r", *asked, "--out", record, "--json"
    )
    found = json.loads(out)
    sizes = [suite["mean"]["n"] for suite in found["suites"]]
    assert code == 0 and sizes == [len(mk.suite(n).tasks) for n in ("builtin", "builtin-heldin")]
    average = found["normalised_average"]
    assert average["low"] - 1e-9 <= average["score"] <= average["high"] + 1e-9
    assert json.loads(record.read_text()) == found
    folders = ["--results", record.parent, "--out", tmp_path / "figures"]
    code, out, _ = run(capsys, "figures", *folders)
    assert code == 0 and out.split() == [str(tmp_path / "figures/eval-scores.png")]
    code, _, err = run(
        capsys, "train", "--workdir", tmp_path / "r", *SMALL, "--learning-rate", "0.5"
    )
    assert code == 2 and "another train configuration" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "--preset", "st-nanno"], "did you mean 'st-nano'"),
        (["train", "--router", "swich"], "did you mean 'switch'"),
        (["train", "--mixture", "flan2023"], "did you mean 'flan2022'"),
        (["train", "--mixture", "flan2022"], "set the environment variable MOEKIT_DATA"),
        (["train", "--corpus", "mirror"], "set the environment variable MOEKIT_DATA"),
        (["train", "--batch-tokens", "8"], "less than one row"),
        (["train", "--input-length", "8000"], "exceeds st-nano's max_length 4096"),
        (["train", "--tokenizer", "no.model"], "no SentencePiece model at no.model"),
        (["train", "--router", "expert-choice"], "later tokens"),
        (["eval", "--checkpoint", "nowhere"], "no checkpoint in nowhere"),
        (["eval", "--checkpoint", "nowhere", "--suite", "builtin,bhb"], "did you mean 'bbh'"),
        (["eval", "--checkpoint", "nowhere", "--suite", "paper"], "set the environment variable"),
        (["data", "describe", "--task", "additon"], "did you mean 'addition'"),
        (["data", "describe", "--task", "swaps"], "held out"),
        (["data", "descrbe"], "did you mean 'describe'"),
        (["data", "fetch", "gsm9k"], "did you mean 'gsm8k'"),
        (["data", "fetch"], "name the sources to fetch"),
        (["data", "fetch", "gsm8k"], "could not load 'openai/gsm8k'"),
        (["data", "check", "nowhere"], "data folder nowhere does not exist"),
        (["bench", "layers"], "did you mean 'layer'"),
        (["bench", "step", "--tokens", "64"], "bench step has no --tokens"),
        (["bench", "step", "--preset", "st-nanno"], "did you mean 'st-nano'"),
        (["figures", "--results", "nowhere"], "no recorded study in nowhere"),
        (["study", "--source", "mirror"], "set the environment variable MOEKIT_DATA"),
        (["tour", "--only", "99"], "no notebook"),
    ],
)
def test_mistakes(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("MOEKIT_DATA", raising=False)
    if argv[0] == "tour":
        monkeypatch.chdir(tmp_path)
    if argv[0] == "train":
        given = [a for a in SMALL if a not in argv]
        argv = [*argv, "--workdir", str(tmp_path / "run"), *(given if len(given) == 8 else [])]
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_damaged_data_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEKIT_DATA", str(tmp_path))
    (tmp_path / "dolly").mkdir()
    row = json.dumps({"instruction": "a", "context": "", "response": "b"}) + "\n"
    file = tmp_path / "dolly/train.jsonl.gz"
    file.write_bytes(gzip.compress((row * 9 + '{"instruction": "a"}\n').encode()))
    code, _, err = run(capsys, "data", "describe", "--mixture", "flan2022")
    assert code == 2 and "train.jsonl.gz:10: field 'context' is missing" in err
    code, out, _ = run(capsys, "data", "describe", "--mixture", "flan2022", "--on-error", "skip")
    assert code == 0 and "dolly" in out
    file.write_bytes(file.read_bytes()[:-12])
    code, _, err = run(capsys, "data", "describe", "--mixture", "flan2022")
    assert code == 2 and "truncated" in err


def test_data_and_doctor(capsys, monkeypatch):
    monkeypatch.delenv("MOEKIT_DATA", raising=False)
    code, out, _ = run(capsys, "data", "describe", "--samples", 2, "--json")
    found = json.loads(out)
    assert code == 0 and len(found["samples"]) == 2
    assert sum(found["rates"].values()) == pytest.approx(1)
    code, out, _ = run(capsys, "data", "describe", "--corpus", "builtin")
    assert code == 0 and "language reference" in out
    code, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert len(found["devices"]) == 8 and found["versions"]["jax"]
    assert any("MOEKIT_DATA is not set" in line for line in found["missing"])
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "missing" in out
    code, out, _ = run(capsys, "doctor", "--presets", "--json")
    rows = {row["preset"]: row for row in json.loads(out)}
    assert rows.keys() == mk.PRESETS.keys()
    assert round(rows["st-32b"]["total_billions"], 1) == 269.1
