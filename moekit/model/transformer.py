"""The encoder-decoder: T5 v1.1 blocks, some with MoE layers, scanned in repeating units.

B batch, L input length, T target length, D d_model, F d_ff, E experts, K choices per token,
N heads, H head dimension, V vocabulary. A stack repeats a unit of `layers / sparse layers` layers
(one when dense) whose last one is sparse; every parameter of a unit carries a leading axis over the
repeats, and `jax.lax.scan` runs over it, so compile time does not grow with depth.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from moekit.config import ModelConfig
from moekit.data.batch import Batch
from moekit.model.attention import Attention, Bias, RelativeBias, product, segment_mask
from moekit.moe.layer import LayerStats, MoE, TokenRouting, gated_gelu
from moekit.sharding import (
    check_mesh,
    constrain_batch,
    param,
    platform,
    use_mesh,
    with_gathered_parameters,
)

# what a backward pass finds saved of each layer ("none": everything)
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
PAD = 0  # also what the decoder reads before the first target


@no_type_check  # pytrees: tree.map rebuilds them around leaves of any shape
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """What the model makes of a batch; `stats` and `routing` have one row per MoE layer."""

    logits: Float[Array, "B T V"]  # float32
    stats: dict[str, LayerStats]  # by stack: "encoder", "decoder"; empty when dense
    routing: dict[str, TokenRouting] | None  # only when traced


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Encoded:
    """Encoder states, and which example each position belongs to (0 is padding)."""

    states: Float[Array, "B L D"]
    segments: Int[Array, "B L"]
    stats: dict[str, LayerStats]
    routing: dict[str, TokenRouting] | None


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What a decoder remembers: keys and values of every layer [repeats, layers a unit, ..]."""

    keys: Float[Array, "R U B T N H"]
    values: Float[Array, "R U B T N H"]
    memory_keys: Float[Array, "R U B L N H"]
    memory_values: Float[Array, "R U B L N H"]
    segments: Int[Array, "B L"]
    step: Int[Array, ""]


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 (Zhang 2019); T5's layer norm."""

    def __init__(self, d_model: int, *, stack=(), rngs):
        axes = (*("layers",) * len(stack), None)
        self.scale_d = param(rngs, (*stack, d_model), axes, value=1.0)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-6)
        return (x32 * inverse * self.scale_d[...]).astype(x.dtype)


def dropout(x: Float[Array, "B L D"], rate: float, key: Key[Array, ""] | None):
    """T5's dropout, the same for all positions of a row; without a key nothing happens."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, x.shape[2]))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class FFN(nnx.Module):
    """The dense feed-forward layer, gated GELU (T5 v1.1) or ReLU (v1.0)."""

    def __init__(
        self, d_model: int, d_ff: int, *, activation="gated_gelu", dtype=jnp.float32, stack=(), rngs
    ):
        layers = ("layers",) * len(stack)
        up, size = (*layers, "embed", "mlp"), (*stack, d_model, d_ff)
        gated = activation == "gated_gelu"
        self.wi_df = param(rngs, size, up, fan_in=d_model)
        self.wg_df = param(rngs, size, up, fan_in=d_model) if gated else None
        self.wo_fd = param(rngs, (*stack, d_ff, d_model), (*layers, "mlp", "embed"), fan_in=d_ff)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        weights = [w for w in (self.wi_df, self.wo_fd, self.wg_df) if w is not None]
        return with_gathered_parameters(_feed_forward, self.dtype, x.astype(self.dtype), *weights)


def _feed_forward(x, wi_df, wo_fd, wg_df=None):
    h = product(x, wi_df)
    h = jax.nn.relu(h) if wg_df is None else gated_gelu(product(x, wg_df), h)
    return product(h, wo_fd)


def _dtype(cfg: ModelConfig):
    return jnp.dtype(cfg.dtype)


class Layer(nnx.Module):
    """One pre-norm layer: self-attention, cross-attention in a decoder, a dense or sparse FFN, and
    after a sparse one, if the configuration has it, ST-MoE's extra dense FFN."""

    def __init__(self, cfg: ModelConfig, stack_name: str, sparse: bool, *, stack, mesh, rngs):
        def attention():
            return Attention(
                cfg.d_model, cfg.num_heads, cfg.head_dim, dtype=_dtype(cfg), stack=stack, rngs=rngs
            )

        def norm():
            return RMSNorm(cfg.d_model, stack=stack, rngs=rngs)

        def ffn(d_ff):
            kind = {"activation": cfg.activation, "dtype": _dtype(cfg)}
            return FFN(cfg.d_model, d_ff, stack=stack, rngs=rngs, **kind)

        decoder = stack_name == "decoder"
        self.self_norm, self.self_attention = norm(), attention()
        self.cross_norm = norm() if decoder else None
        self.cross_attention = attention() if decoder else None
        self.ffn_norm = norm()
        self.ffn = None if sparse else ffn(cfg.d_ff)
        self.moe = _moe(cfg, stack_name, stack, mesh, rngs) if sparse else None
        extra = sparse and cfg.extra_d_ff
        self.extra_norm = norm() if extra else None
        self.extra_ffn = ffn(cfg.extra_d_ff) if extra else None
        self.rate = cfg.dropout

    def feed_forward(self, x, mask, token_ids, key, drop):
        """The residual blocks after attention; statistics and routing are None when dense."""
        moe_key, key, extra_key = _split(key, 3)
        h = self.ffn_norm(x)
        if self.moe is None:
            return x + dropout(self.ffn(h), self.rate, key), None
        y, *seen = self.moe(h, mask, key=moe_key, token_ids=token_ids, drop=drop)
        x = x + dropout(y, self.rate, key)
        if self.extra_ffn is not None:
            x = x + dropout(self.extra_ffn(self.extra_norm(x)), self.rate, extra_key)
        return x, tuple(seen)

    def __call__(self, x, context: "Context", key):
        """The whole layer on whole sequences."""
        self_key, cross_key, key = _split(key, 3)
        h = self.self_norm(x)
        y = self.self_attention(h, h, context.self_mask, context.bias)
        x = x + dropout(y, self.rate, self_key)
        if self.cross_attention is not None:
            h = self.cross_norm(x)
            y = self.cross_attention(h, context.memory, context.cross_mask)
            x = x + dropout(y, self.rate, cross_key)
        return self.feed_forward(x, context.mask, context.token_ids, key, True)

    def decode(self, x, context: "Context", cache: dict[str, Array]):
        """One position with a cache; returns the new keys and values as well."""
        h = self.self_norm(x)
        new = zip(("keys", "values"), self.self_attention.keys_values(h), strict=True)
        seen = {
            name: jax.lax.dynamic_update_slice_in_dim(cache[name], value, context.step, axis=1)
            for name, value in new
        }
        x = x + self.self_attention.attend(
            h, seen["keys"], seen["values"], context.self_mask, context.bias
        )
        h = self.cross_norm(x)
        x = x + self.cross_attention.attend(
            h, cache["memory_keys"], cache["memory_values"], context.cross_mask
        )
        x, _ = self.feed_forward(x, context.mask, context.token_ids, None, False)
        return x, seen


@no_type_check
@dataclass(frozen=True)
class Context:
    """What all layers of a stack share."""

    mask: Bool[Array, "B L"]
    token_ids: Int[Array, "B L"]
    self_mask: Bool[Array, "B 1 L L"]
    bias: Bias
    memory: Float[Array, "B M D"] | None = None
    cross_mask: Bool[Array, "B 1 L M"] | None = None
    step: Int[Array, ""] | None = None
    remat: str = "none"


def _split(key, n: int):
    return (None,) * n if key is None else jax.random.split(key, n)


def _moe(cfg: ModelConfig, stack_name: str, stack, mesh, rngs) -> MoE:
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
        dispatch=cfg.dispatch,
        activation=cfg.activation,
        expert_dropout=cfg.expert_dropout,
        dtype=_dtype(cfg),
        stack=stack,
        mesh=mesh,
        rngs=rngs,
    )


def _rematerialized(layer: Layer, context: Context, turn: Int[Array, ""]) -> Callable:
    """layer(x, context, key) as a function of x and key whose backward pass finds saved what the
    context says; `turn` counts the repeats of a scan."""
    if context.remat == "none":
        return lambda x, key: layer(x, context, key)
    graphdef, state = nnx.split(layer)

    # what is differentiated must be an argument
    @functools.partial(jax.checkpoint, policy=REMAT[context.remat])
    def run(state, x, shared, key):
        # times one: XLA would convert all layers' weights to their compute type at once and keep
        # them, if converting one layer's did not depend on its turn
        one = 1 + jnp.minimum(turn, 0)
        state = jax.tree.map(lambda w: w * one.astype(w.dtype), state)
        return nnx.merge(graphdef, state)(x, replace(context, **shared), key)

    shared = {"bias": context.bias, "memory": context.memory}
    return lambda x, key: run(state, x, shared, key)


class Stack(nnx.Module):
    """Encoder or decoder: relative bias, repeated units, final norm."""

    def __init__(self, cfg: ModelConfig, name: str, *, mesh, rngs):
        layers, sparse = getattr(cfg, f"{name}_layers"), cfg.moe_layers(name)
        self.repeats = sparse or layers
        self.unit = layers // self.repeats
        places = {"stack": (self.repeats,), "mesh": mesh, "rngs": rngs}
        self.blocks = nnx.List(
            [
                Layer(cfg, name, bool(sparse) and i == self.unit - 1, **places)
                for i in range(self.unit)
            ]
        )
        self.bias = RelativeBias(
            cfg.num_heads,
            bidirectional=name == "encoder",
            buckets=cfg.relative_buckets,
            max_distance=cfg.relative_max_distance,
            dtype=_dtype(cfg),
            rngs=rngs,
        )
        self.norm = RMSNorm(cfg.d_model, rngs=rngs)
        self.rate = cfg.dropout

    def scan(self, step: Callable, x, inputs: Any, remat: str = "none"):
        """Run step(layers of a unit, x, inputs of a unit) -> (x, outputs) over the repeats."""
        graphdef, state = nnx.split(self.blocks)

        def body(x, per_unit):
            state, inputs = per_unit
            return step(nnx.merge(graphdef, state), x, inputs)

        # a loop on a CPU copies the weights of every turn out of their stack and gradients into it,
        # but only in a loop does what is computed again wait for its turn
        row = platform() == "cpu" and self.repeats <= 4 and remat == "none"
        return jax.lax.scan(body, x, (state, inputs), unroll=self.repeats if row else 1)

    def __call__(self, x, context: Context, key):
        """Returns states, then statistics and routing [MoE layers, ..] or None."""
        first, last, layers_key = _split(key, 3)
        keys = None
        if key is not None:
            keys = jax.random.split(layers_key, (self.repeats, self.unit))

        def unit(layers, x, inputs):
            keys, turn = inputs
            seen, table = None, context.bias.table
            for i, layer in enumerate(layers):
                key = None if keys is None else keys[i]
                # backward, a layer adds its part to the table's gradient before the next one's turn
                x, table = jax.lax.optimization_barrier((constrain_batch(x), table))
                bias = replace(context.bias, table=table)
                x, seen = _rematerialized(layer, replace(context, bias=bias), turn)(x, key)
            return constrain_batch(x), seen

        turns = jnp.arange(self.repeats)
        x, seen = self.scan(unit, dropout(x, self.rate, first), (keys, turns), context.remat)
        return dropout(self.norm(x), self.rate, last), seen


def _on_its_mesh(method: Callable) -> Callable:
    @functools.wraps(method)
    def placed(self, *args, **kwargs):
        with use_mesh(self.mesh):
            return method(self, *args, **kwargs)

    return placed


class EncoderDecoder(nnx.Module):
    """T5 v1.1 (or v1.0, tied with scaled logits) with MoE layers at the configuration's places.

    Args:
      seed: of the initial parameters.
      mesh: parameters are born sharded over it; batches are split over its data and expert axes.

    Raises:
      ValueError: the mesh's expert axis does not divide the experts.
    """

    def __init__(self, cfg: ModelConfig, seed: int = 0, mesh: Mesh | None = None):
        check_mesh(mesh, cfg.name, experts=cfg.num_experts, **cfg.split_by_model())
        rngs = nnx.Rngs(params=seed)
        with use_mesh(mesh):
            shape, axes = (cfg.vocab_size, cfg.d_model), ("vocab", "embed")
            self.embedding_vd = param(rngs, shape, axes, stddev=1.0)
            self.encoder = Stack(cfg, "encoder", mesh=mesh, rngs=rngs)
            self.decoder = Stack(cfg, "decoder", mesh=mesh, rngs=rngs)
            tied = cfg.tied_logits
            self.head_dv = (
                None if tied else param(rngs, shape[::-1], axes[::-1], fan_in=cfg.d_model)
            )
        self.cfg, self.mesh = cfg, mesh

    def __call__(
        self,
        batch: Batch,
        *,
        key: Key[Array, ""] | None = None,
        trace: bool = False,
        remat: str = "none",
    ) -> Output:
        """Logits of the targets, read with teacher forcing.

        With a key: training (dropout, training capacity factor, router randomness). Without:
        deterministic, evaluation capacity factor. `remat` says what a backward pass computes
        again: see `TrainConfig`.
        """
        batch = jax.tree.map(jnp.asarray, batch)  # also outside of jit
        encoder_key, decoder_key = _split(key, 2)
        how = {"trace": trace, "remat": remat}
        encoded = self.encode(batch.inputs, batch.input_segments, key=encoder_key, **how)
        tokens = shift_right(batch.targets, batch.target_positions)
        return self.decode(encoded, tokens, batch.target_segments, key=decoder_key, **how)

    @_on_its_mesh
    def decode(
        self,
        encoded: Encoded,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        *,
        key: Key[Array, ""] | None = None,
        trace: bool = False,
        remat: str = "none",
    ) -> Output:
        """Logits after each of the decoder's input tokens (targets shifted right)."""
        indices = jnp.arange(tokens.shape[1])
        context = Context(
            mask=segments > 0,
            token_ids=tokens,
            self_mask=segment_mask(segments, segments, causal=True),
            bias=self.decoder.bias(indices, indices),
            memory=encoded.states,
            cross_mask=segment_mask(segments, encoded.segments),
            remat=remat,
        )
        x, seen = self.decoder(self._embed(tokens), context, key)
        stats, routing = dict(encoded.stats), dict(encoded.routing or {})
        if seen is not None:
            stats["decoder"], routing["decoder"] = seen
        return Output(self._logits(x), stats, routing if trace else None)

    @_on_its_mesh
    def encode(
        self,
        inputs: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        *,
        key: Key[Array, ""] | None = None,
        trace: bool = False,
        remat: str = "none",
    ) -> Encoded:
        """Encoder states of inputs; segment 0 is padding."""
        indices = jnp.arange(inputs.shape[1])
        context = Context(
            mask=segments > 0,
            token_ids=inputs,
            self_mask=segment_mask(segments, segments),
            bias=self.encoder.bias(indices, indices),
            remat=remat,
        )
        x, seen = self.encoder(self._embed(inputs), context, key)
        if seen is None:
            return Encoded(x, segments, {}, {} if trace else None)
        return Encoded(x, segments, {"encoder": seen[0]}, {"encoder": seen[1]} if trace else None)

    @_on_its_mesh
    def start_cache(self, encoded: Encoded, length: int) -> Cache:
        """An empty cache for up to `length` decoded tokens, one example a row."""

        def unit(layers, x, _):
            pairs = [layer.cross_attention.keys_values(x) for layer in layers]
            return x, tuple(jnp.stack(each) for each in zip(*pairs, strict=True))

        _, (memory_keys, memory_values) = self.decoder.scan(unit, encoded.states, None)
        r, u, b, _, n, h = memory_keys.shape
        empty = jnp.zeros((r, u, b, length, n, h), memory_keys.dtype)
        step = jnp.zeros((), jnp.int32)
        return Cache(empty, empty, memory_keys, memory_values, encoded.segments, step)

    @_on_its_mesh
    def decode_step(
        self, tokens: Int[Array, "B"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits of the next token. The first token to feed is the padding id 0 (as in T5).

        Every expert has room for every token here: nothing is dropped while decoding.
        """
        length = cache.keys.shape[3]
        seen = jnp.arange(length) <= cache.step
        context = Context(
            mask=jnp.ones((tokens.shape[0], 1), bool),
            token_ids=tokens[:, None],
            self_mask=seen[None, None, None, :],
            bias=self.decoder.bias(cache.step[None], jnp.arange(length)),
            cross_mask=(cache.segments > 0)[:, None, None, :],
            step=cache.step,
        )
        names = ("keys", "values", "memory_keys", "memory_values")
        layers = {name: getattr(cache, name) for name in names}

        def unit(layers, x, cached):
            new = []
            for i, layer in enumerate(layers):
                x, kv = layer.decode(x, context, {name: cached[name][i] for name in names})
                new.append((kv["keys"], kv["values"]))
            return x, tuple(jnp.stack(each) for each in zip(*new, strict=True))

        x, (keys, values) = self.decoder.scan(unit, self._embed(tokens[:, None]), layers)
        logits = self._logits(self.decoder.norm(x))[:, 0]
        cache = Cache(
            keys, values, cache.memory_keys, cache.memory_values, cache.segments, cache.step + 1
        )
        return logits, cache

    def _embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        # in float32: a frequent token's gradient is a long sum
        table = self.embedding_vd
        rows = with_gathered_parameters(
            lambda tokens, table_vd: table_vd[tokens], jnp.float32, tokens, table
        )
        return rows.astype(_dtype(self.cfg))

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        if self.head_dv is None:
            # T5 v1.0 shares the embedding and scales, because its rows have unit variance
            x = (x.astype(jnp.float32) * self.cfg.d_model**-0.5).astype(x.dtype)
            logits = with_gathered_parameters(
                lambda x, w_vd: product(x, w_vd.T), x.dtype, x, self.embedding_vd
            )
            return logits.astype(jnp.float32)
        exact = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        to_logits = product if x.dtype == jnp.float32 else exact
        return with_gathered_parameters(to_logits, x.dtype, x, self.head_dv)


def with_config(model: EncoderDecoder, cfg: ModelConfig) -> EncoderDecoder:
    """A copy of a model under another configuration of the same parameters: other dropout,
    capacity, losses."""
    changed = EncoderDecoder(cfg, mesh=model.mesh)
    nnx.update(changed, jax.tree.map(jnp.copy, nnx.state(model)))
    return changed


def shift_right(targets: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """What the decoder reads: the previous target, and padding where an example starts."""
    shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(positions == 0, PAD, shifted)
