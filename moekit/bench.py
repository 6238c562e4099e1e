"""Timings against the dense floor, all variants interleaved in one run.

D d_model, F d_ff, E experts, K choices per token, S tokens.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from tqdm import tqdm

from moekit.model.transformer import FFN
from moekit.moe.layer import MoE
from moekit.moe.parallel import Place
from moekit.moe.routing import TopK

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
    """Median milliseconds of forward + backward of one layer, float32.

    Variants: "dense" (the FFN of equal active FLOPs, d_ff * k wide), "capacity" (ours, by gathers),
    "dropless" (ours, by blocks), "einsum" (one-hot products). Capacity counts k, so that equal
    shares of tokens are dropped.
    """
    rows = []
    for experts, k in tqdm(shapes, desc="bench layer", unit="shape"):
        steps = _steps(experts, k, tokens, d_model, d_ff, capacity_factor)
        times = _interleaved(steps, repeats)
        for variant, ms in times.items():
            rows.append(
                {
                    "experts": experts,
                    "k": k,
                    "tokens": tokens,
                    "d_model": d_model,
                    "d_ff": d_ff,
                    "variant": variant,
                    "ms": round(ms, 3),
                    "ratio_to_dense": round(ms / times["dense"], 3),
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


def _interleaved(steps: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median ms of each step; one of each in turn, so that noise hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}
