"""moekit runs: the list and the comparison."""

import json

import pytest

from moekit.cli import main
from moekit.training.metrics import Metrics
from moekit.training.run_folder import record_start


@pytest.fixture
def runs(tmp_path):
    """A folder of two runs with other learning rates; the second run has an older configuration."""
    for name, rate in (("a", 0.1), ("b", 0.2)):
        run = tmp_path / name
        run.mkdir()
        train = {"steps": 2, "learning_rate": rate}
        model = {"name": f"model-{name}", "d_model": 16}
        if name == "a":
            train["on_spike"] = "report"
        settings = {"model": model, "train": train, "source": "x", "tokenizer": "y"}
        record_start(run, settings)
        metrics = Metrics(run / "metrics.jsonl")
        for step in (1, 2):
            metrics.add({"step": step, "loss": 5 * rate / step})
    return tmp_path


def test_the_list(runs, capsys):
    assert main(["runs", str(runs)]) == 0
    headings, first, second = capsys.readouterr().out.splitlines()
    assert headings.split() == [
        "run",
        "model",
        "state",
        "steps",
        "loss",
        "valid",
        "loss",
        "changed",
    ]
    assert first.split()[:5] == ["a", "model-a", "stopped", "2/2", "0.2500"]
    assert second.split()[:5] == ["b", "model-b", "stopped", "2/2", "0.5000"]
    assert main(["runs", str(runs / "b"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["name"], found["loss"], found["problems"]) == ("b", 0.5, [])


def test_the_comparison_shows_what_differs_and_draws_the_curves(runs, tmp_path, capsys):
    out = tmp_path / "figure.png"
    paths = [str(runs / name) for name in ("a", "b")]
    assert main(["runs", "compare", *paths, "--out", str(out)]) == 0
    _, *lines, note = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["model.name", "model-a", "model-b"],
        ["train.learning_rate", "0.1", "0.2"],
        ["last", "loss", "0.2500", "0.5000"],
    ]
    assert str(out) in note and out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["."], "holds no run"),
        (["compare", "a"], "needs two or more runs"),
        (["compare", "a", "a"], "named twice"),
        (["compare", "a", "nowhere"], "nowhere holds no run"),
        (["compare", "a", "b", "--key", "lss"], "a did not log 'lss', only loss, step"),
        (["compare", "a", "b", "--out", "x.txt"], "name a .png or .svg file"),
    ],
)
def test_what_cannot_be_shown_is_one_line(runs, flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(runs)
    if flags == ["."]:
        (runs / "empty").mkdir()
        monkeypatch.chdir(runs / "empty")
    assert main(["runs", *flags]) == 2
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1 and message in output.err
