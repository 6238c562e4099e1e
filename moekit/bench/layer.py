"""An MoE layer beside the dense layer of equal FLOPs, interleaved in one run.

D d_model, F d_ff, E experts, K choices per token, C capacity, S tokens.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moekit.bench.timing import interleaved_times, median_ratio, min_ratio
from moekit.model.layers import FFN
from moekit.moe.capacity import slots_per_expert
from moekit.moe.layer import MoE
from moekit.moe.routing import TopK
from moekit.progress import ProgressBar

DENSE = "dense"
SHAPES = ((8, 1), (32, 2))  # experts, choices per token


class EinsumMoE(nnx.Module):
    """The one-hot dispatch of Mesh-TensorFlow and flaxformer, as a baseline.

    It shares an `MoE`'s parameters and multiplies tokens with a one-hot tensor [S, E * C].
    """

    def __init__(self, moe: MoE, router: TopK, capacity_factor: float):
        self.moe = moe
        self.route = router
        self.capacity_factor = capacity_factor

    def __call__(self, x: Float[Array, "S D"]) -> Float[Array, "S D"]:
        logits = self.moe.router(x)
        num_tokens, num_experts = logits.shape
        capacity = slots_per_expert(
            num_tokens, num_experts, self.capacity_factor, choices=self.route.k, minimum=1
        )
        mask = jnp.ones(num_tokens, bool)
        routing = self.route(logits, mask, capacity=capacity)
        slot_onehot = jax.nn.one_hot(routing.slot, num_experts * capacity, dtype=x.dtype)
        dispatch = slot_onehot.sum(1)
        combine = jnp.einsum("sk,skc->sc", routing.combine_weight, slot_onehot)
        slots = jnp.einsum("sc,sd->cd", dispatch, x)
        outputs = self.moe.experts(slots.reshape(num_experts, capacity, -1))
        return jnp.einsum("sc,cd->sd", combine, outputs.reshape(num_experts * capacity, -1))


def layer(
    *,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    tokens: int = 4096,
    d_model: int = 256,
    d_ff: int = 704,
    capacity_factor: float = 1.25,
    repeats: int = 15,
) -> list[dict[str, Any]]:
    """Time forward + backward of one layer in float32.

    Variants: "dense" (an FFN of equal active FLOPs, d_ff * k wide), "capacity" (our gathers),
    "dropless" (our blocks) and "einsum" (one-hot products). Capacity counts k, so that all variants
    drop the same share of tokens.

    Args:
      shapes: pairs of experts and choices per token.
      tokens: tokens of the batch.
      d_model: features of a token.
      d_ff: hidden features of an expert.
      capacity_factor: slots per expert over the balanced load.
      repeats: timed calls of each variant.

    Raises:
      ValueError: a size below 1.
    """
    _check_sizes(tokens=tokens, d_model=d_model, d_ff=d_ff, repeats=repeats)
    rows = []
    for num_experts, num_choices in ProgressBar(shapes, desc="bench layer", unit="shape"):
        functions = _variants(num_experts, num_choices, tokens, d_model, d_ff, capacity_factor)
        times = interleaved_times(functions, repeats)
        for variant, milliseconds in times.items():
            rows.append(
                {
                    "experts": num_experts,
                    "k": num_choices,
                    "tokens": tokens,
                    "d_model": d_model,
                    "d_ff": d_ff,
                    "variant": variant,
                    "ms": round(statistics.median(milliseconds), 3),
                    "min_ms": round(min(milliseconds), 3),
                    "ratio_to_dense": median_ratio(milliseconds, times[DENSE]),
                    "min_ratio_to_dense": min_ratio(milliseconds, times[DENSE]),
                }
            )
    return rows


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; use 1 or more")


def _variants(
    num_experts: int,
    num_choices: int,
    num_tokens: int,
    d_model: int,
    d_ff: int,
    capacity_factor: float,
) -> dict[str, Callable[[], object]]:
    """Compiled functions that run forward + backward of each variant."""
    router = TopK(k=num_choices)

    def moe(dispatch: str) -> MoE:
        return MoE(
            d_model,
            d_ff,
            num_experts,
            router=router,
            capacity_factor=capacity_factor,
            capacity_counts_k=True,
            dispatch=dispatch,
            rngs=nnx.Rngs(0),
        )

    modules = {
        DENSE: FFN(d_model, d_ff * num_choices, rngs=nnx.Rngs(0)),
        "capacity": moe("capacity"),
        "dropless": moe("dropless"),
        "einsum": EinsumMoE(moe("capacity"), router, capacity_factor),
    }
    x = jax.random.normal(jax.random.key(0), (num_tokens, d_model))
    functions = {}
    for name, module in modules.items():
        # modules of the encoder-decoder expect a batch dimension
        is_batched = name != "einsum"
        functions[name] = _forward_backward(module, x[None] if is_batched else x)
    return functions


def _forward_backward(module: nnx.Module, x: Float[Array, "*B D"]) -> Callable[[], object]:
    """Gradients of a module's parameters and input, compiled."""
    graphdef, state = nnx.split(module)
    # a random cotangent: XLA could simplify the backward products of a constant one
    cotangent = jax.random.normal(jax.random.key(1), x.shape)

    def loss(state: nnx.State, x: Float[Array, "*B D"]) -> Float[Array, ""]:
        output = nnx.merge(graphdef, state)(x)
        y = output[0] if isinstance(output, tuple) else output  # an MoE returns statistics as well
        return jnp.vdot(y, cotangent)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    jax.block_until_ready(gradients(state, x))  # compiles

    def run() -> object:
        return jax.block_until_ready(gradients(state, x))

    return run
