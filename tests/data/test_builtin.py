import subprocess
import sys
from collections import Counter

import pytest

from moekit.data.builtin.entries import entries, split_of
from moekit.data.builtin.tasks import HELD_OUT, builtin_corpus, builtin_tasks
from moekit.data.flan import flan_mixture
from moekit.data.tasks import format_prompt

TASKS = builtin_tasks()


def test_the_promised_size():
    clusters = {task.cluster for task in TASKS.values()}
    assert len(TASKS) >= 24 and len(clusters) >= 8 and set(HELD_OUT) < clusters
    for task in TASKS.values():
        assert len(set(task.templates)) == 10
        assert task.held_out == (task.cluster in HELD_OUT)


@pytest.mark.parametrize("name", TASKS)
def test_every_template_renders_and_no_object_is_in_two_splits(name):
    task = TASKS[name]
    asked = {}
    for split in ("train", "valid", "test"):
        examples = task.examples(split)
        assert examples, split
        for i, example in enumerate(examples[:20]):
            prompt = format_prompt(task, example, template=i)
            assert prompt.target in prompt.options and len(set(prompt.options)) >= 2
            assert "{x}" not in prompt.input and "{y}" not in prompt.input
        asked[split] = {tuple(example.fields.values()) for example in examples}
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["valid"]
    assert not asked["valid"] & asked["test"]


@pytest.mark.parametrize("name", TASKS)
def test_no_answer_and_no_place_gives_the_task_away(name):
    examples = TASKS[name].examples("train")
    if len(examples) < 50:
        pytest.skip("too few to count")
    options = [len(e.options) for e in examples]
    first = sum(e.options[0] == e.answer for e in examples) / len(examples)
    assert abs(first - sum(1 / n for n in options) / len(options)) < 0.12
    share = Counter(e.answer for e in examples).most_common(1)[0][1] / len(examples)
    assert share < (0.62 if max(options) == 2 else 0.5)


def test_nothing_held_out_is_trained_on():
    mixture = flan_mixture("builtin")
    assert not {t.cluster for t in mixture.tasks} & set(HELD_OUT)
    trained = "\n".join(p.input for p in mixture.sample(300))
    for task in TASKS.values():
        if task.held_out:
            for example in task.examples("test")[:50]:
                if len(example.fields["x"]) > 25:
                    assert example.fields["x"] not in trained
    texts = {e.text for e in entries() if split_of(e.text) == "test"}
    assert not texts & {d.text for d in builtin_corpus().documents("train")}


def test_corpus_has_domains_and_disjoint_splits():
    corpus = builtin_corpus()
    assert {"python", "numpy", "jax", "language reference"} <= set(corpus.domains)
    train = {d.text for d in corpus.documents("train")}
    valid = {d.text for d in corpus.documents("valid")}
    assert not train & valid
    assert sum(map(len, train)) > 1_000_000


def test_the_same_in_every_process(tmp_path):
    code = (
        "from moekit.data.builtin.tasks import builtin_tasks as t\n"
        "import hashlib\n"
        "names = ('swaps', 'http_status')\n"
        "e = [(x.id, x.options) for n in names for x in t()[n].examples('train')]\n"
        "print(hashlib.sha256(repr(e).encode()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PATH": "", "MOEKIT_CACHE": str(tmp_path / seed)},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
