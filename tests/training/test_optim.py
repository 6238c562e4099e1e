"""Optimizers: Adafactor against T5X's rules, weight decay, schedules, sharding of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding

import moekit as mk
from moekit.config import TrainConfig
from moekit.training.optim import make_optimizer, path_names, schedule, state_specs

RATE = 1e-2
EXPERT_AXES = ("expert", "embed", "mlp")


def parameters(value, axes):
    """The state of a model with one parameter."""
    return nnx.State({"w": nnx.Param(jnp.asarray(value, jnp.float32), axes=axes)})


def first_update(value, gradient, axes, config=None):
    """What the first step adds to a parameter."""
    config = config or TrainConfig(learning_rate=RATE)
    params = parameters(value, axes)
    optimizer = make_optimizer(config, params)
    updates, _ = optimizer.update(parameters(gradient, axes), optimizer.init(params), params)
    return np.asarray(updates["w"][...])


def rms(array):
    return float(np.sqrt(np.mean(np.square(array))))


@pytest.mark.parametrize("name", ["t5-base", "st-xl", "t5-xxl", "switch-base"])
def test_optimizer_state_is_small(name):
    """Every large matrix is factored, also attention kernels."""
    model = nnx.eval_shape(lambda: mk.EncoderDecoder(mk.preset(name)))
    params = nnx.state(model, nnx.Param)
    state = jax.eval_shape(make_optimizer(TrainConfig(), params).init, params)
    state_size = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert state_size < 0.02 * mk.preset(name).num_parameters().total


@pytest.mark.parametrize("axes", [("layers", "embed", "mlp"), ("expert", "embed", "mlp")])
@pytest.mark.parametrize("size", [(256, 128), (16, 8)], ids=["factored", "not factored"])
def test_adafactor_acts_on_each_layer_and_expert_alone(axes, size):
    rng = np.random.default_rng(0)
    scales = np.array([1, 10, 100])[:, None, None]
    stacked = rng.normal(size=(3, *size)) * scales
    gradients = rng.normal(size=(3, *size)) * scales[::-1]
    together = first_update(stacked, gradients, axes)
    for index in range(3):
        alone = first_update(stacked[index], gradients[index], axes[1:])
        np.testing.assert_allclose(together[index], alone, rtol=1e-5)


def test_an_expert_after_small_gradients_steps_like_the_others():
    """T5X's rule: the expert is a batch dimension of clipping and of the parameter scale."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(64, 128, 128))
    params = parameters(weights, EXPERT_AXES)
    optimizer = make_optimizer(TrainConfig(learning_rate=RATE), params)
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for step in range(1, 31):
        gradients = rng.normal(0, 1e-3, size=weights.shape)
        if step < 30:
            gradients[0] *= 1e-3
        updates, state = update(parameters(gradients, EXPERT_AXES), state, params)
    step_of_first = rms(updates["w"][0]) / (RATE * rms(weights[0]))
    assert step_of_first == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("shape", "axes", "matrix"),
    [
        ((256, 4, 64), ("embed", "heads", None), (256, 256)),
        ((4, 64, 384), ("heads", None, "embed"), (256, 384)),
    ],
)
def test_attention_kernels_are_updated_as_matrices(shape, axes, matrix):
    rng = np.random.default_rng(0)
    weights, gradients = rng.normal(size=(2, *shape))
    found = first_update(weights, gradients, axes)
    reference = optax.adafactor(RATE)
    flat = jnp.asarray(weights.reshape(matrix), jnp.float32)
    flat_gradients = jnp.asarray(gradients.reshape(matrix), jnp.float32)
    expected, _ = reference.update(flat_gradients, reference.init(flat), flat)
    np.testing.assert_allclose(found.reshape(matrix), expected, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"learning_rate": 1e-3}, -1e-4),
        ({"learning_rate": 1e-9}, -1e-10),
        ({"learning_rate": 1e-3, "warmup_steps": 10}, 0),
    ],
)
def test_weight_decay_is_multiplied_by_the_learning_rate(optimizer, settings, expected):
    config = TrainConfig(optimizer=optimizer, weight_decay=0.1, **settings)
    moved = first_update(np.ones((4, 4)), np.zeros((4, 4)), ("embed", "mlp"), config)
    np.testing.assert_allclose(moved, expected, rtol=1e-5)


def test_schedules():
    base = TrainConfig(steps=100, learning_rate=2.0, warmup_steps=10)
    ends = {"constant": 2.0, "cosine": 0.0, "linear": 0.0, "rsqrt": 2.0 * (10 / 100) ** 0.5}
    for name, end in ends.items():
        rate = schedule(base.replace(schedule=name))
        assert float(rate(0)) == 0 and float(rate(5)) == pytest.approx(1.0)
        assert float(rate(10)) == pytest.approx(2.0)
        assert float(rate(100)) == pytest.approx(end, abs=1e-6)


@pytest.fixture(scope="module")
def mesh():
    return mk.make_mesh(data=2, expert=2, model=2)


def specs_by_name(mesh: Mesh, optimizer: str) -> dict:
    """(shape, mesh axes of each dimension) of every array of an optimizer's state."""
    cfg = mk.preset("st-nano").replace(
        d_model=256, d_ff=512, expert_d_ff=384, num_heads=4, head_dim=32
    )
    model = nnx.eval_shape(lambda: mk.EncoderDecoder(cfg, mesh=mesh))
    params = nnx.state(model, nnx.Param)
    optimizer_state = jax.eval_shape(
        make_optimizer(TrainConfig(optimizer=optimizer), params).init, params
    )
    specs = state_specs(optimizer_state, params, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(optimizer_state)
    return {
        "/".join(path_names(path)): (leaf.shape, tuple(spec))
        for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs), strict=True)
    }


def find(specs: dict, *parts: str) -> tuple:
    (found,) = (value for name, value in specs.items() if all(part in name for part in parts))
    return found


def test_optimizer_state_is_sharded_like_its_parameter(mesh):
    specs = specs_by_name(mesh, "adafactor")
    for shape, spec in specs.values():
        NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)).shard_shape(shape)  # it divides
    # experts [1, 8, 256, 384] on expert, data and model: rows are the smaller dimension
    up = ("encoder/blocks/1/moe/experts/wi_edf",)
    assert find(specs, "v_row", *up) == ((1, 8, 256), (None, "expert", "data"))
    assert find(specs, "v_col", *up) == ((1, 8, 384), (None, "expert", "model"))
    down = ("encoder/blocks/1/moe/experts/wo_efd",)
    assert find(specs, "v_row", *down) == ((1, 8, 256), (None, "expert", "data"))
    # attention [1, 256, 4, 32] is averaged as [1, 256, 128]
    query = ("decoder/blocks/0/cross_attention/wq_dnh",)
    assert find(specs, "v_row", *query) == ((1, 128), (None, "model"))
    assert find(specs, "v_col", *query) == ((1, 256), (None, ("expert", "data")))
    # what is not factored has the layout of its matrices
    assert find(specs, "/v/", "encoder/blocks/1/moe/router/w_de")[0] == (1, 256, 8)


def test_adamw_state_is_sharded_like_its_parameter(mesh):
    specs = specs_by_name(mesh, "adamw")
    shape, spec = find(specs, "/mu/", "encoder/blocks/1/moe/experts/wi_edf")
    assert shape == (1, 8, 256, 384) and spec == (None, "expert", "data", "model")


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
@pytest.mark.parametrize(
    ("freeze", "moving"),
    [(("router",), "experts"), (("experts",), "router"), (("moe",), "embedding")],
)
def test_frozen_parts_are_not_updated_and_have_no_state(optimizer, freeze, moving):
    cfg = mk.preset("st-nano").replace(d_model=16, d_ff=32, encoder_layers=1, decoder_layers=1)
    params = nnx.state(mk.EncoderDecoder(cfg), nnx.Param)
    config = TrainConfig(optimizer=optimizer, freeze=freeze, weight_decay=0.1)
    transform = make_optimizer(config, params)
    state = transform.init(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(transform.update)(gradients, state, params)
    parts = {"router": "moe/router", "experts": "moe/experts", "moe": "moe/"}
    changes = {"/".join(path_names(path)): update for path, update in leaves(updates)}
    frozen = [name for name in changes if parts[freeze[0]] in name]
    assert frozen and not any(changes[name].any() for name in frozen)
    others = [name for name in changes if moving in name]
    assert others and all(changes[name].all() for name in others)
    assert not any(parts[freeze[0]] in "/".join(path_names(path)) for path, _ in leaves(state))


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_routers_alone_have_state_when_they_alone_are_trained(optimizer):
    cfg = mk.preset("st-nano").replace(d_model=16, d_ff=32, encoder_layers=1, decoder_layers=1)
    params = nnx.eval_shape(lambda: nnx.state(mk.EncoderDecoder(cfg), nnx.Param))
    config = TrainConfig(optimizer=optimizer, freeze=("all_but_router",))
    state = jax.eval_shape(make_optimizer(config, params).init, params)
    found = [path_names(path) for path, _ in leaves(state)]
    of_parameters = [names for names in found if "encoder" in names]
    assert of_parameters
    assert all("router" in names for names in of_parameters)
    assert not any("embedding_vd" in names for names in found)


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)
