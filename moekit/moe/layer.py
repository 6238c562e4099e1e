"""The MoE layer: router + transport + experts + what is measured of them.

B batch, L length, D d_model, F d_ff, E experts, K choices per token, C capacity, G groups,
S tokens in a group; `stack` is an optional leading axis of parameters that a caller scans over.
"""

import math
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from moekit.errors import unknown
from moekit.moe import dropless, ragged
from moekit.moe.capacity import capacity_table, combine, dispatch, plan, slots_per_expert
from moekit.moe.parallel import Place, split_over_mesh
from moekit.moe.routing import Router, Routing, Switch
from moekit.sharding import BATCH_AXES, MESH_AXES, batch_shards, check_mesh, param, use_mesh

ACTIVATIONS = ("gated_gelu", "relu")
DISPATCH = ("capacity", "dropless")


@no_type_check  # a pytree: see Routing
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerStats:
    """What one layer's router did to the real tokens of a batch, as sums that add across shards.

    All float32. A model stacks these, one row per MoE layer.
    """

    tokens: Float[Array, ""]
    load: Float[Array, "E"]  # choices of each expert
    kept: Float[Array, "E"]  # of these, the ones that found a slot
    prob_sum: Float[Array, "E"]
    z_sum: Float[Array, ""]  # squared logsumexp of the logits
    dropped_tokens: Float[Array, ""]  # tokens that no expert processed
    dropped_assignments: Float[Array, ""]  # choices that found no slot
    confidence_sum: Float[Array, ""]  # largest router probability
    entropy_sum: Float[Array, ""]  # entropy of the router's probabilities, nats
    balance_sum: Float[Array, ""]  # balance loss of each group with real tokens
    groups: Float[Array, ""]  # groups with real tokens

    def balance_loss(self) -> Float[Array, "..."]:
        """Mean over groups of E sum_e f_e P_e (Fedus 2021), k at balance; see `layer_stats`."""
        return self.balance_sum / jnp.maximum(self.groups, 1)

    def router_z_loss(self) -> Float[Array, "..."]:
        """Mean over tokens of logsumexp(logits)^2 (Zoph 2022)."""
        return self.z_sum / jnp.maximum(self.tokens, 1)


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRouting:
    """The routing of a batch seen from its tokens; -1 where there is no choice or no token."""

    expert: Int[Array, "B L K"]
    weight: Float[Array, "B L K"]
    kept: Bool[Array, "B L K"]
    entropy: Float[Array, "B L"]  # of the router's probabilities, nats


class RouterBias(nnx.Variable):
    """Per-expert bias of a loss-free balanced router: state that no gradient touches."""


def layer_stats(
    logits: Float[Array, "G S E"], mask: Bool[Array, "G S"], routing: Routing
) -> LayerStats:
    """Sums over real tokens. The balance loss of a group is E sum_e f_e P_e, with f_e the share of
    tokens that chose e (first `balance_choices` choices) and P_e e's mean probability."""
    num_experts = logits.shape[-1]
    real = mask[..., None].astype(jnp.float32)
    experts = jnp.arange(num_experts)
    chosen = routing.expert_index[..., None] == experts  # [G, S, K, E]
    kept = routing.slot < num_experts * routing.capacity
    counted = chosen[:, :, : routing.balance_choices].sum((1, 2)).astype(jnp.float32)
    group_tokens = real.sum((1, 2))
    prob_sum = (routing.probs * real).sum(1)  # [G, E]
    safe = jnp.maximum(group_tokens, 1)[:, None]
    balance = num_experts * jnp.sum((counted / safe) * (prob_sum / safe), -1)
    load = chosen.sum((0, 1, 2)).astype(jnp.float32)
    kept_load = (chosen & kept[..., None]).sum((0, 1, 2)).astype(jnp.float32)
    return LayerStats(
        tokens=group_tokens.sum(),
        load=load,
        kept=kept_load,
        prob_sum=prob_sum.sum(0),
        z_sum=jnp.sum(jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) ** 2, 0.0)),
        dropped_tokens=jnp.sum(mask & ~kept.any(-1)).astype(jnp.float32),
        dropped_assignments=load.sum() - kept_load.sum(),
        confidence_sum=jnp.sum(jnp.where(mask, routing.probs.max(-1), 0.0)),
        entropy_sum=jnp.sum(jnp.where(mask, _entropy(routing.probs), 0.0)),
        balance_sum=balance.sum(),
        groups=jnp.sum(group_tokens > 0).astype(jnp.float32),
    )


def _entropy(probs: Float[Array, "... E"]) -> Float[Array, "..."]:
    return -jnp.sum(jax.scipy.special.xlogy(probs, probs), -1)


def update_router_bias(state: nnx.State, stats: dict[str, LayerStats]) -> nnx.State:
    """Move every `RouterBias` by rate * sign(mean load - load) (Wang 2024).

    Args:
      state: any model state; its biases `[layers, E]` lie under the name of their stack
        ("encoder" or "decoder"). Other variables are returned as they are.
      stats: the same step's statistics of each stack.
    """

    def move(path, variable):
        if not isinstance(variable, RouterBias):
            return variable
        load = stats[path[0].key].load
        bias = variable[...] + variable.rate * jnp.sign(load.mean(-1, keepdims=True) - load)
        return variable.replace(bias)

    return jax.tree_util.tree_map_with_path(
        move, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


class Gate(nnx.Module):
    """The router's weights: one logit per expert, always float32."""

    def __init__(self, d_model: int, num_experts: int, router: Router, *, stack=(), rngs: nnx.Rngs):
        axes = ("layers",) * len(stack)
        self.w_de = param(rngs, (*stack, d_model, num_experts), (*axes, "embed", None), stddev=0.02)
        balanced = getattr(router, "balanced_by_bias", False)
        bias = jnp.zeros((*stack, num_experts))
        self.bias_e = RouterBias(bias, rate=router.rate, axes=(*axes, None)) if balanced else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        exact = jax.lax.Precision.HIGHEST
        # a TPU makes three passes of each float32; bfloat16 is exact in one. Backward this rounds
        # the cotangents of logits to bfloat16, as all others are
        of_x = jax.lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else exact
        return jnp.dot(x.astype(jnp.float32), self.w_de[...], precision=(of_x, exact))


@jax.custom_vjp
def gated_gelu(gate: Float[Array, "*S F"], x: Float[Array, "*S F"]) -> Float[Array, "*S F"]:
    """gelu(gate) * x, whose two cotangents are computed once.

    Left to itself XLA for TPU repeats this arithmetic inside each of the three products that read
    them, and those become bound by it (4.6 instead of 3.8 ms for a layer on v5e:2x4, as compiled).
    """
    return jax.nn.gelu(gate) * x


def _gated_forward(gate, x):
    return gated_gelu(gate, x), (gate, x)


def _gated_backward(residuals, g):
    _, transpose = jax.vjp(lambda gate, x: jax.nn.gelu(gate) * x, *residuals)
    return jax.lax.optimization_barrier(transpose(g))


gated_gelu.defvjp(_gated_forward, _gated_backward)


class Experts(nnx.Module):
    """E feed-forward networks side by side: batched products over the expert axis."""

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "gated_gelu",
        dropout: float = 0.0,
        dtype=jnp.float32,
        stack=(),
        rngs: nnx.Rngs,
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r}: choose one of {ACTIVATIONS}")
        axes = ("layers",) * len(stack)
        up, down = (*axes, "expert", "embed", "mlp"), (*axes, "expert", "mlp", "embed")
        gated = activation == "gated_gelu"
        size = (*stack, num_experts, d_model, d_ff)
        self.wi_edf = param(rngs, size, up, fan_in=d_model)
        self.wg_edf = param(rngs, size, up, fan_in=d_model) if gated else None
        self.wo_efd = param(rngs, (*stack, num_experts, d_ff, d_model), down, fan_in=d_ff)
        self.dropout, self.dtype = dropout, dtype

    def __call__(
        self, x: Float[Array, "E C D"], keep: Bool[Array, "E C F"] | None = None
    ) -> Float[Array, "E C D"]:
        """`keep` drops hidden features: expert dropout (Fedus 2021)."""
        x = x.astype(self.dtype)
        ups = [w for w in (self.wi_edf, self.wg_edf) if w is not None]
        h = self.activate(*(jnp.einsum("ecd,edf->ecf", x, w[...].astype(self.dtype)) for w in ups))
        if keep is not None:
            h = jnp.where(keep, h / (1 - self.dropout), 0)
        return jnp.einsum("ecf,efd->ecd", h, self.wo_efd[...].astype(self.dtype))

    @staticmethod
    def activate(
        hidden: Float[Array, "*S F"], gate: Float[Array, "*S F"] | None = None
    ) -> Float[Array, "*S F"]:
        """Gated GELU, or ReLU where there is no gate."""
        return jax.nn.relu(hidden) if gate is None else gated_gelu(gate, hidden)

    def draw(
        self,
        key: Key[Array, ""] | None,
        expert: Int[Array, "E C"],
        rank: Int[Array, "E C"],
        place: Place,
    ) -> Bool[Array, "E C F"] | None:
        """What expert dropout keeps. A row's draw depends on its expert and its place in that
        expert's queue alone, so it is the same on every mesh."""
        if key is None or self.dropout == 0:
            return None
        f = self.wi_edf[...].shape[-1]

        def features(expert, rank):
            row = jax.random.fold_in(jax.random.fold_in(key, expert), rank)
            kept = jax.random.bernoulli(row, 1 - self.dropout, (f * place.size("model"),))
            return jax.lax.dynamic_slice_in_dim(kept, place.index("model") * f, f)

        return jax.vmap(jax.vmap(features))(expert, rank)


def check_dispatch(dispatch: str, router: Router) -> None:
    """ValueError for an unknown dispatch, and for dropless with a router that fills slots."""
    if dispatch not in DISPATCH:
        raise unknown("dispatch", dispatch, DISPATCH)
    if dispatch == "dropless" and getattr(router, "num_choices", 1) is None:
        raise ValueError(
            f"{type(router).__name__} fills every expert's slots, so it has no dropless form: use "
            'dispatch="capacity" or a router that lets tokens choose'
        )


class MoE(nnx.Module):
    """A sparse feed-forward layer, usable alone inside any nnx model.

    Args:
      router: logits in, `Routing` out; see `moekit.moe.routing`.
      capacity_factor: slots per expert over the balanced load, with a key (training);
        `eval_capacity_factor` without one (default the same).
      capacity_counts_k: True multiplies capacity by the router's choices (Mesh-TensorFlow, GShard);
        False does not (flaxformer).
      group_size: tokens routed together; a device cuts its tokens into equal groups of at most
        this size.
      dispatch: "capacity" gives every expert the same number of slots and drops what finds none
        (the paper's way); "dropless" sends every token, whatever the load.
      mesh: experts are split over its expert axis (and over model, inside each), rows of a batch
        over data and expert.

    Padding neither takes slots nor enters statistics, and capacity follows the real tokens.

    Raises:
      ValueError: the mesh's axes do not divide the experts or their hidden features; a router that
        fills slots (Expert Choice) with dropless dispatch.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        router: Router = Switch(),  # noqa: B008  a frozen dataclass
        capacity_factor: float = 1.25,
        eval_capacity_factor: float | None = None,
        capacity_counts_k: bool = False,
        min_capacity: int = 4,
        group_size: int = 4096,
        dispatch: str = "capacity",
        activation: str = "gated_gelu",
        expert_dropout: float = 0.0,
        dtype=jnp.float32,
        stack=(),
        mesh: Mesh | None = None,
        rngs: nnx.Rngs,
    ):
        check_dispatch(dispatch, router)
        check_mesh(mesh, "this MoE layer", experts=num_experts, d_ff=d_ff)
        with use_mesh(mesh):
            self.router = Gate(d_model, num_experts, router, stack=stack, rngs=rngs)
            self.experts = Experts(
                num_experts,
                d_model,
                d_ff,
                activation=activation,
                dropout=expert_dropout,
                dtype=dtype,
                stack=stack,
                rngs=rngs,
            )
        self.mesh, self.dispatch = mesh, dispatch
        self.ragged = dispatch == "dropless" and ragged.suits(mesh)
        self.route, self.num_experts = router, num_experts
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor or capacity_factor
        self.choices = (getattr(router, "num_choices", 1) or 1) if capacity_counts_k else 1
        self.min_capacity, self.group_size = min_capacity, group_size

    def __call__(
        self,
        x: Float[Array, "B L D"],
        mask: Bool[Array, "B L"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
        token_ids: Int[Array, "B L"] | None = None,
        drop: bool = True,
    ) -> tuple[Float[Array, "B L D"], LayerStats, TokenRouting]:
        """Route, move, compute, move back.

        `key` means training: its capacity factor, its randomness. `drop=False` gives every expert
        room for all tokens (decoding one token at a time). Dropped tokens and padding return 0.
        """
        b = x.shape[0]
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        rows = (x, mask, token_ids)
        if self.mesh is None:
            (y, routing), stats = self._local(rows, key, drop, Place())
            return y, stats, routing

        def local(module, rows, key):
            return module._local(rows, key, drop, Place(self.mesh, typed))

        typed = not self.ragged
        whole = -(-b // batch_shards(self.mesh)) * batch_shards(self.mesh)
        split = split_over_mesh(local, self, self.mesh, self._cast, typed=typed)
        (y, routing), stats = split(jax.tree.map(lambda a: _padded(a, whole), rows), key)
        return y[:b], stats, jax.tree.map(lambda a: a[:b], routing)

    def _cast(self, variable: nnx.Variable) -> Array:
        """Experts compute in their own type; the router stays as it is."""
        value = variable[...]
        return value.astype(self.experts.dtype) if "expert" in variable.axes else value

    def _local(self, rows, key, drop: bool, place: Place):
        """The layer on one device's tokens: ((y, routing), statistics of all devices)."""
        x, mask, token_ids = rows
        b, length, d = x.shape
        route_key, dropout_key = (None, None) if key is None else jax.random.split(key)
        logits, group_mask, ids = self._grouped(x, mask, token_ids)
        drop = drop and self.dispatch == "capacity"
        routing = self._route(logits, group_mask, ids, route_key, drop, place)
        tokens = _token_routing(routing, self.num_experts, (b, length))
        stats = place.sum(layer_stats(logits, group_mask, routing), *BATCH_AXES)
        # over the model axis every device computes its part of the same tokens
        x = place.vary(_padded(x.reshape(-1, d), group_mask.size), "model")
        move = self._dropless if self.dispatch == "dropless" else self._capacity
        y = move(x, routing, dropout_key, place)[: b * length]
        return (place.sum(y, "model").reshape(b, length, d), tokens), stats

    def _capacity(self, x, routing: Routing, key, place: Place) -> Float[Array, "tokens D"]:
        p = place.vary(plan(routing, self.num_experts), "model")
        slots = place.to_experts(dispatch(x, p).reshape(self.num_experts, -1, x.shape[-1]))
        experts, c, d = slots.shape
        expert = place.index("expert") * experts + jnp.arange(experts)[:, None]
        rank = place.index("data") * c + jnp.arange(c)[None]
        keep = self.experts.draw(key, *jnp.broadcast_arrays(expert, rank), place)
        return combine(place.to_tokens(self.experts(slots, keep)).reshape(-1, d), p)

    def _dropless(self, x, routing: Routing, key, place: Place) -> Float[Array, "tokens D"]:
        experts, weight = self.experts, routing.combine_weight.reshape(x.shape[0], -1)
        ups = [w for w in (experts.wi_edf, experts.wg_edf) if w is not None]
        up, down = place.vary(
            jax.tree.map(
                lambda w: w.astype(experts.dtype),
                (tuple(w[...] for w in ups), experts.wo_efd[...]),
            ),
            *MESH_AXES,
        )

        def keep(key, ids):
            drawn = experts.draw(key, jnp.zeros_like(ids)[None], ids[None], place)
            return drawn[0] / (1 - experts.dropout)

        n = place.size("expert")
        how = dropless.Network(
            act=experts.activate,
            keep=keep,
            block=dropless.block_size(weight.size * n, self.num_experts),
            save=n == 1 or self.ragged,
        )
        operands = (x.astype(experts.dtype), place.vary(weight, "model"), up, down, routing)
        options = {"key": key if experts.dropout else None, "place": place}
        send = ragged.send if self.ragged else dropless.send
        return send(how, *operands, **options)

    def _grouped(self, x, mask, token_ids):
        """Router logits, mask and ids as [G, S, ..], filled up with padding."""
        tokens = mask.size
        groups = math.ceil(tokens / self.group_size)
        size = math.ceil(tokens / groups)
        shape = (groups, size)
        # zeroed, not only masked: whatever padding holds must not reach the gate's gradient
        logits = self.router(jnp.where(mask[..., None], x, 0)).reshape(tokens, -1)
        ids = None
        if token_ids is not None:
            ids = _padded(token_ids.reshape(-1), groups * size).reshape(shape)
        logits = _padded(logits, groups * size).reshape(*shape, -1)
        return logits, _padded(mask.reshape(-1), groups * size).reshape(shape), ids

    def _route(self, logits, mask, token_ids, key, drop, place: Place) -> Routing:
        groups, size = mask.shape
        if drop:
            factor = self.eval_capacity_factor if key is None else self.capacity_factor
            shape = (size, self.num_experts, factor)
            convention = {"choices": self.choices, "minimum": self.min_capacity}
            capacity = slots_per_expert(*shape, **convention)
            table = jnp.asarray(capacity_table(*shape, **convention))
            limit = table[mask.sum(-1)]
        else:
            capacity, limit = size, jnp.full(groups, size)
        keys = None
        if key is not None:  # one for each group of all devices
            keys = jax.random.split(key, groups * place.size(*BATCH_AXES))
            first = groups * place.index(*BATCH_AXES)
            keys = jax.lax.dynamic_slice_in_dim(keys, first, groups)
        bias = None if self.router.bias_e is None else self.router.bias_e[...]

        def route(logits, mask, limit, key, token_ids):
            return self.route(
                logits,
                mask,
                capacity=capacity,
                limit=limit,
                key=key,
                token_ids=token_ids,
                bias=bias,
            )

        return jax.vmap(route)(logits, mask, limit, keys, token_ids)


def _padded(x, rows: int):
    return jnp.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def _token_routing(routing: Routing, num_experts: int, shape: tuple[int, int]) -> TokenRouting:
    def per_token(x):
        flat = x.reshape(-1, *x.shape[2:])
        return flat[: shape[0] * shape[1]].reshape(*shape, *flat.shape[1:])

    none = routing.expert_index >= num_experts
    return TokenRouting(
        expert=per_token(jnp.where(none, -1, routing.expert_index)),
        weight=per_token(routing.combine_weight),
        kept=per_token(routing.slot < num_experts * routing.capacity),
        entropy=per_token(_entropy(routing.probs)),
    )
