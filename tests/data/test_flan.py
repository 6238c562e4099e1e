"""Mixtures: FLAN's numbers, clusters and wordings; what `describe` tells; what a digest covers."""

import collections
import gzip
import json
import os
import string
from pathlib import Path

import pytest

import moekit as mk
from moekit.data.collection import FORMATS, MIXTURES, cluster_of, listed, published_size
from moekit.data.datasets import datasets
from moekit.data.flan import Member, proportional
from moekit.data.tasks import TEMPLATES, Template

DATA = os.environ.get("MOEKIT_DATA")
# as printed in Chung 2022, Table 23, and in the public release (flan/v2)
PUBLISHED = {
    "flan-t5": {"muffin": 0.460, "t0": 0.279, "cot": 0.018, "niv2": 0.242},
    "flan-ablation": {"muffin": 0.52, "t0": 0.15, "cot": 0.03, "niv2": 0.30},
    "flan2022": {"flan2021": 0.40, "t0": 0.32, "niv2": 0.20, "cot": 0.05, "dialog": 0.03},
}
CAPS = {"muffin": 30_000, "flan2021": 30_000, "t0": 20_000, "cot": 100_000, "niv2": 5_000}
CAPS["dialog"] = 200_000


def test_proportions_caps_and_formats_are_the_published_ones():
    found = {n: {p: sub.share for p, sub in parts.items()} for n, parts in MIXTURES.items()}
    assert found == PUBLISHED
    for parts in MIXTURES.values():
        assert {part: sub.cap for part, sub in parts.items()} == {p: CAPS[p] for p in parts}
        assert sorted(g for sub in parts.values() for g in sub.groups) == sorted(FORMATS)
    for group, formats in FORMATS.items():
        assert formats.few_shot == 0.5
        assert formats.no_options == (0.5 if group in ("flan2021", "t0") else 0.0)
        inverted = group in ("cot", "dialog", "program")
        assert formats.inverted == pytest.approx(0.3 / 1.3 if inverted else 0, abs=1e-6)
        assert formats.chain_of_thought == (group == "cot")


def test_task_lists_have_the_papers_counts():
    count = {group: len(listed(group)) for group in FORMATS}
    assert count["flan2021"] + count["dialog"] + count["program"] == 80  # Muffin
    assert (count["t0"], count["cot"]) == (193, 9)


@pytest.mark.parametrize(
    ("group", "task", "cluster"),
    [
        ("flan2021", "ai2_arc/ARC-Challenge:1.0.0", "closed-book QA"),
        ("flan2021", "glue/qnli:2.0.0", "entailment"),
        ("flan2021", "squad/v2.0:3.0.0", "reading comprehension"),
        ("flan2021", "wmt16_translate/ro-en:1.0.0", "translation"),
        ("flan2021", "super_glue/wic:1.0.2", "word sense"),
        ("flan2021", "gem/common_gen:1.1.0", "structure to text"),
        ("flan2021", "math_dataset/algebra__linear_1d:1.0.0", "math"),
        ("t0", "duorc_SelfRC_generate_question_by_answer", "extractive QA"),
        ("t0", "duorc_SelfRC_generate_question", "question generation"),
        ("cot", "stream_aqua_ii", "chain of thought"),
        ("dialog", "qrecc_ii", "conversational QA"),
        ("flan2021", "something else", "flan2021"),
    ],
)
def test_clusters_of_names_as_sets_write_them(group, task, cluster):
    assert cluster_of(group, task) == cluster


def test_ten_wordings_a_task_type():
    for kind in ("family", "inverted"):
        for family, wordings in TEMPLATES[kind].items():
            assert len(set(wordings)) == len(wordings) == 10, family
    for name, asked in TEMPLATES["builtin"].items():
        assert len(set(asked["templates"])) == len(asked["templates"]) == 10, name
    for each in datasets().values():
        for columns in (each.hub_columns, *(place.columns for place in each.local)):
            for wording in TEMPLATES["family"][each.templates] if columns else ():
                places = {place for _, place, _, _ in string.Formatter().parse(wording) if place}
                known = set(columns.fields)
                if each.templates == "translation":
                    known |= {"source", "target"}
                assert places and places <= known, each.name


@pytest.fixture
def folder(tmp_path, put):
    """A data folder with a few rows of every group."""
    meta = {"split": "train", "definition": "Do.", "categories": ["QA"]}
    meta = [{"task": f"task{i}_x", **meta} for i in range(2)]
    put("niv2/tasks.jsonl.gz", meta)
    for name, n in (("task0_x", 60), ("task1_x", 24)):
        rows = [{"id": f"{name}{i}", "input": f"in {i}", "output": [f"out {i}"]} for i in range(n)]
        put(f"niv2/train/{name}.jsonl.gz", rows)
        put(f"niv2/valid/{name}.jsonl.gz", rows[:4])
    why = [{"question": f"q{i}?", "answer": str(i), "rationale": "Because."} for i in range(40)]
    put("cot/sums.jsonl.gz", why)
    choice = [{"question": f"q{i}?", "choices": ["a", "b"], "answer": i % 2} for i in range(50)]
    put("mc/boolq/train.jsonl.gz", choice)
    put("mc/boolq/test.jsonl.gz", choice)
    dolly = {"instruction": "Say", "context": "c", "response": "r", "category": "open"}
    for split in ("train", "valid"):
        put(f"dolly/{split}.jsonl.gz", [dolly] * 30)
    put("p3/trivia_x.jsonl", [{"inputs": f"Ask {i}", "targets": str(i)} for i in range(30)])
    put("program/sort.jsonl", [{"instruction": f"Sort {i}", "output": "x"} for i in range(20)])
    return tmp_path


@pytest.mark.parametrize("name", PUBLISHED)
def test_shares_of_a_folder(folder, name):
    mixture = mk.flan_mixture(name, data_dir=folder)
    by_part = collections.Counter()
    for task, part in zip(mixture.tasks, mixture.submixtures, strict=True):
        by_part[part] += mixture.rates[task.name]
    total = sum(PUBLISHED[name].values())  # Chung's add up to 99.9 %
    for part, share in PUBLISHED[name].items():
        assert by_part[part] == pytest.approx(share / total)
    assert mixture.rates["niv2/task0_x"] / mixture.rates["niv2/task1_x"] == pytest.approx(60 / 24)
    parts = dict(zip((t.name for t in mixture.tasks), mixture.submixtures, strict=True))
    assert parts["program/sort"] == ("dialog" if name == "flan2022" else "muffin")
    prompts = mixture.sample(200)
    assert prompts == mk.flan_mixture(name, data_dir=folder).sample(200)
    assert prompts != mixture.sample(200, seed=1)
    assert {p.shots for p in prompts} > {0, 1}


def test_absent_parts_leave_their_share_and_names_can_be_left_out(folder):
    for path in (folder / "p3").glob("*"):
        path.unlink()
    mixture = mk.flan_mixture("flan2022", data_dir=folder, exclude=["dolly"])
    assert "dolly" not in mixture.rates and "t0" not in mixture.submixtures
    assert mixture.rates["boolq"] == pytest.approx(0.40 / 0.68)
    assert mixture.rates["program/sort"] == pytest.approx(0.03 / 0.68)
    with pytest.raises(ValueError, match="did you mean 'boolq'"):
        mk.flan_mixture("flan2022", data_dir=folder, exclude=["boolqq"])
    with pytest.raises(ValueError, match="did you mean 'flan-t5'"):
        mk.flan_mixture("flan-t6")
    with pytest.raises(ValueError, match="did you mean 'hub'"):
        mk.flan_mixture("flan-t5", source="hubb")


def test_caps_level_large_tasks():
    members = []
    for name, size in (("big", 10**6), ("small", 15_000), ("aqua", 97_467), ("gsm8k", 7_473)):
        task = mk.Task(name, "c", lambda split: [], (Template("{x}"),), size=size)
        group = "flan2021" if name in ("big", "small") else "cot"
        members.append(Member(group, task, FORMATS[group]))
    weights = {each.task.name: each.weight for each in proportional("flan2022", members)}
    assert weights["big"] / weights["small"] == pytest.approx(30_000 / 15_000)
    # FLAN's release holds a part of AQuA
    assert weights["aqua"] / weights["gsm8k"] == pytest.approx(2_728 / 7_473)


def test_sizes_of_the_chain_of_thought_sets_are_the_published_ones():
    sizes = {"gsm8k": 7_473, "strategyqa": 2_061, "creak": 6_915, "qasc": 1_084, "esnli": 36_174}
    sizes |= {"ecqa": 7_112, "sensemaking": 6_070, "aqua": 2_728, "qed": 5_154}
    assert {name: published_size(name) for name in listed("cot")} == sizes


def trained_rows(path):
    """Training rows of a file, every twentieth of which validates."""
    with gzip.open(path, "rt") as file:
        rows = sum(1 for line in file if line.strip())
    return rows - -(-rows // 20)


def counted_shares(root, sets):
    """Rates of FLAN 2022 by hand: {task: (submixture, file)}, with the published shares."""
    share = {"flan2021": 0.40, "niv2": 0.20, "cot": 0.05, "dialog": 0.03}
    cap = {"flan2021": 30_000, "niv2": 5_000, "cot": 100_000, "dialog": 200_000}
    sizes = {name: min(cap[part], rows) for name, (part, rows) in sets.items()}
    totals = collections.Counter()
    for name, (part, _) in sets.items():
        totals[part] += sizes[name]
    whole = sum(share[part] for part in totals)
    return {
        name: share[part] * sizes[name] / totals[part] / whole for name, (part, _) in sets.items()
    }


def test_shares_equal_an_independent_count(tmp_path, put):
    choice = [{"question": f"q{i}?", "choices": ["a", "b"], "answer": i % 2} for i in range(140)]
    for name, count in (("boolq", 60), ("arc_easy", 20), ("openbookqa", 140)):
        put(f"mc/{name}/train.jsonl.gz", choice[:count])
    sums = [{"question": f"q{i}?", "answer": "4", "solution": "2+2\n#### 4"} for i in range(100)]
    put("gsm8k/train.jsonl.gz", sums)
    put("strategyqa/train.jsonl.gz", [{"question": f"{i}?", "answer": "yes"} for i in range(40)])
    why = [{"question": f"q{i}?", "answer": "4", "rationale": "Why."} for i in range(80)]
    for name in ("gsm8k", "strategyqa", "creak", "mine"):
        put(f"cot/{name}.jsonl.gz", why)
    files = {
        "boolq": ("flan2021", "mc/boolq"),
        "arc_easy": ("flan2021", "mc/arc_easy"),
        "openbookqa": ("flan2021", "mc/openbookqa"),
        "gsm8k": ("cot", "gsm8k"),
        "strategyqa": ("cot", "strategyqa"),
    }
    sets = {
        name: (part, trained_rows(tmp_path / folder / "train.jsonl.gz"))
        for name, (part, folder) in files.items()
    }
    sets["creak"] = ("cot", trained_rows(tmp_path / "cot/creak.jsonl.gz"))
    mixture = mk.flan_mixture("flan2022", data_dir=tmp_path)
    mine = next(task for task in mixture.tasks if task.name == "cot/mine")
    sets["cot/mine"] = ("cot", mine.train_size)  # a file of one's own is split by question
    assert mixture.rates == pytest.approx(counted_shares(tmp_path, sets))
    clusters = {task.name: task.cluster for task in mixture.tasks}
    assert clusters["arc_easy"] == "closed-book QA"
    assert clusters["gsm8k"] == clusters["strategyqa"] == "chain of thought"


@pytest.mark.skipif(not DATA, reason="needs MOEKIT_DATA")
def test_shares_of_the_real_data_equal_an_independent_count():
    root, sets = Path(DATA), {}
    for name in ("arc_easy", "arc_challenge", "openbookqa", "boolq"):
        sets[name] = ("flan2021", trained_rows(root / f"mc/{name}/train.jsonl.gz"))
    for name in ("gsm8k", "strategyqa"):
        sets[name] = ("cot", trained_rows(root / f"{name}/train.jsonl.gz"))
    for name in ("creak", "ecqa", "qasc", "sensemaking"):
        sets[name] = ("cot", trained_rows(root / f"cot/{name}.jsonl.gz"))
    for entry in json.loads((root / "manifest.json").read_text()):
        name = entry["path"].removesuffix(".jsonl.gz")
        if name.startswith("niv2/train/"):
            sets[name.replace("/train/", "/")] = ("niv2", entry["rows"])
        elif name in ("dolly/train", "cot/aqua"):  # their validation rows are other files
            part = "dialog" if name == "dolly/train" else "cot"
            sets[name.split("/")[part == "cot"]] = (part, entry["rows"])
    mixture = mk.flan_mixture("flan2022")
    assert mixture.rates == pytest.approx(counted_shares(root, sets))


def test_rates_of_your_own(monkeypatch, folder):
    monkeypatch.delenv("MOEKIT_DATA", raising=False)
    mixture = mk.flan_mixture({"addition": 3.0, "parity": 1.0})
    assert mixture.rates == {"addition": 0.75, "parity": 0.25}
    drawn = [p.task for p in mixture.sample(400)]
    assert drawn.count("addition") / 400 == pytest.approx(0.75, abs=0.07)
    both = mk.flan_mixture({"addition": 1.0, "boolq": 1.0, "t0/trivia_x": 2.0}, data_dir=folder)
    assert both.rates == {"addition": 0.25, "boolq": 0.25, "t0/trivia_x": 0.5}
    for rates, message in (
        ({"additon": 1.0}, "did you mean 'addition'"),
        ({"swaps": 1.0}, "swaps is held out"),
        ({"addition": 0.0}, r"rate of task addition is 0\.0"),
        ({}, "has no tasks"),
    ):
        with pytest.raises(ValueError, match=message):
            mk.flan_mixture(rates)


def test_describe_agrees_with_what_a_run_sees(folder):
    mixture = mk.flan_mixture("flan2022", data_dir=folder)
    seen = mixture.describe()
    rows = {row.task: row for row in seen.rows}
    assert {name: row.rate for name, row in rows.items()} == mixture.rates
    assert (rows["niv2/task0_x"].examples, rows["niv2/task0_x"].valid) == (60, 4)
    assert rows["boolq"].examples + rows["boolq"].valid == 50 and rows["boolq"].valid
    assert rows["cot/sums"].examples + rows["cot/sums"].valid == 40
    assert sum(c.tasks for c in seen.clusters) == seen.total.tasks == len(mixture.tasks)
    # one epoch: as many prompts as examples, so in the mean every example once
    assert seen.total.repeats == pytest.approx(1) and seen.run_tokens == seen.epoch_tokens
    for row in seen.rows:
        assert row.repeats == pytest.approx(row.rate * seen.total.examples / row.examples)
    longer = mixture.describe(tokens=int(3 * seen.epoch_tokens))
    assert longer.total.repeats == pytest.approx(3, rel=1e-3)
    # against many drawn prompts; the table counts a sample of each task
    drawn = mixture.sample(600, seed=5)
    mean = sum(len(p.input) + len(p.target) + 2 for p in drawn) / 600
    assert seen.total.tokens == pytest.approx(mean, rel=0.2)
    assert json.loads(json.dumps(seen.to_dict()))["total"]["examples"] == seen.total.examples
    assert "trivia_x" in seen.table("task") and "trivia_x" not in str(seen) == repr(seen)
    assert len(seen.plot().axes[0].get_yticks()) == len(seen.clusters)


def test_tokens_are_counted_by_the_tokenizer_given(folder):
    class Words(mk.ByteTokenizer):
        def encode(self, text):
            return [5] * len(text.split())

    mixture = mk.flan_mixture({"boolq": 1.0}, data_dir=folder)
    assert mixture.describe(Words()).total.tokens < mixture.describe().total.tokens / 3


def test_a_digest_covers_data_templates_and_rates(folder, put):
    def digest(name="flan2022"):
        return mk.flan_mixture(name, data_dir=folder).digest()

    first = digest()
    assert first == digest() != digest("flan-t5")
    lines = gzip.decompress((folder / "niv2/tasks.jsonl.gz").read_bytes()).splitlines()
    meta = [json.loads(line) for line in lines]
    put("niv2/tasks.jsonl.gz", [m | {"definition": "Do it well."} for m in meta])
    second = digest()
    choice = [{"question": f"q{i}?", "choices": ["a", "b"], "answer": 1} for i in range(50)]
    put("mc/boolq/train.jsonl.gz", choice)
    third = digest()
    assert len({first, second, third}) == 3
    assert mk.flan_mixture({"addition": 1.0}).digest() != mk.flan_mixture({"parity": 1.0}).digest()
