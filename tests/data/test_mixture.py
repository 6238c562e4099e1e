import itertools
import json
from collections import Counter

import numpy as np

from moekit.data.loader import batches
from moekit.data.mixture import Mixture, PromptFormats
from moekit.data.shuffle import shuffled_index
from moekit.data.tasks import Example, Task, Template
from moekit.data.tokenizer import EOS, ByteTokenizer

TOKENIZER = ByteTokenizer()
SIZES, WEIGHTS = (300, 40, 7, 100), (5.0, 3.0, 0.2, 1.8)


def task(number, size):
    """Its examples are as long as the task's number says."""
    examples = [Example(str(i), {"q": f"{i} " + "x" * 9 * number}, f"y{i}") for i in range(size)]
    return Task(f"t{number}", f"c{number % 2}", lambda split: examples, (Template("{q}"),))


def mixture(few_shot=0.0):
    tasks = tuple(task(i, size) for i, size in enumerate(SIZES))
    formats = PromptFormats(few_shot=few_shot)
    return Mixture("m", tasks, WEIGHTS, (formats,) * 4, ("p",) * 4)


def test_rates_hold_in_the_stream_and_in_the_packed_rows():
    mix, seed, lengths = mixture(), 2**40, {"input_length": 64, "target_length": 16}
    prompts = Counter(prompt.task for prompt in mix.sample(2000, seed=seed))
    stream = batches(mix, TOKENIZER, seed=seed, batch_size=16, **lengths)
    for _ in range(50):
        next(stream)
    tasks = stream.take_statistics().to_dict()["tasks"]
    packed = Counter({name: sums["examples"] for name, sums in tasks.items()})
    pairs = mix.token_pairs(TOKENIZER, seed=seed, **lengths)
    for state in stream.get_state().values():  # small examples wait longer for their row
        _, window, rows = json.loads(state)
        packed.update(mix.tasks[pairs[i]["task"]].name for i in itertools.chain(window, *rows))
    for counts in (prompts, packed):
        assert counts.total() >= 2000
        for name, rate in mix.rates.items():
            expected = counts.total() * rate
            assert abs(counts[name] - expected) < 3 * np.sqrt(expected)


def test_every_example_once_an_epoch_in_a_new_order():
    ids = {f"t{i}": [] for i in range(4)}
    for prompt in mixture().sample(3000):
        ids[prompt.task].append(prompt.id)
    for number, size in enumerate(SIZES):
        # the mixture is shuffled within windows, so epochs of one task overlap a little
        counts = Counter(ids[f"t{number}"])
        epochs = len(ids[f"t{number}"]) / size
        assert all(abs(n - epochs) <= 1 + epochs for n in counts.values())
    for size in (5, 1000, 2**13 + 1):
        epochs = [
            [shuffled_index(k + e * size, size=size, seed=9) for k in range(min(size, 2000))]
            for e in (0, 1)
        ]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_counts_agree_with_an_independent_count():
    mix = mixture()
    lengths = {"input_length": 24, "target_length": 4}
    stream = batches(mix, TOKENIZER, seed=0, batch_size=8, repeat=False, **lengths)
    rows, counts = 0, None
    for batch in stream:
        rows += 8
        new = stream.take_statistics()
        counts = new if counts is None else counts + new
        assert new.row()["input_fill"] == (batch.input_segments > 0).mean()
    found = counts.to_dict()
    for task, size in zip(mix.tasks, SIZES, strict=True):
        inputs = [len(e.fields["q"]) + 1 for e in task.examples("train")]
        targets = [len(e.answer) + 1 for e in task.examples("train")]
        cut = [max(0, i - 24) + max(0, t - 4) for i, t in zip(inputs, targets, strict=True)]
        assert found["tasks"][task.name] == {
            "examples": size,
            "input_tokens": sum(min(i, 24) for i in inputs),
            "target_tokens": sum(min(t, 4) for t in targets),
            "truncated_examples": sum(c > 0 for c in cut),
            "truncated_tokens": sum(cut),
        }
    assert found["clusters"]["c1"]["examples"] == SIZES[1] + SIZES[3]
    assert found["truncated_examples"] > 100 and counts.rows == rows
    assert f"{found['truncated_examples']:,} examples were truncated" in str(counts)


def test_exemplars_are_left_out_before_anything_is_truncated():
    mix = mixture(few_shot=1.0)
    pairs = mix.token_pairs(TOKENIZER, input_length=70, target_length=16, seed=0)
    shots = Counter()
    for i in range(300):
        pair = pairs[i]
        text = TOKENIZER.decode(pair["inputs"])
        assert pair["truncated"] == 0 and pair["inputs"][-1] == EOS
        parts = text.split("\n\n")
        shots[pair["task"], len(parts) - 1] += 1
        assert parts[-1] not in {part.split("\n")[0] for part in parts[:-1]}
    assert shots[0, 3] and shots[3, 1] and not shots[3, 3]


def test_no_prompt_shows_its_own_question_with_the_answer():
    """Every question stands twice in the train split, under another id, and once in test."""
    questions = [f"question {number}?" for number in range(12)]
    train = [Example(f"train {i}", {"q": questions[i // 2]}, f"answer {i // 2}") for i in range(24)]
    test = [Example(str(i), {"q": question}, f"answer {i}") for i, question in enumerate(questions)]
    load = {"train": train, "test": test}.__getitem__
    twice = Task("twice", "c", load, (Template("Q: {q}"),), splits=("train", "test"))
    mix = Mixture("m", (twice,), (1.0,), (PromptFormats(few_shot=1.0),), ("p",))
    for split in ("train", "test"):
        prompts = mix.sample(300, split=split)
        for prompt in prompts:
            *exemplars, question = prompt.input.split("Q: ")[1:]
            assert len(exemplars) == prompt.shots >= 1
            shown = [exemplar.split("\n")[0] for exemplar in exemplars]
            assert question not in shown and len(set(shown)) == len(shown)
            assert prompt.target not in "".join(exemplars).split("\n")
        assert {prompt.shots for prompt in prompts} == {1, 2, 3}


def test_select_keeps_the_proportions():
    chosen = mixture().select([3, 0])
    assert [task.name for task in chosen.tasks] == ["t3", "t0"]
    assert np.isclose(chosen.rates["t0"] / chosen.rates["t3"], 5.0 / 1.8)
    assert chosen.submixtures == ("p", "p") and len(chosen.formats) == 2
