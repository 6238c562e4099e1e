"""The command line as a user meets it: one clear line and exit code 2 for every mistake."""

import functools
import gzip
import inspect
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

import moekit as mk
from moekit.bench import baselines, generation, input, layer, step
from moekit.cli import VERBS, command, main
from moekit.data import packing

SIZES = ["--set", "d_model=16", "--set", "d_ff=32", "--set", "encoder_layers=1"]
SIZES += ["--set", "decoder_layers=1", "--set", "decoder_moe_layers=0"]
SMALL = ["--steps", "2", "--batch-tokens", "320", "--input-length", "64", "--target-length", "16"]


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def functions() -> Iterator[tuple[str, Callable]]:
    """Every verb with its function, such as ("data list", list_data)."""
    for verb in VERBS:
        found = command(verb)
        if isinstance(found, dict):
            yield from ((f"{verb} {name}", function) for name, function in found.items())
        else:
            yield verb, found


def help_texts(capsys: pytest.CaptureFixture, verb: str) -> dict[str, str]:
    """The text beside each flag and positional in the box that --help prints, without defaults."""
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    texts: dict[str, str] = {}
    flag = ""
    for line in capsys.readouterr().out.replace("│", " ").splitlines():
        if re.match(r"  \S", line):  # a flag, whose text may follow on the same line
            flag, _, text = line.strip().partition("  ")
            texts[flag] = text
        elif flag:
            texts[flag] += " " + line.strip()
    return {flag: re.sub(r"\((default:|required).*", "", text) for flag, text in texts.items()}


@pytest.mark.parametrize("verb", [verb for verb, _ in functions()])
def test_every_flag_of_every_verb_has_a_help_text(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    texts = help_texts(capsys, verb)
    assert any(flag.startswith("--json") for flag in texts)
    without = [flag for flag, text in texts.items() if len(text.strip()) < 10]
    assert not without
    for flag in inspect.signature(dict(functions())[verb]).parameters:
        name = flag.replace("_", "-")
        positional = (
            "file",
            "folder",
            "sources",
            "source",
            "preset",
            "texts",
            "dense",
            "destination",
            "runs",
        )
        renamed = ("config", "settings")
        assert flag in positional + renamed or f"--{name}" in " ".join(texts)


def test_help_lists_every_verb_and_starts_without_jax():
    code = (
        "import sys\n"
        "from moekit.cli import VERBS, main\n"
        "assert main(['--help']) == 0\n"
        "assert not {'jax', 'numpy', 'matplotlib', 'moekit.config'} & set(sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert [line.split()[0] for line in re.findall(r"^  \w.*", shown.stdout, re.M)] == list(VERBS)


BENCHMARKS = {
    "layer": layer.layer,
    "step": step.step,
    "input": input.input_pipeline,
    "peers": baselines.peers,
    "generation": generation.generation,
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_flags_of_a_benchmark_are_its_parameters(name):
    flags = dict(inspect.signature(command("bench")[name]).parameters)
    assert flags.pop("json").default is False
    parameters = inspect.signature(BENCHMARKS[name]).parameters
    assert flags.keys() == parameters.keys()
    for parameter, flag in flags.items():
        if parameter != "mesh":  # a text on the command line
            assert flag.default == parameters[parameter].default


def test_bench_times_a_layer_by_default(capsys):
    sizes = ["--tokens", 16, "--d-model", 8, "--d-ff", 8, "--repeats", 1, "--shapes", 2, 1]
    code, out, _ = run(capsys, "bench", *sizes, "--json")
    rows = json.loads(out)
    assert code == 0 and {row["tokens"] for row in rows} == {16}


def test_train_eval_and_resume(tmp_path, capsys):
    code, out, _ = run(capsys, "train", "--workdir", tmp_path / "r", *SMALL, *SIZES, "--json")
    assert code == 0 and json.loads(out)["step"] == 2
    flags = ["--steps", 3, *SMALL[2:], *SIZES]
    code, out, _ = run(capsys, "train", "--workdir", tmp_path / "r", *flags)
    assert code == 0 and "step 3" in out
    record = tmp_path / "results/eval.json"
    flags = ["--suite", "builtin", "--limit", 1, "--options", "False"]
    code, out, _ = run(
        capsys, "eval", "--checkpoint", tmp_path / "r", *flags, "--out", record, "--json"
    )
    found = json.loads(out)
    (suite,) = found["suites"]
    assert code == 0 and suite["mean"]["n"] == len(mk.suite("builtin").tasks)
    average = found["normalised_average"]
    assert average["low"] - 1e-9 <= average["score"] <= average["high"] + 1e-9
    assert json.loads(record.read_text()) == found
    folders = ["--results", record.parent, "--out", tmp_path / "figures"]
    code, out, _ = run(capsys, "figures", *folders)
    assert code == 0 and out.split() == [str(tmp_path / "figures/eval-scores.png")]
    code, _, err = run(
        capsys, "train", "--workdir", tmp_path / "r", *SMALL, *SIZES, "--weight-decay", "0.5"
    )
    assert code == 2 and "weight_decay" in err and "another" in err


def test_own_files_are_trained_evaluated_and_traced(tmp_path, capsys):
    rows = [
        {"Frage": f"Was ist {i}?", "Wahl": ["x", "y"], "Antwort": "xy"[i % 2]} for i in range(9)
    ]
    mine, notes = tmp_path / "mine.jsonl", tmp_path / "notes"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes.mkdir()
    (notes / "a.txt").write_text("some text " * 300)
    columns = ["--input", "Frage", "--target", "Antwort"]
    flags = ["--task", mine, *columns, "--options", "Wahl", "--corpus", notes, *SIZES]
    code, out, err = run(capsys, "train", "--workdir", tmp_path / "r", *flags, *SMALL, "--json")
    assert code == 0, err
    assert json.loads(out)["step"] == 2
    flags = ["--suite", mine, *columns, "--option-columns", "Wahl", "--limit", "2"]
    code, out, err = run(capsys, "eval", "--checkpoint", tmp_path / "r", *flags, "--json")
    assert code == 0, err
    (suite,) = json.loads(out)["suites"]
    assert suite["mean"]["n"] == 2 and suite["mean"]["metric"] == "accuracy"
    flags = ["--task", mine, *columns, "--options", "Wahl", "--limit", "5"]
    files = ["--out", tmp_path / "t/trace.npz", "--figures", tmp_path / "t"]
    code, out, err = run(capsys, "trace", "--checkpoint", tmp_path / "r", *flags, *files, "--json")
    assert code == 0, err
    traced = mk.RouterTrace.load(tmp_path / "t/trace.npz")
    assert json.loads(out)["prompts"] == len(traced.tasks) == 5
    found = [row["load_entropy"] for row in mk.balance_table(traced).rows]
    assert [row["load_entropy"] for row in json.loads(out)["balance"]] == found
    assert [path.name for path in (tmp_path / "t").glob("*.png")] == ["st-nano-expert-load.png"]
    flags = ["--task", mine, "--corpus", notes]
    code, _, err = run(capsys, "trace", "--checkpoint", tmp_path / "r", *flags)
    assert code == 2 and "one at a time" in err
    code, _, err = run(capsys, "train", "--workdir", tmp_path / "s", "--task", mine, *SMALL)
    assert code == 2 and "has the columns 'Frage', 'Wahl', 'Antwort'" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "--preset", "st-nanno"], "did you mean 'st-nano'"),
        (["train", "--router", "swich"], "did you mean 'switch'"),
        (["train", "--set", "num_expert=16"], "did you mean 'num_experts'"),
        (["train", "--set", "num_experts=many"], "num_experts must be a whole number"),
        (["train", "--set", "num_experts"], "write FIELD=VALUE"),
        (["train", "--set", "num_experts=-1"], "num_experts is -1; use 0"),
        (["train", "--set", "expert_d_ff=1.5"], "expert_d_ff must be a whole number or none"),
        (["train", "--set", "capacity_factor=x"], "capacity_factor must be a number"),
        (["train", "--set", "tied_logits=2"], "tied_logits must be true or false"),
        (["train", "--set", "router=swich"], "did you mean 'switch'"),
        (["plan", "--set", "num_expert=16"], "did you mean 'num_experts'"),
        (["train", "--router", "nowhere.py:mine"], "no file nowhere.py"),
        (["generate", "a", "--checkpoint", "nowhere"], "no checkpoint in nowhere"),
        (["generate", "a", "--checkpoint", "nowhere", "--router", "top2"], "give FILE.py:NAME"),
        (["generate", "--checkpoint", "nowhere"], "no text to answer"),
        (["generate", "a", "--checkpoint", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["generate", "a", "--checkpoint", "x", "--temperature", "nan"], "--temperature is nan"),
        (["chat", "--checkpoint", "nowhere"], "no checkpoint in nowhere"),
        (["chat", "--checkpoint", "x", "--seed", "-1"], "--seed is -1"),
        (["train", "--mixture", "flan2023"], "did you mean 'flan2022'"),
        (["train", "--mixture", "flan2022"], "set the environment variable MOEKIT_DATA"),
        (["train", "--corpus", "local"], "set the environment variable MOEKIT_DATA"),
        (["train", "--task", "no.jsonl"], "no file or folder no.jsonl"),
        (["train", "--input", "question"], "name its file"),
        (["train", "--corpus", "no/notes"], "no file or folder no/notes"),
        (["eval", "--checkpoint", "nowhere", "--suite", "no.jsonl"], "no file or folder no.jsonl"),
        (["train", "--batch-tokens", "8"], "less than one row"),
        (["train", "--input-length", "8000"], "exceeds st-nano's max_length 4096"),
        (["train", "--tokenizer", "no.model"], "no SentencePiece model at no.model"),
        (["train", "--router", "expert-choice"], "later tokens"),
        (["train", "--mesh", "expert=1000000"], "expert=1000000, model=1 does not fill"),
        (["train", "--seed", "99999999999999999999"], "seed is 99999999999999999999; use"),
        (["train", "--seed", "-1"], "seed is -1; use 0"),
        (["train", "--checkpoint", ""], "a path is empty"),
        (["train", "--checkpoint", "nowhere", "--router", "top2"], "leave out --checkpoint"),
        (["eval", "--checkpoint", "nowhere"], "no checkpoint in nowhere"),
        (["eval", "--checkpoint", "nowhere", "--suite", "builtin,bhb"], "did you mean 'bbh'"),
        (["eval", "--checkpoint", "nowhere", "--suite", "paper"], "set MOEKIT_DATA"),
        (["eval", "--checkpoint", " "], "a path is empty"),
        (["eval", "--checkpoint", "nowhere", "--limit", "0"], "--limit is 0; use 1 or more"),
        (["eval", "--checkpoint", "nowhere", "--shots", "-1"], "--shots is -1; use 0 or more"),
        (["eval", "--checkpoint", "nowhere", "--seed", str(2**64)], f"--seed is {2**64}"),
        (["plan", "st-nano", "--batch", "0"], "--batch is 0; use 1 or more"),
        (["plan", "st-nano", "--mesh", "expert=1000000"], "does not fill the 8 chips"),
        (["data", "describe", "--samples", "-1"], "--samples is -1; use 0 or more"),
        (["data", "describe", "--seed", "-1"], "--seed is -1"),
        (["data", "check", ""], "a path is empty"),
        (["study", "nowhere.toml"], "nowhere.toml: no such file"),
        (["study", ""], "a path is empty"),
        (["data", "describe", "--task", "additon"], "did you mean 'addition'"),
        (["data", "describe", "--task", "swaps"], "held out"),
        (["data", "descrbe"], "did you mean 'describe'"),
        (["data", "fetch", "gsm9k"], "did you mean 'gsm8k'"),
        (["data", "fetch"], "name the sources to fetch"),
        (["data", "fetch", "gsm8k"], "could not load 'openai/gsm8k'"),
        (["data", "check", "nowhere"], "data folder nowhere does not exist"),
        (["bench", "layers"], "did you mean 'layer'"),
        (["bench", "layer", "--tokens", "0"], "--tokens is 0; use 1 or more"),
        (["bench", "--tokens", "-1"], "--tokens is -1; use 1 or more"),
        (["bench", "layer", "--d-model", "0"], "--d-model is 0; use 1 or more"),
        (["bench", "layer", "--capacity-factor", "nan"], "--capacity-factor is nan"),
        (["bench", "layer", "--shapes", "2", "3"], "2 experts and 3 choices"),
        (["bench", "step", "--batch", "0"], "--batch is 0"),
        (["bench", "step", "--mesh", "expert=1000000"], "expert=1000000, model=1 does not fill"),
        (["bench", "step", "--mesh", "experts=2"], "write axes (data, expert, model)"),
        (["bench", "step", "--mesh", "expert=0"], "write axes (data, expert, model)"),
        (["bench", "input", "--workers", "-1"], "--workers is -1; use 0 or more"),
        (["bench", "peers", "--experts", "8", "-1"], "--experts is -1; use 0 or more"),
        (["bench", "step", "--preset", "st-nanno"], "did you mean 'st-nano'"),
        (["figures", "--results", "nowhere"], "no recorded study in nowhere"),
        (["tour", "--only", "99"], "no notebook"),
    ],
)
def test_mistakes(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("MOEKIT_DATA", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
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


@pytest.fixture
def few_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths are proposed from 64 examples instead of 4,096."""
    few = functools.partial(packing.propose_lengths, examples=64)
    monkeypatch.setattr(packing, "propose_lengths", few)


def test_a_damaged_data_folder(capsys, tmp_path, monkeypatch, few_examples):
    monkeypatch.setenv("MOEKIT_DATA", str(tmp_path))
    (tmp_path / "dolly").mkdir()
    row = json.dumps({"instruction": "a", "context": "", "response": "b"}) + "\n"
    file = tmp_path / "dolly/train.jsonl.gz"
    file.write_bytes(gzip.compress((row * 9 + '{"instruction": "a"}\n').encode()))
    code, _, err = run(capsys, "data", "describe", "--mixture", "flan2022")
    assert code == 2 and "train.jsonl.gz:10: column 'context' is missing" in err
    code, out, _ = run(capsys, "data", "describe", "--mixture", "flan2022", "--on-error", "skip")
    assert code == 0 and "dolly" in out
    file.write_bytes(file.read_bytes()[:-12])
    code, _, err = run(capsys, "data", "describe", "--mixture", "flan2022")
    assert code == 2 and "truncated" in err


def test_data_and_doctor(capsys, monkeypatch, few_examples):
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
