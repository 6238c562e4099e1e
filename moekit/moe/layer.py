"""The MoE layer: route, dispatch, all-to-all, experts, all-to-all, combine.

`MoE._forward` shows these steps in order. The others are in `routing.py` (routers), `capacity.py`
(slots, dispatch, combine), `expert_parallel.py` (shard_map, collectives), `dropless.py` and
`ragged.py` (the other kind of dispatch) and `stats.py` (statistics, losses).

B batch, L length, D d_model, F d_ff, E experts, K choices per token, C slots per expert (of all
groups), G groups, S tokens in a group, T = G * S tokens. `stack` is an optional leading axis of all
parameters that a caller scans over.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from moekit.errors import unknown
from moekit.moe import dropless, ragged
from moekit.moe.capacity import combine, dispatch, dispatch_indices, group_capacity
from moekit.moe.dropless import ExpertFunction, ExpertInputs, block_size
from moekit.moe.expert_parallel import ExpertParallel, parameter_layouts
from moekit.moe.routing import OptionalKey, Router, Routing, Switch, check_router, check_routing
from moekit.moe.stats import (
    LayerStats,
    RouterBias,
    TokenRouting,
    layer_stats,
    token_routing,
    without_padding,
)
from moekit.sharding import BATCH_AXES, MESH_AXES, check_mesh, param, platform, use_mesh

ACTIVATIONS = ("gated_gelu", "relu")
DISPATCH = ("capacity", "dropless")
Activation = str | Callable[[Array], Array]  # a name, or any elementwise function


class RouterWeights(nnx.Module):
    """The router's matrix: one logit per expert, always float32."""

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        router: Router,
        *,
        stack: tuple[int, ...] = (),
        rngs: nnx.Rngs,
    ):
        axes = ("layers",) * len(stack)
        self.w_de = param(rngs, (*stack, d_model, num_experts), (*axes, "embed", None), stddev=0.02)
        if getattr(router, "balanced_by_bias", False):
            bias = jnp.zeros((*stack, num_experts))
            self.bias_e = RouterBias(bias, rate=router.rate, axes=(*axes, None))
        else:
            self.bias_e = None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        exact = jax.lax.Precision.HIGHEST
        # A TPU makes three bfloat16 passes for each float32 operand; one is exact for bfloat16. In
        # the backward pass this rounds the gradient of the logits to bfloat16, as all others are.
        x_precision = jax.lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else exact
        return jnp.dot(x.astype(jnp.float32), self.w_de[...], precision=(x_precision, exact))


@jax.custom_vjp
def gated_gelu(gate: Float[Array, "*S F"], x: Float[Array, "*S F"]) -> Float[Array, "*S F"]:
    """gelu(gate) * x, whose two gradients are computed once.

    XLA for TPU would otherwise repeat this arithmetic inside each of the three matmuls that read
    the gradients, and bound them by it (4.6 instead of 3.8 ms for a layer compiled for v5e:2x4).
    """
    return jax.nn.gelu(gate) * x


def _gated_gelu_forward(gate: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
    return gated_gelu(gate, x), (gate, x)


def _gated_gelu_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    _, transpose = jax.vjp(lambda gate, x: jax.nn.gelu(gate) * x, *residuals)
    return jax.lax.optimization_barrier(transpose(gradient))


gated_gelu.defvjp(_gated_gelu_forward, _gated_gelu_backward)


def activate(
    activation: Activation,
    hidden: Float[Array, "*S F"],
    gate: Float[Array, "*S F"] | None = None,
) -> Float[Array, "*S F"]:
    """An activation of hidden features; gated GELU has a gate beside them."""
    if gate is not None:
        return gated_gelu(gate, hidden)
    function = jax.nn.relu if activation == "relu" else activation
    return function(hidden).astype(hidden.dtype)


def check_activation(activation: Activation, d_ff: int) -> None:
    """Check the activation of a feed-forward layer.

    Raises:
      ValueError: an unknown name, or a function that does not keep the shape of its argument.
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        return
    hidden = jax.ShapeDtypeStruct((1, d_ff), jnp.float32)
    shape = jnp.shape(jax.eval_shape(activation, hidden))
    if shape != hidden.shape:
        raise ValueError(
            f"activation {activation} returns shape {shape} for {hidden.shape}: use an elementwise "
            f"function such as jnp.tanh, or a name: {', '.join(ACTIVATIONS)}"
        )


class Experts(nnx.Module):
    """E feed-forward networks, computed as batched matmuls over the expert axis."""

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_ff: int,
        *,
        activation: Activation = "gated_gelu",
        dropout: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        stack: tuple[int, ...] = (),
        rngs: nnx.Rngs,
    ):
        check_activation(activation, d_ff)
        self.activation = activation
        layers = ("layers",) * len(stack)
        up_shape = (*stack, num_experts, d_model, d_ff)
        up_axes = (*layers, "expert", "embed", "mlp")
        down_shape = (*stack, num_experts, d_ff, d_model)
        down_axes = (*layers, "expert", "mlp", "embed")
        self.wi_edf = param(rngs, up_shape, up_axes, fan_in=d_model)
        gated = activation == "gated_gelu"
        self.wg_edf = param(rngs, up_shape, up_axes, fan_in=d_model) if gated else None
        self.wo_efd = param(rngs, down_shape, down_axes, fan_in=d_ff)
        self.dropout, self.dtype = dropout, dtype

    def __call__(
        self,
        slots: Float[Array, "E C D"],
        key: OptionalKey = None,
        parallel: ExpertParallel = ExpertParallel(),  # noqa: B008  a frozen dataclass
    ) -> Float[Array, "E C D"]:
        """Every slot through its expert; a key turns expert dropout on."""
        (wi_edf, *wg_edf), wo_efd = self.matrices()
        x = slots.astype(self.dtype)
        hidden = jnp.einsum("ecd,edf->ecf", x, wi_edf)
        gate = jnp.einsum("ecd,edf->ecf", x, wg_edf[0]) if wg_edf else None
        hidden = activate(self.activation, hidden, gate)
        if key is not None and self.dropout > 0:
            num_experts, num_slots, _ = slots.shape
            expert = parallel.axis_index("expert") * num_experts + jnp.arange(num_experts)
            position = parallel.axis_index("data") * num_slots + jnp.arange(num_slots)
            kept = self.dropout_mask(key, expert[:, None], position[None], parallel)
            hidden = jnp.where(kept, hidden / (1 - self.dropout), 0)
        return jnp.einsum("ecf,efd->ecd", hidden, wo_efd)

    def matrices(self) -> tuple[tuple[Array, ...], Float[Array, "E F D"]]:
        """The experts' first matrices, (wi,) or (wi, wg), and the last, in the compute type."""
        up = [self.wi_edf[...].astype(self.dtype)]
        if self.wg_edf is not None:
            up.append(self.wg_edf[...].astype(self.dtype))
        return tuple(up), self.wo_efd[...].astype(self.dtype)

    def dropout_mask(
        self,
        key: Key[Array, ""],
        expert: Int[Array, "*#S"],
        position: Int[Array, "*#S"],
        parallel: ExpertParallel,
    ) -> Bool[Array, "*S F"]:
        """The hidden features that expert dropout keeps (Fedus 2021).

        Depends only on the expert and the position in its queue, so it is the same on every mesh.
        """
        local_features = self.wi_edf.shape[-1]
        num_features = local_features * parallel.axis_size("model")
        first_feature = local_features * parallel.axis_index("model")

        def keep(expert: Int[Array, ""], position: Int[Array, ""]) -> Bool[Array, "F"]:
            row_key = jax.random.fold_in(jax.random.fold_in(key, expert), position)
            kept = jax.random.bernoulli(row_key, 1 - self.dropout, (num_features,))
            return jax.lax.dynamic_slice_in_dim(kept, first_feature, local_features)

        return jnp.vectorize(keep, signature="(),()->(f)")(expert, position)


def check_dispatch(dispatch: str, router: Router) -> None:
    """Check the kind of dispatch.

    Raises:
      ValueError: it is unknown, or it is "dropless" and the router fills slots (Expert Choice).
    """
    if dispatch not in DISPATCH:
        raise unknown("dispatch", dispatch, DISPATCH)
    if dispatch == "dropless" and getattr(router, "num_choices", 1) is None:
        raise ValueError(
            f"{type(router).__name__} fills every expert's slots, so it has no dropless form: use "
            'dispatch="capacity" or a router that lets tokens choose'
        )


def check_expert_capacity(expert_capacity: int | None, dispatch: str) -> None:
    """Check a fixed number of slots.

    Raises:
      ValueError: it is below 1, or tokens are dispatched without slots (dropless).
    """
    if expert_capacity is None:
        return
    if expert_capacity < 1:
        raise ValueError(f"expert_capacity is {expert_capacity}: use 1 or more, or None")
    if dispatch == "dropless":
        raise ValueError(
            f'expert_capacity is {expert_capacity}, but dispatch="dropless" has no slots: use '
            'expert_capacity=None or dispatch="capacity"'
        )


class Tokens(NamedTuple):
    """The inputs of a layer: [B, L, ..] or, in groups, [G, S, ..]."""

    x: Float[Array, "B L D"]
    mask: Bool[Array, "B L"]
    token_ids: Int[Array, "B L"] | None


class MoE(nnx.Module):
    """A sparse feed-forward layer, usable alone inside any nnx model.

    Args:
      d_model: features of a token.
      d_ff: hidden features of an expert.
      num_experts: number of experts.
      router: logits in, `Routing` out; see `moekit.moe.routing`.
      capacity_factor: slots per expert relative to the balanced load, in training (with a key).
      eval_capacity_factor: the same without a key (default `capacity_factor`).
      capacity_counts_k: True multiplies capacity by the router's choices (Mesh-TensorFlow, GShard);
        False does not (flaxformer).
      min_capacity: least number of slots per expert.
      group_size: tokens routed together; a device divides its tokens into equal groups of at most
        this size.
      expert_capacity: a fixed number of slots per expert, instead of the capacity factors. Every
        sequence (all tokens of an index of the first dimension of x) is then a group of its own,
        and its padding is routed and takes slots in the order of the tokens, as in transformers'
        Switch.
      dispatch: "capacity" gives every expert the same number of slots and drops what exceeds them
        (the paper's way); "dropless" dispatches every token, whatever the load.
      activation: "gated_gelu", "relu", or an elementwise function such as jnp.tanh.
      expert_dropout: dropout rate of the experts' hidden features.
      dtype: compute type of the experts.
      mesh: experts are sharded over its expert axis (and their hidden features over model), the
        leading dimension of the input over data and expert.

    Padding neither takes slots (except with `expert_capacity`) nor enters statistics; capacity is
    computed from the real tokens.

    Raises:
      ValueError: an argument is out of range; the router cannot be called by the layer, chooses
        more experts than there are, or fills slots (Expert Choice) with dropless dispatch; the
        mesh does not divide the experts or their hidden features.
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
        expert_capacity: int | None = None,
        dispatch: str = "capacity",
        activation: Activation = "gated_gelu",
        expert_dropout: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        stack: tuple[int, ...] = (),
        mesh: Mesh | None = None,
        rngs: nnx.Rngs,
    ):
        self.route, self.dispatch, self.mesh = router, dispatch, mesh
        self.d_model, self.num_experts = d_model, num_experts
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        if eval_capacity_factor is None:
            self.eval_capacity_factor = capacity_factor
        self.capacity_choices = 1
        if capacity_counts_k:
            self.capacity_choices = getattr(router, "num_choices", 1) or 1
        self.min_capacity, self.group_size = min_capacity, group_size
        self.expert_capacity = expert_capacity
        self._check_arguments(d_ff, expert_dropout)

        with use_mesh(mesh):
            self.router = RouterWeights(d_model, num_experts, router, stack=stack, rngs=rngs)
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
        self.ragged = dispatch == "dropless" and ragged.is_preferred(mesh)
        self.parallel = ExpertParallel()
        if mesh is not None:
            layouts = parameter_layouts(self, mesh, dtype, len(stack))
            self.parallel = ExpertParallel(mesh, layouts, check_vma=not self.ragged)

    def _check_arguments(self, d_ff: int, expert_dropout: float) -> None:
        sizes = {
            "d_model": self.d_model,
            "d_ff": d_ff,
            "num_experts": self.num_experts,
            "min_capacity": self.min_capacity,
            "group_size": self.group_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}: use 1 or more")
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            if not 0 < factor < math.inf:
                raise ValueError(f"{name} is {factor}: use a number above 0, for example 1.25")
        if not 0 <= expert_dropout < 1:
            raise ValueError(f"expert_dropout is {expert_dropout}: use 0 or more and less than 1")
        check_router(self.route)
        check_dispatch(self.dispatch, self.route)
        check_expert_capacity(self.expert_capacity, self.dispatch)
        num_choices = getattr(self.route, "num_choices", 1) or 1
        if num_choices > self.num_experts:
            raise ValueError(
                f"num_experts is {self.num_experts}, but router {self.route} chooses {num_choices} "
                "different experts: use more experts or a router with fewer choices"
            )
        check_mesh(self.mesh, "this MoE layer", experts=self.num_experts, d_ff=d_ff)

    def __call__(
        self,
        x: Float[Array, "*B D"],
        mask: Bool[Array, "*B"] | None = None,
        *,
        key: OptionalKey = None,
        token_ids: Int[Array, "*B"] | None = None,
        drop: bool = True,
    ) -> tuple[Float[Array, "*B D"], LayerStats, TokenRouting]:
        """Outputs, statistics of the batch, and the routing of each token.

        Args:
          x: tokens, of any number of leading dimensions.
          mask: True for real tokens (default all). Padding, like dropped tokens, returns 0 (with
            `expert_capacity` what its expert returns).
          key: for training: turns the router's randomness and expert dropout on, and selects the
            training capacity factor.
          token_ids: for routers that read them (Hash).
          drop: False dispatches every token, whatever the load (decoding, scoring).

        Raises:
          ValueError: x does not have d_model features, or mask or token_ids another shape than x.
        """
        leading = x.shape[:-1]
        tokens = Tokens(x, jnp.ones(leading, bool) if mask is None else mask, token_ids)
        self._check_inputs(tokens)
        batch, length = leading[0] if leading else 1, math.prod(leading[1:])
        shards = self.parallel.axis_size(*BATCH_AXES)
        padded = shards * max(1, math.ceil(batch / shards))

        def to_batch(array: Array) -> Array:
            features = array.shape[len(leading) :]
            return _pad_rows(array.reshape(batch, length, *features), padded)

        def from_batch(array: Array) -> Array:
            return array[:batch].reshape(*leading, *array.shape[2:])

        forward = functools.partial(MoE._forward, drop=drop)
        if self.mesh is None:
            forward = functools.partial(forward, self)
        else:
            forward = self.parallel.shard(forward, self)
        outputs, stats = forward(jax.tree.map(to_batch, tokens), key)
        y, routing = jax.tree.map(from_batch, outputs)
        return y, stats, routing

    def _check_inputs(self, tokens: Tokens) -> None:
        leading, features = tokens.x.shape[:-1], tokens.x.shape[-1]
        if features != self.d_model:
            raise ValueError(f"x has {features} features per token, but d_model is {self.d_model}")
        for name in ("mask", "token_ids"):
            array = getattr(tokens, name)
            if array is not None and array.shape != leading:
                raise ValueError(f"{name} has shape {array.shape}; the tokens of x have {leading}")

    def _forward(
        self, tokens: Tokens, key: OptionalKey, drop: bool
    ) -> tuple[tuple[Float[Array, "B L D"], TokenRouting], LayerStats]:
        """The layer on one device's tokens; statistics are those of all devices."""
        parallel, num_experts = self.parallel, self.num_experts
        route_key, dropout_key = (None, None) if key is None else jax.random.split(key)
        groups, real = self._group(tokens, drop)
        # padding is zeroed: whatever it contains must not reach the router's gradient
        logits = self.router(jnp.where(groups.mask[..., None], groups.x, 0))
        routing = self._route(logits, groups, route_key, drop)

        # all devices along the model axis process the same tokens
        x = parallel.cast_varying(groups.x.reshape(-1, self.d_model), "model")
        if self._is_dropless(drop):
            y = self._dropless(x, routing, dropout_key, drop)
        else:
            indices = parallel.cast_varying(dispatch_indices(routing, num_experts), "model")
            slots = dispatch(x, indices).reshape(num_experts, -1, self.d_model)
            slots = parallel.all_to_all(slots, split_axis=0, concat_axis=1)
            slots = self.experts(slots, dropout_key, parallel)
            slots = parallel.all_to_all(slots, split_axis=1, concat_axis=0)
            y = combine(slots.reshape(-1, self.d_model), indices)
        if parallel.axis_size("model") > 1:
            y = parallel.psum(y, "model")

        batch, length, _ = tokens.x.shape
        y = y[: batch * length].reshape(batch, length, self.d_model)
        if self.expert_capacity is not None:
            routing = without_padding(routing, real, num_experts)
        per_token = token_routing(routing, num_experts, (batch, length))
        stats = parallel.psum(layer_stats(logits, real, routing), *BATCH_AXES)
        return (y, per_token), stats

    def _group(self, tokens: Tokens, drop: bool) -> tuple[Tokens, Bool[Array, "G S"]]:
        """The same tokens in groups [G, S, ..], filled up with padding, and the mask of the real
        ones. The groups' own mask is True for those to route."""
        if self.expert_capacity is not None and drop:
            everything = jnp.ones_like(tokens.mask)
            return tokens._replace(mask=everything), tokens.mask
        num_tokens = tokens.mask.size
        num_groups = max(1, math.ceil(num_tokens / self.group_size))
        group_tokens = max(1, math.ceil(num_tokens / num_groups))

        def to_groups(array: Array) -> Array:
            features = array.shape[2:]
            flat = _pad_rows(array.reshape(num_tokens, *features), num_groups * group_tokens)
            return flat.reshape(num_groups, group_tokens, *features)

        groups = jax.tree.map(to_groups, tokens)
        return groups, groups.mask

    def _route(
        self, logits: Float[Array, "G S E"], groups: Tokens, key: OptionalKey, drop: bool
    ) -> Routing:
        """The routing of each group, with a leading group axis."""
        num_groups, group_tokens = groups.mask.shape
        if drop and self.expert_capacity is not None:
            capacity = min(self.expert_capacity, group_tokens)
            limits = jnp.full(num_groups, capacity)
        elif drop and self.dispatch == "capacity":
            capacity, limits = group_capacity(
                groups.mask,
                self.num_experts,
                self.eval_capacity_factor if key is None else self.capacity_factor,
                choices=self.capacity_choices,
                minimum=self.min_capacity,
            )
        else:
            capacity, limits = group_tokens, jnp.full(num_groups, group_tokens)
        keys = None
        if key is not None:  # one for each group of all devices
            keys = jax.random.split(key, num_groups * self.parallel.axis_size(*BATCH_AXES))
            first_group = num_groups * self.parallel.axis_index(*BATCH_AXES)
            keys = jax.lax.dynamic_slice_in_dim(keys, first_group, num_groups)
        bias = None if self.router.bias_e is None else self.router.bias_e[...]

        def route_group(
            logits: Float[Array, "S E"],
            mask: Bool[Array, "S"],
            limit: Int[Array, ""],
            key: OptionalKey,
            token_ids: Int[Array, "S"] | None,
        ) -> Routing:
            routing = self.route(
                logits,
                mask,
                capacity=capacity,
                limit=limit,
                key=key,
                token_ids=token_ids,
                bias=bias,
            )
            return check_routing(self.route, routing, logits, capacity)

        return jax.vmap(route_group)(logits, groups.mask, limits, keys, groups.token_ids)

    def _is_dropless(self, drop: bool) -> bool:
        """Whether to dispatch without slots. With slots for all tokens, most would be empty."""
        fills_slots = getattr(self.route, "num_choices", 1) is None
        return self.dispatch == "dropless" or not (drop or fills_slots)

    def _dropless(
        self,
        x: Float[Array, "T D"],
        routing: Routing,
        dropout_key: OptionalKey,
        drop: bool,
    ) -> Float[Array, "T D"]:
        """Dispatch, experts and combine for every choice, whatever the load."""
        experts, parallel = self.experts, self.parallel
        weight = routing.combine_weight.reshape(x.shape[0], -1)
        weight = parallel.cast_varying(weight, "model")
        up, down = parallel.cast_varying(experts.matrices(), *MESH_AXES)

        def dropout_scale(key: Key[Array, ""], choice_ids: Int[Array, "M"]) -> Float[Array, "M F"]:
            expert = jnp.zeros_like(choice_ids)
            kept = experts.dropout_mask(key, expert, choice_ids, parallel)
            return kept / (1 - experts.dropout)

        num_devices = parallel.axis_size("expert")
        # a CPU multiplies single rows well; other devices compute several in the time of one
        smallest = 1 if platform(self.mesh) == "cpu" and not drop else 8
        function = ExpertFunction(
            activation=functools.partial(activate, experts.activation),
            dropout_scale=dropout_scale,
            block_rows=block_size(weight.size * num_devices, self.num_experts, smallest),
            save_hidden=drop and (num_devices == 1 or self.ragged),
        )
        inputs = ExpertInputs(x.astype(experts.dtype), weight, up, down)
        transport = ragged if self.ragged else dropless
        return transport.dispatch_and_combine(
            function,
            inputs,
            routing,
            dropout_key=dropout_key if experts.dropout else None,
            parallel=parallel,
        )


def _pad_rows(array: Shaped[Array, "rows *S"], num_rows: int) -> Shaped[Array, "padded *S"]:
    missing = num_rows - array.shape[0]
    return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
