"""`moekit upcycle`: checkpoints, runs, and what cannot be upcycled."""

import json
from pathlib import Path

import pytest

import moekit as mk
from moekit.cli import main

DENSE = mk.preset("t5-nano").replace(
    d_model=16, d_ff=32, num_heads=2, head_dim=8, encoder_layers=2, decoder_layers=1
)
FLAGS = ("--set", "num_experts=4", "--set", "encoder_moe_layers=1")


def run(capsys: pytest.CaptureFixture, *argv: object) -> tuple[int, str, str]:
    code = main(["upcycle", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model."""
    folder = tmp_path_factory.mktemp("dense")
    mk.save(folder, mk.EncoderDecoder(DENSE))
    return folder


def test_a_checkpoint_is_upcycled(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    sparse = tmp_path / "sparse"
    code, out, _ = run(capsys, source, sparse, *FLAGS, "--mesh", "expert=4", "--json")
    model = mk.load(sparse)
    cfg = DENSE.replace(num_experts=4, encoder_moe_layers=1, router=mk.TopK(k=2, normalise=True))
    assert code == 0 and model.cfg == cfg
    assert json.loads(out)["total"] == cfg.num_parameters().total
    switch = tmp_path / "switch"
    assert run(capsys, source, switch, *FLAGS, "--router", "switch")[0] == 0
    assert mk.load(switch).cfg.router == mk.Switch()
    code, _, err = run(capsys, source, sparse, *FLAGS)
    assert code == 2 and f"{sparse} exists: name a new folder" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "num_experts=4"], "give encoder_moe_layers or decoder_moe_layers"),
        ([], "t5-nano is dense (num_experts=0)"),
        ([*FLAGS, "--set", "d_ff=64"], "d_ff=32 there, 64 here"),
        ([*FLAGS, "--optimizer"], "has no optimizer state"),
        ([*FLAGS, "--seed", "-1"], "--seed is -1"),
    ],
    ids=str,
)
def test_mistakes_leave_no_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
):
    code, _, err = run(capsys, source, tmp_path / "sparse", *flags)
    assert code == 2 and message in err
    assert not (tmp_path / "sparse").exists()


def test_a_run_is_upcycled_with_its_optimizer_state(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def upcycle(source: str, cfg: mk.ModelConfig, **settings: object) -> mk.EncoderDecoder:
        calls.append((source, settings["workdir"]))
        return mk.EncoderDecoder(cfg)

    mk.save(tmp_path / "dense", mk.EncoderDecoder(DENSE))
    monkeypatch.setattr(mk, "upcycle", upcycle)
    code, out, _ = run(capsys, tmp_path / "dense", tmp_path / "sparse", *FLAGS, "--optimizer")
    assert code == 0 and calls == [(str(tmp_path / "dense"), tmp_path / "sparse")]
    assert "M active; written to" in out
