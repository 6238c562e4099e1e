"""Figures: every one draws its data, and the same data gives the same file."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moekit as mk
from moekit.analysis.plots import plot_load, plot_plan, save_figure
from moekit.training.metrics import Metrics


@pytest.fixture
def trace(synthetic):
    """24 examples of 40 tokens, two layers, two choices of four experts."""
    generator = np.random.default_rng(1)
    experts = np.tile(np.arange(4), (2, 960, 1))
    trace = synthetic(
        generator.permuted(experts, axis=2)[:, :, :2],
        domains=[f"d{i % 3}" for i in range(24)],
        token=generator.integers(3, 9, 960),
        example=np.repeat(np.arange(24), 40),
    )
    return dataclasses.replace(trace, tasks=tuple(f"t{i % 4}" for i in range(24)))


def test_every_figure_draws_and_is_reproducible(trace, tmp_path):
    draws = {
        "load": lambda: mk.plot_expert_load(trace),
        "domains": lambda: mk.plot_domain_specialization(trace),
        "distance": lambda: mk.plot_domain_distance(trace),
        "tasks": lambda: mk.plot_task_specialization(trace),
        "clusters": lambda: mk.plot_task_specialization(trace, by="cluster"),
        "tokens": lambda: mk.plot_token_specialization(trace, mk.ByteTokenizer()),
        "together": lambda: mk.plot_coactivation(trace),
        "bars": lambda: mk.plot_bars({"x": {"a": 1.0, "b": 2.0}}, "share", "t", ("level", 1.0)),
    }
    for name, draw in draws.items():
        files = [save_figure(draw(), tmp_path / f"{name}{i}.svg") for i in range(2)]
        first, second = [file.read_bytes() for file in files]
        assert first == second and len(first) > 2000


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


def test_bars_are_the_data(trace):
    load = np.array([[0.1, 0.6, 0.3]])
    (axes,) = plot_load({"encoder": load}, "m").axes
    assert heights(axes) == [0.6, 0.3, 0.1]
    bars = mk.plot_bars({"x": {"a": 1.0, "b": 2.0}, "y": {"b": 3.0, "a": 4.0}}, "share", "t")
    assert heights(bars.axes[0]) == [1, 2, 4, 3]
    result = mk.domain_specialization(trace, resamples=5)
    shown = mk.plot_specialization(result, "m").axes
    for layer, axes in enumerate(shown):
        np.testing.assert_allclose(heights(axes), result.share[layer].T.ravel())


def test_scores_and_curves_are_the_data():
    mean = {"score": 0.5, "low": 0.4, "high": 0.7, "chance": 0.25, "majority": 0.3}
    record = {"name": "m on suite", "mean": mean}
    (axes,) = mk.plot_scores({"m": [record], "n": [record]}, "title").axes
    assert heights(axes) == [0.5, 0.5]
    assert axes.get_xticklabels()[0].get_text() == "suite"
    metrics = Metrics(rows=[{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}])
    (axes,) = mk.plot_learning_curves({"run": metrics}, lines=[("entropy", 2.5)]).axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 3], [2, 2]])
    assert axes.lines[1].get_ydata()[0] == 2.5


def test_mixtures_and_batches_are_the_data():
    (axes,) = mk.plot_rates(mk.flan_mixture({"addition": 3.0, "parity": 1.0})).axes
    assert sum(bar.get_width() for bar in axes.patches) == pytest.approx(1)
    prompts = [mk.Prompt("abc", "d")]
    batch = mk.pad_prompts(prompts, mk.ByteTokenizer(), input_length=8, target_length=4)
    assert [axes.get_title() for axes in mk.plot_packing(batch).axes] == [
        *("inputs: 50% of positions used", "targets: 50% of positions used")
    ]


def test_a_routing_shows_slots_and_drops():
    logits = jnp.array([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    routing = mk.Switch()(logits, jnp.ones(4, bool), capacity=2)
    axes = mk.plot_routing({"switch": routing}).axes[0]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "0", (0, 1): "1", (0, 2): "x", (1, 3): "0"}


def test_a_sharded_parameter_shows_the_devices_of_each_part():
    layer = mk.MoE(8, 16, 4, rngs=nnx.Rngs(0), mesh=mk.make_mesh(expert=4, model=2))
    axes = mk.plot_sharding({"wi": layer.experts.wi_edf}).axes[0]
    devices = [int(i) for text in axes.texts for i in text.get_text().split(", ")]
    assert sorted(devices) == list(range(8))


def test_a_plan_shows_memory_time_and_collectives():
    figure = plot_plan(
        title="st-nano",
        memory_gib={"parameters": 3.0, "temporaries": 2.0},
        memory_limit_gib=16.0,
        seconds={"compute": 0.5},
        step_seconds=[0.5, 0.7],
        collectives=[{"op": "all-to-all", "axis": "expert", "bytes": 2e9}],
    )
    memory, seconds, sent = figure.axes
    assert heights(memory) == [3, 2] and heights(seconds) == [0.5]
    assert [bar.get_width() for bar in sent.patches] == [2]
