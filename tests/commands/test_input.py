"""Malformed records, traces, checkpoints and flags: one line, and no traceback of a library."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moekit as mk
from moekit.cli import main
from moekit.commands.output import EscapedMessages, print_messages
from moekit.planning.step_plan import Plan

SIZES = {"d_model": 16, "d_ff": 32, "encoder_layers": 1, "decoder_layers": 1, "num_experts": 2}
SCORES = {"task": "t", "score": 0.5, "low": 0.4, "high": 0.6, "chance": 0.25, "majority": 0.3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small model whose name leads out of a folder."""
    cfg = mk.preset("st-nano").replace(**SIZES, encoder_moe_layers=1, decoder_moe_layers=1)
    folder = tmp_path_factory.mktemp("saved") / "model"
    mk.save(folder, mk.EncoderDecoder(cfg.replace(name="../model")))
    return folder


def one_line(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """The error of a command line."""
    assert main([str(argument) for argument in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def replace_by_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [replace_by_pipe, cut])
@pytest.mark.parametrize("item", ["meta/metadata", "model/d"])
def test_a_damaged_checkpoint_is_named(damage, item, saved, tmp_path, capfd):
    shutil.copytree(saved, tmp_path / "model")
    place = tmp_path / "model/0" / item
    largest = place
    if place.is_dir():
        largest = max(place.iterdir(), key=lambda path: path.stat().st_size)
    damage(largest)
    print_messages()
    line = one_line(capfd, "generate", "--checkpoint", tmp_path / "model", "x")
    assert f"checkpoint 0 in {tmp_path / 'model'} is damaged" in line


def test_a_model_name_does_not_lead_out_of_the_folder_of_figures(saved, tmp_path, capsys):
    argv = ["trace", "--checkpoint", saved, "--figures", tmp_path / "figures"]
    assert "the model's name '../model' cannot be part of a file's name" in one_line(capsys, *argv)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "x", "--num-beams", 10**6], "num_beams is 1000000; use at most 384"),
        (["generate", "x", "--top-p", 2], "--top-p is 2.0; use a number above 0, at most 1"),
        (["chat", "--top-p", "nan"], "--top-p is nan"),
        (["eval", "--out", "."], ". is a folder: name a file"),
        (["eval", "--out", "/proc/none/x.json"], "cannot write /proc/none/x.json"),
        (["trace", "--out", "/proc/none/x.npz"], "cannot write /proc/none/x.npz"),
    ],
)
def test_flags_are_refused_before_long_work(argv, message, saved, capsys):
    verb, *flags = argv
    assert message in one_line(capsys, verb, "--checkpoint", saved, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", 0], "--seeds is 0; use 1 or more"),
        (["--minutes", -1], "--minutes is -1.0; use 0 or more"),
        (["--pack", "."], ". is a folder: name a file"),
        (["--pack", "/proc/none/x.npz"], "cannot write /proc/none/x.npz"),
        (["--packed", "none.npz"], "none.npz: no such file"),
        (["--only", "t6"], "unknown model or setup 't6': did you mean 't5'"),
    ],
)
def test_a_study_is_refused_before_it_starts(flags, message, tmp_path, capsys):
    design = tmp_path / "study.toml"
    lines = ['title = "x"', "[held_out]", 'reporting = ["cloze"]', "[stages.pretrain]", "steps = 1"]
    lines += ["[models.t5]", 'preset = "t5-nano"', "seeds = 1"]
    lines += ["[[comparisons]]", 'sparse = "t5"', 'dense = "t5"']
    design.write_text("\n".join(lines))
    folders = ["--out", tmp_path / "out", "--workdir", tmp_path / "models"]
    assert message in one_line(capsys, "study", design, *folders, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def evaluation(**changes: object) -> str:
    suite = {"name": "m on s", "mean": SCORES, "tasks": [SCORES | changes]}
    record = {"kind": "evaluation", "model": "m", "suites": [suite]}
    return json.dumps(record | {"normalised_average": {"score": 0.5}})


@pytest.mark.parametrize(
    "text",
    [
        evaluation(score=float("nan")),
        evaluation(score=1e300),
        evaluation(low=None),
        evaluation(high="0.5"),
        evaluation().replace('"model": "m"', '"model": null'),
        json.dumps({"kind": "evaluation", "model": "m", "suites": []}),
        "[" * 100_000,
    ],
)
def test_a_record_of_wrong_scores_is_named(text, tmp_path, capsys):
    (tmp_path / "x.json").write_text(text)
    line = one_line(capsys, "figures", "--results", tmp_path, "--out", tmp_path / "figures")
    assert f"{tmp_path / 'x.json'} is not a record" in line
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"preset": 3}', "[" * 100_000])
def test_a_plan_is_named(text, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json is not a plan"):
        Plan.load(path)


def test_files_of_any_kind_are_not_opened_if_they_are_pipes(tmp_path, capsys):
    replace_by_pipe(tmp_path / "x.json")
    assert "a named pipe" in one_line(capsys, "figures", "--results", tmp_path)
    for load in (Plan.load, mk.RouterTrace.load):
        with pytest.raises(ValueError, match=r"x\.json: a named pipe"):
            load(tmp_path / "x.json")


def test_messages_are_escaped_and_what_is_said_twice_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(logging, "lastResort", logging.lastResort)
    others = []
    monkeypatch.setattr(sys, "unraisablehook", others.append)
    print_messages()
    if not isinstance(logging.lastResort, EscapedMessages):
        pytest.fail("messages are not escaped")
    record = logging.makeLogRecord({"msg": "row %s", "args": ("\x1b[2J",)})
    logging.lastResort.handle(record)
    assert capsys.readouterr().err == "row \\x1b[2J\n"


def test_writes_that_orbax_drops_are_not_mentioned():
    program = """
from moekit.commands.output import print_messages
async def write(): pass
print_messages()
write()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def raised_in(path: str) -> ValueError:
    """An error that a file of this path has raised."""
    try:
        exec(compile("raise ValueError('disk full')", path, "exec"))
    except ValueError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("name", ["absl", "asyncio"])
@pytest.mark.parametrize(
    ("path", "is_shown"),
    [
        ("/site-packages/orbax/checkpoint/future.py", False),
        ("/my/orchestra.py", True),
        ("/my/orbax_runs.py", True),
    ],
)
def test_tracebacks_of_orbax_are_left_out(name, path, is_shown):
    import absl.logging

    from moekit.training.checkpoint import hide_repeated_errors

    assert absl.logging
    hide_repeated_errors()
    error = raised_in(path)
    record = {"name": name, "pathname": path, "msg": "Task exception was never retrieved"}
    assert logging.getLogger(name).filter(logging.makeLogRecord(record))
    record["exc_info"] = (ValueError, error, error.__traceback__)
    assert bool(logging.getLogger(name).filter(logging.makeLogRecord(record))) == is_shown
