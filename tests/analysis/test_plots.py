"""Figures: every one draws, and the same data gives the same file."""

import dataclasses

import numpy as np

import moekit as mk


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
