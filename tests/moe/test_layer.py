"""The MoE layer against a slow oracle: a loop over experts and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moekit.moe.capacity import capacity_table, combine, dispatch, plan, slots_per_expert
from moekit.moe.layer import Gate, MoE, RouterBias, update_router_bias
from moekit.moe.routing import ExpertChoice, GShard, Hash, LossFree, Random, Switch, TopK

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
    ex = moe.experts
    for e in range(moe.num_experts):
        h = x @ ex.wi_edf[...][e]
        h = jax.nn.relu(h) if ex.wg_edf is None else jax.nn.gelu(x @ ex.wg_edf[...][e]) * h
        weight = jnp.where(routing.expert == e, routing.weight, 0).sum(-1)
        y = y + weight[..., None] * (h @ ex.wo_efd[...][e])
    return y


def layer(route, **kwargs):
    options = {"capacity_factor": 1.0, "min_capacity": 1, "group_size": 16} | kwargs
    return MoE(D, F, E, router=route, rngs=nnx.Rngs(0), **options)


def inputs(padding=5):
    x = jax.random.normal(jax.random.key(1), (3, 10, D))
    mask = jnp.arange(30).reshape(3, 10) % 10 < 10 - padding
    ids = jax.random.randint(jax.random.key(2), (3, 10), 0, 50)
    return x, mask, ids


@pytest.mark.parametrize("activation", ["gated_gelu", "relu"])
@pytest.mark.parametrize("route", ROUTERS, ids=str)
def test_equals_the_oracle_forward_and_backward(route, activation):
    moe = layer(route, activation=activation)
    x, mask, ids = inputs()
    cotangent = jax.random.normal(jax.random.key(3), x.shape)
    graphdef, state = nnx.split(moe)

    def run(state, x, slow):
        module = nnx.merge(graphdef, state)
        y, _, routing = module(x, mask, token_ids=ids)
        if slow:
            y = oracle(module, x, routing)
        return jnp.vdot(y, cotangent), (y, routing)

    grad = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True), static_argnums=2)
    fast, (y, _) = grad(state, x, False)
    slow, (expected, _) = grad(state, x, True)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert float(jnp.abs(y).max()) > 0
    assert (y[~np.asarray(mask)] == 0).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), fast, slow)


@pytest.mark.parametrize("route", ROUTERS, ids=str)
def test_poisoned_padding_changes_nothing(route):
    moe = layer(route)
    x, mask, ids = inputs()
    graphdef, state = nnx.split(moe)

    def run(state, x):
        y, stats, _ = nnx.merge(graphdef, state)(x, mask, token_ids=ids)
        return y.sum() + stats.balance_loss() + stats.router_z_loss(), (y, stats)

    grad = jax.jit(jax.grad(run, has_aux=True))
    clean, seen = grad(state, jnp.where(mask[..., None], x, 0.0))
    poisoned, seen_poisoned = grad(state, jnp.where(mask[..., None], x, jnp.nan))
    same = lambda a, b: np.testing.assert_array_equal(a, b)  # noqa: E731
    jax.tree.map(same, clean, poisoned)
    jax.tree.map(same, seen, seen_poisoned)


@pytest.mark.parametrize("route", ROUTERS[:6], ids=str)
def test_appended_padding_changes_nothing(route):
    moe = layer(route, group_size=4096)
    x, _, ids = inputs()
    mask = jnp.ones((3, 10), bool)
    y, stats, _ = moe(x, mask, token_ids=ids)
    wide = [jnp.pad(a, [(0, 0), (0, 7)] + [(0, 0)] * (a.ndim - 2)) for a in (x, mask, ids)]
    padded, padded_stats, _ = moe(wide[0], wide[1], token_ids=wide[2])
    np.testing.assert_allclose(padded[:, :10], y, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), padded_stats, stats)


def test_all_padding_is_finite_and_counts_nothing():
    moe = layer(TopK(k=2))
    y, stats, routing = moe(jnp.full((1, 4, D), jnp.nan), jnp.zeros((1, 4), bool))
    assert (y == 0).all() and (routing.expert == -1).all()
    assert stats.tokens == 0 and stats.load.sum() == 0 and stats.dropped_tokens == 0
    assert stats.balance_loss() == 0 and stats.router_z_loss() == 0


def test_permuting_tokens_permutes_outputs_when_nothing_is_dropped():
    moe = layer(TopK(k=2), capacity_factor=8.0)
    x, _, _ = inputs()
    order = jax.random.permutation(jax.random.key(4), 10)
    x = x[:1]
    np.testing.assert_allclose(moe(x[:, order])[0], moe(x)[0][:, order], atol=1e-6)


def test_drops_are_counted_for_every_choice():
    moe = layer(TopK(k=2), capacity_factor=0.5)  # without k: 16 tokens, 2 slots for each expert
    x = jax.random.normal(jax.random.key(1), (1, 16, D))
    y, stats, routing = moe(x)
    kept = np.asarray(routing.kept)
    assert stats.load.sum() == 32 and stats.kept.sum() == kept.sum() <= 8
    assert stats.dropped_assignments == 32 - kept.sum()
    gone = ~kept.any(-1)
    assert stats.dropped_tokens == gone.sum() > 0
    assert (np.asarray(y)[gone] == 0).all()


def test_statistics_are_sums_over_groups():
    whole = layer(TopK(k=2), group_size=15, capacity_factor=8.0)
    x, _, _ = inputs()
    mask = jnp.ones((3, 10), bool)
    total = whole(x, mask)[1]
    halves = [whole(x.reshape(2, 15, D)[i : i + 1], jnp.ones((1, 15), bool))[1] for i in range(2)]
    summed = jax.tree.map(jnp.add, *halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), total, summed)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_router_logits_are_products_in_float32(dtype):
    """Also on a TPU, which takes float32 for bfloat16 where nothing else is asked for."""
    gate = Gate(256, 8, TopK(k=2), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 16, 256)).astype(dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(gate.w_de[...], np.float64)
    np.testing.assert_allclose(gate(x), exact, atol=1e-6)
    (dot,) = (e for e in jax.make_jaxpr(gate)(x).eqns if e.primitive.name == "dot_general")
    of_x, of_w = dot.params["precision"]
    assert of_w == jax.lax.Precision.HIGHEST
    assert of_x == of_w or dtype == jnp.bfloat16  # which is exact as it is


def test_balance_loss_is_k_at_balance_and_experts_at_collapse():
    moe = layer(TopK(k=1), capacity_factor=8.0)
    x = jnp.ones((1, 8, D))
    moe.router.w_de[...] = jnp.zeros((D, E)).at[:, 2].set(10.0)
    stats = moe(x)[1]
    np.testing.assert_allclose(stats.balance_loss(), E, rtol=1e-4)
    np.testing.assert_array_equal(stats.load, [0, 0, 8, 0])
    uniform = layer(TopK(k=2), capacity_factor=8.0)
    uniform.router.w_de[...] = jnp.zeros((D, E))
    np.testing.assert_allclose(uniform(x)[1].balance_loss(), 2, rtol=1e-5)
    np.testing.assert_allclose(uniform(x)[1].router_z_loss(), np.log(E) ** 2, rtol=1e-5)


def test_capacity_conventions():
    flax = slots_per_expert(4096, 64, 1.25, choices=1, minimum=4)
    mesh = slots_per_expert(4096, 64, 1.25, choices=2, minimum=4)
    assert (flax, mesh) == (80, 160)
    assert slots_per_expert(16, 64, 1.25, choices=1, minimum=4) == 4
    assert slots_per_expert(3, 1, 8.0, choices=1, minimum=4) == 3  # never more than tokens
    table = capacity_table(4096, 64, 1.25, choices=1, minimum=4)
    assert table[4096] == 80 and table[0] == 0 and (np.diff(table) >= 0).all()


def test_training_uses_its_own_capacity_and_expert_dropout():
    moe = layer(Switch(), capacity_factor=1.0, eval_capacity_factor=8.0, expert_dropout=0.5)
    x, _, _ = inputs()
    train = moe(x, key=jax.random.key(0))
    assert train[1].dropped_tokens > 0 == moe(x)[1].dropped_tokens
    other = moe(x, key=jax.random.key(1))
    assert not np.allclose(train[0], other[0])
    np.testing.assert_array_equal(moe(x, drop=False)[1].dropped_tokens, 0)


def test_loss_free_bias_moves_towards_balance():
    moe = layer(LossFree(rate=0.01), capacity_factor=8.0)
    moe.router.w_de[...] = moe.router.w_de[...] * 20
    x = jax.random.normal(jax.random.key(1), (1, 64, D)) + 1.0
    graphdef, state = nnx.split(nnx.Dict(encoder=moe))

    @jax.jit
    def step(state):
        stats = nnx.merge(graphdef, state).encoder(x)[1]
        return update_router_bias(state, {"encoder": stats}), stats.load

    state, before = step(state)
    for _ in range(100):
        state, after = step(state)
    assert after.max() < before.max() and after.std() < 0.5 * before.std()
    assert isinstance(moe.router.bias_e, RouterBias)


@pytest.mark.parametrize("route", [TopK(k=2), ExpertChoice()], ids=str)
def test_transport_is_linear_and_its_transpose_is_its_gradient(route):
    logits = jax.random.normal(jax.random.key(0), (2, 6, E))
    mask = jnp.arange(12).reshape(2, 6) < 10
    p = plan(jax.vmap(lambda a, b: route(a, b, capacity=3))(logits, mask), E)
    x, y = jax.random.normal(jax.random.key(1), (12, D)), jnp.ones((E * 2 * 3, D))
    _, transpose = jax.vjp(lambda x: dispatch(x, p), x)
    np.testing.assert_allclose(jnp.vdot(dispatch(x, p), y), jnp.vdot(x, transpose(y)[0]), rtol=1e-5)
    used = np.asarray(p.token) < 12
    assert (np.asarray(dispatch(x, p))[~used] == 0).all()
    poisoned = jnp.where(used[:, None], y, jnp.nan)
    assert np.isfinite(combine(poisoned, p)).all()


def test_a_function_is_a_router():
    from moekit.moe.routing import assign

    def loudest(logits, mask, *, capacity, limit=None, **_):
        probs = jax.nn.softmax(logits)
        best = jnp.argmax(logits, -1)[:, None]
        return assign(best, probs.max(-1)[:, None], probs, mask, capacity=capacity, limit=limit)

    x, mask, _ = inputs()
    np.testing.assert_allclose(layer(loudest)(x, mask)[0], layer(Switch())(x, mask)[0], atol=1e-6)
