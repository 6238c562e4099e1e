"""A user's own rows: what goes in comes out, whatever holds them; mistakes are named at once."""

import logging
import random

import datasets
import pandas
import pytest
from hypothesis import given, settings, strategies as st

import moekit as mk
from moekit.data.mixture import Mixture
from moekit.data.own_mixture import as_source
from moekit.data.own_rows import split_of
from moekit.data.suites import as_suite
from moekit.data.tables import Rows

ROWS = [{"question": f"Что такое {i}?", "answer": f'数 {i}\n"x", y'} for i in range(40)]
CHOICES = [{"question": f"q {i}", "A": "x", "B": "y", "key": "AB"[i % 2]} for i in range(40)]


def pairs(task: mk.Task) -> list[tuple[str, str]]:
    """Input and answer of all training and validation examples, sorted."""
    found = [example for split in task.splits for example in task.examples(split)]
    return sorted((example.fields["input"], example.answer) for example in found)


EXPECTED = sorted((row["question"], row["answer"]) for row in ROWS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_files_of_every_kind(tmp_path, put, name):
    path = tmp_path / name
    if name == "a.tsv":
        pandas.DataFrame(ROWS).to_csv(path, sep="\t", index=False, encoding="utf-8-sig")
    else:
        put(name, ROWS)
    task = mk.task(str(path))
    assert pairs(task) == EXPECTED and (task.name, task.metric) == ("a", "exact_match")
    assert isinstance(task.examples("train"), Rows) and len(task.examples("valid")) >= 1
    (suite_task,) = mk.suite(path).tasks
    assert len(suite_task.examples("test")) == len(suite_task.examples("train")) == 40


def test_objects_of_every_kind():
    data = datasets.Dataset.from_list(ROWS)
    by_kind = {
        "list": ROWS,
        "DataFrame": pandas.DataFrame(ROWS),
        "Dataset": data,
        "with numpy": data.with_format("numpy"),
        "IterableDataset": data.to_iterable_dataset(),
        "DatasetDict": datasets.DatasetDict({"train": data}),
    }
    tasks = {kind: mk.task(rows) for kind, rows in by_kind.items()}
    assert all(pairs(task) == EXPECTED for task in tasks.values())
    assert len({mk.mixture([task]).digest() for task in tasks.values()}) == 1
    other = mk.task([*ROWS, {"question": "new", "answer": "z"}])
    assert mk.mixture([other]).digest() != mk.mixture([tasks["list"]]).digest()


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
solid = text.filter(lambda each: each.strip())


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.tuples(solid, solid | st.integers()), min_size=1, max_size=8),
    seed=st.integers(0, 9),
)
def test_what_goes_in_comes_out_whatever_the_order_and_case_of_columns(rows, seed):
    dicts = [{"Prompt": given, "other": 0.5, "COMPLETION": wanted} for given, wanted in rows]
    task = mk.task(dicts)
    expected = sorted((given.strip(), str(wanted).strip()) for given, wanted in rows)
    assert pairs(task) == expected
    columns = ["Prompt", "other", "COMPLETION"]
    random.Random(seed).shuffle(columns)
    shuffled = mk.task([{column: row[column] for column in columns} for row in dicts])
    assert shuffled.origin() == task.origin() and pairs(shuffled) == expected


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Do", "input": "this", "output": "a"}, "Do\nthis"),
        ({"instruction": "Do", "input": "", "output": "a"}, "Do"),
        ({"instruction": "Do", "context": None, "response": "a"}, "Do"),
        ({"Context": "c", "Question": "q", "answers": {"text": ["a", "b"]}}, "c\n\nq"),
        ({"premise": "p", "hypothesis": "h", "label": "a"}, "p\nh"),
        ({"text": "t", "label": 3, "label_text": "a"}, "t"),
        ({"document": "d", "summary": "a"}, "d"),
        ({"source": "s", "translation": "a"}, "s"),
        ({"inputs": [4, 5], "inputs_pretokenized": "s", "targets": ["a", "b"]}, "s"),
    ],
)
def test_usual_names(row, prompt):
    task = mk.task([row])
    (example,) = task.examples("train")
    assert mk.format_prompt(task, example).input == prompt
    assert example.answer == "a" and task.splits == ("train",)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"answer": ["no", "yes"]}, ["no", "yes"]),
        ({"answer": [0, 1]}, ["no", "yes"]),
        ({"answer": ["0", "1"]}, ["no", "yes"]),
        ({"answer": [False, True]}, ["no", "yes"]),
        ({"answer": ["A", "B"]}, ["no", "yes"]),
        ({"answer": [0, 1], "choices": ["no", "yes"]}, None),
        ({"answer": ["A", "B"], "choices": ["no", "yes"]}, None),
        ({"answer": ["no", "yes"], "liste": ["no ", "yes"]}, "liste"),
        ({"answer": ["(A)", "(B)"], "a": "no", "b": "yes"}, ["a", "b"]),
    ],
)
@pytest.mark.parametrize("as_frame", [False, True])
def test_options(change, options, as_frame):
    rows = []
    for index in range(30):
        row = {"question": f"q {index}"} | change
        rows.append(row | {"answer": change["answer"][index % 2]})
    task = mk.task(pandas.DataFrame(rows) if as_frame else rows, options=options)
    assert task.metric == "accuracy"
    examples = [*task.examples("train"), *task.examples("valid")]
    assert len(examples) == 30
    for example in examples:
        is_odd = int(example.fields["input"].split()[1]) % 2
        assert example.answer == ["no", "yes"][is_odd] and example.options == ("no", "yes")


def test_class_labels_of_a_data_set():
    names = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = {"text": ["a", "b"], "label": [1, 0]}
    task = mk.task(datasets.Dataset.from_dict(rows, features=features).to_iterable_dataset())
    assert pairs(task) == [("a", "good"), ("b", "bad")] and task.metric == "accuracy"
    task = mk.task(datasets.Dataset.from_dict(rows, features=features), options=[])
    assert pairs(task) == [("a", "1"), ("b", "0")] and task.metric == "exact_match"


def test_inputs_of_several_columns_and_templates():
    rows = [{"Fr age?": f"q {i}", "note": "n" if i % 2 else None, "ok": i} for i in range(4)]
    task = mk.task(rows, input="{Fr age?} / {note?}", target="ok")
    assert ("q 1 / n", "1") in pairs(task) and ("q 2 /", "2") in pairs(task)
    templates = ["Q: {question}\nA:", mk.Template("Say {input}", "It is {answer}")]
    task = mk.task(ROWS, templates=templates)
    example = task.examples("train")[0]
    shown = [mk.format_prompt(task, example, template=index) for index in (0, 1)]
    assert shown[0].input == f"Q: {example.fields['question']}\nA:"
    assert shown[1].input == f"Say {example.fields['question']}"
    assert shown[1].target == f"It is {example.answer}"
    long = [{"text": f"t {i}", "summary": "word " * 20} for i in range(3)]
    assert mk.task(long).metric == "rouge_l"


def test_splits_of_folders_and_dicts(tmp_path, put):
    sizes = {"train": 12, "dev": 3, "test": 2}
    by_split = {
        split: [{"input": f"{split} {i}", "target": "x"} for i in range(size)]
        for split, size in sizes.items()
    }
    put("parts/train/0.jsonl", by_split["train"][:5])
    put("parts/train/1.csv", by_split["train"][5:])
    put("parts/dev-00000.parquet", by_split["dev"])
    put("parts/Test.json", by_split["test"])
    for rows in (tmp_path / "parts", by_split):
        task = mk.task(rows)
        assert {split: len(task.examples(split)) for split in task.splits} == {
            "train": 12,
            "valid": 3,
            "test": 2,
        }
    assert (
        as_suite(task).split == "test"
        and mk.suite(tmp_path / "parts").tasks[0].splits[-1] == "test"
    )
    put("flat/a.jsonl", by_split["train"])
    put("flat/more/b.jsonl", by_split["dev"])
    assert len(pairs(mk.task(tmp_path / "flat"))) == 15
    assert [split_of([name]) for name in ("testimony.csv", "val.csv", "training_1", "trains")] == [
        "",
        "valid",
        "train",
        "",
    ]


@pytest.mark.parametrize("missing", [None, float("nan"), "", "  ", pandas.NA, pandas.NaT])
@pytest.mark.parametrize("column", ["question", "answer"])
def test_missing_values_are_named_or_skipped_and_counted(caplog, missing, column):
    rows = [dict(row) for row in ROWS]
    rows[6][column] = missing
    for data in (rows, pandas.DataFrame(rows)):
        with pytest.raises(ValueError, match=rf"rows:7: column '{column}' is empty.*skip"):
            mk.task(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "moekit"):
            task = mk.task(data, on_error="skip")
        assert "skipped 1 unusable of 40 rows" in caplog.text
        assert pairs(task) == sorted(set(EXPECTED) - {(ROWS[6]["question"], ROWS[6]["answer"])})


def test_whole_numbers_beside_missing_ones_stay_whole():
    frame = pandas.DataFrame({"question": ["a", "b", "c"], "answer": [1, None, 3]})
    assert pairs(mk.task(frame, on_error="skip")) == [("a", "1"), ("c", "3")]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([], {}, "rows is empty"),
        (["a", "b"], {}, r"rows:1: expected a dict of columns, found str \(texts: mk.corpus\)"),
        (7, {}, "rows are int: give a list of dicts"),
        ({"a": [1]}, {}, "without train, valid or test"),
        ([{"text": "a"}], {}, "columns 'text' only: .*mk.corpus"),
        ([{"a;b": "1;2"}], {}, "'a;b' only: write it with commas"),
        ([{"frage": "a", "antwort": "b"}], {}, r"'frage', 'antwort'.*input='frage', target='antw"),
        (ROWS, {"input": "qestion"}, "did you mean 'question'"),
        (ROWS, {"input": "Q: {qestion}"}, "did you mean 'question'"),
        (ROWS, {"target": "answers"}, "did you mean 'answer'"),
        (ROWS, {"templates": ["{qestion}"]}, "did you mean 'question'"),
        (ROWS, {"templates": ["{question} {answer}"]}, "shows the target"),
        (ROWS, {"templates": ["{question"]}, "literal brace"),
        (ROWS, {"options": "choices"}, "unknown column of rows 'choices'"),
        (ROWS, {"options": ["yes", "no"]}, "no name, index from 0 or letter"),
        (CHOICES, {"target": "key", "options": ["A", "C"]}, "'C'"),
        (ROWS, {"on_error": "skp"}, "did you mean 'skip'"),
        ([{"text": "a", "label": True}], {}, r'options=\["no", "yes"\]'),
        ([{"text": "a", "label": 0.5}], {"target": "label"}, "holds no text: '0.5'"),
        ([{"question": "a", "answer": i} for i in (0, 1, 2)], {"options": ["n", "y"]}, "rows:3: "),
    ],
)
def test_mistakes(rows, arguments, message):
    with pytest.raises(ValueError, match=message):
        mk.task(rows, **arguments)


def test_mistakes_in_paths(tmp_path, put):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "header.csv").write_text("question,answer\n")
    (tmp_path / "a.xlsx").write_text("")
    (tmp_path / "none").mkdir()
    for name, message in [
        ("empty.jsonl", "is empty: it has no rows"),
        ("header.csv", "is empty: it has no rows"),
        ("a.xlsx", "unknown kind of file; known: .jsonl"),
        ("none", "holds no data files"),
    ]:
        with pytest.raises(ValueError, match=message):
            mk.task(tmp_path / name)
    for read in (mk.task, mk.suite, mk.corpus):
        with pytest.raises(FileNotFoundError, match=r"no file or folder .*nothing\.jsonl"):
            read(str(tmp_path / "nothing.jsonl"))
    put("t.tsv.jsonl", [{"question": "a", "answer": "b"}, {"question": "c"}])
    with pytest.raises(ValueError, match=r"jsonl:2: column 'answer' is missing"):
        mk.task(tmp_path / "t.tsv.jsonl")


def test_a_mixture_of_own_tasks_names_and_mixtures():
    first, second = mk.task(ROWS, name="first"), mk.task(CHOICES, target="key", options=["A", "B"])
    pair = mk.flan_mixture({"addition": 3.0, "largest": 1.0})
    mixed = mk.mixture({first: 2, second: 2, "last_word": 1, pair: 4})
    rates = {"first": 2, "own": 2, "last_word": 1, "addition": 3, "largest": 1}
    assert mixed.rates == pytest.approx({name: rate / 9 for name, rate in rates.items()})
    assert all(prompt.shots == 0 for prompt in mixed.sample(60) if prompt.cluster == "own")
    by_size = mk.mixture([first, second])
    assert by_size.rates["first"] == first.train_size / (first.train_size + second.train_size)
    for wrong, message in [
        ([first, first], "several tasks called first"),
        ([first, "addition"], "holds a str: give a dict"),
        ({first: 0.0}, "rate of first is 0.0"),
        ({"additon": 1.0}, "did you mean 'addition'"),
        ({3: 1.0}, "not of a int"),
        ([], "no tasks"),
    ]:
        with pytest.raises(ValueError, match=message):
            mk.mixture(wrong)


def long_text() -> mk.Corpus:
    return mk.corpus([mk.Document("word " * 900, domain="prose"), mk.Document("other " * 900)])


def test_rows_and_text_in_one_stream():
    joint = mk.mixture({long_text(): 1, mk.task(ROWS): 2, "addition": 1})
    stream = joint.token_pairs(mk.ByteTokenizer(), input_length=64, target_length=32, seed=0)
    labels = joint.labels("train")
    drawn = [labels[stream[index]["task"]][0] for index in range(400)]
    assert set(drawn) == {"prose", "", "own", "addition"}
    assert drawn.count("own") == pytest.approx(200, abs=40)
    assert drawn.count("addition") == pytest.approx(100, abs=35)
    again = mk.mixture({long_text(): 1, mk.task(ROWS): 2, "addition": 1})
    other = mk.mixture({long_text(): 2, mk.task(ROWS): 2, "addition": 1})
    assert joint.digest() == again.digest() != other.digest()
    with pytest.raises(ValueError, match="no questions to evaluate"):
        as_suite(joint)


def test_workers_read_own_rows_and_text():
    joint = mk.mixture({long_text(): 1, mk.task(ROWS): 1})
    found = []
    for workers in (0, 1):
        stream = mk.batches(
            joint,
            mk.ByteTokenizer(),
            input_length=64,
            target_length=32,
            batch_size=4,
            seed=0,
            workers=workers,
        )
        found.append(next(stream).inputs.copy())
        stream.close()
    assert (found[0] == found[1]).all()


def test_what_can_be_trained_on_and_evaluated(tmp_path, put):
    path = put("mine.jsonl", ROWS)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.md").write_text("# A\ntext")
    builtin = mk.flan_mixture({"addition": 1.0})
    assert as_source(builtin) is builtin
    assert isinstance(as_source(tmp_path / "notes"), mk.Corpus)
    for data in (path, str(path), ROWS, pandas.DataFrame(ROWS), mk.task(ROWS)):
        assert isinstance(as_source(data), Mixture)
        suite = as_suite(data)
        assert suite.split == "valid" and len(suite.tasks) == 1
    assert as_suite("builtin").name == "builtin" and as_suite(builtin).split == "test"
    one = mk.task(ROWS[:1])
    with pytest.raises(ValueError, match=r"no split 'test'; it has \('train',\)"):
        one.examples(as_suite(one).split)
    with pytest.raises(ValueError, match="columns of a file of yours"):
        mk.suite("builtin", input="question")


def test_a_corpus_of_files(tmp_path, put):
    put("notes/law/cases.jsonl", [{"Body": f"case {i}", "title": f"t{i}"} for i in range(60)])
    (tmp_path / "notes/a.txt").write_bytes("\ufeffДлинный текст. ".encode() * 300)
    (tmp_path / "notes/b.md").write_text("# B\n" + "words " * 10)
    (tmp_path / "notes/empty.txt").write_text(" \n")
    corpus = mk.corpus(tmp_path / "notes")
    assert corpus.domains == ("a", "b", "law")
    train, valid = corpus.documents("train"), corpus.documents("valid")
    assert len(train) == 61 and len(valid) == 1  # the 50th
    assert not {document.text for document in train} & {document.text for document in valid}
    (long,) = mk.corpus(tmp_path / "notes/a.txt").documents("train")
    (tail,) = mk.corpus(tmp_path / "notes/a.txt").documents("valid")
    whole = (tmp_path / "notes/a.txt").read_text(encoding="utf-8-sig")
    assert long.text + tail.text == whole and 0.02 < len(tail.text) / len(whole) < 0.06
    put("split/train.jsonl", [{"text": "a"}])
    put("split/dev.csv", [{"content": "b"}])
    split = mk.corpus(str(tmp_path / "split"))
    assert [split.documents(name)[0].text for name in ("train", "valid")] == ["a", "b"]


def test_mistakes_in_a_corpus(tmp_path, put):
    path = put("a.jsonl", [{"Text": "x"}, {"Text": None}, {"txt": "z"}])
    (tmp_path / "none").mkdir()
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for name, arguments, message in [
        (path, {}, r"a\.jsonl:2: column 'Text' holds no text"),
        (path, {"text": "Txt"}, "did you mean 'Text'"),
        (put("b.csv", [{"x": "1", "y": "2"}]), {}, r"'x', 'y'.*mk.corpus\(.., text='x'\)"),
        (tmp_path / "none", {}, "no text to train on"),
        (tmp_path / "latin.txt", {}, "byte 0 is not UTF-8"),
        (["a", ""], {}, "text 2 of the corpus is ''"),
        ([], {}, "no text to train on"),
        ("bookz", {}, "did you mean 'books'"),
    ]:
        with pytest.raises(ValueError, match=message):
            mk.corpus(name, **arguments)
    assert len(mk.corpus(path, on_error="skip").documents("train")) == 1


@pytest.fixture(scope="module")
def tiny() -> mk.EncoderDecoder:
    cfg = mk.preset("st-nano").replace(
        d_model=16,
        d_ff=16,
        num_heads=1,
        head_dim=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_moe_layers=1,
        decoder_moe_layers=1,
        num_experts=2,
    )
    return mk.EncoderDecoder(cfg, seed=0)


def test_own_rows_are_trained_evaluated_and_traced(tiny, put):
    path = put("mine.jsonl", ROWS)
    config = mk.TrainConfig(steps=1, batch_tokens=256, input_length=48, target_length=16)
    run = mk.train(tiny, str(path), config, eval_source=ROWS)
    assert {"loss", "valid_loss"} <= run.metrics.rows[0].keys() | run.metrics.rows[-1].keys()
    scores = mk.evaluate(tiny, pandas.DataFrame(CHOICES).rename(columns={"key": "answer"}), limit=2)
    assert scores.rows[0].task == "own" and scores.split == "valid"
    traced = mk.trace_routing(tiny, path)
    assert set(traced.tasks) == {"mine"} and len(traced.tasks) == mk.task(path).train_size
    texts = mk.trace_routing(tiny, ["a", "What is 3/4?"])
    assert len(texts.tasks) == 2 and set(texts.stacks) == {"encoder"}


def test_five_per_cent_of_many_rows_validate():
    task = mk.task([{"question": f"q {i}", "answer": "a"} for i in range(400)])
    assert len(task.examples("train")) + len(task.examples("valid")) == 400
    assert 10 < len(task.examples("valid")) < 35
