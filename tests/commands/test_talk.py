"""`moekit train --router FILE.py:NAME`, then `generate` and `chat` with its checkpoint."""

import io
import json
from pathlib import Path

import pytest

import moekit as mk
from moekit.cli import main

SIZES = {"d_model": 16, "d_ff": 32, "encoder_layers": 1, "decoder_layers": 1, "num_experts": 2}


def run(capsys: pytest.CaptureFixture, *argv: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def untrained(folder: Path, router: object = "switch") -> Path:
    """A checkpoint of a small model."""
    cfg = mk.preset("st-nano").replace(**SIZES, encoder_moe_layers=1, decoder_moe_layers=1)
    mk.save(folder, mk.EncoderDecoder(cfg.replace(router=router), seed=0))
    return folder


def type_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_texts_and_lines_are_answered(tmp_path, capsys, monkeypatch):
    checkpoint = untrained(tmp_path / "model")
    flags = ["--checkpoint", checkpoint, "--max-new-tokens", 12, "--temperature", 2, "--seed", 1]
    code, out, _ = run(capsys, "generate", "one", "two", *flags, "--json")
    rows = json.loads(out)
    assert code == 0 and [row["prompt"] for row in rows] == ["one", "two"]
    settings = dict(max_new_tokens=12, temperature=2.0, seed=1)
    answers = mk.generate(mk.load(checkpoint), ["one", "two"], **settings)
    assert [row["answer"] for row in rows] == answers
    type_in(monkeypatch, "one\n\ntwo\n")
    assert run(capsys, "generate", *flags, "--json") == (0, out, "")
    code, out, _ = run(capsys, "generate", "one", *flags)
    assert code == 0 and "\x1b" not in out
    stop = mk.generate(mk.load(checkpoint), "one", **settings)[2]
    code, out, _ = run(capsys, "generate", "one", *flags, "--stop", stop, "--stop", "zz", "--json")
    assert stop not in json.loads(out)[0]["answer"]


def test_a_chat_answers_every_line_by_itself(tmp_path, capsys, monkeypatch):
    checkpoint = untrained(tmp_path / "model")
    flags = ["--checkpoint", checkpoint, "--max-new-tokens", 12, "--temperature", 2]
    type_in(monkeypatch, "one\n" + "x" * 5000 + "\ntwo\n\nnever asked\n")
    code, out, err = run(capsys, "chat", *flags, "--json")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == ["one", "two"]
    model = mk.load(checkpoint)
    for row, seed in zip(rows, (0, 2), strict=True):
        answer = mk.generate(model, row["prompt"], max_new_tokens=12, temperature=2.0, seed=seed)
        assert row["answer"] == answer
    assert "does not remember" in err.splitlines()[0]
    assert "5001 tokens long" in err
    monkeypatch.setattr(mk, "generate", lambda *_, **__: iter(["\x1b[31m", "red", " \u20ac"]))
    type_in(monkeypatch, "one")  # ended by the end of the input
    code, out, _ = run(capsys, "chat", *flags)
    assert code == 0 and out == "\\x1b[31mred \u20ac\n"


def test_a_model_with_a_router_of_ones_own(tmp_path, capsys, router_file):
    router = f"{router_file}:noisy"
    settings = []
    for name, value in (SIZES | {"encoder_moe_layers": 1, "decoder_moe_layers": 0}).items():
        settings += ["--set", f"{name}={value}"]
    lengths = ["--batch-tokens", 160, "--input-length", 64, "--target-length", 16]
    flags = ["--workdir", tmp_path / "run", *settings, *lengths, "--router", router]
    assert run(capsys, "train", "--steps", 1, *flags)[0] == 0
    code, out, _ = run(capsys, "train", "--steps", 2, *flags)  # resumed
    assert code == 0 and "step 2" in out
    asked = ["generate", "one", "--checkpoint", tmp_path / "run", "--max-new-tokens", 4]
    code, _, err = run(capsys, *asked)
    assert code == 2 and "trained with a router of its author, {'router': 'noisy'}" in err
    code, _, err = run(capsys, *asked, "--router", f"{router_file}:Sharp")
    assert code == 2 and "not {'router': 'Sharp', 'scale': 2.0}" in err
    assert run(capsys, *asked, "--router", router)[0] == 0
