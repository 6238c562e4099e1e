"""Broken files of every family: a clear error or a counted skip, never a hang or a wrong example.

A case is a sound file, damaged in its bytes or in one row, and read in all three ways: stopping,
skipping, and telling of every fault.
"""

import csv
import gzip
import io
import json
import time

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from moekit.data.check import check
from moekit.data.corpora import read_text
from moekit.data.datasets import Access, dataset, dataset_task
from moekit.data.instructions import instruction_tasks
from moekit.data.niv2 import niv2_tasks

HOW = settings(
    max_examples=16,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
META = {"task": "task1_x", "split": "train", "definition": "Do.", "categories": ["QA"]}
NIV2 = [{"id": f"n{i}", "input": f"in {i}", "output": [f"out {i}", "x"]} for i in range(4)]
HEAD = {"Definition": ["Do."], "Categories": ["QA"], "Domains": [], "Source": ["s"]}
COT = [{"question": f"q{i}", "answer": f"a{i}", "rationale": f"r{i}"} for i in range(4)]
CHOICE = [{"id": i, "question": f"q{i}", "choices": ["a", "b"], "answer": i % 2} for i in range(4)]
SUMS = [{"question": f"q{i}", "answer": f"{i}", "solution": f"s{i}"} for i in range(4)]
FACTS = [{"question": f"q{i}", "answer": "yes", "facts": [f"f{i}"]} for i in range(4)]
SAID = [{"instruction": f"i{i}", "context": "", "response": f"r{i}"} for i in range(4)]
MMLU = [dict(zip("qabcdl", (f"q{i}", "w", "x", "y", "z", "ABCD"[i % 4]))) for i in range(4)]  # noqa: B905
READY = [{"inputs": f"in {i}", "targets": f"out {i}", "task_name": "t"} for i in range(4)]
TEXT = [{"text": f"text {i}", "title": f"t{i}"} for i in range(4)]


# family: file, rows, how it is read
def described(name):
    return lambda root, on_error: [dataset_task(dataset(name), Access(root, on_error=on_error))]


def instructions(group):
    return lambda root, on_error: instruction_tasks(root, group, on_error=on_error)


def niv2(root, on_error):
    return niv2_tasks(root, "train", on_error)


FAMILIES = {
    "niv2": ("niv2/train/task1_x.jsonl.gz", NIV2, niv2),
    "niv2 meta": ("niv2/tasks.jsonl.gz", [META], niv2),
    "niv2 official": ("niv2/task9_y.json", NIV2, niv2),
    "cot": ("cot/x.jsonl", COT, instructions("cot")),
    "cot tsv": ("cot/creak_train.tsv", COT, described("creak")),
    "choices": ("mc/boolq/train.jsonl.gz", CHOICE, described("boolq")),
    "gsm8k": ("gsm8k/train.jsonl.gz", SUMS, described("gsm8k")),
    "strategyqa": ("strategyqa/train.jsonl.gz", FACTS, described("strategyqa")),
    "dolly": ("dolly/train.jsonl.gz", SAID, described("dolly")),
    "mmlu": ("mmlu/test/law_test.csv", MMLU, described("mmlu")),
    "rows": ("t0/x.jsonl", READY, instructions("t0")),
    "csv": ("dialog/z.csv", READY, instructions("dialog")),
    "parquet": ("p3/w.parquet", READY, instructions("t0")),
    "text": ("text/books/train.parquet", TEXT, None),
}
# what else a family's folder holds
OTHERS = {
    "niv2": [("niv2/tasks.jsonl.gz", [META])],
    "niv2 meta": [("niv2/train/task1_x.jsonl.gz", NIV2)],
}


def written(name, rows):
    """The bytes of a file of that name."""
    if name.endswith(".json"):
        return json.dumps({**HEAD, "Instances": rows}).encode()
    if name.endswith(".parquet"):
        try:
            table = pyarrow.Table.from_pylist(rows)
            parquet.write_table(table, io.BytesIO())
        except (pyarrow.ArrowException, TypeError, AttributeError, OverflowError):
            table = pyarrow.table({"other": [1]})  # what parquet cannot hold
        buffer = io.BytesIO()
        parquet.write_table(table, buffer)
        return buffer.getvalue()
    if name.endswith((".csv", ".tsv")):
        text = io.StringIO()
        kind = {"delimiter": "\t"} if name.endswith("tsv") else {}
        writer = csv.writer(text, **kind)
        listed = [list(row.values()) if isinstance(row, dict) else [row] for row in rows]
        names = [list(rows[0])] if name == "dialog/z.csv" and isinstance(rows[0], dict) else []
        writer.writerows([*names, *listed])
        return text.getvalue().encode(errors="surrogatepass")
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return gzip.compress(data) if name.endswith(".gz") else data


def examples(root, family, on_error):
    """(question, answer) of everything that is read, checked to be a sound example."""
    _, _, tasks = FAMILIES[family]
    if tasks is None:
        return {d.text for d in read_text(root / "text/books", "train", "books", on_error)}
    found = set()
    for task in tasks(root, on_error):
        for split in task.splits:
            for example in task.load(split):
                assert example.answer.strip() and len(example.options) <= 26
                assert not example.options or example.answer in example.options
                texts = [*example.fields.values(), example.answer, example.rationale]
                assert all(isinstance(text, str) and text.encode() is not None for text in texts)
                asked = {k: v for k, v in example.fields.items() if k != "definition"}
                found.add((tuple(sorted(asked.items())), example.answer))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for each family, with its file alone."""
    root = tmp_path_factory.mktemp("fuzz")
    for family, (name, rows, _) in FAMILIES.items():
        for file, content in [(name, rows), *OTHERS.get(family, ())]:
            path = root / family / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(written(file, content))
    return root


def attempt(folder, family, data):
    """What is read of damaged bytes in each of the three ways; None for a clear error."""
    results, told = [], []
    for on_error in ("stop", "skip", lambda *fault: told.append(fault)):
        results.append(attempt_once(folder, family, data, on_error))
    assert results[2] is not None  # telling goes on to the end
    if results[0] is None and results[1] is not None:
        assert told or family == "niv2 meta"
    if results[0] is not None and results[1] is not None:
        assert results[0] == results[1]
    return results


def attempt_once(folder, family, data, on_error):
    """What is read of damaged bytes in one way; None for a clear error."""
    root, (name, rows, _) = folder / family, FAMILIES[family]
    path = root / name
    path.write_bytes(data)
    try:
        return examples(root, family, on_error)
    except (ValueError, OSError) as error:
        assert path.stem.split(".")[0] in str(error), error
        return None
    finally:
        path.write_bytes(written(name, rows))


BYTES = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 2000), st.just(b"")),
    st.tuples(st.just("put"), st.integers(0, 2000), st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("over"), st.integers(0, 2000), st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("all"), st.just(0), st.binary(max_size=200)),
    st.tuples(st.just("text"), st.integers(0, 2000), st.sampled_from([b"\xff\xfe", b"\x00", b'"'])),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@pytest.mark.parametrize("family", FAMILIES)
@HOW
@given(damage=BYTES)
def test_damaged_bytes(folder, family, damage):
    kind, at, data = damage
    name, rows, _ = FAMILIES[family]
    sound = written(name, rows)
    packed = name.endswith(".gz") and kind == "text"
    sound = gzip.decompress(sound) if packed else sound
    at %= len(sound) + 1
    broken = {
        "cut": sound[:at],
        "put": sound[:at] + data + sound[at:],
        "over": sound[:at] + data + sound[at + len(data) :],
        "all": data,
        "text": sound[:at] + data + sound[at:],
    }[kind]
    attempt(folder, family, gzip.compress(broken) if packed else broken)


@pytest.mark.parametrize("family", FAMILIES)
@HOW
@given(data=st.data(), value=JSON, at=st.integers(0, 3))
def test_a_damaged_row(folder, family, data, value, at):
    name, rows, _ = FAMILIES[family]
    at %= len(rows)
    change = data.draw(st.sampled_from(["drop", "set", "row", "twice"]))
    damaged = list(rows)
    key = data.draw(st.sampled_from(sorted(rows[at])))
    if change == "drop":
        damaged[at] = {k: v for k, v in rows[at].items() if k != key}
    elif change == "set":
        damaged[at] = rows[at] | {key: value}
    elif change == "row":
        damaged[at] = value
    else:
        damaged.insert(at, rows[at])
    try:
        broken = written(name, damaged)
    except (ValueError, UnicodeEncodeError):
        return  # what such a file cannot say
    skipped = attempt(folder, family, broken)[1]
    if skipped is not None and name.endswith((".jsonl", ".jsonl.gz", ".json")):
        # what was not touched is read as before
        others = written(name, [row for i, row in enumerate(rows) if i != at])
        assert (attempt_once(folder, family, others, "skip") or set()) <= skipped


def test_ten_megabytes_in_a_row_are_read_or_named(folder, tmp_path):
    big, started = "x" * 10_000_000, time.monotonic()
    for family in ("cot", "rows", "csv", "niv2 official"):
        name, rows, _ = FAMILIES[family]
        key = next(k for k in rows[0] if k in ("question", "input", "inputs"))
        long = written(name, [*rows, rows[0] | {"id": "n", key: big}])
        found = attempt_once(folder, family, long, "skip")
        assert family == "csv" or len(found) == len(rows) + 1
    assert time.monotonic() - started < 300  # no hang


@pytest.mark.parametrize("data", [b"", b"\xff" * 50, b"[" * 100_000, b"{}", b"null", b"[[]]"])
def test_a_broken_manifest_and_deep_nesting(tmp_path, data):
    (tmp_path / "manifest.json").write_bytes(data)
    (tmp_path / "niv2").mkdir()
    (tmp_path / "niv2/task1_x.json").write_bytes(data)
    faults = check(tmp_path).faults
    assert {fault.path for fault in faults} == {"manifest.json", "niv2/task1_x.json"}
