"""The layer on meshes of eight virtual devices against one device with the same groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moekit.moe.layer import MoE
from moekit.moe.routing import ExpertChoice, GShard, Hash, LossFree, Random, Switch, TopK
from moekit.sharding import make_mesh

D, F, E, ROWS, LENGTH = 8, 16, 8, 8, 12
ALL_AXES = {"data": 2, "expert": 2, "model": 2}
OTHER_MESHES = [{"expert": 8}, {"data": 2, "expert": 4}, {"data": 8}]
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


def layer(route, mesh=None, **changes):
    options = {"group_size": LENGTH, "min_capacity": 1, "capacity_factor": 1.0} | changes
    return MoE(D, F, E, router=route, mesh=mesh, rngs=nnx.Rngs(0), **options)


def inputs():
    """Rows of different length, the last one empty."""
    x = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, D))
    mask = jnp.arange(LENGTH) < (LENGTH - 2 * jnp.arange(ROWS)[:, None])
    ids = jax.random.randint(jax.random.key(2), (ROWS, LENGTH), 0, 50)
    return x, mask, ids


def step(moe):
    """Value, gradients of parameters and input, outputs, statistics and routing of a training
    step with random routing and expert dropout."""
    x, mask, ids = inputs()
    graphdef, params, rest = nnx.split(moe, nnx.Param, ...)
    cotangent = jax.random.normal(jax.random.key(3), x.shape)

    def loss(params, x):
        module = nnx.merge(graphdef, params, rest)
        y, stats, routing = module(x, mask, key=jax.random.key(4), token_ids=ids)
        total = jnp.vdot(y, cotangent) + stats.balance_loss() + stats.router_z_loss()
        return total, (y, stats, routing)

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return jax.tree.map(np.asarray, jax.device_get(grad(params, x)))


def assert_close(got, expected, message=""):
    def close(a, b):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5, err_msg=str(message))

    jax.tree.map(close, got, expected)


@pytest.mark.parametrize("route", ROUTERS, ids=str)
def test_every_mesh_equals_one_device(route):
    expected = step(layer(route, expert_dropout=0.2))
    (_, (y, stats, _)), _ = expected
    assert np.abs(y).max() > 0 and (stats.dropped_assignments > 0 or route == ExpertChoice())
    meshes = [ALL_AXES, *OTHER_MESHES] if route == TopK(k=2) else [ALL_AXES]
    for sizes in meshes:
        got = step(layer(route, make_mesh(**sizes), expert_dropout=0.2))
        assert_close(got, expected, sizes)


@pytest.mark.parametrize("route", [Switch(), TopK(k=2), GShard(), LossFree(k=2)], ids=str)
def test_dropless_equals_capacity_with_room_for_all_on_every_mesh(route):
    expected = step(layer(route, capacity_factor=float(E)))
    assert expected[0][1][1].dropped_assignments == 0
    assert_close(step(layer(route, dispatch="dropless")), expected)
    with_dropout = step(layer(route, dispatch="dropless", expert_dropout=0.2))
    meshes = [ALL_AXES, *OTHER_MESHES[1:]] if route == TopK(k=2) else [ALL_AXES]
    for sizes in meshes:
        sharded = layer(route, make_mesh(**sizes), dispatch="dropless", expert_dropout=0.2)
        assert_close(step(sharded), with_dropout, sizes)


@pytest.mark.parametrize("sizes", [None, {"data": 2, "expert": 4}], ids=str)
def test_empty_rows_of_a_block_contribute_nothing(sizes):
    """Blocks are only partly full: what their other rows would read is poisoned."""
    x, mask, _ = inputs()
    moe = layer(TopK(k=2), sizes and make_mesh(**sizes), dispatch="dropless")
    graphdef, state = nnx.split(moe)

    def loss(state, x):
        y, stats, _ = nnx.merge(graphdef, state)(x, mask)
        return jnp.vdot(y, y) + stats.balance_loss(), y

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    clean = grad(state, jnp.where(mask[..., None], x, 0.0))
    poisoned = grad(state, jnp.where(mask[..., None], x, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
    assert np.isfinite(np.asarray(clean[1])).all() and np.abs(np.asarray(clean[1])).max() > 0


@pytest.mark.parametrize("shape", [(), (5,), (3, LENGTH), (2, 2, 6)], ids=str)
def test_a_batch_that_the_mesh_does_not_divide_is_padded(shape):
    moe = layer(TopK(k=2), make_mesh(expert=8), capacity_factor=8.0)
    alone = layer(TopK(k=2), capacity_factor=8.0)
    x = jax.random.normal(jax.random.key(1), (*shape, D))
    mask = jnp.arange(int(np.prod(shape))).reshape(shape) % 5 < 4
    apply = nnx.jit(lambda layer, *inputs: layer(*inputs))
    y, stats, routing = apply(moe, x, mask)
    expected_y, expected_stats, expected_routing = apply(alone, x, mask)
    assert y.shape == x.shape
    assert_close((y, stats.load, routing), (expected_y, expected_stats.load, expected_routing))


def test_the_layer_has_two_all_to_alls_each_way_and_no_other_exchange_of_tokens():
    moe = layer(TopK(k=2), make_mesh(expert=8))
    x, mask, _ = inputs()
    graphdef, state = nnx.split(moe)

    def loss(state, x):
        y, stats, _ = nnx.merge(graphdef, state)(x, mask)
        return jnp.vdot(y, y) + stats.balance_loss()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(state, x))
    assert text.count("= all_to_all[") == 4
    # the router's weights and their gradient; the rest are psums of statistics
    assert text.count("= all_gather[") == 1 and text.count("= reduce_scatter[") == 1


def test_parameters_are_created_on_their_devices():
    moe = layer(Switch(), make_mesh(data=2, expert=2, model=2))
    shapes = {
        name: getattr(moe.experts, name)[...].addressable_shards[0].data.shape
        for name in ("wi_edf", "wg_edf", "wo_efd")
    }
    up, down = (E // 2, D // 2, F // 2), (E // 2, F // 2, D // 2)
    assert shapes == {"wi_edf": up, "wg_edf": up, "wo_efd": down}


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"expert": 3}, r"8 experts.*n in \[1, 2, 4, 8\]"),
        ({"model": 3}, r"16 d_ff.*make_mesh\(mod"),
    ],
)
def test_a_mesh_that_does_not_divide_names_the_axis(sizes, message):
    devices = np.array(jax.devices()[:3]).reshape(1, sizes.get("expert", 1), sizes.get("model", 1))
    mesh = jax.sharding.Mesh(devices, ("data", "expert", "model"))
    with pytest.raises(ValueError, match=message):
        layer(Switch(), mesh)
