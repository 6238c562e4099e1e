"""A whole training step beside its dense twin and a plain matmul, interleaved in one run."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from moekit import presets
from moekit.bench.timing import full_batch, interleaved_times, median_ratio
from moekit.config import ModelConfig, TrainConfig
from moekit.model.transformer import EncoderDecoder
from moekit.sharding import shard_batch
from moekit.training.step import compiled_step

MATMUL = "matmul"  # the name of the plain product among the timed functions


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
) -> list[dict[str, Any]]:
    """Time a training step of a preset beside its dense twin (t5 of the same size).

    Tokens are random and none is padding. FLOPs are the model's (6 per matrix parameter and token,
    as in `moekit plan`); `mfu` is their rate over that of a plain matmul on the same devices.
    `recompilations` counts programs that were compiled after the first step.

    Args:
      preset: name of the model's preset.
      batch: rows per step.
      input_length: tokens of an input.
      target_length: tokens of a target.
      mesh: mesh of devices; default one device.
      remat: rematerialization policy, see `TrainConfig`.
      dispatch: "capacity" or "dropless", of a sparse preset.
      repeats: timed steps of each model.
    """
    models = _models(preset, dispatch)
    num_tokens = batch * (input_length + target_length)
    train = TrainConfig(
        batch_tokens=num_tokens,
        input_length=input_length,
        target_length=target_length,
        remat=remat,
    )
    runs = {cfg.name: _TrainingRun(cfg, train, batch, mesh) for cfg in models}
    matmul_flops, matmul = _plain_matmul(models[0].dtype)
    functions = {name: run.step for name, run in runs.items()}
    times = interleaved_times({**functions, MATMUL: matmul}, repeats)
    num_devices = 1 if mesh is None else mesh.size
    peak_flops_per_ms = matmul_flops / min(times[MATMUL])
    if jax.default_backend() != "cpu":  # virtual devices share one processor
        peak_flops_per_ms *= num_devices
    baseline = times[models[-1].name]
    rows = []
    for cfg in models:
        milliseconds = times[cfg.name]
        median_ms = statistics.median(milliseconds)
        encoder_flops, decoder_flops = cfg.flops_per_token()
        forward_flops = encoder_flops * input_length + decoder_flops * target_length
        flops_per_ms = 3 * batch * forward_flops / median_ms
        first_step_seconds = runs[cfg.name].first_step_seconds
        rows.append(
            {
                "preset": cfg.name,
                "dispatch": cfg.dispatch if cfg.num_experts else "",
                "batch": batch,
                "input_length": input_length,
                "target_length": target_length,
                "devices": num_devices,
                "remat": remat,
                "ms": round(median_ms, 3),
                "min_ms": round(min(milliseconds), 3),
                "tokens_per_second": round(1e3 * num_tokens / median_ms),
                "model_gflops_per_second": round(flops_per_ms / 1e6, 1),
                "mfu": round(flops_per_ms / peak_flops_per_ms, 3),
                "compile_seconds": round(first_step_seconds - median_ms / 1e3, 2),
                "recompilations": runs[cfg.name].recompilations(),
                "ratio_to_dense": median_ratio(milliseconds, baseline),
            }
        )
    return rows


def _models(preset: str, dispatch: str) -> list[ModelConfig]:
    """The preset and, if it has one, its dense twin."""
    cfg = presets.preset(preset)
    if cfg.num_experts:
        cfg = cfg.replace(dispatch=dispatch)
    size = preset.partition("-")[2]
    twin = f"t5-{size}"
    if twin == preset or twin not in presets.PRESETS:
        return [cfg]
    return [cfg, presets.preset(twin)]


class _TrainingRun:
    """A model in training on one batch: `step` is one more update."""

    def __init__(self, cfg: ModelConfig, train: TrainConfig, batch: int, mesh: Mesh | None):
        model = EncoderDecoder(cfg, mesh=mesh)
        compiled = compiled_step(model, train)
        _, params, rest = nnx.split(model, nnx.Param, ...)
        self.update = compiled.update
        self.state = compiled.start(params, rest, seed=0)
        tokens = full_batch(batch, train.input_length, train.target_length, cfg.vocab_size)
        self.batch = shard_batch(tokens, mesh)
        programs_before = self.update._cache_size()
        start = time.perf_counter()
        self.step()
        self.first_step_seconds = time.perf_counter() - start
        self.first_programs = max(1, programs_before)

    def step(self) -> None:
        self.state, report = self.update(self.state, self.batch)
        jax.block_until_ready(report)

    def recompilations(self) -> int:
        return self.update._cache_size() - self.first_programs


def _plain_matmul(dtype: DTypeLike) -> tuple[float, Callable[[], object]]:
    """FLOPs of a square matmul, and a function that computes it."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()  # compiles

    def run() -> object:
        return multiply(x, x).block_until_ready()

    return 2.0 * size**3, run
