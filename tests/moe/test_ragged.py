"""The ragged transport of TPUs and GPUs on CPU devices: slow substitutes stand in for its
all-to-all and kernels, and rows that belong to no group are poisoned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas.ops.tpu import megablox

from moekit.moe import ragged
from moekit.moe.expert_parallel import ExpertParallel
from moekit.moe.layer import MoE
from moekit.moe.routing import Switch, TopK
from moekit.sharding import make_mesh

D, F, E, ROWS, LENGTH = 8, 16, 8, 8, 12
MESHES = [{"expert": 8}, {"data": 2, "expert": 2, "model": 2}]


def all_to_all(x, output, start, size, offset, received, *, axis_name):
    """`jax.lax.ragged_all_to_all` by its documentation."""
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    xs, starts, sizes, offsets = map(gather, (x, start, size, offset))
    n, pieces = starts.shape
    me, each = jax.lax.axis_index(axis_name), pieces // n
    row = jnp.arange(x.shape[0])
    for sender in range(n):
        for i in range(each):
            piece = me * each + i
            at = lambda a, s=sender, p=piece: a[s, p]  # noqa: E731
            source = xs[sender].at[at(starts) + row].get(mode="fill", fill_value=0)
            target = jnp.where(row < at(sizes), at(offsets) + row, output.shape[0])
            output = output.at[target].set(source, mode="drop")
    return output


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped(x, w, sizes, dtype, tiling):
    """`megablox.gmm`: NaN in every row that no group owns, and blind for them."""
    inside, group = owners(sizes, x.shape[0])
    y = jnp.einsum("rk,rkn->rn", jnp.where(inside, x, 0), w[group])
    return jnp.where(inside, y, jnp.nan)


def owners(sizes, rows):
    row = jnp.arange(rows)[:, None]
    group = jnp.sum(row >= jnp.cumsum(sizes), 1)
    return row < sizes.sum(), jnp.minimum(group, sizes.shape[0] - 1)


def grouped_forward(x, w, sizes, dtype, tiling):
    return grouped(x, w, sizes, dtype, tiling), (x, w, sizes)


def grouped_backward(dtype, tiling, residuals, g):
    x, w, sizes = residuals
    inside, group = owners(sizes, x.shape[0])
    x, g = jnp.where(inside, x, 0), jnp.where(inside, g, 0)
    onehot = jax.nn.one_hot(group, w.shape[0])
    dx = jnp.where(inside, jnp.einsum("rn,rkn->rk", g, w[group]), jnp.nan)
    return dx, jnp.einsum("rk,rn,re->ekn", x, g, onehot), None


grouped.defvjp(grouped_forward, grouped_backward)


def step(moe):
    x = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, D))
    mask = jnp.arange(LENGTH) < (LENGTH - jnp.arange(ROWS)[:, None])
    cotangent = jax.random.normal(jax.random.key(3), x.shape)
    graphdef, state = nnx.split(moe)

    def loss(state, x):
        y, stats, _ = nnx.merge(graphdef, state)(x, mask, key=jax.random.key(4))
        return jnp.vdot(y, cotangent) + stats.balance_loss(), y

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return jax.tree.map(np.asarray, jax.device_get(grad(state, x)))


def layer(route, mesh=None, **kwargs):
    options = {"router": route, "dispatch": "dropless", "group_size": LENGTH, "mesh": mesh}
    return MoE(D, F, E, rngs=nnx.Rngs(0), **options | kwargs)


@pytest.mark.parametrize(
    "platform, route, margin, sizes",
    [
        ("tpu", TopK(k=2), 1 / 3, MESHES[0]),
        ("tpu", Switch(), -0.6, MESHES[0]),  # a small buffer: most rows overflow
        ("tpu", TopK(k=2), -0.9, MESHES[1]),
        ("tpu", TopK(k=2), 1 / 3, None),
        ("gpu", TopK(k=2), -0.5, MESHES[1]),
    ],
    ids=str,
)
def test_ragged_equals_the_portable_transport(platform, route, margin, sizes, monkeypatch):
    expected = step(layer(route, expert_dropout=0.2))
    monkeypatch.setattr(ragged, "is_preferred", lambda mesh: True)
    monkeypatch.setattr(ragged, "BUFFER_MARGIN", margin)
    monkeypatch.setattr(ExpertParallel, "platform", platform)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", all_to_all)
    monkeypatch.setattr(megablox, "gmm", grouped)
    got = step(layer(route, sizes and make_mesh(**sizes), expert_dropout=0.2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), got, expected)


def test_the_kernels_read_no_row_past_the_last_group():
    """As the substitutes assume, checked on the kernels themselves (interpreted)."""
    sizes = jnp.array([5, 0, 6], jnp.int32)
    x, w = jax.random.normal(jax.random.key(0), (16, 8)), jnp.ones((3, 8, 8))
    g = jax.random.normal(jax.random.key(1), (16, 8))
    inside = np.arange(16) < 11
    x, g = (jnp.where(inside[:, None], a, jnp.nan) for a in (x, g))
    tiling = (8, 8, 8)
    y, pullback = jax.vjp(
        lambda x, w: megablox.gmm(x, w, sizes, x.dtype, tiling, interpret=True), x, w
    )
    expected, expected_pullback = jax.vjp(lambda x, w: grouped(x, w, sizes, x.dtype, tiling), x, w)
    (dx, dw), (expected_dx, expected_dw) = pullback(g), expected_pullback(g)
    for got, wanted in ((y, expected), (dx, expected_dx)):
        np.testing.assert_allclose(got[inside], wanted[inside], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, expected_dw, rtol=1e-5, atol=1e-5)
