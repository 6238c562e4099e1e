"""A stack of T5 layers, some of them with MoE, scanned over repeated blocks.

B batch, L query length, M encoder length, D d_model. A stack repeats a block of
`layers / sparse layers` layers (one when dense), one of which is sparse: the last, unless the
configuration's `sparse_layer` names another. Every parameter has a leading axis over the blocks,
and `jax.lax.scan` runs over it, so that compile time does not grow with depth.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from moekit.config import ModelConfig
from moekit.model.attention import Attention
from moekit.model.cache import LayerCache
from moekit.model.layers import FFN, RMSNorm, dropout
from moekit.model.relative_bias import Bias, RelativeBias
from moekit.moe.layer import MoE
from moekit.moe.stats import LayerStats, TokenRouting
from moekit.sharding import constrain_batch, platform
from moekit.versions import ModuleList

# rematerialization policies: what the forward pass saves of each layer ("none": everything)
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

Shape = tuple[int, ...]
OptionalKey = Key[Array, ""] | None  # None: deterministic evaluation
Routed = tuple[LayerStats, TokenRouting] | None  # of an MoE layer; None when dense


@no_type_check
@dataclass(frozen=True)
class Context:
    """What all layers of a stack share; `memory`: the encoder states a decoder attends to."""

    mask: Bool[Array, "B L"]  # False at padding
    token_ids: Int[Array, "B L"]
    self_mask: Bool[Array, "B 1 L L"]
    bias: Bias
    memory: Float[Array, "B M D"] | None = None
    cross_mask: Bool[Array, "B 1 L M"] | None = None
    remat: str = "none"


@no_type_check
@dataclass(frozen=True)
class DecodingContext:
    """What all layers share in incremental decoding: S more tokens of W rows of Q questions."""

    mask: Bool[Array, "Q WS"]  # False at padding
    token_ids: Int[Array, "Q WS"]
    self_mask: Bool[Array, "Q 1 WS WT"]
    bias: Float[Array, "N WS WT"]
    cross_mask: Bool[Array, "Q 1 1 L"]
    step: Int[Array, ""]  # position of the first of these tokens


def split_key(key: OptionalKey, count: int) -> Any:
    """jax.random.split, or as many None."""
    if key is None:
        return (None,) * count
    return jax.random.split(key, count)


class Layer(nnx.Module):
    """One pre-norm layer: self-attention, cross-attention (decoder), dense or sparse FFN.

    ST-MoE's sparse layers have an extra dense FFN behind the sparse one (`extra_d_ff`).
    """

    def __init__(
        self,
        cfg: ModelConfig,
        stack_name: str,
        sparse: bool,
        *,
        stack: Shape,
        mesh: Mesh | None,
        rngs: nnx.Rngs,
    ):
        is_decoder = stack_name == "decoder"
        has_extra = sparse and cfg.extra_d_ff
        self.self_norm = _norm(cfg, stack, rngs)
        self.self_attention = _attention(cfg, stack, rngs)
        self.cross_norm = _norm(cfg, stack, rngs) if is_decoder else None
        self.cross_attention = _attention(cfg, stack, rngs) if is_decoder else None
        self.ffn_norm = _norm(cfg, stack, rngs)
        self.ffn = None if sparse else _ffn(cfg, cfg.d_ff, stack, rngs)
        self.moe = _moe(cfg, stack_name, stack, mesh, rngs) if sparse else None
        self.extra_norm = _norm(cfg, stack, rngs) if has_extra else None
        self.extra_ffn = _ffn(cfg, cfg.extra_d_ff, stack, rngs) if has_extra else None
        self.dropout_rate = cfg.dropout

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        key: OptionalKey,
    ) -> tuple[Float[Array, "B L D"], Routed]:
        """The layer applied to whole sequences."""
        self_key, cross_key, ffn_key = split_key(key, 3)
        normed = self.self_norm(x)
        attended = self.self_attention(normed, normed, context.self_mask, context.bias)
        x = x + dropout(attended, self.dropout_rate, self_key)
        if self.cross_attention is not None:
            normed = self.cross_norm(x)
            attended = self.cross_attention(normed, context.memory, context.cross_mask)
            x = x + dropout(attended, self.dropout_rate, cross_key)
        return self.feed_forward(x, context, ffn_key)

    def feed_forward(
        self,
        x: Float[Array, "B L D"],
        context: Context | DecodingContext,
        key: OptionalKey,
        drop: bool = True,
    ) -> tuple[Float[Array, "B L D"], Routed]:
        """The residual branches after attention; `drop=False`: experts have room for all tokens."""
        moe_key, ffn_key, extra_key = split_key(key, 3)
        normed = self.ffn_norm(x)
        if self.moe is None:
            y = self.ffn(normed)
            return x + dropout(y, self.dropout_rate, ffn_key), None
        y, stats, routing = self.moe(
            normed,
            context.mask,
            key=moe_key,
            token_ids=context.token_ids,
            drop=drop,
        )
        x = x + dropout(y, self.dropout_rate, ffn_key)
        if self.extra_ffn is not None:
            normed = self.extra_norm(x)
            y = self.extra_ffn(normed)
            x = x + dropout(y, self.dropout_rate, extra_key)
        return x, (stats, routing)

    def decode(
        self,
        x: Float[Array, "Q WS D"],
        context: DecodingContext,
        cache: LayerCache,
    ) -> tuple[Float[Array, "Q WS D"], LayerCache]:
        """The layer applied to S more tokens of W rows, with the cache of the tokens before."""
        normed = self.self_norm(x)
        keys, values = self.self_attention.keys_values(normed)
        cache = cache.append(keys, values, context.step)
        keys, values = cache.flat_rows()
        x = x + self.self_attention.attend_cached(
            normed, keys, values, context.self_mask, context.bias
        )
        normed = self.cross_norm(x)
        x = x + self.cross_attention.attend_cached(
            normed, cache.memory_keys, cache.memory_values, context.cross_mask
        )
        x, _ = self.feed_forward(x, context, None, drop=False)
        return x, cache


def _norm(cfg: ModelConfig, stack: Shape, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(cfg.d_model, stack=stack, rngs=rngs)


def _attention(cfg: ModelConfig, stack: Shape, rngs: nnx.Rngs) -> Attention:
    return Attention(
        cfg.d_model,
        cfg.num_heads,
        cfg.head_dim,
        dtype=jnp.dtype(cfg.dtype),
        stack=stack,
        rngs=rngs,
    )


def _ffn(cfg: ModelConfig, d_ff: int, stack: Shape, rngs: nnx.Rngs) -> FFN:
    return FFN(
        cfg.d_model,
        d_ff,
        activation=cfg.activation,
        dtype=jnp.dtype(cfg.dtype),
        stack=stack,
        rngs=rngs,
    )


def _moe(
    cfg: ModelConfig,
    stack_name: str,
    stack: Shape,
    mesh: Mesh | None,
    rngs: nnx.Rngs,
) -> MoE:
    return MoE(
        cfg.d_model,
        cfg.expert_d_ff or cfg.d_ff,
        cfg.num_experts,
        router=cfg.stack_router(stack_name),
        capacity_factor=cfg.capacity_factor,
        eval_capacity_factor=cfg.eval_capacity_factor,
        capacity_counts_k=cfg.capacity_counts_k,
        min_capacity=cfg.min_capacity,
        group_size=cfg.group_size,
        expert_capacity=cfg.expert_capacity,
        dispatch=cfg.dispatch,
        activation=cfg.activation,
        expert_dropout=cfg.expert_dropout,
        dtype=jnp.dtype(cfg.dtype),
        stack=stack,
        mesh=mesh,
        rngs=rngs,
    )


def run_layer(
    layer: Layer,
    x: Float[Array, "B L D"],
    context: Context,
    key: OptionalKey,
    block_index: Int[Array, ""],
) -> tuple[Float[Array, "B L D"], Routed]:
    """layer(x, context, key), rematerialized under the policy `context.remat`."""
    if context.remat == "none":
        return layer(x, context, key)
    graphdef, state = nnx.split(layer)

    # jax.checkpoint differentiates with respect to arguments only, not closed-over arrays
    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES[context.remat])
    def run(
        state: nnx.State,
        x: Float[Array, "B L D"],
        bias: Bias,
        memory: Float[Array, "B M D"] | None,
        key: OptionalKey,
    ) -> tuple[Float[Array, "B L D"], Routed]:
        # Multiply by a loop-dependent one, or XLA hoists the dtype cast of all layers out of the
        # scan and keeps every weight twice.
        one = 1 + jnp.minimum(block_index, 0)
        state = jax.tree.map(lambda weight: weight * one.astype(weight.dtype), state)
        layer = nnx.merge(graphdef, state)
        own_context = replace(context, bias=bias, memory=memory)
        return layer(x, own_context, key)

    return run(state, x, context.bias, context.memory, key)


class Stack(nnx.Module):
    """Encoder or decoder: relative bias, repeated blocks of layers, final norm.

    `blocks[i]` holds layer i of every block; its parameters are stacked over the blocks.
    """

    def __init__(self, cfg: ModelConfig, name: str, *, mesh: Mesh | None, rngs: nnx.Rngs):
        self.num_blocks = cfg.num_blocks(name)
        self.layers_per_block = cfg.num_layers(name) // self.num_blocks
        self.blocks = ModuleList([])
        for index in range(self.layers_per_block):
            sparse = index == cfg.sparse_layer_of(name)
            layer = Layer(cfg, name, sparse, stack=(self.num_blocks,), mesh=mesh, rngs=rngs)
            self.blocks.append(layer)
        self.bias = RelativeBias(
            cfg.num_heads,
            bidirectional=name == "encoder",
            buckets=cfg.relative_buckets,
            max_distance=cfg.relative_max_distance,
            dtype=jnp.dtype(cfg.dtype),
            rngs=rngs,
        )
        self.norm = RMSNorm(cfg.d_model, rngs=rngs)
        self.dropout_rate = cfg.dropout

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        key: OptionalKey,
    ) -> tuple[Float[Array, "B L D"], Routed]:
        """Final states, and statistics and routing stacked over the MoE layers (None: dense)."""
        first_key, last_key, layers_key = split_key(key, 3)
        layer_keys = None
        if key is not None:
            shape = (self.num_blocks, self.layers_per_block)
            layer_keys = jax.random.split(layers_key, shape)

        def block(layers: ModuleList, x: Array, inputs: tuple[Any, Array]) -> tuple[Array, Routed]:
            keys, block_index = inputs
            table = context.bias.table
            routed = None
            for index, layer in enumerate(layers):
                layer_key = None if keys is None else keys[index]
                # The barrier orders the backward pass: a layer adds its part to the gradient of
                # the bias table before the next layer starts.
                x = constrain_batch(x)
                x, table = jax.lax.optimization_barrier((x, table))
                bias = replace(context.bias, table=table)
                layer_context = replace(context, bias=bias)
                x, layer_routed = run_layer(layer, x, layer_context, layer_key, block_index)
                if layer_routed is not None:
                    routed = layer_routed
            return constrain_batch(x), routed

        x = dropout(x, self.dropout_rate, first_key)
        inputs = (layer_keys, jnp.arange(self.num_blocks))
        x, routed = self.scan(block, x, inputs, context.remat)
        x = self.norm(x)
        return dropout(x, self.dropout_rate, last_key), routed

    def layer_states(self) -> tuple[nnx.State, ...]:
        """The parameters of every layer by itself, in the order of the layers.

        A copy: reading a layer out of the stack again for every token costs more than its products.
        """
        states = []
        for block_index in range(self.num_blocks):
            for layer in self.blocks:
                stacked = nnx.state(layer)
                states.append(jax.tree.map(operator.itemgetter(block_index), stacked))
        return tuple(states)

    def layers(self, states: Sequence[nnx.State]) -> list[Layer]:
        """The layers with the parameters that `layer_states` returned."""
        layers = []
        for index, state in enumerate(states):
            graphdef = nnx.graphdef(self.blocks[index % self.layers_per_block])
            layers.append(nnx.merge(graphdef, state))
        return layers

    def scan(
        self,
        block: Callable,
        x: Float[Array, "B L D"],
        inputs: Any,
        remat: str = "none",
    ) -> tuple[Float[Array, "B L D"], Any]:
        """Run all blocks, one after the other.

        Args:
          block: (layers of a block, x, inputs of a block) to (x, outputs of a block).
          inputs: pytree of arrays with a leading axis over the blocks.

        Returns:
          x after the last block, and the outputs stacked over the blocks.
        """
        graphdef, stacked = nnx.split(self.blocks)

        def body(x: Array, sliced: tuple[nnx.State, Any]) -> tuple[Array, Any]:
            state, block_inputs = sliced
            layers = nnx.merge(graphdef, state)
            return block(layers, x, block_inputs)

        # Unroll short stacks on CPU: scan copies each iteration's weights. Not with remat:
        # unrolled, XLA recomputes all layers at once.
        short = self.num_blocks <= 4
        unrolled = platform() == "cpu" and short and remat == "none"
        unroll = self.num_blocks if unrolled else 1
        return jax.lax.scan(body, x, (stacked, inputs), unroll=unroll)
