"""Benchmarks at tiny sizes: the form of their rows, equal work and equal drops; never a time."""

import json
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import moekit as mk
from moekit.bench.baselines import Work, our_config, our_functions
from moekit.bench.generation import decoding_work, our_decoding
from moekit.bench.layer import SHAPES, EinsumMoE
from moekit.cli import main


def rows_of(capsys, *argv):
    assert main(["bench", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_layer_has_one_row_a_variant(capsys):
    rows = rows_of(capsys, "layer", "--tokens", 64, "--d-model", 16, "--d-ff", 32, "--repeats", 2)
    variants = ("dense", "capacity", "dropless", "einsum")
    assert [(r["experts"], r["k"], r["variant"]) for r in rows] == [
        (experts, k, v) for experts, k in SHAPES for v in variants
    ]
    for row in rows:
        assert 0 < row["min_ms"] <= row["ms"] and row["tokens"] == 64
        if row["variant"] == "dense":
            assert row["ratio_to_dense"] == row["min_ratio_to_dense"] == 1


def test_the_einsum_peer_computes_the_same():
    router = mk.TopK(k=2)
    ours = mk.MoE(
        8, 16, 4, router=router, capacity_factor=0.75, capacity_counts_k=True, rngs=nnx.Rngs(0)
    )
    peer = EinsumMoE(ours, router, 0.75)
    x = jax.random.normal(jax.random.key(0), (32, 8))
    y, stats, _ = ours(x[None])
    assert stats.dropped_assignments > 0
    np.testing.assert_allclose(y[0], peer(x), atol=1e-5)


@pytest.mark.parametrize(
    ("presets", "flags"),
    [
        (["st-nano", "t5-nano"], ["--dispatch", "dropless"]),
        (["t5-nano"], ["--mesh", "data=8", "--remat", "full"]),
    ],
)
def test_step_stands_beside_its_dense_twin(presets, flags, capsys):
    flags = ["--batch", 8, "--input-length", 16, "--target-length", 8, "--repeats", 2, *flags]
    rows = rows_of(capsys, "step", "--preset", presets[0], *flags)
    assert [row["preset"] for row in rows] == presets and rows[-1]["ratio_to_dense"] == 1
    for row in rows:
        assert row["devices"] == (8 if "--mesh" in flags else 1)
        assert row["recompilations"] == 0 and row["compile_seconds"] > 0
        # tokens / s = tokens / ms
        assert row["tokens_per_second"] * row["ms"] == pytest.approx(8 * 24 * 1000, rel=0.01)
        flops = mk.preset(row["preset"]).flops_per_token()
        flops = 3 * 8 * (16 * flops[0] + 8 * flops[1])
        assert row["model_gflops_per_second"] == pytest.approx(flops / row["ms"] / 1e6, abs=0.1)


def test_ours_drops_nothing_at_the_peers_work():
    work = Work(
        num_experts=4,
        batch=2,
        input_length=16,
        target_length=8,
        d_model=64,
        d_ff=32,
        vocab_size=128,
        threads=1,
    )
    config = our_config(work)
    functions, dropped = our_functions(work)
    loss, _ = functions["forward"]()
    (again, _), gradient = functions["forward + backward"]()
    assert dropped == 0 and config.moe_layers("decoder") == 2
    np.testing.assert_allclose(loss, again, rtol=1e-5)
    assert max(abs(g).max() for g in jax.tree.leaves(gradient)) > 0


def test_generation_does_equal_work_on_both_sides(capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    sizes = ["--experts", 4, "--d-model", 64, "--d-ff", 32, "--vocab-size", 128]
    work = ["--batch", 2, "--input-length", 12, "--new-tokens", 5, "--repeats", 1]
    options = ["--question-length", 70, "--options", 3, "--option-length", 4]
    rows = rows_of(capsys, "generation", *sizes, *work, *options)
    assert [row["task"] for row in rows] == ["generate", "rank"]
    for row in rows:
        assert row["model"] == "switch" and row["experts"] == 4
        counted = 2 * 5 if row["task"] == "generate" else 2
        assert row["ours_count"] == row["peer_count"] == counted
        ratio = row["ours_per_second"] / row["peer_per_second"]
        assert row["speedup"] == pytest.approx(ratio, rel=0.02)


def test_we_generate_every_token_that_is_timed():
    work = decoding_work(
        num_experts=4,
        batch=2,
        input_length=12,
        new_tokens=5,
        question_length=20,
        num_options=3,
        option_length=4,
        d_model=64,
        d_ff=32,
        vocab_size=128,
    )
    functions, num_generated = our_decoding(work)
    assert num_generated == 2 * 5
    found = functions["rank"]()
    assert [[option.tokens for option in each] for each in found] == [[4] * 3] * 2


@pytest.mark.parametrize("benchmark", ["peers", "generation"])
def test_without_torch_one_line_names_the_extra(benchmark, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["bench", benchmark]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and 'pip install -e ".[parity]"' in error
    assert f"bench {benchmark} " in error
