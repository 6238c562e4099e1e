"""The MoE layer on one device against a slow oracle: a loop over experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moekit.moe.layer import MoE, RouterWeights
from moekit.moe.routing import (
    ExpertChoice,
    GShard,
    Hash,
    LossFree,
    Random,
    Routing,
    Switch,
    TopK,
    assign,
)
from moekit.moe.stats import RouterBias, update_router_bias

D, F, E = 8, 16, 4
ROUTERS = [
    Switch(),
    TopK(k=2),
    TopK(k=2, priority="batch", normalise=True),
    GShard(),
    ExpertChoice(),
    LossFree(k=2),
    Hash(),
    Random(),
]


def oracle(moe, x, routing):
    """y[s] = sum_k w[s, k] * FFN_expert(x[s]) over the kept choices, one expert at a time."""
    y = jnp.zeros_like(x)
    experts = moe.experts
    for expert in range(moe.num_experts):
        hidden = x @ experts.wi_edf[...][expert]
        if experts.activation == "relu":
            hidden = jax.nn.relu(hidden)
        elif experts.wg_edf is None:
            hidden = experts.activation(hidden)
        else:
            hidden = jax.nn.gelu(x @ experts.wg_edf[...][expert]) * hidden
        weight = jnp.where(routing.expert == expert, routing.weight, 0).sum(-1)
        y = y + weight[..., None] * (hidden @ experts.wo_efd[...][expert])
    return y


def layer(route, **changes):
    options = {"capacity_factor": 1.0, "min_capacity": 1, "group_size": 16} | changes
    return MoE(D, F, E, router=route, rngs=nnx.Rngs(0), **options)


def inputs(padding=5):
    x = jax.random.normal(jax.random.key(1), (3, 10, D))
    mask = jnp.arange(30).reshape(3, 10) % 10 < 10 - padding
    ids = jax.random.randint(jax.random.key(2), (3, 10), 0, 50)
    return x, mask, ids


@nnx.jit
def apply(moe, *inputs, **settings):
    """The layer as one program: one by one, its operations are compiled as often."""
    return moe(*inputs, **settings)


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def assert_close(got, expected, atol=1e-5):
    def close(a, b):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)

    jax.tree.map(close, got, expected)


@pytest.mark.parametrize(
    "route, activation",
    [(route, "gated_gelu") for route in ROUTERS] + [(Switch(), "relu")],
    ids=str,
)
def test_equals_the_oracle_and_ignores_what_padding_contains(route, activation):
    moe = layer(route, activation=activation)
    x, mask, ids = inputs()
    cotangent = jax.random.normal(jax.random.key(3), x.shape)
    graphdef, state = nnx.split(moe)

    def fast(state, x):
        y, stats, routing = nnx.merge(graphdef, state)(x, mask, token_ids=ids)
        losses = stats.balance_loss() + stats.router_z_loss()
        return jnp.vdot(y, cotangent) + losses, (y, stats, routing)

    def slow(state, x):
        module = nnx.merge(graphdef, state)
        _, stats, routing = module(x, mask, token_ids=ids)
        y = oracle(module, x, routing)
        losses = stats.balance_loss() + stats.router_z_loss()
        return jnp.vdot(y, cotangent) + losses, y

    @jax.jit  # one program for both
    def both(state, x):
        zeroed = jnp.where(mask[..., None], x, 0)
        return [
            jax.grad(fast, argnums=(0, 1), has_aux=True)(state, x),
            jax.grad(slow, argnums=(0, 1), has_aux=True)(state, zeroed),
        ]

    (gradients, (y, *seen)), (expected_gradients, expected) = both(state, x)
    assert_close((y, gradients), (expected, expected_gradients))
    assert float(jnp.abs(y).max()) > 0
    assert (y[~np.asarray(mask)] == 0).all()

    poisoned = jnp.where(mask[..., None], x, jnp.nan)
    (poisoned_gradients, (poisoned_y, *poisoned_seen)), _ = both(state, poisoned)
    assert_equal((poisoned_y, poisoned_gradients), (y, gradients))
    assert_equal(poisoned_seen, seen)


def test_appended_padding_changes_nothing():
    layers = [layer(route, group_size=4096) for route in ROUTERS[:6]]

    @jax.jit
    def run(x, mask, ids):
        results = [moe(x, mask, token_ids=ids) for moe in layers]
        return [(y, stats) for y, stats, _ in results]

    x, _, ids = inputs()
    mask = jnp.ones((3, 10), bool)
    expected = run(x, mask, ids)
    padding = ((0, 0), (0, 7))
    padded = run(jnp.pad(x, (*padding, (0, 0))), jnp.pad(mask, padding), jnp.pad(ids, padding))
    assert len(padded) == 6
    assert_close([(y[:, :10], stats) for y, stats in padded], expected, atol=1e-6)


def test_all_padding_is_finite_and_counts_nothing():
    moe = layer(TopK(k=2))
    y, stats, routing = apply(moe, jnp.full((1, 4, D), jnp.nan), jnp.zeros((1, 4), bool))
    assert (y == 0).all() and (routing.expert == -1).all()
    assert stats.tokens == 0 and stats.load.sum() == 0 and stats.dropped_tokens == 0
    assert stats.balance_loss() == 0 and stats.router_z_loss() == 0


def test_permuting_tokens_permutes_outputs_when_nothing_is_dropped():
    moe = layer(TopK(k=2), capacity_factor=8.0)
    x, _, _ = inputs()
    order = jax.random.permutation(jax.random.key(4), 10)
    x = x[:1]
    np.testing.assert_allclose(apply(moe, x[:, order])[0], apply(moe, x)[0][:, order], atol=1e-6)


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_any_function_is_an_activation(dispatch):
    def squared_relu(hidden):
        return jnp.where(hidden > 0, hidden * hidden, 0)

    moe = layer(TopK(k=2), activation=squared_relu, dispatch=dispatch)
    x, mask, _ = inputs()
    graphdef, state = nnx.split(moe)

    @jax.jit
    def both(state, x):
        module = nnx.merge(graphdef, state)
        y, _, routing = module(x, mask)
        gradient = jax.grad(lambda state: nnx.merge(graphdef, state)(x, mask)[0].sum())(state)
        slow = jax.grad(lambda state: oracle(nnx.merge(graphdef, state), x, routing).sum())(state)
        return (y, gradient["experts"]), (oracle(module, x, routing), slow["experts"])

    assert_close(*both(state, jnp.where(mask[..., None], x, 0)))


@pytest.mark.parametrize(
    "shape", [(), (12,), (4, 3), (2, 2, 3), (2, 1, 3, 2), (0,), (3, 0)], ids=str
)
def test_tokens_may_have_any_leading_dimensions(shape):
    moe = layer(TopK(k=2))
    num_tokens = int(np.prod(shape))
    x = jax.random.normal(jax.random.key(1), (*shape, D))
    mask = jnp.arange(num_tokens).reshape(shape) % 5 < 4
    y, stats, routing = apply(moe, x, mask)
    assert y.shape == x.shape and routing.entropy.shape == shape
    assert routing.expert.shape == routing.weight.shape == routing.kept.shape == (*shape, 2)
    assert stats.tokens == mask.sum()
    flat = x.reshape(num_tokens, D), mask.reshape(-1)
    flat_y, flat_stats, flat_routing = apply(moe, *flat)
    assert_equal(flat_stats, stats)
    assert_equal(flat_y, y.reshape(num_tokens, D))
    assert_equal(flat_routing.expert, routing.expert.reshape(num_tokens, 2))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"router": TopK(k=5)}, "num_experts is 4, but router .*k=5.* chooses 5"),
        ({"router": GShard(), "num_experts": 1}, "num_experts is 1, but router GShard.* chooses 2"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"d_model": 0}, "d_model is 0"),
        ({"d_ff": -1}, "d_ff is -1"),
        ({"capacity_factor": 0.0}, "^capacity_factor is 0"),
        ({"capacity_factor": -1.0}, "^capacity_factor is -1.0"),
        ({"capacity_factor": float("inf")}, "^capacity_factor is inf"),
        ({"capacity_factor": float("nan")}, "^capacity_factor is nan"),
        ({"eval_capacity_factor": 0.0}, "eval_capacity_factor is 0"),
        ({"group_size": 0}, "group_size is 0"),
        ({"min_capacity": 0}, "min_capacity is 0"),
        ({"expert_dropout": 1.0}, "expert_dropout is 1.0"),
        ({"expert_dropout": -0.1}, "expert_dropout is -0.1"),
        ({"activation": "gelu"}, "unknown activation 'gelu'.*gated_gelu"),
        ({"activation": jax.nn.glu}, r"returns shape \(1, 8\) for \(1, 16\): use an elementwise"),
        ({"activation": jnp.sum}, r"returns shape \(\) for"),
        ({"dispatch": "droples"}, "unknown dispatch.*did you mean 'dropless'"),
        ({"dispatch": "dropless", "router": ExpertChoice()}, "ExpertChoice fills every"),
    ],
)
def test_arguments_are_checked(changes, message):
    arguments = {"d_model": D, "d_ff": F, "num_experts": E} | changes
    with pytest.raises(ValueError, match=message):
        MoE(**arguments, rngs=nnx.Rngs(0))


def test_an_evaluation_capacity_of_its_own_is_used():
    x, _, _ = inputs()
    small = layer(Switch(), capacity_factor=8.0, eval_capacity_factor=0.1)
    assert apply(small, x)[1].dropped_tokens > 0


def test_inputs_are_checked():
    moe = layer(Hash())
    with pytest.raises(ValueError, match="x has 9 features per token, but d_model is 8"):
        moe(jnp.zeros((3, D + 1)))
    with pytest.raises(ValueError, match="the Hash router needs token_ids"):
        moe(jnp.zeros((3, D)))


def test_drops_are_counted_for_every_choice():
    moe = layer(TopK(k=2), capacity_factor=0.5)  # without k: 16 tokens, 2 slots for each expert
    x = jax.random.normal(jax.random.key(1), (1, 16, D))
    y, stats, routing = apply(moe, x)
    kept = np.asarray(routing.kept)
    assert stats.load.sum() == 32 and stats.kept.sum() == kept.sum() <= 8
    assert stats.dropped_assignments == 32 - kept.sum()
    dropped = ~kept.any(-1)
    assert stats.dropped_tokens == dropped.sum() > 0
    assert (np.asarray(y)[dropped] == 0).all()


def test_statistics_are_sums_over_groups():
    moe = layer(TopK(k=2), group_size=15, capacity_factor=8.0)
    x, _, _ = inputs()
    total = apply(moe, x)[1]
    halves = [apply(moe, half)[1] for half in x.reshape(2, 15, D)]
    assert_close(jax.tree.map(jnp.add, *halves), total)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_router_logits_are_matmuls_in_float32(dtype):
    """Also on a TPU, whose default precision for float32 is bfloat16."""
    router = RouterWeights(256, 8, TopK(k=2), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 16, 256)).astype(dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(router.w_de[...], np.float64)
    np.testing.assert_allclose(router(x), exact, atol=1e-6)
    (dot,) = (e for e in jax.make_jaxpr(router)(x).eqns if e.primitive.name == "dot_general")
    of_x, of_w = dot.params["precision"]
    assert of_w == jax.lax.Precision.HIGHEST
    assert of_x == of_w or dtype == jnp.bfloat16  # a bfloat16 operand is exact in one pass


def test_balance_loss_is_k_at_balance_and_experts_at_collapse():
    moe = layer(TopK(k=1), capacity_factor=8.0)
    x = jnp.ones((1, 8, D))
    moe.router.w_de[...] = jnp.zeros((D, E)).at[:, 2].set(10.0)
    stats = apply(moe, x)[1]
    np.testing.assert_allclose(stats.balance_loss(), E, rtol=1e-4)
    np.testing.assert_array_equal(stats.load, [0, 0, 8, 0])
    uniform = layer(TopK(k=2), capacity_factor=8.0)
    uniform.router.w_de[...] = jnp.zeros((D, E))
    stats = apply(uniform, x)[1]
    np.testing.assert_allclose(stats.balance_loss(), 2, rtol=1e-5)
    np.testing.assert_allclose(stats.router_z_loss(), np.log(E) ** 2, rtol=1e-5)


def test_training_uses_its_own_capacity_and_expert_dropout():
    moe = layer(Switch(), capacity_factor=1.0, eval_capacity_factor=8.0, expert_dropout=0.5)
    x, _, _ = inputs()
    y, stats, _ = apply(moe, x, key=jax.random.key(0))
    assert stats.dropped_tokens > 0 == apply(moe, x)[1].dropped_tokens
    other_y, _, _ = apply(moe, x, key=jax.random.key(1))
    assert not np.allclose(y, other_y)
    np.testing.assert_array_equal(moe(x, drop=False)[1].dropped_tokens, 0)


class Holder(nnx.Module):
    """A model with one sparse layer."""

    def __init__(self, moe):
        self.encoder = moe


def test_loss_free_bias_moves_towards_balance():
    moe = layer(LossFree(rate=0.01), capacity_factor=8.0)
    moe.router.w_de[...] = moe.router.w_de[...] * 20
    x = jax.random.normal(jax.random.key(1), (1, 64, D)) + 1.0
    graphdef, state = nnx.split(Holder(moe))

    @jax.jit
    def step(state):
        stats = nnx.merge(graphdef, state).encoder(x)[1]
        return update_router_bias(state, {"encoder": stats}), stats.load

    state, before = step(state)
    for _ in range(100):
        state, after = step(state)
    assert after.max() < before.max() and after.std() < 0.5 * before.std()
    assert isinstance(moe.router.bias_e, RouterBias)


def loudest(logits, mask, *, capacity, limit=None, **_):
    probs = jax.nn.softmax(logits)
    best = jnp.argmax(logits, -1)[:, None]
    return assign(best, probs.max(-1)[:, None], probs, mask, capacity=capacity, limit=limit)


def test_a_function_is_a_router():
    x, mask, _ = inputs()
    y, expected = (apply(layer(router), x, mask)[0] for router in (loudest, Switch()))
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_a_router_that_the_layer_cannot_call_is_refused():
    def forgetful(logits, mask, *, capacity):
        return loudest(logits, mask, capacity=capacity)

    def demanding(logits, mask, temperature, **_):
        return loudest(logits, mask, **_)

    with pytest.raises(
        ValueError, match=r"forgetful.*'limit'.*capacity=, limit=, key=, token_ids="
    ):
        layer(forgetful)
    with pytest.raises(ValueError, match=r"router demanding.*'temperature'"):
        layer(demanding)


def test_a_router_balanced_by_bias_needs_a_rate():
    def biased(logits, mask, *, capacity, limit=None, bias=None, **_):
        return loudest(logits + bias, mask, capacity=capacity, limit=limit)

    biased.balanced_by_bias = True
    with pytest.raises(ValueError, match="biased has balanced_by_bias=True but no rate"):
        layer(biased)
    biased.rate = 0.1
    assert layer(biased).router.bias_e.rate == 0.1


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda routing: (routing.expert_index, routing.combine_weight),
            "returned tuple: return a",
        ),
        (lambda routing: None, "returned NoneType: return a Routing"),
        ({"combine_weight": (3, 2)}, r"combine_weight has shape \(3, 2\).*need \(6, 1\)"),
        ({"expert_index": (5, 1)}, r"expert_index has shape \(5, 1\).*need \(6, 1\)"),
        ({"slot_to_choice": (9,)}, r"slot_to_choice has shape \(9,\).*4 experts and 2 slots"),
        ({"probs": (6, 3)}, r"probs has shape \(6, 3\).*need \(6, 4\)"),
        ({"capacity": 1}, "capacity 1: use the capacity that it was called with, 2"),
    ],
    ids=["a tuple", "None", "weights", "experts", "slots", "probabilities", "capacity"],
)
def test_what_a_router_returns_is_checked(change, message):
    def broken(logits, mask, *, capacity, limit=None, **_):
        routing = loudest(logits, mask, capacity=capacity, limit=limit)
        if callable(change):
            return change(routing)
        fields = {**vars(routing)}
        for name, shape in change.items():
            fields[name] = jnp.zeros(shape, int) if isinstance(shape, tuple) else shape
        return Routing(**fields)

    with pytest.raises(ValueError, match=f"router broken.*{message}"):
        apply(layer(broken), jnp.ones((6, D)))


@pytest.mark.parametrize("expert_capacity", [1, 2, 64])
def test_an_expert_capacity_counts_every_row_for_itself_and_its_padding_too(expert_capacity):
    moe = layer(Switch(), expert_capacity=expert_capacity)
    x, _, _ = inputs()
    mask = np.arange(10) >= np.array([[0], [4], [10]])  # without padding, on the left, all padding
    y, stats, routing = apply(moe, x, mask)

    chosen = np.asarray(jnp.argmax(moe.router(x), -1))
    num_before = np.zeros(chosen.shape, int)
    for row, token in np.ndindex(chosen.shape):
        num_before[row, token] = np.sum(chosen[row, :token] == chosen[row, token])
    kept = num_before < expert_capacity
    probability = np.asarray(jax.nn.softmax(moe.router(x)).max(-1))
    as_computed = dataclasses.replace(
        routing,
        expert=jnp.asarray(chosen)[..., None],
        weight=jnp.asarray(kept * probability)[..., None],
    )
    assert_close(y, oracle(moe, x, as_computed))
    assert_equal(routing.kept[..., 0], kept & mask)
    assert_equal(routing.expert[..., 0], np.where(mask, chosen, -1))
    assert float(stats.tokens) == mask.sum()
    assert float(stats.dropped_tokens) == (mask & ~kept).sum()


def test_an_expert_capacity_needs_slots_and_does_not_drop_while_decoding():
    with pytest.raises(ValueError, match="expert_capacity is 0: use 1 or more"):
        layer(Switch(), expert_capacity=0)
    with pytest.raises(ValueError, match='dispatch="dropless" has no slots'):
        layer(Switch(), expert_capacity=1, dispatch="dropless")
    x, _, _ = inputs()
    moe = layer(Switch(), expert_capacity=1)
    _, stats, _ = nnx.jit(lambda moe, x: moe(x, drop=False))(moe, x)
    assert float(stats.dropped_tokens) == 0
