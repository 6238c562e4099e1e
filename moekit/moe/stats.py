"""What a layer's router did: statistics, the losses made of them, and the routing of each token.

Statistics are sums, which add across groups and devices; ratios are taken at the end.
G groups, S tokens in a group, E experts, K choices per token.
"""

from dataclasses import dataclass, replace
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from moekit.moe.routing import Routing
from moekit.sharding import is_variable


@no_type_check  # a pytree: see Routing
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerStats:
    """Sums over the real tokens of a batch, all float32; a model stacks one row per MoE layer."""

    tokens: Float[Array, ""]
    load: Float[Array, "E"]  # choices of each expert
    kept: Float[Array, "E"]  # of these, the ones that found a slot
    z_sum: Float[Array, ""]  # squared logsumexp of the logits
    dropped_tokens: Float[Array, ""]  # tokens that no expert processed
    dropped_assignments: Float[Array, ""]  # choices that found no slot
    balance_sum: Float[Array, ""]  # balance loss of each group with real tokens
    groups: Float[Array, ""]  # groups with real tokens

    def balance_loss(self) -> Float[Array, "..."]:
        """Mean over groups of E sum_e f_e P_e (Fedus 2021); equals k when balanced.

        f_e is the share of a group's tokens that chose expert e, P_e its mean probability.
        """
        return self.balance_sum / jnp.maximum(self.groups, 1)

    def router_z_loss(self) -> Float[Array, "..."]:
        """Mean over tokens of logsumexp(logits)^2 (Zoph 2022)."""
        return self.z_sum / jnp.maximum(self.tokens, 1)


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRouting:
    """The routing of each token, shaped like the layer's input; -1 means no choice or padding."""

    expert: Int[Array, "*B K"]
    weight: Float[Array, "*B K"]
    kept: Bool[Array, "*B K"]
    entropy: Float[Array, "*B"]  # of the router's probabilities, nats


class RouterBias(nnx.Variable):
    """Per-expert bias of an auxiliary-loss-free router: state without a gradient."""


def without_padding(routing: Routing, mask: Bool[Array, "G S"], num_experts: int) -> Routing:
    """A routing of groups without the choices of padding."""
    is_real = mask[..., None]
    no_slot = num_experts * routing.capacity
    return replace(
        routing,
        expert_index=jnp.where(is_real, routing.expert_index, num_experts),
        combine_weight=jnp.where(is_real, routing.combine_weight, 0.0),
        slot=jnp.where(is_real, routing.slot, no_slot),
    )


def layer_stats(
    logits: Float[Array, "G S E"], mask: Bool[Array, "G S"], routing: Routing
) -> LayerStats:
    """The statistics of a routing of groups."""
    num_experts = logits.shape[-1]
    chosen = routing.expert_index[..., None] == jnp.arange(num_experts)  # [G, S, K, E]
    kept = routing.slot < num_experts * routing.capacity
    load = chosen.sum((0, 1, 2)).astype(jnp.float32)
    kept_load = (chosen & kept[..., None]).sum((0, 1, 2)).astype(jnp.float32)
    squared_logsumexp = jax.nn.logsumexp(logits, axis=-1) ** 2

    group_tokens = mask.sum(1).astype(jnp.float32)
    balance_choices = chosen[:, :, : routing.balance_choices]
    chosen_sum = balance_choices.sum((1, 2)).astype(jnp.float32)  # [G, E]
    prob_sum = jnp.sum(routing.probs * mask[..., None], 1)
    at_least_one = jnp.maximum(group_tokens, 1)[:, None]
    share, mean_prob = chosen_sum / at_least_one, prob_sum / at_least_one
    balance = num_experts * jnp.sum(share * mean_prob, -1)

    return LayerStats(
        tokens=group_tokens.sum(),
        load=load,
        kept=kept_load,
        z_sum=jnp.sum(jnp.where(mask, squared_logsumexp, 0.0)),
        dropped_tokens=jnp.sum(mask & ~kept.any(-1)).astype(jnp.float32),
        dropped_assignments=load.sum() - kept_load.sum(),
        balance_sum=balance.sum(),
        groups=jnp.sum(group_tokens > 0).astype(jnp.float32),
    )


def token_routing(routing: Routing, num_experts: int, shape: tuple[int, int]) -> TokenRouting:
    """A routing of groups as one of a batch of that shape [B, L]."""
    num_tokens = shape[0] * shape[1]

    def per_token(x: Shaped[Array, "G S *K"]) -> Shaped[Array, "B L *K"]:
        flat = x.reshape(-1, *x.shape[2:])
        return flat[:num_tokens].reshape(*shape, *flat.shape[1:])

    no_expert = routing.expert_index >= num_experts
    entropy = -jnp.sum(jax.scipy.special.xlogy(routing.probs, routing.probs), -1)
    return TokenRouting(
        expert=per_token(jnp.where(no_expert, -1, routing.expert_index)),
        weight=per_token(routing.combine_weight),
        kept=per_token(routing.slot < num_experts * routing.capacity),
        entropy=per_token(entropy),
    )


def update_router_bias(state: nnx.State, stats: dict[str, LayerStats]) -> nnx.State:
    """Add rate * sign(mean load - load) to every `RouterBias` (Wang 2024).

    Args:
      state: any model state; its biases `[layers, E]` are inside the stack that they belong to
        ("encoder" or "decoder"). Other variables are returned unchanged.
      stats: the same step's statistics of each stack.
    """

    def update(path: tuple[Any, ...], variable: Any) -> Any:
        if not isinstance(variable, RouterBias):
            return variable
        load = stats[path[0].key].load
        direction = jnp.sign(load.mean(-1, keepdims=True) - load)
        return variable.replace(variable[...] + variable.rate * direction)

    return jax.tree_util.tree_map_with_path(update, state, is_leaf=is_variable)
