"""Routers: logits in, `Routing` out.

A router is a function of one group's logits `[S, E]`, its padding mask `[S]` and a static number
of slots per expert. It depends neither on the experts nor on how tokens are dispatched to them.

To write one, choose experts and weights and let `assign` put them into the experts' queues::

    def loudest(logits, mask, *, capacity, limit=None, **_):
        probs = jax.nn.softmax(logits)
        expert = jnp.argmax(logits, -1)[:, None]
        weight = probs.max(-1)[:, None]
        return assign(expert, weight, probs, mask, capacity=capacity, limit=limit)

S tokens in a group, E experts, K choices per token, C capacity (slots per expert).
"""

import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moekit.errors import unknown

PRIORITIES = ("token", "choice", "batch")

Logits = Float[Array, "S E"]
Mask = Bool[Array, "S"]
Limit = Int[Array, ""] | None
OptionalKey = Key[Array, ""] | None


@no_type_check  # a pytree: tree.map and vmap rebuild it around leaves of any shape
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert, indexed both by token and by slot.

    `slot` and `slot_to_choice` are inverse to each other: choice `s * K + k` of a token has the
    slot `e * C + position`. The values `E`, `E * C` and `S * K` mean that there is none.
    """

    expert_index: Int[Array, "S K"]  # E where there is no choice (padding, unused second expert)
    combine_weight: Float[Array, "S K"]  # float32; 0 where the choice was dropped
    slot: Int[Array, "S K"]  # E * C where the choice was dropped
    slot_to_choice: Int[Array, "E*C"]  # S * K where the slot is empty
    probs: Float[Array, "S E"]  # softmax of the logits, float32
    capacity: int = field(metadata={"static": True})
    balance_choices: int = field(metadata={"static": True})  # leading choices in the balance loss


@runtime_checkable
class Router(Protocol):
    """The interface of a router; a plain function with `**_` satisfies it.

    Optional attributes:
      num_choices: experts per token, used for capacity and FLOP counts (default 1); None: variable
        (Expert Choice).
      causal: a token's routing does not depend on later tokens, which a decoder requires (default
        False).
      balanced_by_bias: the layer keeps a per-expert bias and passes it (default False); the
        router's `rate` is then the step size of its update.
    """

    def __call__(
        self,
        logits: Logits,
        mask: Mask,
        *,
        capacity: int,
        limit: Limit = None,
        key: OptionalKey = None,
        token_ids: Int[Array, "S"] | None = None,
        bias: Float[Array, "E"] | None = None,
    ) -> Routing: ...


def check_router(router: Router) -> None:
    """Check from its signature that the layer can call a router.

    Raises:
      ValueError: the router lacks an argument that the layer passes, or requires another one.
    """
    name = _router_name(router)
    try:
        inspect.signature(router).bind(
            None, None, capacity=1, limit=None, key=None, token_ids=None, bias=None
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"router {name} {error}: the layer calls router(logits, mask, capacity=, limit=, key=, "
            "token_ids=, bias=); add what is missing, or **_ for what the router does not use"
        ) from None
    if getattr(router, "balanced_by_bias", False) and not hasattr(router, "rate"):
        raise ValueError(f"router {name} has balanced_by_bias=True but no rate: add `rate = 1e-3`")


def check_routing(router: Router, routing: Any, logits: Logits, capacity: int) -> Routing:
    """Check what a router returned, and return it.

    Raises:
      ValueError: it is not a `Routing`, or one of its fields has the wrong shape.
    """
    if not isinstance(routing, Routing):
        raise ValueError(
            f"router {_router_name(router)} returned {type(routing).__name__}: return a Routing, "
            "for example the result of moekit.assign"
        )
    num_tokens, num_experts = logits.shape
    per_choice = (num_tokens, *jnp.shape(routing.expert_index)[-1:])
    expected = {
        "expert_index": per_choice,
        "combine_weight": per_choice,
        "slot": per_choice,
        "slot_to_choice": (num_experts * capacity,),
        "probs": (num_tokens, num_experts),
    }
    for name, shape in expected.items():
        actual = jnp.shape(getattr(routing, name))
        if actual != shape:
            raise ValueError(
                f"router {_router_name(router)} returned a Routing whose {name} has shape "
                f"{actual}: {num_tokens} tokens, {num_experts} experts and {capacity} slots need "
                f"{shape}"
            )
    if routing.capacity != capacity:
        raise ValueError(
            f"router {_router_name(router)} returned a Routing of capacity {routing.capacity}: use "
            f"the capacity that it was called with, {capacity}"
        )
    return routing


def _router_name(router: Router) -> str:
    return getattr(router, "__name__", type(router).__name__)


def top_k(scores: Float[Array, "S E"], k: int) -> tuple[Int[Array, "S K"], Bool[Array, "S K E"]]:
    """Indices and one-hot rows of the k largest scores; ties go to the lowest index.

    k argmaxes: cheaper than a sort for few choices per token, and with one-hot rows the gradient
    of the chosen probabilities is dense instead of a scatter.

    Raises:
      ValueError: k exceeds the number of experts.
    """
    num_experts = scores.shape[-1]
    if k > num_experts:
        raise ValueError(f"a router with k={k} cannot choose among {num_experts} experts: lower k")
    taken = jnp.zeros(scores.shape, bool)
    indices, onehots = [], []
    for _ in range(k):
        index = jnp.argmax(jnp.where(taken, -jnp.inf, scores), axis=-1)
        onehot = index[:, None] == jnp.arange(num_experts)
        taken = taken | onehot
        indices.append(index)
        onehots.append(onehot)
    return jnp.stack(indices, 1), jnp.stack(onehots, 1)


def _queue_order(priority: str, confidence: Float[Array, "S"], k: int) -> Int[Array, "SK"]:
    """The choices `s * K + k` in the order in which they enter the experts' queues."""
    tokens = jnp.arange(confidence.shape[0])
    if priority == "batch":
        tokens = jnp.argsort(-confidence)
    choices = tokens[None, :] * k + jnp.arange(k)[:, None]  # [K, S]: all first choices first
    if priority == "token":
        choices = choices.T
    return choices.reshape(-1)


def assign(
    expert_index: Int[Array, "S K"],
    weight: Float[Array, "S K"],
    probs: Float[Array, "S E"],
    mask: Mask,
    *,
    capacity: int,
    limit: Limit = None,
    priority: str = "token",
    balance_choices: int | None = None,
) -> Routing:
    """Put each choice into its expert's queue; choices at positions from `limit` on are dropped.

    Args:
      expert_index: chosen experts, E for none; choices of padding are removed here.
      weight: combine weights of the choices.
      probs: softmax of the logits, for the balance loss.
      mask: True for real tokens.
      capacity: slots per expert (static).
      limit: slots in use, at most `capacity` (default all).
      priority: order of the queue. "token": tokens in order, each with all its choices. "choice":
        all first choices before any second (GShard). "batch": the same, with the most confident
        tokens first (ST-MoE).
      balance_choices: number of leading choices that the balance loss counts (default all).
    """
    num_tokens, k = expert_index.shape
    num_experts = probs.shape[-1]
    no_slot, no_choice = num_experts * capacity, num_tokens * k
    limit = capacity if limit is None else limit
    expert_index = jnp.where(mask[:, None], expert_index, num_experts)
    confidence = jnp.where(mask, weight[:, 0], -jnp.inf)
    in_token_order = priority == "token" or (priority == "choice" and k == 1)

    order = _queue_order("token" if in_token_order else priority, confidence, k)
    expert = expert_index.reshape(-1)
    if not in_token_order:
        expert = expert[order]
    onehot = (expert[:, None] == jnp.arange(num_experts)).astype(jnp.int32)
    position_in_expert = jnp.sum(jnp.cumsum(onehot, axis=0) * onehot, axis=1) - 1
    kept = (expert < num_experts) & (position_in_expert < limit)
    slot = jnp.where(kept, expert * capacity + position_in_expert, no_slot)

    slot_to_choice = jnp.full(no_slot, no_choice).at[slot].set(order, mode="drop")
    if not in_token_order:
        slot = jnp.zeros(no_choice, slot.dtype).at[order].set(slot)
    slot = slot.reshape(num_tokens, k)
    weight = jnp.where(slot < no_slot, weight, 0.0)
    if balance_choices is None:
        balance_choices = k
    return Routing(expert_index, weight, slot, slot_to_choice, probs, capacity, balance_choices)


class _KChoices:
    """What routers with k choices per token share; `k` and `priority` are their fields."""

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"{type(self).__name__}.k is {self.k!r}: use 1 or more experts")
        _check_priority(self.priority)

    @property
    def num_choices(self) -> int:
        return self.k

    @property
    def causal(self) -> bool:
        return self.priority == "token" or (self.priority == "choice" and self.k == 1)


def _check_priority(priority: str) -> None:
    if priority not in PRIORITIES:
        raise unknown("priority", priority, PRIORITIES)


@dataclass(frozen=True)
class TopK(_KChoices):
    """Every token chooses its k most probable experts (Shazeer 2017; ST-MoE, Zoph 2022: k = 2).

    Attributes:
      k: experts per token.
      normalise: divide the weights by their sum (Mesh-TensorFlow, GShard); False keeps the raw
        probabilities (flaxformer).
      priority: order of the experts' queues, see `assign`; "batch" is ST-MoE's.
    """

    k: int = 2
    normalise: bool = False
    priority: str = "token"
    balanced_by_bias: ClassVar[bool] = False

    def __call__(
        self, logits: Logits, mask: Mask, *, capacity: int, limit: Limit = None, **_: Any
    ) -> Routing:
        probs = jax.nn.softmax(logits.astype(jnp.float32))
        index, onehot = top_k(probs, self.k)
        weight = jnp.sum(probs[:, None] * onehot, -1)
        if self.normalise:
            weight = weight / jnp.sum(weight, -1, keepdims=True)
        return assign(
            index, weight, probs, mask, capacity=capacity, limit=limit, priority=self.priority
        )


def Switch() -> TopK:
    """Top-1, weighted by its raw probability (Fedus 2021): y = p_i(x) E_i(x), i = argmax p."""
    return TopK(k=1)


@dataclass(frozen=True)
class GShard:
    """Top-2 with a random second expert and balance loss from first choices (Lepikhin 2020).

    With a key (training) the second expert is used with probability min(1, g2 / threshold), where
    g1 and g2 are the two weights divided by their sum; without a key always.

    Attributes:
      threshold: 0.2 in Mesh-TensorFlow.
      normalise: combine with g1 and g2; False keeps the raw probabilities.
      priority: order of the experts' queues, see `assign`.
    """

    threshold: float = 0.2
    normalise: bool = True
    priority: str = "choice"
    num_choices: ClassVar[int] = 2
    balanced_by_bias: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_priority(self.priority)

    @property
    def causal(self) -> bool:
        return self.priority == "token"

    def __call__(
        self,
        logits: Logits,
        mask: Mask,
        *,
        capacity: int,
        limit: Limit = None,
        key: OptionalKey = None,
        **_: Any,
    ) -> Routing:
        probs = jax.nn.softmax(logits.astype(jnp.float32))
        index, onehot = top_k(probs, 2)
        weight = jnp.sum(probs[:, None] * onehot, -1)
        normalised = weight / jnp.sum(weight, -1, keepdims=True)
        if key is not None:
            used = jax.random.uniform(key, mask.shape) < normalised[:, 1] / self.threshold
            no_expert = probs.shape[-1]
            index = index.at[:, 1].set(jnp.where(used, index[:, 1], no_expert))
        return assign(
            index,
            normalised if self.normalise else weight,
            probs,
            mask,
            capacity=capacity,
            limit=limit,
            priority=self.priority,
            balance_choices=1,
        )


@dataclass(frozen=True)
class ExpertChoice:
    """Every expert chooses its `limit` tokens of highest probability (Zhou 2022).

    The load is balanced without an auxiliary loss. A token may get no expert or many, so K = E
    here. The choice depends on all tokens of the group: it is not causal.
    """

    num_choices: ClassVar[None] = None
    causal: ClassVar[bool] = False
    balanced_by_bias: ClassVar[bool] = False

    def __call__(
        self, logits: Logits, mask: Mask, *, capacity: int, limit: Limit = None, **_: Any
    ) -> Routing:
        num_tokens, num_experts = logits.shape
        no_slot, no_choice = num_experts * capacity, num_tokens * num_experts
        experts = jnp.arange(num_experts)
        limit = capacity if limit is None else limit
        probs = jax.nn.softmax(logits.astype(jnp.float32))

        filled = min(capacity, num_tokens)
        scores = jnp.where(mask[:, None], probs, -1.0).T  # [E, S]
        _, token = jax.lax.top_k(scores, filled)
        used = mask[token] & (jnp.arange(filled) < limit)
        choice = jnp.where(used, token * num_experts + experts[:, None], no_choice)
        never_filled = ((0, 0), (0, capacity - filled))
        choice = jnp.pad(choice, never_filled, constant_values=no_choice)
        slot_to_choice = choice.reshape(-1)

        slot = jnp.full(no_choice, no_slot).at[slot_to_choice].set(jnp.arange(no_slot), mode="drop")
        slot = slot.reshape(num_tokens, num_experts)
        chosen = slot < no_slot
        index = jnp.where(chosen, experts, num_experts)
        weight = jnp.where(chosen, probs, 0.0)
        return Routing(index, weight, slot, slot_to_choice, probs, capacity, num_experts)


@dataclass(frozen=True)
class LossFree(_KChoices):
    """Auxiliary-loss-free balancing: top-k of probability + bias, weighted by the probability
    alone (Wang 2024, DeepSeek-V3).

    The layer keeps the bias; the training step adds `rate * sign(mean load - load)` to it.
    """

    k: int = 1
    rate: float = 1e-3
    priority: str = "token"
    balanced_by_bias: ClassVar[bool] = True

    def __call__(
        self,
        logits: Logits,
        mask: Mask,
        *,
        capacity: int,
        limit: Limit = None,
        bias: Float[Array, "E"] | None = None,
        **_: Any,
    ) -> Routing:
        probs = jax.nn.softmax(logits.astype(jnp.float32))
        scores = probs if bias is None else probs + jax.lax.stop_gradient(bias)
        index, onehot = top_k(scores, self.k)
        weight = jnp.sum(probs[:, None] * onehot, -1)
        return assign(
            index, weight, probs, mask, capacity=capacity, limit=limit, priority=self.priority
        )


@dataclass(frozen=True)
class Hash:
    """Baseline: a fixed pseudo-random expert per token id, weight 1 (Roller 2021)."""

    num_choices: ClassVar[int] = 1
    causal: ClassVar[bool] = True
    balanced_by_bias: ClassVar[bool] = False

    def __call__(
        self,
        logits: Logits,
        mask: Mask,
        *,
        capacity: int,
        limit: Limit = None,
        token_ids: Int[Array, "S"] | None = None,
        **_: Any,
    ) -> Routing:
        if token_ids is None:
            raise ValueError("the Hash router needs token_ids: call the layer with token_ids=")
        # Knuth's multiplicative hash in uint32 spreads neighbouring ids
        hashed = token_ids.astype(jnp.uint32) * jnp.uint32(2654435761)
        expert = (hashed >> 16) % logits.shape[-1]
        index = expert.astype(jnp.int32)[:, None]
        return _assign_with_weight_one(index, logits, mask, capacity, limit)


@dataclass(frozen=True)
class Random:
    """Baseline: a uniformly random expert per token, weight 1; a fixed draw without a key."""

    num_choices: ClassVar[int] = 1
    causal: ClassVar[bool] = True
    balanced_by_bias: ClassVar[bool] = False

    def __call__(
        self,
        logits: Logits,
        mask: Mask,
        *,
        capacity: int,
        limit: Limit = None,
        key: OptionalKey = None,
        **_: Any,
    ) -> Routing:
        key = jax.random.key(0) if key is None else key
        index = jax.random.randint(key, (mask.shape[0], 1), 0, logits.shape[-1])
        return _assign_with_weight_one(index, logits, mask, capacity, limit)


def _assign_with_weight_one(
    index: Int[Array, "S 1"], logits: Logits, mask: Mask, capacity: int, limit: Limit
) -> Routing:
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    weight = jnp.ones(index.shape)
    return assign(index, weight, probs, mask, capacity=capacity, limit=limit)


ROUTERS = {
    "switch": Switch(),
    "top2": TopK(k=2),
    "gshard": GShard(),
    "expert-choice": ExpertChoice(),
    "loss-free": LossFree(),
    "hash": Hash(),
    "random": Random(),
}


def router(name: str) -> Router:
    """The router of that name with its default settings; ValueError for an unknown name."""
    if name not in ROUTERS:
        raise unknown("router", name, ROUTERS)
    return ROUTERS[name]
