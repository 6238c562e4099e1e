"""The lm-evaluation-harness runs our model on its own task configurations, pointed at files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import moekit as mk
from moekit.data.tasks import Example, Task, Template

pytest.importorskip("lm_eval", reason="the extra `eval` (lm-eval) is not installed")
# the harness and the libraries that it brings warn while they are imported and used
pytestmark = pytest.mark.filterwarnings("default")

QUESTIONS = [
    {
        "question": f"Which of these is the word number {i}?",
        "choices": {"text": ["stone", "river", f"tree {i}", "the sky"], "label": list("ABCD")},
        "answerKey": "ABCD"[i % 4],
    }
    for i in range(9)
]


@pytest.fixture(scope="module")
def manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()


def local(config, rows, folder):
    """The harness's own configuration of a task, with the data set replaced by a file."""
    import lm_eval

    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / config),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {name: str(path) for name in ("train", "validation", "test")},
            "cache_dir": str(folder / "cache"),
        },
    }
    (folder / "task.yaml").write_text(json.dumps(changed))  # JSON is YAML
    return str(folder / "task.yaml")


def test_its_arc_easy_is_answered_as_by_our_own_ranking(model, manager, tmp_path):
    task = local("arc/arc_easy.yaml", QUESTIONS, tmp_path)
    found = mk.harness(model, [task], task_manager=manager, bootstrap_iters=0)
    samples = sorted(found["samples"]["arc_easy"], key=lambda sample: sample["doc_id"])
    examples = [
        Example(str(i), {"q": row["question"]}, "stone", options=tuple(row["choices"]["text"]))
        for i, row in enumerate(QUESTIONS)
    ]
    task = Task("t", "c", lambda split: examples, (Template("Question: {q}\nAnswer:"),))
    prompts = [mk.format_prompt(task, example, options=False) for example in examples]
    best = mk.rank_options(model, prompts)
    correct = 0
    for sample, prompt, ours, row in zip(samples, prompts, best, QUESTIONS, strict=True):
        assert sample["arguments"][0][0] == prompt.input
        sums = [float(response[0]) for (response,) in sample["resps"]]
        tokens = [len(option.encode()) + 1 for option in prompt.options]
        assert int(np.argmax(np.array(sums) / tokens)) == ours
        correct += int(np.argmax(sums)) == "ABCD".index(row["answerKey"])
    assert found["results"]["arc_easy"]["acc,none"] == pytest.approx(correct / len(QUESTIONS))


def test_its_gsm8k_generates_with_stop_texts(model, manager, tmp_path):
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is.\n#### {i + 1}"} for i in range(6)]
    task = local("gsm8k/gsm8k.yaml", rows, tmp_path)
    found = mk.harness(
        model,
        [task],
        shots=2,
        task_manager=manager,
        gen_kwargs="max_gen_toks=8",
        bootstrap_iters=0,
    )
    sample = found["samples"]["gsm8k"][0]
    prompt = sample["arguments"][0][0]
    assert prompt.count("Question:") == 3
    assert sample["resps"][0][0] == mk.generate(model, prompt, max_new_tokens=8)
    assert 0 <= found["results"]["gsm8k"]["exact_match,strict-match"] <= 1


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def test_likelihoods_sum_over_tokens_and_name_greedy_texts(model):
    lm = mk.MoekitLM(model)
    greedy = mk.generate(model, "say it", max_new_tokens=3)
    pairs = [("say it", f" {greedy}"), ("say it", "no"), ("another", "no")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs))
    assert [found[i] for i in (1, 2)] == [
        lm.loglikelihood(requests("loglikelihood", pair))[0] for pair in pairs[1:]
    ]
    assert all(math.isfinite(value) and value < 0 for value, _ in found)
    assert not found[1][1]
    # an unfinished text is greedy up to its end, where the end of sequence must be the best too
    longer = mk.generate(model, "say it", max_new_tokens=40)
    assert found[0][1] == (longer == greedy)


def test_generation_stops_and_refuses_what_it_cannot_do(model, manager):
    lm = mk.MoekitLM(model)
    whole = mk.generate(model, "tell", max_new_tokens=12)
    stop = whole[4:6]
    settings = {"until": [stop], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    free = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    cut, sampled = lm.generate_until(requests("generate_until", ("tell", settings), ("tell", free)))
    assert cut == whole.split(stop)[0] and sampled != whole
    with pytest.raises(ValueError, match=r"sets top_p=0\.9"):
        lm.generate_until(requests("generate_until", ("x", {"top_p": 0.9, "do_sample": True})))
    with pytest.raises(ValueError, match="encoder-decoder does not define"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("text",)))
    with pytest.raises(ValueError, match="did you mean 'arc_easy'"):
        mk.harness(model, ["arc_eazy"], task_manager=manager)


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0.0}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": None}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": None, "top_p": None}, 1.0),
        ({"do_sample": True, "temperature": 0.5, "top_p": 1.0}, 0.5),
        ({"do_sample": False, "temperature": 0.5}, 0.0),
        ({"do_sample": None, "temperature": 0.5}, 0.5),
    ],
)
def test_settings_that_are_none_have_their_defaults(settings, temperature):
    from moekit.evaluation.lm_harness import _decoding

    assert _decoding(settings) == (256, temperature)
    assert _decoding({**settings, "max_tokens": 9, "max_gen_toks": None}) == (9, temperature)


def test_long_contexts_lose_their_beginning_and_are_counted(model, caplog):
    short = mk.MoekitLM(mk.with_config(model, model.cfg.replace(max_length=64)))
    text = "x" * 100 + "y" * 63
    pairs = [(text, "no"), ("y" * 63, "no")]
    a, b = short.loglikelihood(requests("loglikelihood", *pairs))
    assert a[0] == pytest.approx(b[0], abs=1e-5)
    assert "1 of 2 contexts were cut to their last 63 tokens" in caplog.text


def test_its_registry_loads_a_checkpoint(model, tmp_path):
    import lm_eval.api.registry

    mk.save(tmp_path / "saved", model)
    made = lm_eval.api.registry.get_model("moekit").create_from_arg_string(
        f"checkpoint={tmp_path / 'saved'}", {"batch_size": "auto", "device": None}
    )
    pair = requests("loglikelihood", ("a", "b"))
    assert made.loglikelihood(pair) == mk.MoekitLM(model).loglikelihood(pair)
    with pytest.raises(ValueError, match="give a model"):
        mk.MoekitLM()
