"""Scores, ranking, decoding, evaluation."""

import dataclasses

import numpy as np
import pytest

import moekit as mk
from moekit.data.suites import Suite
from moekit.data.tasks import Example, Task, Template
from moekit.evaluation import evaluator
from moekit.evaluation.evaluator import rank_options
from moekit.evaluation.scores import (
    Scores,
    TaskScore,
    bootstrap,
    compare,
    exact_match,
    extract_answer,
    normalise,
    normalised_average,
    report,
    rouge_l,
)
from moekit.model.batching import bucket_length, length_groups, num_rows

TEN = tuple(Template(f"{i} " + "{x}") for i in range(10))


def task(name="pick", n=12, options=True, rationale="", **kwargs):
    def load(split):
        return [
            Example(
                f"{split}{i}",
                {"x": f"say {i} now"},
                answer=f"word{i % 3}",
                options=("word0", "word1", "word2") if options else (),
                rationale=rationale,
            )
            for i in range(n)
        ]

    return Task(name, "cluster", load, TEN, **kwargs)


@pytest.fixture(scope="module")
def model():
    return mk.EncoderDecoder(mk.preset("st-nano").replace(d_model=16, d_ff=32), seed=0)


def test_exact_match_and_rouge():
    assert normalise("The  Answer, is: 42!") == "answer is 42" and normalise("%") == "%"
    assert exact_match("the Paris.", ["paris", "rome"]) == 1 and exact_match("pari", ["paris"]) == 0
    assert rouge_l("a b c d", ["a b c d"]) == 1
    # longest common subsequence 3 of 4 and 5 words: P 3/4, R 3/5
    assert rouge_l("one two nine three", ["one two three four five"]) == pytest.approx(2 / 3)
    assert rouge_l("x", ["y", "x"]) == 1


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("5", "-5", False),
        ("72.0", "72", True),
        ("$1,234.50", "1234.5", True),
        ("40%", "40", True),
        ("22090603", "2.20906e+07", True),
        ("72001", "72000", False),
        ("01/02/2003", "1022003", False),
        ("] )", "] )", True),
        ("B", "(B)", True),
    ],
)
def test_numbers_match_as_numbers(answer, reference, same):
    assert exact_match(answer, [reference]) == same == exact_match(reference, [answer])


@pytest.mark.parametrize(
    ("text", "like", "options", "answer"),
    [
        ("So it is 3 * 2 = 6. The answer is 6.", "6", (), "6"),
        ("The answer is 6 * 7 = 42 eggs of 50.", "42", (), "42"),
        ("The answer is 5 apples. Then 9.", "5", (), "5"),
        ("First 10 - 3, so 7", "7", (), "7"),
        ("10-3", "3", (), "3"),
        ("work\n#### -1,200", "-1200", (), "-1,200"),
        ("answer: $3.50.", "3.5", (), "$3.50"),
        ("The answer is forty.", "40", (), "forty"),
        ("So the answer is: (B).", "(B)", ("(A)", "(B)"), "(B)"),
        ("The answer is B", "y", ("x", "y"), "y"),
        ("The answer is A dog", "dog", ("cat", "dog"), "dog"),
        ("Not (A). I take (C)", "z", ("x", "y", "z"), "z"),
        ("The answer is yes, as no one said", "yes", ("no", "yes"), "yes"),
        ("no wait, yes", "yes", ("no", "yes"), "yes"),
        ("the answer is new york", "new york", ("york", "new york"), "new york"),
        ("The answer is none of it", "x", ("x", "y"), "none of it."),
        ("So the answer is ] ).", "] )", (), "] )"),
        ("Then 3.5. The answer is 3.5", "3.5", (), "3.5"),
        (" just this ", "", (), "just this"),
    ],
)
def test_answers_are_read_by_their_kind(text, like, options, answer):
    found = extract_answer(text, like, options)
    assert exact_match(found, [answer])
    assert options == () or found in (*options, "none of it")


def test_the_normalised_average_scales_between_chance_and_one():
    a = TaskScore.of("a", "c", "accuracy", [1.0] * 11 + [0.0] * 9, 0.5, 0.5)
    b = TaskScore.of("b", "c", "exact_match", [1.0, 0.0, 0.0, 0.0], 0.0, 0.0)
    below = TaskScore.of("c", "c", "accuracy", [1.0] * 9 + [0.0] * 11, 0.5, 0.5)
    results = [Scores("m on one", (a, b)), Scores("m on two", (below,))]
    average = normalised_average(results)
    # a right share of .55 at chance .5 is .1, one of .45 is -.1 (the example of Chung 2022)
    assert average.suites == pytest.approx({"one": (0.1 + 0.25) / 2, "two": -0.1})
    assert average.score == pytest.approx((0.175 - 0.1) / 2)
    assert average.low < average.score < average.high and "one 17.5%" in str(average)
    record = report(results)
    assert record["model"] == "m" and len(record["suites"]) == 2
    assert record["normalised_average"]["score"] == average.score
    for wrong in ([], results[:1] * 2):
        with pytest.raises(ValueError, match="different suites"):
            normalised_average(wrong)


def test_bootstrap_covers_the_mean_and_narrows():
    rng = np.random.default_rng(0)
    few, many = rng.random(30) < 0.5, rng.random(3000) < 0.5
    low, high = bootstrap([few.astype(float)])
    assert low < few.mean() < high and high - low == pytest.approx(0.36, abs=0.08)
    low, high = bootstrap([many.astype(float)])
    assert low < many.mean() < high and high - low < 0.05
    assert bootstrap([np.ones(9)]) == (1, 1)


def test_mean_weighs_tasks_alike_and_differences_are_paired():
    a = TaskScore.of("a", "c", "accuracy", [1, 0, 1, 0], 0.25, 0.5)
    b = TaskScore.of("b", "c", "accuracy", [1] * 100, 0.5, 0.5)
    scores = Scores("m", (a, b))
    assert scores.mean.score == 0.75 and scores.mean.chance == 0.375
    assert "a" in scores.table() and len(scores.to_dict()["tasks"]) == 2
    better = dataclasses.replace(a, values=np.ones(4))
    change = compare(scores, Scores("n", (better, b)))
    assert change.difference == 0.25 and change.low >= 0
    with pytest.raises(ValueError, match="different examples"):
        compare(scores, Scores("n", (a,)))


def test_ranking_equals_scoring_each_option_alone(model):
    tokenizer = mk.ByteTokenizer()
    examples = task().examples("test")
    prompts = [mk.format_prompt(task(), e, template=0) for e in examples[:5]]
    wide = mk.with_config(model, model.cfg.replace(eval_capacity_factor=8.0))
    together = rank_options(wide, prompts, tokenizer)
    assert together == [rank_options(wide, [p], tokenizer)[0] for p in prompts]
    for prompt, best in zip(prompts, together, strict=True):
        means = []
        for option in prompt.options:
            target = dataclasses.replace(prompt, target=option)
            ids = tokenizer.encode(option)
            batch = mk.pad_prompts([target], tokenizer, input_length=64, target_length=16)
            logits = np.asarray(wide(batch).logits[0], np.float64)[: len(ids) + 1]
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            means.append(np.mean([row[i] for row, i in zip(log_probs, [*ids, 1], strict=True)]))
        assert int(np.argmax(means)) == best


@pytest.mark.parametrize("mesh", [None, {"data": 2, "expert": 4}], ids=str)
def test_batches_hold_fewer_long_texts_and_split_over_the_mesh(mesh):
    mesh = mesh and mk.make_mesh(**mesh)
    lengths = [5000, 60, 3000, 61, 700, 2000, 65] * 3
    parts = [3] * 21
    groups = list(length_groups(lengths, 4096, 16, parts, mesh))
    assert sorted(i for group, _, _ in groups for i in group) == list(range(21))
    shards = 8 if mesh else 1
    for group, size, rows in groups:
        assert size == bucket_length(max(lengths[i] for i in group), 4096)
        assert rows == num_rows(size, 16, mesh)
        assert len(group) <= rows <= 16 and rows % shards == 0
        assert rows == shards or rows * size**2 <= 2**23
        assert sum(parts[i] for i in group) <= 64


def test_a_mesh_gives_the_same_answers(model):
    cfg = model.cfg.replace(eval_capacity_factor=8.0)
    results = []
    for mesh in (None, mk.make_mesh(data=2, expert=4)):
        each = mk.EncoderDecoder(cfg, seed=0, mesh=mesh)
        scores = mk.evaluate(each, [task(), task("free", options=False)], max_new_tokens=4)
        prompts = [mk.format_prompt(task(), e) for e in task().examples("test")]
        trace = mk.trace_routing(each, prompts, target_length=8)
        results.append((np.concatenate([row.values for row in scores.rows]), trace))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    for one, many in zip(*(trace.stacks.values() for _, trace in results), strict=True):
        np.testing.assert_array_equal(one.expert, many.expert)


def test_scores_carry_chance_majority_and_intervals(model):
    scores = mk.evaluate(model, [task(), task("free", options=False, metric="exact_match")])
    ranked, free = scores.rows
    assert ranked.metric == "accuracy" and ranked.chance == pytest.approx(1 / 3)
    assert ranked.majority == pytest.approx(1 / 3) and free.chance == 0
    assert ranked.low <= ranked.score <= ranked.high and ranked.n == 12
    assert free.metric == "exact_match" and scores.mean.metric == "mixed"
    assert scores.plot().axes


def test_limit_is_a_fixed_sample_and_shots_come_from_train(model):
    a, b = (mk.evaluate(model, [task(n=30)], limit=7, shots=2) for _ in range(2))
    assert a.rows[0].n == 7
    np.testing.assert_array_equal(a.rows[0].values, b.rows[0].values)
    short = mk.with_config(model, model.cfg.replace(max_length=64))
    assert mk.evaluate(short, [task()], shots=3).dropped_shots > 0
    with pytest.raises(ValueError, match=r"pick test0.*the question alone is \d+ tokens"):
        mk.evaluate(mk.with_config(model, model.cfg.replace(max_length=8)), [task()])
    without = dataclasses.replace(task(), load=lambda split: task().load(split)[: split == "test"])
    assert mk.evaluate(model, [without], shots=2).rows[0].n == 1


def test_a_suite_is_asked_in_its_own_way(model, monkeypatch):
    asked = []

    def decode(model, ids, *, max_new_tokens):
        asked.extend(mk.ByteTokenizer().decode(row) for row in ids)
        said = ["It is so. The answer is word1." for _ in ids]
        return [np.array(mk.ByteTokenizer().encode(text)) for text in said]

    monkeypatch.setattr(evaluator, "generate_ids", decode)
    thought = task(rationale="Think.")
    suite = Suite("s", (thought,), shots=2, chain_of_thought=True, first=6, missing=("gone",))
    scores = mk.evaluate(model, suite)
    assert scores.name == "st-nano on s" and scores.suite == "s" and scores.model == "st-nano"
    row = scores.rows[0]
    assert (row.metric, row.n, row.score, row.chance) == (
        "exact_match",
        6,
        2 / 6,
        pytest.approx(1 / 3),
    )
    assert all(text.count("Think. The answer is word") == 2 for text in asked)
    assert all(text.endswith("step by step.") for text in asked)
    assert "not evaluated, for want of data: gone" in scores.table()
    asked.clear()
    decoded = Suite("d", (task(metric="rouge_l"),), options=False, ranked=False)
    row = mk.evaluate(model, decoded).rows[0]
    assert row.metric == "rouge_l" and row.chance == 0 and "word" not in asked[0]
    lettered = Suite("l", (task(),), style=3)
    asked.clear()
    assert mk.evaluate(model, lettered).rows[0].metric == "accuracy" and not asked
    assert mk.evaluate(model, lettered, shots=1).rows[0].n == 12
    nothing = dataclasses.replace(task("empty"), load=lambda split: [])
    assert mk.evaluate(model, [task(), nothing]).missing == ("empty",)
    with pytest.raises(ValueError, match="suite tasks has no questions"):
        mk.evaluate(model, [nothing])


def test_few_exemplars_are_shown_in_their_order(model, monkeypatch):
    asked = []
    monkeypatch.setattr(
        evaluator,
        "generate_ids",
        lambda model, ids, **_: asked.extend(ids) or [np.zeros(1, np.int32)] * len(ids),
    )
    mk.evaluate(model, [task(n=3, options=False, metric="exact_match")], shots=5)
    texts = [mk.ByteTokenizer().decode(row) for row in asked]
    assert len(texts) == 3
    for text in texts:
        assert [text.index(f"word{i}") for i in range(3)] == sorted(
            text.index(f"word{i}") for i in range(3)
        )


def test_greedy_decoding_equals_argmax_of_the_whole(model):
    wide = mk.with_config(model, model.cfg.replace(eval_capacity_factor=8.0))
    texts, tokenizer = ["one", "a longer text than that"], mk.ByteTokenizer()
    said = mk.generate(wide, texts, max_new_tokens=5)
    assert said == [mk.generate(wide, [text], max_new_tokens=5)[0] for text in texts]
    for text, answer in zip(texts, said, strict=True):
        ids: list[int] = []
        for _ in range(5):
            target = {"inputs": [*tokenizer.encode(text), 1], "targets": [*ids, 5]}
            from moekit.data.batch import pad_pairs

            logits = wide(pad_pairs([target], input_length=64, target_length=8)).logits
            ids.append(int(logits[0, len(ids)].argmax()))
            if ids[-1] == 1:
                break
        assert tokenizer.decode(ids) == answer


def test_sampling_depends_on_the_seed_alone(model):
    a, b, c = (
        mk.generate(model, ["text"] * 3, temperature=1.0, seed=seed, max_new_tokens=8)
        for seed in (1, 1, 2)
    )
    assert a == b != c
    with pytest.raises(ValueError, match="temperature is -1"):
        mk.generate(model, ["x"], temperature=-1.0)
    with pytest.raises(ValueError, match="is 5001 tokens long, more than the 4096"):
        mk.generate(model, ["x" * 5000])
