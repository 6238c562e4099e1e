"""`moekit generate` and `chat` with checkpoints, also of a router of one's own."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

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


def test_settings_that_are_left_out_are_those_of_the_checkpoint(tmp_path, capsys, monkeypatch):
    beams = mk.GenerationSettings(max_new_tokens=6, num_beams=3)
    cfg = mk.preset("t5-nano").replace(d_model=16, d_ff=32, encoder_layers=1, decoder_layers=1)
    mk.save(tmp_path / "model", mk.EncoderDecoder(cfg.replace(generation=beams)))
    model = mk.load(tmp_path / "model")
    flags = ["--checkpoint", tmp_path / "model", "--json"]
    _, out, _ = run(capsys, "generate", "one", *flags)
    assert json.loads(out)[0]["answer"] == mk.generate(model, "one", num_beams=3)
    _, out, _ = run(capsys, "generate", "one", *flags, "--num-beams", 1)
    assert json.loads(out)[0]["answer"] == mk.generate(model, "one", num_beams=1)
    type_in(monkeypatch, "one")  # an answer that is shown while it grows has no beams
    code, chatted, _ = run(capsys, "chat", *flags)
    assert code == 0 and json.loads(chatted)["answer"] == json.loads(out)[0]["answer"]


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


def test_train_changes_a_preset_or_the_settings_of_a_checkpoint(
    tmp_path, capsys, monkeypatch, router_file
):
    models = []

    def train(model: mk.EncoderDecoder, *_: object, **__: object) -> SimpleNamespace:
        models.append(model)
        return SimpleNamespace(metrics=SimpleNamespace(rows=[{"step": 1, "loss": 0.0}]))

    monkeypatch.setattr(mk, "train", train)
    settings = []
    for name, value in (SIZES | {"encoder_moe_layers": 1, "decoder_moe_layers": 1}).items():
        settings += ["--set", f"{name}={value}"]
    flags = ["--workdir", tmp_path / "run", "--corpus", "builtin"]
    router = f"{router_file}:Sharp"
    assert run(capsys, "train", *flags, *settings, "--router", router)[0] == 0
    (model,) = models
    assert model.cfg.num_experts == 2 and model.cfg.router.scale == 2
    checkpoint = tmp_path / "model"
    mk.save(checkpoint, model)
    flags += ["--checkpoint", checkpoint]
    assert run(capsys, "train", *flags, "--set", "dropout=0.25", "--router", router)[0] == 0
    assert models[1].cfg.to_dict() == model.cfg.to_dict() | {"dropout": 0.25}
    code, _, err = run(capsys, "train", *flags, "--set", "vocab_size=512", "--router", router)
    assert code == 2 and "changes the parameter" in err
    asked = ["generate", "one", "--checkpoint", checkpoint, "--max-new-tokens", 4]
    code, _, err = run(capsys, *asked)
    assert code == 2 and "trained with a router of its author, {'router': 'Sharp'" in err
    code, _, err = run(capsys, *asked, "--router", f"{router_file}:noisy")
    assert code == 2 and "not {'router': 'noisy'}" in err
    assert run(capsys, *asked, "--router", router)[0] == 0
