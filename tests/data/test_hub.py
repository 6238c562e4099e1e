"""Hub data sets through local files of their very schema, and what happens without network."""

import logging

import pytest

import moekit as mk
from moekit.data.hub import open_table, raw_task, ready_tasks, source, sources
from moekit.data.tasks import format_prompt

CHOICES = {"text": ["red", "blue"], "label": ["A", "B"]}
PAIR = {"sentence1": "one", "sentence2": "two", "label": 1, "idx": 0}
NLI = {"premise": "p", "hypothesis": "h", "label": 2}
# a row of every raw set in the schema of its card, with what it must become: answer, options or
# rationale, and a text that the prompt holds
ROWS = {
    "gsm8k": (
        {"question": "q?", "answer": "1+1=<<1+1=2>>2\nSo two.\n#### 2"},
        "2",
        "1+1=<<1+1=2>>2\nSo two.",
    ),
    "aqua": (
        {"question": "q?", "options": ["A)3", "B)4"], "rationale": "Because.", "correct": "B"},
        "B)4",
        "Because.",
    ),
    "strategyqa": (
        {"qid": "1", "question": "q?", "answer": True, "facts": "A. B."},
        "yes",
        "A. B.",
    ),
    "qasc": (
        {
            "question": "q?",
            "choices": CHOICES,
            "answerKey": "A",
            "fact1": "F1.",
            "fact2": "F2.",
            "combinedfact": "C.",
        },
        "red",
        "F1. F2. C.",
    ),
    "svamp": ({"Body": "There are 3.", "Question": "q?", "Answer": "3.0"}, "3.0", ""),
    "asdiv": ({"body": "There are 3.", "question": "q?", "answer": "9 (apples)"}, "9", ""),
    "mmlu": (
        {"question": "q?", "subject": "s", "choices": ["red", "blue"], "answer": 1},
        "blue",
        ("red", "blue"),
    ),
    "natural_questions": ({"question": "q", "answer": ["one", "uno"]}, "one", ""),
    "trivia_qa": (
        {"question": "q?", "answer": {"value": "Rome", "aliases": ["Roma"]}},
        "Rome",
        "",
    ),
    "openbookqa": (
        {"question_stem": "q?", "choices": CHOICES, "answerKey": "B"},
        "blue",
        ("red", "blue"),
    ),
    "bool_q": ({"question": "q", "passage": "p", "answer": False}, "no", ("no", "yes")),
    "squad_v1": (
        {"context": "c", "question": "q?", "answers": {"text": ["x", "y"], "answer_start": [0, 1]}},
        "x",
        "",
    ),
    "cosmos_qa": (
        {"context": "c", "question": "q?", "label": 2} | {f"answer{i}": f"a{i}" for i in range(4)},
        "a2",
        ("a0", "a1", "a2", "a3"),
    ),
    "paws_wiki": (PAIR, "yes", ("no", "yes")),
    "glue_qqp": ({"question1": "one", "question2": "two", "label": 0}, "no", ("no", "yes")),
    "ag_news": ({"text": "t", "label": 3}, "science and technology", None),
    "trec": ({"text": "t", "coarse_label": 5, "fine_label": 1}, "number", None),
    "cnn_dailymail": ({"article": "long", "highlights": "short", "id": "1"}, "short", ()),
    "xsum": ({"document": "long", "summary": "short"}, "short", ()),
    "samsum": ({"dialogue": "long", "summary": "short"}, "short", ()),
    "gigaword": ({"document": "long", "summary": "short"}, "short", ()),
    "common_gen": ({"concepts": ["dog", "run"], "target": "A dog runs."}, "A dog runs.", ()),
    "copa": (
        {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 0},
        "a",
        ("a", "b"),
    ),
    "hellaswag": ({"ctx": "c", "endings": ["e0", "e1"], "label": "1"}, "e1", ("e0", "e1")),
    "piqa": ({"goal": "g", "sol1": "a", "sol2": "b", "label": 1}, "b", ("a", "b")),
    "winogrande": (
        {"sentence": "The _ is.", "option1": "a", "option2": "b", "answer": "2"},
        "b",
        ("a", "b"),
    ),
    "social_i_qa": (
        {"context": "c", "question": "q?", "label": "3"} | {f"answer{x}": x for x in "ABC"},
        "C",
        ("A", "B", "C"),
    ),
    "wic": (
        {"word": "w", "sentence1": "one", "sentence2": "two", "label": 1},
        "the same",
        ("different", "the same"),
    ),
    "cola": ({"sentence": "s", "label": 1}, "yes", ("no", "yes")),
    "sst2": ({"sentence": "s", "label": 1}, "positive", ("negative", "positive")),
    "wmt16_translate_deen": ({"translation": {"de": "Haus", "en": "house"}}, "house", ()),
    "wmt16_translate_roen": ({"translation": {"ro": "casa", "en": "house"}}, "house", ()),
    "dolly": (
        {"instruction": "Say", "context": "", "response": "r", "category": "open_qa"},
        "r",
        (),
    ),
    "mbpp": ({"task_id": 1, "text": "Add.", "code": "a + b", "test_list": []}, "a + b", ()),
}
ROWS |= {name: ROWS["openbookqa"] for name in ("arc_easy", "arc_challenge")}
for name in ("arc_easy", "arc_challenge"):
    ROWS[name] = ({"question": "q?", "choices": CHOICES, "answerKey": "B"}, "blue", None)
ROWS |= {name: (PAIR, source(name).labels[1], None) for name in ("rte", "wnli", "glue_mrpc")}
for name in ("mnli_matched", "snli", "anli_r1", "anli_r2", "anli_r3", "cb"):
    ROWS[name] = (NLI, source(name).labels[2], None)
for name in ("imdb_reviews", "yelp_polarity_reviews"):
    ROWS[name] = ({"text": "t", "label": 0}, "negative", None)


def test_every_raw_set_has_a_row_here():
    assert set(ROWS) == {name for name, each in sources().items() if each.config}


@pytest.mark.parametrize("name", ROWS)
def test_a_raw_set_in_its_own_schema(tmp_path, put, name):
    each, (row, answer, more) = source(name), ROWS[name]
    for pattern in each.splits.values():
        put(f"hub/{each.path}/{pattern.replace('*', '0000')}", [row] * 3)
    task = raw_task(name, tmp_path)
    split = "train" if "train" in each.splits else "test"
    example = task.examples(split)[0]
    assert example.answer == answer
    assert more in (None, example.options, example.rationale)
    assert task.held_out == (not each.group) and len(task.templates) == 10
    for template in range(10):
        prompt = format_prompt(task, example, template=template)
        assert prompt.input.strip() and prompt.target


def ready(n, tasks, text="Prompt {}"):
    row = {"task_source": "P3", "template_type": "fs_opt"}
    return [
        row | {"inputs": text.format(f"{name} {i}"), "targets": f" {i} ", "task_name": name}
        for i in range(n)
        for name in tasks
    ]


@pytest.fixture
def submixtures(put, tmp_path):
    """All five ready-made sets, as fetched."""
    for group, tasks in (
        ("flan2021", ["glue/rte:2.0.0", "aeslc:1.0.0"]),
        ("t0", ["wiki_bio_who"]),
        ("niv2", ["task1_x", "task2_y"]),
        ("cot", ["cot_gsm8k", "cot_gsm8k_ii"]),
        ("dialog", ["wiki_dialog"]),
    ):
        at = f"hub/conceptofmind/{group}_submix_original/data"
        put(f"{at}/train-00000-of-00002-ab.parquet", ready(20, tasks))
        put(f"{at}/train-00001-of-00002-cd.parquet", ready(10, tasks[:1], "Second {}"))
    return tmp_path


@pytest.mark.parametrize("where", ["hub", "mirror"])
def test_ready_made_sub_mixtures(submixtures, where):
    mixture = mk.flan_mixture("flan2022", source=where, data_dir=submixtures)
    seen = {row.task: row for row in mixture.describe().rows}
    assert seen["flan2021/glue/rte:2.0.0"].cluster == "entailment"
    assert seen["cot/cot_gsm8k_ii"].cluster == "chain of thought"
    assert seen["niv2/task1_x"].examples + seen["niv2/task1_x"].valid == 30
    by_part = {}
    for row in seen.values():
        by_part[row.submixture] = by_part.get(row.submixture, 0) + row.rate
    assert by_part == pytest.approx(
        {"flan2021": 0.4, "t0": 0.32, "niv2": 0.2, "cot": 0.05, "dialog": 0.03}
    )
    for prompt in mixture.sample(60):  # worded already: nothing is added
        assert prompt.input.startswith(("Prompt ", "Second ")) and prompt.target.isdigit()
        assert prompt.shots == 0 and "\n" not in prompt.input


def test_empty_rows_are_counted_and_some_can_be_streamed(put, tmp_path, caplog):
    rows = ready(40, ["a", "b"])
    rows[3]["targets"], rows[5]["inputs"], rows[6]["inputs"] = "", "", None
    put("hub/conceptofmind/t0_submix_original/data/train-00000.parquet", rows)
    with caplog.at_level(logging.WARNING, "moekit"):
        tasks = ready_tasks("t0", tmp_path)
    assert "3 of 80 rows are empty" in caplog.text
    assert sum(len(t.examples(s)) for t in tasks for s in t.splits) == 77
    some = ready_tasks("t0", tmp_path, limit=20)
    assert sum(len(t.examples(s)) for t in some for s in t.splits) == 17


def test_own_files_come_before_fetched_ones(submixtures, put):
    put("cot/sums.jsonl", [{"question": "q?", "answer": "1", "rationale": "R"}] * 9)
    row, _, _ = ROWS["rte"]
    put("hub/nyu-mll/glue/rte/train/0000.parquet", [row] * 9)
    names = mk.flan_mixture("flan2022", data_dir=submixtures).rates
    assert "cot/sums" in names and "cot/cot_gsm8k" not in names
    assert "rte" in names and "flan2021/aeslc:1.0.0" not in names and "t0/wiki_bio_who" in names


def test_unusable_labels_and_missing_columns(tmp_path, put, caplog):
    rows = [NLI | {"label": label} for label in (0, -1, 1)]
    put("hub/stanfordnlp/snli/plain_text/train/0000.parquet", rows)
    task = raw_task("snli", tmp_path)
    # an unlabelled row gives way to the next
    answers = [e.answer for e in task.examples("train")]
    assert answers == ["yes", "cannot tell", "cannot tell"] and "answer -1" in caplog.text
    put("hub/nyu-mll/glue/rte/train/0000.parquet", [{"label": 1}] * 2)
    with pytest.raises(ValueError, match=r"no usable rows.*glue row 1: KeyError 'sentence1'"):
        raw_task("rte", tmp_path).load("train")[0]
    (tmp_path / "hub/nyu-mll/glue/wnli/train").mkdir(parents=True)
    (tmp_path / "hub/nyu-mll/glue/wnli/train/0000.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="not readable"):
        open_table(source("wnli"), "train", tmp_path)


def test_without_network(tmp_path, monkeypatch):
    monkeypatch.delenv("MOEKIT_DATA", raising=False)
    hint = r"conceptofmind/flan2021.*network.*moekit data fetch.*MOEKIT_DATA.*builtin"
    with pytest.raises(ConnectionError, match=hint):
        mk.flan_mixture("flan2022", source="hub")
    with pytest.raises(ConnectionError, match=r"load 'openai/gsm8k'"):
        raw_task("gsm8k", tmp_path, limit=5).examples("train")
    with pytest.raises(ValueError, match="did you mean 'gsm8k'"):
        raw_task("gsm8")
    with pytest.raises(ValueError, match="use ready_tasks"):
        raw_task("t0")
    with pytest.raises(ValueError, match="no split 'test'"):
        raw_task("dolly").examples("test")
