"""FLOPs by formula: what a step multiplies, to hold against what the compiler counts."""

import math

from moekit.config import ModelConfig
from moekit.moe.capacity import slots_per_expert


def forward_flops(
    cfg: ModelConfig, rows: int, length: int, target_length: int, shards: int = 1
) -> dict[str, float]:
    """FLOPs of all products of a forward pass: in the stacks, in the output head, and ("last") in
    the products that end a layer.

    Unlike `ModelConfig.flops_per_token` it counts attention scores, the router's logits and the
    experts' slots, filled or not; `shards` are the devices that split the rows.
    """
    inner, d = cfg.num_heads * cfg.head_dim, cfg.d_model
    sources, targets = rows * length, rows * target_length
    stacks = last = 0.0
    for stack, tokens, own in (
        ("encoder", sources, length),
        ("decoder", targets, target_length),
    ):
        layers, sparse = getattr(cfg, f"{stack}_layers"), cfg.moe_layers(stack)
        stacks += layers * tokens * (8 * d * inner + 4 * own * inner)
        if stack == "decoder":
            stacks += layers * (4 * d * inner * (targets + sources) + 4 * length * inner * targets)
        stacks += (layers - sparse) * tokens * 2 * cfg.ffn_parameters(cfg.d_ff)
        extra = cfg.extra_d_ff or 0
        stacks += sparse * tokens * 2 * (d * cfg.num_experts + cfg.ffn_parameters(extra))
        slots = expert_slots(cfg, stack, tokens // shards) * shards if sparse else 0
        stacks += sparse * slots * 2 * cfg.ffn_parameters(cfg.expert_d_ff or cfg.d_ff)
        last += 2 * tokens * d * ((layers - sparse) * cfg.d_ff + sparse * extra)
    return {"stacks": stacks, "head": 2.0 * targets * d * cfg.vocab_size, "last": last}


def expert_slots(cfg: ModelConfig, stack: str, tokens: int) -> int:
    """Slots of all experts for a device's tokens in training; dropless: their choices."""
    if cfg.dispatch == "dropless":
        return tokens * cfg.stack_router(stack).num_choices
    groups = math.ceil(tokens / cfg.group_size)
    router = cfg.stack_router(stack)
    choices = (getattr(router, "num_choices", 1) or 1) if cfg.capacity_counts_k else 1
    slots = slots_per_expert(
        math.ceil(tokens / groups),
        cfg.num_experts,
        cfg.capacity_factor,
        choices=choices,
        minimum=cfg.min_capacity,
    )
    return groups * cfg.num_experts * slots


def step_flops(
    cfg: ModelConfig, rows: int, length: int, target_length: int, *, remat: str, shards: int = 1
) -> float:
    """FLOPs of all products of a training step, with what "full" remat computes again: every layer
    but its last product, whose result nothing asks for. ("dots" repeats only attention scores and
    experts, which this leaves out.)"""
    flops = forward_flops(cfg, rows, length, target_length, shards)
    again = flops["stacks"] - flops["last"] if remat == "full" else 0.0
    return 3 * (flops["stacks"] + flops["head"]) + again
