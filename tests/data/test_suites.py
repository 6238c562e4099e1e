"""Suites of a folder: what they count, and that benchmarks are asked in their own words."""

import gzip
import json

import pytest

import moekit as mk
from moekit.data.published import CUE
from moekit.data.suites import SUITES

DESCRIPTION = "Say the place of a thing.\n\nThe first place is one."
ASKED = "Where is {}?\nOptions:\n(A) first\n(B) last"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def published(space="\n"):
    """A chain-of-thought prompt of three shots, in the form of the published ones."""
    shots = [
        f"Q: {ASKED.format(f's{i}')}\nA: {CUE}{space}It is last. So the answer is (B)."
        for i in range(3)
    ]
    return "\n\n".join([DESCRIPTION, *shots])


@pytest.fixture
def root(tmp_path):
    sizes = [f"orders_{size}_objects" for size in ("five", "seven", "three")]
    for name in (*sizes, "single"):
        rows = [{"input": ASKED.format(i), "target": f"({'AB'[i % 2]})"} for i in range(4)]
        write(tmp_path / f"bbh/{name}.jsonl.gz", rows)
    rows = [{"input": f"not {i} is", "target": str(i % 2 == 0)} for i in range(5)]
    write(tmp_path / "bbh/truths.jsonl.gz", rows)
    prompts = [{"task": name, "prompt": published()} for name in sizes]
    prompts.append({"task": "single", "prompt": published(" ")})
    write(tmp_path / "bbh/prompts/cot_prompts.jsonl.gz", prompts)
    return tmp_path


def test_bbh_is_read_in_the_published_words(root):
    suite = mk.suite("bbh", data_dir=root)
    assert [(t.name, len(t.examples("test"))) for t in suite.tasks] == [
        ("bbh/orders", 12),
        ("bbh/single", 4),
        ("bbh/truths", 5),
    ]
    assert (suite.shots, suite.chain_of_thought) == (3, False)
    orders, single, truths = suite.tasks
    for task, space in ((orders, "\n"), (single, " ")):
        shots, example = task.examples("train"), task.examples("test")[1]
        assert [shot.answer for shot in shots] == ["(B)"] * 3
        thought = mk.format_prompt(task, example, shots=shots, chain_of_thought=True)
        assert thought.input == f"{published(space)}\n\nQ: {ASKED.format(1)}\nA: {CUE}"
        assert thought.references == ("(B)",) and not thought.options
        direct = mk.format_prompt(task, example, shots=shots)
        assert direct.input.startswith(f"{DESCRIPTION}\n\nQ: {ASKED.format('s0')}\nA: (B)\n\nQ: ")
        assert (
            direct.input.endswith(f"(B)\n\nQ: {ASKED.format(1)}\nA:") and "step" not in direct.input
        )
        assert direct.options == ("(A)", "(B)") and direct.target == "(B)"
    assert truths.examples("test")[0].options == ("False", "True")
    assert mk.suite("bbh-cot", data_dir=root).chain_of_thought


def test_bbh_in_the_original_files(root, tmp_path):
    own = tmp_path / "own"
    lines = gzip.decompress((root / "bbh/single.jsonl.gz").read_bytes()).splitlines()
    rows = [json.loads(line) for line in lines]
    (own / "bbh/cot-prompts").mkdir(parents=True)
    (own / "bbh/single.json").write_text(json.dumps({"canary": "x", "examples": rows}))
    (own / "bbh/cot-prompts/single.txt").write_text(f"canary GUID\n-----\n{published(' ')}")
    (one,) = mk.suite("bbh", data_dir=own).tasks
    same = mk.suite("bbh", data_dir=root).tasks[1]
    for split in ("train", "test"):
        assert list(one.examples(split)) == list(same.examples(split))
    (own / "bbh/single.json").write_text(json.dumps({"examples": [{"input": "x"}]}))
    with pytest.raises(ValueError, match=r"single\.json:1: field 'target' is missing"):
        mk.suite("bbh", data_dir=own).tasks[0].examples("test")


def test_word_problems_without_a_train_split_have_exemplars_of_our_own(tmp_path, put, caplog):
    rows = [{"question": "One and one?", "answer": "2"}] * 3
    write(tmp_path / "svamp/test.jsonl.gz", rows)
    write(tmp_path / "gsm8k/test.jsonl.gz", rows)
    suite = mk.suite("reasoning", data_dir=tmp_path)
    assert [task.name for task in suite.tasks] == ["gsm8k", "svamp"]
    assert suite.missing == ("asdiv", "strategyqa") and suite.shots == 8 and suite.chain_of_thought
    assert "asdiv is left out: could not load 'EleutherAI/asdiv'" in caplog.text
    exemplars = suite.tasks[1].examples("train")
    assert len(exemplars) == 8
    for exemplar in exemplars:  # each sum of a rationale is right, and the last is the answer
        sums = [
            part.split("=") for part in exemplar.rationale.rstrip(".").split(". ") if "=" in part
        ]
        for left, right in sums:
            words = left.split()
            at = next(i for i, w in enumerate(words) if w in "+-*/")
            assert eval(" ".join(words[at - 1 : at + 2])) == int(right.split()[0])
        assert sums[-1][1].split()[0] == exemplar.answer
    row = {"answer": "9 (apples)", "body": "Seven red and two green.", "question": "How many?"}
    put("hub/EleutherAI/asdiv/asdiv/validation/0000.parquet", [row])  # as fetched from the hub
    (asdiv,) = mk.suite("asdiv", data_dir=tmp_path).tasks
    example = asdiv.examples("test")[0]
    assert example.fields == {"question": "Seven red and two green. How many?"}
    assert example.answer == "9" and asdiv.examples("train") == exemplars
    assert mk.suite("reasoning", data_dir=tmp_path).missing == ("strategyqa",)


def test_groups_single_tasks_and_names(root, monkeypatch):
    choice = [{"question": f"q{i}?", "choices": ["a", "b"], "answer": i % 2} for i in range(3)]
    write(root / "mc/arc_easy/test.jsonl.gz", choice)
    qa = mk.suite("qa", data_dir=root)
    assert [task.name for task in qa.tasks] == ["arc_easy"] and qa.shots == 0
    assert qa.missing == ("ai2_science_elementary", "boolq", "arc_challenge")
    meta = [
        {"task": f"task{i}_x", "split": split, "definition": "Do.", "categories": ["C"]}
        for i, split in enumerate(("train", "test"))
    ]
    write(root / "niv2/tasks.jsonl.gz", meta)
    rows = [{"id": str(i), "input": f"in {i}", "output": [f"out {i}"]} for i in range(120)]
    for part, name in (("train", "task0_x"), ("valid", "task0_x"), ("test", "task1_x")):
        write(root / f"niv2/{part}/{name}.jsonl.gz", rows)
    one, other = (mk.suite(f"niv2/task{i}_x", data_dir=root) for i in (0, 1))
    assert (one.split, other.split) == ("valid", "test")
    assert not other.ranked and other.first == 100
    whole = mk.suite("niv2-test", data_dir=root)
    assert [t.name for t in whole.tasks] == ["niv2/task1_x"]
    both = mk.suites("bbh, qa", data_dir=root)
    assert [suite.name for suite in both] == ["bbh", "qa"]
    for name, near in (("bbhh", "bbh"), ("niv2/task0_y", "niv2/task0_x")):
        with pytest.raises(ValueError, match=f"did you mean '{near}'"):
            mk.suite(name, data_dir=root)
    with pytest.raises(FileNotFoundError, match="could not load 'baber/piqa'"):
        mk.suite("piqa", data_dir=root)
    assert {"mmlu", "bbh", "reasoning", "qa"} < set(SUITES)
    monkeypatch.delenv("MOEKIT_DATA", raising=False)
    assert all(task.held_out for task in mk.suite("builtin").tasks)
    assert not any(task.held_out for task in mk.suite("builtin-heldin").tasks)
    with pytest.raises(FileNotFoundError, match="MOEKIT_DATA"):
        mk.suites("paper")
