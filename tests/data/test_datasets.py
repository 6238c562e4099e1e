"""Data sets of the hub: rows as the published cards show them, other copies, missing values."""

import logging
import math
import re

import pytest

import moekit as mk
from moekit.data.collection import cluster_of
from moekit.data.columns import Columns
from moekit.data.datasets import Access, dataset, dataset_task, datasets
from moekit.data.fetch import plan
from moekit.data.hub_files import unavailable
from moekit.data.ready_made import ready_made_tasks
from moekit.data.tasks import format_prompt

# set: file of the hub, a row as the set's card shows it, answer, options, a field of the example
CARDS = {
    "gsm8k": (
        "openai/gsm8k/main/train/0000.parquet",
        {
            "question": "Natalia sold clips to 48 of her friends in April, and then she sold half "
            "as many clips in May. How many clips did Natalia sell altogether in April and May?",
            "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = "
            "<<48+24=72>>72 clips altogether in April and May.\n#### 72",
        },
        "72",
        (),
        {},
    ),
    "aqua": (
        "deepmind/aqua_rat/raw/train/0000.parquet",
        {
            "question": "Two friends plan to walk along a 43-km trail, starting at opposite ends",
            "options": ["A)21", "B)21.5", "C)22", "D)22.5", "E)23"],
            "rationale": "If Q complete x kilometers, then P completes 1.15x kilometers.",
            "correct": "E",
        },
        "23",
        ("21", "21.5", "22", "22.5", "23"),
        {},
    ),
    "strategyqa": (
        "ChilleD/StrategyQA/default/train/0000.parquet",
        {
            "qid": "b8677742616fef051f00",
            "term": "Genghis Khan",
            "description": "founder and first Great Khan of the Mongol Empire",
            "question": "Are more people today related to Genghis Khan than Julius Caesar?",
            "answer": True,
            "facts": "Julius Caesar had three children. Genghis Khan had sixteen children.",
        },
        "yes",
        ("no", "yes"),
        {},
    ),
    "qasc": (
        "allenai/qasc/default/train/0000.parquet",
        {
            "id": "3NGI5ARFTT4HNGVWXAMLNBMFA0U1PG",
            "question": "What type of water formation is formed by clouds?",
            "choices": {"text": ["pearls", "streams", "beads"], "label": ["A", "B", "C"]},
            "answerKey": "C",
            "fact1": "beads of water are formed by water vapor condensing",
            "fact2": "Clouds are made of water vapor.",
            "combinedfact": "Beads of water can be formed by clouds.",
        },
        "beads",
        ("pearls", "streams", "beads"),
        {},
    ),
    "svamp": (
        "ChilleD/SVAMP/default/test/0000.parquet",
        {
            "ID": "chal-777",
            "Body": "There are 87 oranges and 290 bananas in Philip's collection.",
            "Question": "How many oranges are there?",
            "Equation": "( 290.0 / 2.0 )",
            "Answer": "145",
            "Type": "Common-Division",
        },
        "145",
        (),
        {
            "question": "There are 87 oranges and 290 bananas in Philip's collection. "
            "How many oranges are there?"
        },
    ),
    "asdiv": (
        "EleutherAI/asdiv/asdiv/validation/0000.parquet",
        {
            "body": "Seven red apples and two green apples are in the basket.",
            "question": "How many apples are in the basket?",
            "solution_type": "Addition",
            "answer": "9 (apples)",
            "formula": "7+2=9",
        },
        "9",
        (),
        {},
    ),
    "mmlu": (
        "cais/mmlu/all/test/0000.parquet",
        {
            "question": "What is the embryological origin of the hyoid bone?",
            "subject": "anatomy",
            "choices": ["The first arch", "The second arch", "Both", "The third arch"],
            "answer": 3,
        },
        "The third arch",
        ("The first arch", "The second arch", "Both", "The third arch"),
        {},
    ),
    "arc_easy": (
        "allenai/ai2_arc/ARC-Easy/train/0000.parquet",
        {
            "id": "Mercury_7220990",
            "question": "Which factor will most likely cause a person to develop a fever?",
            "choices": {
                "text": ["a leg muscle relaxing", "a bacterial population in the bloodstream"],
                "label": ["A", "B"],
            },
            "answerKey": "B",
        },
        "a bacterial population in the bloodstream",
        ("a leg muscle relaxing", "a bacterial population in the bloodstream"),
        {},
    ),
    "arc_challenge": (
        "allenai/ai2_arc/ARC-Challenge/test/0000.parquet",
        {
            "id": "NYSEDREGENTS_2013_4_7",
            "question": "What happens to water vapor when it condenses?",
            "choices": {"text": ["it melts", "it forms drops"], "label": ["1", "2"]},
            "answerKey": "2",
        },
        "it forms drops",
        ("it melts", "it forms drops"),
        {},
    ),
    "natural_questions": (
        "google-research-datasets/nq_open/nq_open/train/0000.parquet",
        {"question": "where did they film hot tub time machine", "answer": ["Fernie", "BC"]},
        "Fernie",
        (),
        {"question": "where did they film hot tub time machine?"},
    ),
    "trivia_qa": (
        "mandarjoshi/trivia_qa/rc.nocontext/train/0000.parquet",
        {
            "question": "Which American-born Sinclair won the Nobel Prize for Literature in 1930?",
            "question_id": "tc_1",
            "answer": {"aliases": ["Harry Sinclair Lewis"], "value": "Sinclair Lewis"},
        },
        "Sinclair Lewis",
        (),
        {},
    ),
    "openbookqa": (
        "allenai/openbookqa/main/train/0000.parquet",
        {
            "id": "7-980",
            "question_stem": "The sun is responsible for",
            "choices": {"text": ["puppies learning", "plants sprouting"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        "plants sprouting",
        ("puppies learning", "plants sprouting"),
        {},
    ),
    "boolq": (
        "google/boolq/default/train/0000.parquet",
        {
            "question": "do iran and afghanistan speak the same language",
            "answer": True,
            "passage": "Persian, also known by its endonym Farsi, is spoken in Iran.",
        },
        "yes",
        ("no", "yes"),
        {"question": "do iran and afghanistan speak the same language?"},
    ),
    "squad_v1": (
        "rajpurkar/squad/plain_text/train/0000.parquet",
        {
            "id": "5733be284776f41900661182",
            "title": "University_of_Notre_Dame",
            "context": "Architecturally, the school has a Catholic character.",
            "question": "What character does the school have?",
            "answers": {"text": ["Catholic"], "answer_start": [32]},
        },
        "Catholic",
        (),
        {},
    ),
    "cosmos_qa": (
        "Samsoup/cosmos_qa/default/train/0000.parquet",
        {
            "id": "3Q9SPIIRWJKVQ8244310E8TUS6YWAC",
            "context": "It's a very humbling experience when you need someone to dress you.",
            "question": "What's a possible reason the writer needed someone to dress him?",
            "answer0": "None of the above choices.",
            "answer1": "The writer has a physical ailment.",
            "answer2": "The writer is tired.",
            "answer3": "The writer is cold.",
            "label": 1,
        },
        "The writer has a physical ailment.",
        (
            "None of the above choices.",
            "The writer has a physical ailment.",
            "The writer is tired.",
            "The writer is cold.",
        ),
        {},
    ),
    "rte": (
        "nyu-mll/glue/rte/train/0000.parquet",
        {
            "sentence1": "No Weapons of Mass Destruction Found in Iraq Yet.",
            "sentence2": "Weapons of Mass Destruction Found in Iraq.",
            "label": 1,
            "idx": 0,
        },
        "it does not follow",
        ("it follows", "it does not follow"),
        {},
    ),
    "cb": (
        "aps/super_glue/cb/train/0000.parquet",
        {"premise": "It was a complex language.", "hypothesis": "h", "idx": 0, "label": 1},
        "no",
        ("yes", "no", "cannot tell"),
        {},
    ),
    "snli": (
        "stanfordnlp/snli/plain_text/train/0000.parquet",
        {
            "premise": "A person on a horse jumps over a broken down airplane.",
            "hypothesis": "A person is training his horse for a competition.",
            "label": 1,
        },
        "cannot tell",
        ("yes", "cannot tell", "no"),
        {},
    ),
    "anli_r2": (
        "facebook/anli/plain_text/train_r2/0000.parquet",
        {"uid": "u", "premise": "p", "hypothesis": "h", "label": 2, "reason": ""},
        "no",
        ("yes", "cannot tell", "no"),
        {},
    ),
    "glue_qqp": (
        "nyu-mll/glue/qqp/train/0000.parquet",
        {"question1": "How is life?", "question2": "Is it nice?", "label": 0, "idx": 0},
        "no",
        ("no", "yes"),
        {},
    ),
    "ag_news": (
        "fancyzhx/ag_news/default/train/0000.parquet",
        {"text": "Wall St. Bears Claw Back Into the Black (Reuters)", "label": 2},
        "business",
        ("world", "sports", "business", "science and technology"),
        {},
    ),
    "trec": (
        "SetFit/TREC-QC/default/train/0000.parquet",
        {
            "text": "How did serfdom develop in and then leave Russia ?",
            "label": 26,
            "label_original": "DESC:manner",
            "label_coarse": 2,
            "label_coarse_original": "DESC",
        },
        "description",
        ("abbreviation", "entity", "description", "human", "location", "number"),
        {},
    ),
    "samsum": (
        "knkarthick/samsum/default/train/0000.parquet",
        {
            "id": "13818513",
            "dialogue": "Amanda: I baked cookies. Do you want some?\nJerry: Sure!",
            "summary": "Amanda baked cookies and will bring Jerry some tomorrow.",
        },
        "Amanda baked cookies and will bring Jerry some tomorrow.",
        (),
        {},
    ),
    "gigaword": (
        "SalmanFaroz/gigaword/default/train/0000.parquet",
        {
            "article": "australia 's current account deficit shrunk by a record #.## billion",
            "summary": "australian current account deficit narrows sharply",
        },
        "australian current account deficit narrows sharply",
        (),
        {},
    ),
    "common_gen": (
        "allenai/common_gen/default/train/0000.parquet",
        {"concept_set_idx": 0, "concepts": ["ski", "mountain"], "target": "Skier on a mountain"},
        "Skier on a mountain",
        (),
        {"text": "ski, mountain"},
    ),
    "hellaswag": (
        "Rowan/hellaswag/default/train/0000.parquet",
        {"ind": 4, "ctx": "The man writes over the snow,", "endings": ["a", "b"], "label": "1"},
        "b",
        ("a", "b"),
        {},
    ),
    "piqa": (
        "baber/piqa/default/validation/0000.parquet",
        {"goal": "How do I ready a cage?", "sol1": "Use paper.", "sol2": "Use jeans.", "label": 0},
        "Use paper.",
        ("Use paper.", "Use jeans."),
        {},
    ),
    "winogrande": (
        "allenai/winogrande/winogrande_xl/validation/0000.parquet",
        {
            "sentence": "Sarah was a much better surgeon than Maria so _ got the easier cases.",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "2",
        },
        "Maria",
        ("Sarah", "Maria"),
        {},
    ),
    "social_i_qa": (
        "lighteval/siqa/default/validation/0000.parquet",
        {
            "context": "Tracy resisted Riley's attacks.",
            "question": "What does Tracy need to do before this?",
            "answerA": "make a new plan",
            "answerB": "Go home and see Riley",
            "answerC": "Find somewhere to go",
            "label": "3",
        },
        "Find somewhere to go",
        ("make a new plan", "Go home and see Riley", "Find somewhere to go"),
        {"question": "Tracy resisted Riley's attacks. What does Tracy need to do before this?"},
    ),
    "wmt16_translate_deen": (
        "wmt/wmt16/de-en/train/0000.parquet",
        {"translation": {"de": "Wiederaufnahme", "en": "Resumption"}},
        "Resumption",
        (),
        {"text": "Wiederaufnahme"},
    ),
    "dolly": (
        "databricks/databricks-dolly-15k/default/train/0000.parquet",
        {
            "instruction": "When did Virgin Australia start operating?",
            "context": "Virgin Australia commenced services on 31 August 2000.",
            "response": "31 August 2000",
            "category": "closed_qa",
        },
        "31 August 2000",
        (),
        {"question": "When did Virgin Australia start operating?"},
    ),
    "mbpp": (
        "google-research-datasets/mbpp/full/train/0000.parquet",
        {"task_id": 601, "text": "Find the longest chain.", "code": "def f(): pass"},
        "def f(): pass",
        (),
        {},
    ),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_row_as_the_card_shows_it(tmp_path, put, name):
    path, row, answer, options, fields = CARDS[name]
    put(f"hub/{path}", [row] * 3)
    task = dataset_task(dataset(name), Access(tmp_path))
    example = task.examples(next(split for split in task.splits if split != "valid"))[0]
    assert (example.answer, example.options) == (answer, options)
    assert {**example.fields, **fields} == example.fields
    assert task.held_out == (not dataset(name).group) and len(task.templates) == 10
    for template in range(10):
        prompt = format_prompt(task, example, template=template)
        assert all(text in prompt.input for text in fields.values() if name != "dolly")
        assert prompt.target


def test_reasoning_is_one_line_without_marks(tmp_path, put):
    path, row, *_ = CARDS["gsm8k"]
    put(f"hub/{path}", [row])
    (example,) = dataset_task(dataset("gsm8k"), Access(tmp_path)).examples("train")
    assert example.rationale == (
        "Natalia sold 48/2 = 24 clips in May. "
        "Natalia sold 48+24 = 72 clips altogether in April and May."
    )


def test_an_answer_of_several_parts_keeps_them_all(tmp_path, put):
    row = {"body": "b", "question": "q?", "answer": "12 (girls); 9 (boys)"}
    put("hub/EleutherAI/asdiv/asdiv/validation/0000.parquet", [row])
    (example,) = dataset_task(dataset("asdiv"), Access(tmp_path)).examples("test")
    assert example.answer == "12; 9" and "12 and 9" in example.references


# what pandas, JSON and broken exports leave in place of a value
MISSING = [None, math.nan, 2.0, [], ["y", None], True]
PLAIN = Columns({"question": "{q}"}, "a")
CHOICE = Columns({"question": "{q}"}, "a", options="options")
LABEL = Columns({"question": "{q}"}, "a", labels=["no", "yes"])


@pytest.mark.parametrize("value", MISSING)
def test_missing_values_never_become_words(value):
    for row in ({"q": value, "a": "x"}, {"q": "x", "a": value}, {"a": "x"}, {"q": "x"}):
        with pytest.raises(ValueError, match=r"column '[qa]'"):
            PLAIN.example(row, "1")
    with pytest.raises(ValueError, match=r"column 'options'|not one of"):
        CHOICE.example({"q": "x", "a": 0, "options": value}, "1")
    with pytest.raises(ValueError, match="column 'options'"):
        CHOICE.example({"q": "x", "a": 0, "options": ["y", None]}, "1")


@pytest.mark.parametrize("label", [1.5, True, False, -1, 2, "1", None, math.nan, 1.0, [1]])
def test_labels_that_are_none(label):
    with pytest.raises(ValueError, match="is not one of 2 options"):
        LABEL.example({"q": "x", "a": label}, "1")
    assert LABEL.example({"q": "x", "a": 1}, "1").answer == "yes"


@pytest.mark.parametrize("column", ["sentence1", "label"])
def test_a_missing_value_in_a_copy_is_refused_or_skipped(tmp_path, put, caplog, column):
    row = {"sentence1": "one", "sentence2": "two", "label": 1}
    rows = [row, row | {column: None}, row]
    put("hub/nyu-mll/glue/rte/train/0000.parquet", rows)
    with pytest.raises(ValueError, match=rf"glue/rte/train:2: .*{column}|train:2: answer 'None'"):
        mk.flan_mixture("flan2022", data_dir=tmp_path)
    with caplog.at_level(logging.WARNING, "moekit"):
        mixture = mk.flan_mixture("flan2022", data_dir=tmp_path, on_error="skip")
    (task,) = mixture.tasks
    examples = [*task.examples("train"), *task.examples("valid")]
    assert [example.answer for example in examples] == ["it does not follow"] * 2
    assert "skipped 1 unusable of 3 rows" in caplog.text


def test_an_integer_column_beside_a_missing_value(tmp_path, put):
    rows = [{"sentence1": "one", "sentence2": "two", "label": value} for value in (1.0, math.nan)]
    put("hub/nyu-mll/glue/rte/train/0000.parquet", rows)
    with pytest.raises(ValueError, match=r"answer '1\.0'.*is not one of 2"):
        mk.flan_mixture("flan2022", data_dir=tmp_path)


def test_published_rows_without_text_are_skipped(tmp_path, put, caplog):
    good = {"id": "1", "dialogue": "a: hi", "summary": "They greet."}
    bad = {"id": "13828807", "dialogue": None, "summary": "problem with visualization"}
    put("hub/knkarthick/samsum/default/train/0000.parquet", [good, bad, good])
    with caplog.at_level(logging.WARNING, "moekit"):
        task = dataset_task(dataset("samsum"), Access(tmp_path))
        assert {example.fields["text"] for example in task.examples("train")} == {"a: hi"}
    assert "skipped 1 unusable of 3 rows" in caplog.text


def test_a_long_table_is_checked_for_missing_values_when_it_is_opened(
    tmp_path, put, monkeypatch, caplog
):
    monkeypatch.setattr("moekit.data.datasets.CHECKED", 1)
    row = {"sentence1": "one", "sentence2": "two"}
    labels = [1, 7, None, 0]
    put("hub/nyu-mll/glue/rte/train/0000.parquet", [row | {"label": label} for label in labels])
    with pytest.raises(ValueError, match=r"rte/train:3: column 'label' holds no text: missing"):
        dataset_task(dataset("rte"), Access(tmp_path)).load("train")
    task = dataset_task(dataset("rte"), Access(tmp_path, on_error="skip"))
    rows = [*task.examples("valid"), *task.examples("train")]
    answers = [example.answer for example in rows]
    assert answers == ["it does not follow", "it follows", "it follows"]  # 7 gives way
    assert "answer '7'" in caplog.text


def test_a_broken_copy_is_named(tmp_path):
    (tmp_path / "hub/nyu-mll/glue/wnli/train").mkdir(parents=True)
    (tmp_path / "hub/nyu-mll/glue/wnli/train/0000.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="wnli/train: not readable"):
        mk.flan_mixture("flan2022", data_dir=tmp_path)


LOCAL = {  # the data folder's own layout of the same rows
    "gsm8k": "gsm8k/train.jsonl.gz",
    "boolq": "mc/boolq/train.jsonl.gz",
    "arc_easy": "mc/arc_easy/train.jsonl.gz",
    "openbookqa": "mc/openbookqa/train.jsonl.gz",
    "strategyqa": "strategyqa/train.jsonl.gz",
    "dolly": "dolly/train.jsonl.gz",
    "qasc": "cot/qasc.jsonl.gz",
    "aqua": "cot/aqua.jsonl.gz",
}


def local_row(name, row):
    """The row of a card in the data folder's own layout."""
    question = row.get("question") or row.get("question_stem")
    if name == "gsm8k":
        return row | {"solution": row["answer"], "answer": row["answer"].split("#### ")[1]}
    if name == "boolq":
        shown = {"question": f"{question}?", "context": row["passage"]}
        return shown | {"choices": ["no", "yes"], "answer": int(row["answer"])}
    if name in ("arc_easy", "openbookqa"):
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        answer = labels.index(row["answerKey"])
        return {"question": question, "choices": texts, "answer": answer}
    if name == "strategyqa":
        facts = [f"{fact.rstrip('.')}." for fact in row["facts"].split(". ")]
        return {"question": question, "answer": "yes", "facts": facts}
    if name == "aqua":
        lines = [f"({option[0]}) {option[2:]}" for option in row["options"]]
        shown = "\n".join([question, "Options:", *lines])
        return {"question": shown, "answer": "(E)", "rationale": row["rationale"]}
    if name == "qasc":
        pairs = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
        shown = "\n".join([question, "Options:", *(f"- ({key}) {text}" for key, text in pairs)])
        reasons = " ".join(row[fact] for fact in ("fact1", "fact2", "combinedfact"))
        return {"question": shown, "answer": "(C)", "rationale": reasons}
    return row


@pytest.mark.parametrize("name", ["flan2022"])
def test_a_mixture_does_not_depend_on_where_its_files_are(tmp_path, put, name):
    for number, (each, path) in enumerate(LOCAL.items()):
        file, row, *_ = CARDS[each]
        key = "instruction" if each == "dolly" else "question"
        key = "question_stem" if each == "openbookqa" else key
        rows = [row | {key: f"{row[key]} {index}"} for index in range(22 + number)]
        put(f"fetched/hub/{file}", rows)
        put(f"own/{path}", [local_row(each, each_row) for each_row in rows])
    own = mk.flan_mixture(name, data_dir=tmp_path / "own")
    fetched = mk.flan_mixture(name, data_dir=tmp_path / "fetched")
    hub = mk.flan_mixture(
        name, data_dir=tmp_path / "fetched", source="hub-raw", on_error="skip"
    )  # sets that are not fetched cannot be loaded
    assert set(own.rates) == set(LOCAL)
    for other in (fetched, hub):
        assert other.rates == own.rates and other.submixtures == own.submixtures
        for one, two in zip(own.tasks, other.tasks, strict=True):
            assert (one.cluster, one.templates, one.inverted) == (
                two.cluster,
                two.templates,
                two.inverted,
            )
            assert (one.metric, set(one.splits)) == (two.metric, set(two.splits))
            for split in ("train", "valid"):
                assert list(one.examples(split)) == list(two.examples(split))
        assert own.sample(30) == other.sample(30)


def test_entries_are_complete_and_agree_with_flans_clusters():
    assert len(datasets()) > 50
    for each in datasets().values():
        assert each.local or each.hub, each.name
        listed = cluster_of(each.group, each.name)
        if each.group in ("flan2021", "cot") and listed != each.group:
            assert each.cluster == listed, each.name
        for columns in (each.hub_columns, *(place.columns for place in each.local)):
            assert columns is None or columns.answer


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


@pytest.mark.parametrize("where", ["hub", "local", "mirror"])
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
        tasks = ready_made_tasks("t0", Access(tmp_path))
    assert "3 of 80 rows are empty" in caplog.text
    assert sum(len(t.examples(s)) for t in tasks for s in t.splits) == 77
    some = ready_made_tasks("t0", Access(tmp_path, limit=20))
    assert sum(len(t.examples(s)) for t in some for s in t.splits) == 17


def test_own_files_come_before_fetched_ones(submixtures, put):
    put("cot/sums.jsonl", [{"question": "q?", "answer": "1", "rationale": "R"}] * 9)
    path, row, *_ = CARDS["rte"]
    put(f"hub/{path}", [row] * 9)
    names = mk.flan_mixture("flan2022", data_dir=submixtures).rates
    assert "cot/sums" in names and "cot/cot_gsm8k" not in names
    assert "rte" in names and "flan2021/aeslc:1.0.0" not in names and "t0/wiki_bio_who" in names


def test_without_network(tmp_path, monkeypatch):
    monkeypatch.delenv("MOEKIT_DATA", raising=False)
    hint = r"conceptofmind/flan2021.*network.*moekit data fetch.*MOEKIT_DATA.*builtin"
    with pytest.raises(ConnectionError, match=hint):
        mk.flan_mixture("flan2022", source="hub")
    gsm8k = dataset_task(dataset("gsm8k"), Access(None, hub=True, limit=5))
    with pytest.raises(ConnectionError, match=r"load 'openai/gsm8k'.*HF_HUB_OFFLINE"):
        gsm8k.examples("train")
    with pytest.raises(ValueError, match="did you mean 'gsm8k'"):
        dataset("gsm8")
    assert dataset("bool_q") is dataset("boolq")
    assert dataset_task(dataset("gsm8k"), Access(tmp_path)) is None


def test_a_missing_set_stops_the_mixture_or_leaves_its_share(tmp_path, put):
    rows = {"rte": 40, "boolq": 60, "gsm8k": 20}
    for name, count in rows.items():
        path, row, *_ = CARDS[name]
        put(f"hub/{path}", [row] * count)
    with pytest.raises(ConnectionError, match=r"'.*'.*HF_HUB_OFFLINE.*skip"):
        mk.flan_mixture("flan2022", source="hub-raw", data_dir=tmp_path)
    mixture = mk.flan_mixture("flan2022", source="hub-raw", data_dir=tmp_path, on_error="skip")
    assert "squad_v1" in mixture.dropped and "HF_HUB_OFFLINE" in mixture.dropped["squad_v1"]
    share = 0.4 / 0.45
    assert mixture.rates == pytest.approx(
        {"gsm8k": 0.05 / 0.45, "boolq": share * 57 / 95, "rte": share * 38 / 95}
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "no public repository"),
        ("RevisionNotFoundError", "no branch 'refs/convert/parquet'"),
        ("EntryNotFoundError", r"no files x/\*\.parquet on branch"),
        ("ConnectError", "no network"),
    ],
)
def test_what_was_missing_is_named(kind, message):
    error = type(kind, (Exception,), {})("as the client words it")
    problem = unavailable("a/b", "refs/convert/parquet", error, "x/*.parquet")
    assert re.search(message, str(problem)) and "'a/b'" in str(problem)


def test_the_other_repository_of_a_sub_mixture_is_tried(put, tmp_path):
    at = "hub/DataProvenanceInitiative/t0_submix_original/data/train-00000.parquet"
    put(at, ready(20, ["wiki_bio_who"]))
    (task,) = mk.flan_mixture("flan2022", data_dir=tmp_path).tasks
    assert task.name == "t0/wiki_bio_who" and len(task.examples("train")) == 19
    items = plan(["t0"], str(tmp_path / "hub"))
    assert [item.repository for item in items] == ["DataProvenanceInitiative/t0_submix_original"]
