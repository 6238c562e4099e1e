"""Routers: logits in, `Routing` out.

A router is a function of one group's logits `[S, E]`, its padding mask `[S]` and a static number
of slots per expert. It knows nothing of the experts nor of how tokens travel (see `capacity.py`).
S tokens in a group, E experts, K choices per token, C capacity (slots per expert).

Writing one is picking experts and weights and letting `assign` queue them::

    def loudest(logits, mask, *, capacity, limit=None, **_):
        probs = jax.nn.softmax(logits)
        return assign(jnp.argmax(logits, -1)[:, None], probs.max(-1)[:, None], probs, mask,
                      capacity=capacity, limit=limit)
"""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moekit.errors import unknown

PRIORITIES = ("token", "choice", "batch")


@no_type_check  # a pytree: tree.map and vmap rebuild it around leaves of any shape
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Who goes where, seen from the tokens and from the slots.

    `slot` and `assignment` are each other's inverse: a token's k-th choice knows its slot
    `e * C + position`, and a slot knows its choice `s * K + k`. `E`, `E * C` and `S * K` mean none.
    """

    expert_index: Int[Array, "S K"]  # E where there is no choice (padding, unused second expert)
    combine_weight: Float[Array, "S K"]  # float32; 0 where the choice was dropped
    slot: Int[Array, "S K"]  # E * C where dropped
    assignment: Int[Array, "E*C"]  # S * K where the slot is empty
    probs: Float[Array, "S E"]  # softmax of the logits, float32
    capacity: int = field(metadata={"static": True})
    balance_choices: int = field(metadata={"static": True})  # choices the balance loss counts


@runtime_checkable
class Router(Protocol):
    """What the layer asks of a router; a plain function with `**_` will do.

    `num_choices` (default 1) only enters FLOP counts and capacity, None stands for as many as
    there are slots; `causal` (default False) says
    that a token's routing ignores later tokens, which a decoder needs; `balanced_by_bias` (default
    False) asks the layer to keep a per-expert bias.
    """

    def __call__(
        self,
        logits: Float[Array, "S E"],
        mask: Bool[Array, "S"],
        *,
        capacity: int,
        limit: Int[Array, ""] | None = None,
        key: Key[Array, ""] | None = None,
        token_ids: Int[Array, "S"] | None = None,
        bias: Float[Array, "E"] | None = None,
    ) -> Routing: ...


def top_k(scores: Float[Array, "S E"], k: int) -> tuple[Int[Array, "S K"], Bool[Array, "S K E"]]:
    """Indices and one-hot rows of the k largest scores; ties go to the lowest index.

    k argmaxes: cheaper than a sort for the few choices a token has, and the one-hot rows make the
    backward pass of reading the chosen probabilities dense instead of a scatter.
    """
    experts = jnp.arange(scores.shape[-1])
    taken = jnp.zeros(scores.shape, bool)
    indices, onehots = [], []
    for _ in range(k):
        index = jnp.argmax(jnp.where(taken, -jnp.inf, scores), axis=-1)
        onehot = index[:, None] == experts
        taken = taken | onehot
        indices.append(index)
        onehots.append(onehot)
    return jnp.stack(indices, 1), jnp.stack(onehots, 1)


def _queue_order(priority: str, confidence: Float[Array, "S"], k: int) -> Int[Array, "SK"]:
    """The choices `s * K + k` in the order in which experts serve them."""
    s = confidence.shape[0]
    tokens = jnp.argsort(-confidence) if priority == "batch" else jnp.arange(s)
    choices = tokens[None, :] * k + jnp.arange(k)[:, None]  # [K, S]: all first choices first
    return (choices.T if priority == "token" else choices).reshape(-1)


def assign(
    expert_index: Int[Array, "S K"],
    weight: Float[Array, "S K"],
    probs: Float[Array, "S E"],
    mask: Bool[Array, "S"],
    *,
    capacity: int,
    limit: Int[Array, ""] | None = None,
    priority: str = "token",
    balance_choices: int | None = None,
) -> Routing:
    """Queue chosen experts' tokens into slots; what comes after `limit` is dropped.

    Args:
      expert_index: chosen experts, E for none; padding is removed here.
      weight: combine weights of the choices.
      capacity: slots per expert (static); `limit` (at most capacity) are in use.
      priority: "token" serves tokens in order with all their choices, "choice" all first choices
        before any second (GShard), "batch" the same with the most confident tokens first (ST-MoE).
      balance_choices: how many leading choices the balance loss counts (default all).
    """
    s, k = expert_index.shape
    num_experts = probs.shape[-1]
    limit = capacity if limit is None else limit
    expert_index = jnp.where(mask[:, None], expert_index, num_experts)
    confidence = jnp.where(mask, weight[:, 0], -jnp.inf)
    if k == 1 and priority == "choice":
        priority = "token"
    order = _queue_order(priority, confidence, k)
    in_order = priority == "token"
    queue = expert_index.reshape(-1) if in_order else expert_index.reshape(-1)[order]
    onehot = (queue[:, None] == jnp.arange(num_experts)).astype(jnp.int32)
    position = jnp.sum(jnp.cumsum(onehot, axis=0) * onehot, axis=1) - 1
    kept = (queue < num_experts) & (position < limit)
    none = num_experts * capacity
    queue_slot = jnp.where(kept, queue * capacity + position, none)
    assignment = jnp.full(none, s * k).at[queue_slot].set(order, mode="drop", unique_indices=False)
    if in_order:
        slot = queue_slot.reshape(s, k)
    else:
        slot = jnp.zeros(s * k, queue_slot.dtype).at[order].set(queue_slot).reshape(s, k)
    weight = jnp.where(slot < none, weight, 0.0)
    choices = k if balance_choices is None else balance_choices
    return Routing(expert_index, weight, slot, assignment, probs, capacity, choices)


class _KChoices:
    """What routers with k choices a token share; `k` and `priority` are their fields."""

    def __post_init__(self):
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"{type(self).__name__}.k is {self.k!r}: choose 1 or more experts")
        _check_priority(self)

    @property
    def num_choices(self) -> int:
        return self.k

    @property
    def causal(self) -> bool:
        return self.priority == "token" or (self.priority == "choice" and self.k == 1)


@dataclass(frozen=True)
class TopK(_KChoices):
    """Every token takes its k most probable experts (Shazeer 2017; ST-MoE, Zoph 2022, for k = 2).

    `normalise` divides the weights by their sum (Mesh-TensorFlow, GShard); False keeps the raw
    probabilities (flaxformer). `priority` "batch" is ST-MoE's batch-prioritised order.
    """

    k: int = 2
    normalise: bool = False
    priority: str = "token"
    balanced_by_bias: ClassVar[bool] = False

    def __call__(self, logits, mask, *, capacity, limit=None, **_) -> Routing:
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

    With a key the second expert is used with probability min(1, g2 / threshold) (Mesh-TensorFlow:
    threshold 0.2); without one (evaluation) always. Weights are divided by g1 + g2 if `normalise`.
    """

    threshold: float = 0.2
    normalise: bool = True
    priority: str = "choice"
    num_choices: ClassVar[int] = 2
    balanced_by_bias: ClassVar[bool] = False

    def __post_init__(self):
        _check_priority(self)

    @property
    def causal(self) -> bool:
        return self.priority == "token"

    def __call__(self, logits, mask, *, capacity, limit=None, key=None, **_) -> Routing:
        probs = jax.nn.softmax(logits.astype(jnp.float32))
        index, onehot = top_k(probs, 2)
        weight = jnp.sum(probs[:, None] * onehot, -1)
        share = weight / jnp.sum(weight, -1, keepdims=True)
        if key is not None:
            used = jax.random.uniform(key, mask.shape) < share[:, 1] / self.threshold
            index = index.at[:, 1].set(jnp.where(used, index[:, 1], probs.shape[-1]))
        return assign(
            index,
            share if self.normalise else weight,
            probs,
            mask,
            capacity=capacity,
            limit=limit,
            priority=self.priority,
            balance_choices=1,
        )


@dataclass(frozen=True)
class ExpertChoice:
    """Every expert takes its `limit` best tokens by softmax-over-experts score (Zhou 2022).

    Perfect balance without an auxiliary loss; a token may get none or many experts, so K = E here.
    The choice looks at all tokens of the group: it is not causal.
    """

    num_choices: ClassVar[None] = None  # as many as the slots allow
    causal: ClassVar[bool] = False
    balanced_by_bias: ClassVar[bool] = False

    def __call__(self, logits, mask, *, capacity, limit=None, **_) -> Routing:
        s, e = logits.shape
        probs = jax.nn.softmax(logits.astype(jnp.float32))
        rows = min(capacity, s)
        _, tokens = jax.lax.top_k(jnp.where(mask[:, None], probs, -1.0).T, rows)  # [E, C]
        taken = mask[tokens] & (jnp.arange(rows) < (capacity if limit is None else limit))
        experts = jnp.arange(e)[:, None]
        assignment = jnp.where(taken, tokens * e + experts, s * e)
        assignment = jnp.pad(
            assignment, ((0, 0), (0, capacity - rows)), constant_values=s * e
        ).reshape(-1)
        none = e * capacity
        slot = jnp.full(s * e, none).at[assignment].set(jnp.arange(none), mode="drop")
        chosen = slot.reshape(s, e) < none
        index = jnp.where(chosen, jnp.arange(e), e)
        weight = jnp.where(chosen, probs, 0.0)
        return Routing(index, weight, slot.reshape(s, e), assignment, probs, capacity, e)


@dataclass(frozen=True)
class LossFree(_KChoices):
    """Top-k of probability + bias, weighted by probability alone (Wang 2024, DeepSeek-V3).

    The layer keeps the bias and the training step moves it by `rate * sign(mean load - load)`.
    """

    k: int = 1
    rate: float = 1e-3
    priority: str = "token"
    balanced_by_bias: ClassVar[bool] = True

    def __call__(self, logits, mask, *, capacity, limit=None, bias=None, **_) -> Routing:
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

    def __call__(self, logits, mask, *, capacity, limit=None, token_ids=None, **_) -> Routing:
        if token_ids is None:
            raise ValueError("the Hash router needs token_ids: call the layer with token_ids=")
        # Knuth's multiplicative hash in uint32: neighbouring ids land far apart
        mixed = token_ids.astype(jnp.uint32) * jnp.uint32(2654435761)
        index = ((mixed >> 16) % logits.shape[-1]).astype(jnp.int32)[:, None]
        return _fixed(index, logits, mask, capacity, limit)


@dataclass(frozen=True)
class Random:
    """Baseline: a uniformly random expert per token, weight 1; without a key a fixed draw."""

    num_choices: ClassVar[int] = 1
    causal: ClassVar[bool] = True
    balanced_by_bias: ClassVar[bool] = False

    def __call__(self, logits, mask, *, capacity, limit=None, key=None, **_) -> Routing:
        key = jax.random.key(0) if key is None else key
        index = jax.random.randint(key, (mask.shape[0], 1), 0, logits.shape[-1])
        return _fixed(index, logits, mask, capacity, limit)


def _fixed(index, logits, mask, capacity, limit) -> Routing:
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    return assign(index, jnp.ones(index.shape), probs, mask, capacity=capacity, limit=limit)


def _check_priority(router) -> None:
    if router.priority not in PRIORITIES:
        raise unknown("priority", router.priority, PRIORITIES)


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
