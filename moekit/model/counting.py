"""FLOPs of all matrix products of a step by formula, to compare with what the compiler counts.

Counts are per step of the whole batch, over all devices.
"""

import math
from typing import NamedTuple

from moekit.config import ModelConfig
from moekit.moe.capacity import slots_per_expert


class ForwardFlops(NamedTuple):
    """FLOPs of the products of a forward pass."""

    stacks: float  # encoder and decoder
    head: float  # output logits
    last: float  # part of `stacks`: the last product of each layer, which remat need not repeat


def forward_flops(
    cfg: ModelConfig,
    rows: int,
    length: int,
    target_length: int,
    shards: int = 1,
) -> ForwardFlops:
    """FLOPs of the products of a forward pass over `rows` inputs and targets.

    Unlike `ModelConfig.flops_per_token` this includes attention scores, router logits and empty
    expert slots.

    Args:
      length, target_length: tokens of an input and of a target, with padding.
      shards: devices over which the batch is sharded; each routes its own tokens.
    """
    sources = rows * length
    targets = rows * target_length
    encoder = (
        cfg.encoder_layers * _self_attention_flops(cfg, sources, length)
        + _dense_ffn_flops(cfg, "encoder", sources)
        + _sparse_ffn_flops(cfg, "encoder", sources, length, shards)
    )
    decoder = (
        cfg.decoder_layers * _self_attention_flops(cfg, targets, target_length)
        + cfg.decoder_layers * _cross_attention_flops(cfg, targets, sources, length)
        + _dense_ffn_flops(cfg, "decoder", targets)
        + _sparse_ffn_flops(cfg, "decoder", targets, target_length, shards)
    )
    last = _last_product_flops(cfg, "encoder", sources)
    last += _last_product_flops(cfg, "decoder", targets)
    head = 2.0 * targets * cfg.d_model * cfg.vocab_size
    stacks = float(encoder + decoder)
    return ForwardFlops(stacks, head, float(last))


def _self_attention_flops(cfg: ModelConfig, tokens: int, length: int) -> int:
    inner = cfg.num_heads * cfg.head_dim
    projections = 4 * 2 * cfg.d_model * inner  # query, key, value, output
    scores_and_values = 2 * 2 * length * inner
    return tokens * (projections + scores_and_values)


def _cross_attention_flops(cfg: ModelConfig, targets: int, sources: int, length: int) -> int:
    inner = cfg.num_heads * cfg.head_dim
    query_and_output = targets * 2 * 2 * cfg.d_model * inner
    key_and_value = sources * 2 * 2 * cfg.d_model * inner
    scores_and_values = targets * 2 * 2 * length * inner
    return query_and_output + key_and_value + scores_and_values


def _dense_layers(cfg: ModelConfig, stack: str) -> int:
    num_layers = cfg.num_layers(stack)
    return num_layers - cfg.moe_layers(stack)


def _dense_ffn_flops(cfg: ModelConfig, stack: str, tokens: int) -> int:
    parameters = cfg.ffn_parameters(cfg.d_ff)
    return _dense_layers(cfg, stack) * tokens * 2 * parameters


def _sparse_ffn_flops(
    cfg: ModelConfig,
    stack: str,
    tokens: int,
    length: int,
    shards: int,
) -> int:
    num_sparse = cfg.moe_layers(stack)
    if not num_sparse:
        return 0
    router = tokens * 2 * cfg.d_model * cfg.num_experts
    extra_d_ff = cfg.extra_d_ff or 0
    extra = tokens * 2 * cfg.ffn_parameters(extra_d_ff)
    slots = shards * expert_slots(cfg, stack, tokens // shards, length)
    expert_d_ff = cfg.expert_d_ff or cfg.d_ff
    experts = slots * 2 * cfg.ffn_parameters(expert_d_ff)
    return num_sparse * (router + extra + experts)


def _last_product_flops(cfg: ModelConfig, stack: str, tokens: int) -> int:
    dense = _dense_layers(cfg, stack) * cfg.d_ff
    sparse = cfg.moe_layers(stack) * (cfg.extra_d_ff or 0)
    return 2 * tokens * cfg.d_model * (dense + sparse)


def expert_slots(cfg: ModelConfig, stack: str, tokens: int, length: int) -> int:
    """Slots of all experts for one device's tokens in training; without slots (dropless): their
    choices. A row has `length` tokens."""
    router = cfg.stack_router(stack)
    if cfg.dispatch == "dropless":
        return tokens * router.num_choices
    if cfg.expert_capacity is not None:
        slots = min(cfg.expert_capacity, length)
        return tokens // length * cfg.num_experts * slots
    num_groups = math.ceil(tokens / cfg.group_size)
    choices = 1
    if cfg.capacity_counts_k:
        choices = getattr(router, "num_choices", 1) or 1
    slots = slots_per_expert(
        math.ceil(tokens / num_groups),
        cfg.num_experts,
        cfg.capacity_factor,
        choices=choices,
        minimum=cfg.min_capacity,
    )
    return num_groups * cfg.num_experts * slots


def step_flops(
    cfg: ModelConfig,
    rows: int,
    length: int,
    target_length: int,
    *,
    remat: str,
    shards: int = 1,
) -> float:
    """FLOPs of the products of a training step, with those that remat "full" computes again.

    "full" repeats every layer except its last product, whose result the backward pass does not
    need. "dots" repeats only attention scores and experts, which are not added here.
    """
    forward = forward_flops(cfg, rows, length, target_length, shards)
    repeated = 0.0
    if remat == "full":
        repeated = forward.stacks - forward.last
    return 3 * (forward.stacks + forward.head) + repeated
