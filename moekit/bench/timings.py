"""Timings of a layer and of a whole step against their dense twins, interleaved in one run.

B batch, L length, D d_model, F d_ff, E experts, K choices per token, S tokens.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
from tqdm import tqdm

from moekit import config as configs
from moekit.config import ModelConfig, TrainConfig
from moekit.data.batch import Batch
from moekit.model.layers import FFN
from moekit.model.transformer import EncoderDecoder
from moekit.moe.layer import MoE
from moekit.moe.parallel import Place
from moekit.moe.routing import TopK
from moekit.sharding import shard_batch
from moekit.training.step import compiled_step

SHAPES = ((8, 1), (32, 2))  # experts, choices


class EinsumMoE(MoE):
    """The one-hot transport of Mesh-TensorFlow and flaxformer, as the peer to compare with."""

    def __call__(self, x, mask=None, *, key=None, token_ids=None, drop=True):
        b, length, d = x.shape
        mask = jnp.ones((b, length), bool) if mask is None else mask
        logits, group_mask, ids = self._grouped(x, mask, token_ids)
        routing = self._route(logits, group_mask, ids, key, drop, Place())
        slots = self.num_experts * routing.capacity
        onehot = jax.nn.one_hot(routing.slot, slots, dtype=x.dtype)  # [G, S, K, E*C]
        combine = jnp.einsum("gsk,gskc->gsc", routing.combine_weight, onehot)
        grouped = x.reshape(*group_mask.shape, d)
        sent = jnp.einsum("gsd,gsc->cgd", grouped, onehot.sum(2))
        out = self.experts(sent.reshape(self.num_experts, -1, d))
        y = jnp.einsum("cgd,gsc->gsd", out.reshape(slots, -1, d), combine)
        return y.reshape(b, length, d), None, None


def layer(
    *,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    tokens: int = 4096,
    d_model: int = 256,
    d_ff: int = 704,
    capacity_factor: float = 1.25,
    repeats: int = 15,
) -> list[dict]:
    """Median and least milliseconds of forward + backward of one layer, float32.

    Variants: "dense" (the FFN of equal active FLOPs, d_ff * k wide), "capacity" (ours, by gathers),
    "dropless" (ours, by blocks), "einsum" (one-hot products). Capacity counts k, so that equal
    shares of tokens are dropped.
    """
    rows = []
    for experts, k in tqdm(shapes, desc="bench layer", unit="shape"):
        steps = _steps(experts, k, tokens, d_model, d_ff, capacity_factor)
        times = interleaved(steps, repeats)
        floor = times["dense"]
        for variant, ms in times.items():
            rows.append(
                {
                    "experts": experts,
                    "k": k,
                    "tokens": tokens,
                    "d_model": d_model,
                    "d_ff": d_ff,
                    "variant": variant,
                    "ms": round(statistics.median(ms), 3),
                    "min_ms": round(min(ms), 3),
                    "ratio_to_dense": ratio(ms, floor),
                    "min_ratio_to_dense": ratio(ms, floor, min),
                }
            )
    return rows


def _steps(experts, k, tokens, d_model, d_ff, capacity_factor) -> dict[str, Callable]:
    x = jax.random.normal(jax.random.key(0), (1, tokens, d_model))
    options = {"router": TopK(k=k), "capacity_factor": capacity_factor, "capacity_counts_k": True}
    modules = {
        "dense": FFN(d_model, d_ff * k, rngs=nnx.Rngs(0)),
        "capacity": MoE(d_model, d_ff, experts, rngs=nnx.Rngs(0), **options),
        "dropless": MoE(d_model, d_ff, experts, rngs=nnx.Rngs(0), dispatch="dropless", **options),
        "einsum": EinsumMoE(d_model, d_ff, experts, rngs=nnx.Rngs(0), **options),
    }
    return {name: _step(module, x) for name, module in modules.items()}


def _step(module: nnx.Module, x: Float[Array, "1 S D"]) -> Callable:
    """A compiled forward + backward over parameters and input."""
    graphdef, state = nnx.split(module)
    # a random cotangent: with a constant one XLA could simplify the backward products
    cotangent = jax.random.normal(jax.random.key(1), x.shape)

    def loss(state, x):
        y = nnx.merge(graphdef, state)(x)
        return jnp.vdot(y[0] if isinstance(y, tuple) else y, cotangent)

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    jax.block_until_ready(step(state, x))
    return lambda: jax.block_until_ready(step(state, x))


def interleaved(steps: dict[Any, Callable], repeats: int) -> dict[Any, list[float]]:
    """All times of each step in ms; one of each in turn, so that noise hits all alike."""
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(ours: list[float], others: list[float], of: Callable = statistics.median) -> float:
    """How much of the others' time ours take, of the medians or other statistics."""
    return round(of(ours) / of(others), 3)


def step(
    *,
    preset: str = "st-mini",
    batch: int = 8,
    input_length: int = 256,
    target_length: int = 64,
    mesh: Mesh | None = None,
    remat: str = "none",
    dispatch: str = "capacity",
    repeats: int = 9,
) -> list[dict]:
    """A whole training step of a preset, its dense twin (t5 of the same size, where there is one)
    and a plain product, on the devices there are.

    Tokens are random and none is padding. FLOPs are the model's (6 a matrix parameter and token, as
    in `moekit plan`), and `mfu` their rate over that of the product. `recompilations` counts
    programs compiled after the first step.
    """
    cfg = configs.preset(preset)
    if cfg.num_experts:
        cfg = cfg.replace(dispatch=dispatch)
    twin = f"t5-{preset.partition('-')[2]}"
    models = [cfg]
    if twin in configs.PRESETS and twin != preset:
        models.append(configs.preset(twin))
    tokens = batch * (input_length + target_length)
    config = TrainConfig(
        batch_tokens=tokens, input_length=input_length, target_length=target_length, remat=remat
    )
    runs = {model.name: _Run(model, config, batch, mesh) for model in models}
    devices = 1 if mesh is None else mesh.size
    flops, multiply = _plain_product(jnp.dtype(cfg.dtype))
    times = interleaved({**{name: run.step for name, run in runs.items()}, "": multiply}, repeats)
    # virtual devices share one processor
    peak = flops / min(times.pop("")) * (1 if jax.default_backend() == "cpu" else devices)
    rows = []
    for model in models:
        ms = times[model.name]
        encoder, decoder = model.flops_per_token()
        rate = 3 * batch * (encoder * input_length + decoder * target_length)
        rate /= statistics.median(ms)
        rows.append(
            {
                "preset": model.name,
                "dispatch": model.dispatch if model.num_experts else "",
                "batch": batch,
                "input_length": input_length,
                "target_length": target_length,
                "devices": devices,
                "remat": remat,
                "ms": round(statistics.median(ms), 3),
                "min_ms": round(min(ms), 3),
                "tokens_per_second": round(1e3 * tokens / statistics.median(ms)),
                "model_gflops_per_second": round(rate / 1e6, 1),
                "mfu": round(rate / peak, 3),
                "compile_seconds": round(runs[model.name].first - statistics.median(ms) / 1e3, 2),
                "recompilations": runs[model.name].recompilations(),
                "ratio_to_dense": ratio(ms, times[models[-1].name]),
            }
        )
    return rows


class _Run:
    """A model in training on one batch: `step` is one more update."""

    def __init__(self, cfg: ModelConfig, config: TrainConfig, rows: int, mesh: Mesh | None):
        model = EncoderDecoder(cfg, mesh=mesh)
        compiled = compiled_step(model, config)
        _, params, rest = nnx.split(model, nnx.Param, ...)
        self.update, self.key = compiled.update, jax.random.key(0)
        self.state = (params, rest, compiled.start(params))
        lengths = (config.input_length, config.target_length)
        self.batch = shard_batch(full_batch(rows, *lengths, cfg.vocab_size), mesh)
        before, start = self.update._cache_size(), time.perf_counter()
        self.step()
        self.first, self.programs = time.perf_counter() - start, max(1, before)

    def step(self):
        *self.state, report = self.update(*self.state, self.batch, self.key)
        jax.block_until_ready(report)

    def recompilations(self) -> int:
        return self.update._cache_size() - self.programs


def full_batch(rows: int, length: int, target_length: int, vocab_size: int) -> Batch:
    """Random tokens, one example a row, no padding."""
    rng = np.random.default_rng(0)

    def side(length):
        ones = np.ones((rows, length), np.int32)
        return rng.integers(2, vocab_size, ones.shape, np.int32), ones, ones.cumsum(1) - ones

    inputs, targets = side(length), side(target_length)
    return Batch(
        *(jnp.asarray(x, jnp.int32) for x in (*inputs, *targets)), jnp.ones((rows, target_length))
    )


def _plain_product(dtype) -> tuple[float, Callable]:
    """FLOPs of a square product, and a function that computes it."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    return 2.0 * size**3, lambda: multiply(x, x).block_until_ready()
