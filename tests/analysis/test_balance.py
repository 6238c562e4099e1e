"""Measures of balance and specialization on synthetic traces with known answers."""

import dataclasses

import numpy as np
import pytest

import moekit as mk
from moekit.analysis import balance as b, specialization as s
from moekit.analysis.trace import RouterTrace, StackTrace, text_prompts
from moekit.data.span_corruption import Corpus, Document


def synthetic(expert, *, kept=None, weight=None, domains=None, token=None, experts=4, example=None):
    """A trace from choices [Y, N, K]; by default two examples of N / 2 tokens."""
    expert = np.asarray(expert)
    y, n, k = expert.shape
    kept = np.ones((y, n, k), bool) & (expert >= 0) if kept is None else np.asarray(kept)
    weight = np.where(kept, 0.5, 0.0) if weight is None else np.asarray(weight, float)
    example = np.arange(n) * 2 // n if example is None else np.asarray(example)
    stack = StackTrace(
        token=np.arange(n) if token is None else np.asarray(token),
        example=example,
        position=np.concatenate([np.arange(c) for c in np.bincount(example)]),
        expert=expert,
        weight=weight,
        kept=kept,
        entropy=np.full((y, n), 0.25),
    )
    labels = domains or ("a", "b")
    names = tuple(f"task{i}" for i in range(len(labels)))
    return RouterTrace("m", experts, {"encoder": stack}, names, names, tuple(labels))


def one_choice(choices, **kwargs):
    return synthetic(np.array(choices)[None, :, None], **kwargs)


def test_even_load():
    trace = one_choice([0, 1, 2, 3] * 4)
    load = b.expert_load(trace)
    np.testing.assert_allclose(load, 0.25)
    assert b.load_entropy(load)[0] == pytest.approx(np.log(4))
    assert b.effective_experts(load)[0] == pytest.approx(4)
    assert b.coefficient_of_variation(load)[0] == 0 == b.max_violation(load)[0]


def test_collapse_and_opposite_collapses_do_not_cancel():
    trace = synthetic(np.stack([np.zeros((8, 1), int), np.full((8, 1), 3)]))
    load = b.expert_load(trace)
    assert b.load_entropy(load).tolist() == [0, 0]
    np.testing.assert_allclose(b.max_violation(load), 3)
    np.testing.assert_allclose(b.coefficient_of_variation(load), np.sqrt(3))
    np.testing.assert_allclose(b.effective_experts(load), 1)


def test_uneven_load():
    load = b.expert_load(one_choice([0, 0, 0, 1, 1, 1, 2, 2], experts=4))
    np.testing.assert_allclose(load, [[3 / 8, 3 / 8, 2 / 8, 0]])
    p = np.array([3 / 8, 3 / 8, 2 / 8])
    assert b.load_entropy(load)[0] == pytest.approx(-(p * np.log(p)).sum())
    assert b.max_violation(load)[0] == pytest.approx(0.5)


def test_drops_of_tokens_and_of_choices_differ():
    expert = np.array([[[0, 1], [0, 1], [2, 3], [0, -1]]])  # the last has no second choice
    kept = np.array([[[True, False], [False, False], [True, True], [False, False]]])
    trace = synthetic(expert, kept=kept)
    assert b.dropped_tokens(trace)[0] == pytest.approx(2 / 4)
    assert b.dropped_assignments(trace)[0] == pytest.approx(4 / 7)
    np.testing.assert_allclose(b.expert_load(trace), [[3 / 7, 2 / 7, 1 / 7, 1 / 7]])


def test_confidence_counts_processed_tokens():
    kept = np.array([[[True], [True], [False], [True]]])
    trace = synthetic(np.zeros((1, 4, 1), int), kept=kept, weight=[[[0.9], [0.5], [0.0], [0.7]]])
    assert b.router_confidence(trace)[0] == pytest.approx(0.7)
    assert b.router_entropy(trace)[0] == pytest.approx(0.25)
    row = b.balance_table(trace).rows[0]
    assert row["confidence"] == pytest.approx(0.7) and row["stack"] == "encoder"
    assert "effective experts" in str(b.balance_table(trace))
    assert "<table>" in b.balance_table(trace)._repr_html_()


def test_domains_that_own_their_experts():
    # forty examples of four tokens: domain a goes to experts 0 and 1, b to 2 and 3
    examples = np.repeat(np.arange(40), 4)
    domains = ["a" if i % 2 else "b" for i in range(40)]
    first = np.where(examples % 2 == 1, 0, 2)
    trace = one_choice(first + np.arange(160) % 2, domains=domains, example=examples)
    result = s.domain_specialization(trace)
    assert result.labels == ("a", "b") and result.chance[0] == 0.25
    np.testing.assert_allclose(result.share[0].T, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(result.low, result.share)
    assert result.p_value[0] < 0.02
    assert s.label_distance(result)[0, 0, 1] == pytest.approx(1)
    assert s.label_distance(result)[0, 0, 0] == 0


def test_labels_without_meaning_are_not_significant():
    rng, p_values = np.random.default_rng(0), []
    for _ in range(12):
        examples = np.repeat(np.arange(30), 5)
        trace = one_choice(
            rng.integers(0, 4, 150), domains=list(rng.choice(["a", "b", "c"], 30)), example=examples
        )
        p_values.append(s.domain_specialization(trace, resamples=60).p_value[0])
    assert np.mean(np.array(p_values) < 0.1) < 0.4 and np.mean(p_values) > 0.25


def test_tokens_per_expert():
    trace = one_choice([0] * 25 + [1] * 5 + [2] * 30 + [3] * 3, token=[7] * 30 + [8] * 30 + [9] * 3)
    result = s.token_specialization(trace, min_count=20)
    assert result.tokens.tolist() == [7, 8] and result.count.tolist() == [30, 30]
    np.testing.assert_allclose(result.share[0, :, 0], [25 / 30, 5 / 30, 0, 0])
    assert result.top(0, 2, 1) == [(8, 1.0)] and result.chance[0] == 0.25
    with pytest.raises(ValueError, match="no token occurs 99 times"):
        s.token_specialization(trace, min_count=99)


def test_coactivation_counts_all_pairs_whatever_their_rank():
    expert = np.array([[[0, 1, 2], [2, 0, -1], [0, 3, -1]]])
    together = s.coactivation(synthetic(expert))[0]
    assert together[0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1 / 3])
    assert together[2].tolist() == pytest.approx([1, 1 / 2, 0, 0])
    assert np.diag(together).tolist() == [0] * 4


def test_repetition_stays_inside_an_example():
    trace = one_choice([0, 0, 1, 1, 1, 1], example=[0, 0, 0, 1, 1, 1])
    same, chance = s.repetition(trace)
    assert same[0] == pytest.approx(3 / 4)  # the pair across the border does not count
    assert chance[0] == pytest.approx((2 / 6) ** 2 + (4 / 6) ** 2)


def test_saturation():
    early = synthetic([[[0, 1], [2, 3], [0, 2], [1, 3]]])
    late = synthetic([[[1, 0], [2, 0], [1, 3], [1, -1]]])
    assert mk.saturation(early, early)[0] == 1
    assert mk.saturation(early, late)[0] == pytest.approx((2 + 1 + 0 + 1) / 7)
    other = synthetic([[[0, 1]] * 3], example=[0, 0, 1])
    with pytest.raises(ValueError, match="different prompts"):
        mk.saturation(early, other)


def test_trace_of_a_model_saves_and_loads(tmp_path):
    model = mk.EncoderDecoder(mk.preset("st-nano").replace(d_model=16, d_ff=32), seed=0)
    corpus = Corpus(
        "c", lambda split: [Document(f"text {i} " * 9, "", "ab"[i % 2]) for i in range(8)]
    )
    prompts = text_prompts(corpus, 5, characters=40)
    trace = mk.trace_routing(model, prompts, batch_size=4, target_length=8)
    encoder = trace.stack("encoder")
    assert encoder.expert.shape[1] == sum(len(p.input) + 1 for p in prompts)
    assert encoder.expert.shape[::2] == (1, 2) and set(trace.domains) == {"a", "b"}
    order = np.lexsort((encoder.position, encoder.example))
    first = [i for i in order if encoder.example[i] == 0]
    assert mk.ByteTokenizer().decode(encoder.token[first]) == prompts[0].input
    trace.save(tmp_path / "t.npz")
    again = RouterTrace.load(tmp_path / "t.npz")
    assert again.domains == trace.domains
    for field in dataclasses.fields(encoder):
        mine, theirs = getattr(encoder, field.name), getattr(again.stack("encoder"), field.name)
        np.testing.assert_allclose(mine, theirs, atol=1e-3)
    (tmp_path / "bad.npz").write_bytes((tmp_path / "t.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="not a routing trace, or damaged"):
        RouterTrace.load(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match="unknown stack of this trace 'encode'"):
        trace.stack("encode")
    with pytest.raises(ValueError, match="unknown label 'domian': did you mean 'domain'"):
        trace.labels("domian")


def test_dense_models_and_no_prompts():
    with pytest.raises(ValueError, match="t5-nano is dense"):
        mk.trace_routing(mk.EncoderDecoder(mk.preset("t5-nano")), [])
    with pytest.raises(ValueError, match="no prompts"):
        mk.trace_routing(mk.EncoderDecoder(mk.preset("st-nano")), [])


def test_every_figure_draws_and_is_reproducible(tmp_path):
    rng = np.random.default_rng(1)
    examples = np.repeat(np.arange(24), 40)
    trace = synthetic(
        rng.permuted(np.tile(np.arange(4), (2, 960, 1)), axis=2)[:, :, :2],
        domains=[f"d{i % 3}" for i in range(24)],
        token=rng.integers(3, 9, 960),
        example=examples,
    )
    trace = dataclasses.replace(trace, tasks=tuple(f"t{i % 4}" for i in range(24)))
    draws = {
        "load": lambda: mk.plot_expert_load(trace),
        "domains": lambda: mk.plot_domain_specialization(trace),
        "distance": lambda: mk.plot_domain_distance(trace),
        "tasks": lambda: mk.plot_task_specialization(trace),
        "tokens": lambda: mk.plot_token_specialization(trace, mk.ByteTokenizer()),
        "together": lambda: mk.plot_coactivation(trace),
        "bars": lambda: mk.plot_bars({"x": {"a": 1.0, "b": 2.0}}, "share", "t", ("level", 1.0)),
        "rates": lambda: mk.plot_rates(mk.flan_mixture({"addition": 3.0, "parity": 1.0})),
    }
    for name, draw in draws.items():
        first, second = (mk.save_figure(draw(), tmp_path / f"{name}{i}.svg") for i in (0, 1))
        assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 2000
