"""One training step: losses, gradients, optimizer; a `TrainState` and a batch make the next state.

B batch, T target length, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Key

from moekit.config import ModelConfig, TrainConfig
from moekit.data.batch import Batch
from moekit.model.transformer import EncoderDecoder
from moekit.moe.stats import LayerStats, update_router_bias
from moekit.sharding import BATCH_SPEC, platform
from moekit.training.guards import health
from moekit.training.optim import make_optimizer, state_specs
from moekit.training.state import (
    TrainState,
    model_shardings,
    replicated,
    split_model,
    with_shardings,
)

Report = dict[str, Array]  # numbers of one step that are logged, and its "health" (guards)
Init = Callable[[nnx.State, Array], tuple[Array, Any, Array]]
Update = Callable[[TrainState, Batch], tuple[TrainState, Report]]


@jax.custom_vjp
def target_logits(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The logit of each target.

    Its gradient is written as a comparison with the targets, which XLA fuses with the gradient of
    the softmax; the transpose of a gather would be a scatter into zeros.
    """
    index = targets[..., None]
    chosen = jnp.take_along_axis(logits, index, -1)
    return chosen[..., 0]


def _target_logits_forward(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Array, tuple[Array, Array]]:
    chosen = target_logits(logits, targets)
    return chosen, (logits, targets)


def _target_logits_backward(
    residuals: tuple[Array, Array], gradient: Float[Array, "B T"]
) -> tuple[Float[Array, "B T V"], None]:
    logits, targets = residuals
    vocabulary_size = logits.shape[-1]
    is_target = jnp.arange(vocabulary_size) == targets[..., None]
    logits_gradient = jnp.where(is_target, gradient[..., None], 0)
    return logits_gradient.astype(logits.dtype), None


target_logits.defvjp(_target_logits_forward, _target_logits_backward)


def token_losses(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    label_smoothing: float = 0.0,
) -> dict[str, Float[Array, ""]]:
    """Weighted sums over the targets, in nats.

    A hit is a target that greedy decoding would choose: the first of the largest logits.

    Returns:
      objective: cross-entropy with label smoothing.
      cross_entropy: without.
      z: log(Z)^2 of the logits.
      hits: targets that are hits.
      count: sum of the weights.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = target_logits(logits, targets)
    cross_entropy = log_z - chosen
    objective = cross_entropy
    if label_smoothing:
        uniform_cross_entropy = log_z - logits.mean(-1)
        target_part = (1 - label_smoothing) * cross_entropy
        uniform_part = label_smoothing * uniform_cross_entropy
        objective = target_part + uniform_part
    is_hit = logits.argmax(-1) == targets
    return {
        "objective": jnp.sum(weights * objective),
        "cross_entropy": jnp.sum(weights * cross_entropy),
        "z": jnp.sum(weights * log_z**2),
        "hits": jnp.sum(weights * is_hit),
        "count": jnp.sum(weights),
    }


def auxiliary_losses(
    cfg: ModelConfig,
    stats: dict[str, LayerStats],
) -> dict[str, Float[Array, ""]]:
    """The router losses times their coefficients: means over all MoE layers."""
    if not stats:
        return {
            "balance": jnp.zeros(()),
            "router_z": jnp.zeros(()),
        }
    balance_of_stack = [of_stack.balance_loss() for of_stack in stats.values()]
    balance = jnp.concatenate(balance_of_stack)
    router_z_of_stack = [of_stack.router_z_loss() for of_stack in stats.values()]
    router_z = jnp.concatenate(router_z_of_stack)
    return {
        "balance": cfg.balance_loss * balance.mean(),
        "router_z": cfg.router_z_loss * router_z.mean(),
    }


def training_loss(
    params: nnx.State,
    rest: nnx.State,
    graphdef: nnx.GraphDef,
    batch: Batch,
    key: Key[Array, ""],
    config: TrainConfig,
) -> tuple[Float[Array, ""], tuple[Report, dict[str, LayerStats]]]:
    """The objective; its parts as they are logged; the routers' statistics."""
    model = nnx.merge(graphdef, params, rest)
    output = model(batch, key=key, remat=config.remat)
    smoothing = config.label_smoothing
    sums = token_losses(output.logits, batch.targets, batch.loss_weights, smoothing)
    count = jnp.maximum(sums["count"], 1)
    auxiliary = auxiliary_losses(model.cfg, output.stats)
    z_loss = config.z_loss * sums["z"] / count
    objective = sums["objective"] / count
    balance = auxiliary["balance"]
    router_z = auxiliary["router_z"]
    total = objective + z_loss + balance + router_z
    report = {
        "loss": sums["cross_entropy"] / count,
        "accuracy": sums["hits"] / count,
        "z_loss": z_loss,
    }
    report |= auxiliary
    for stack_name, stats in output.stats.items():
        report |= router_report(stack_name, stats)
    return total, (report, output.stats)


def router_report(stack_name: str, stats: LayerStats) -> dict[str, Float[Array, ""]]:
    """How balanced the routers of a stack are: means over its MoE layers."""
    load = stats.load
    mean_load = load.mean(-1)
    largest_load = load.max(-1)
    max_violation = largest_load / jnp.maximum(mean_load, 1e-9) - 1

    num_tokens = jnp.maximum(stats.tokens, 1)
    dropped = stats.dropped_tokens / num_tokens

    total_load = load.sum(-1, keepdims=True)
    share = load / jnp.maximum(total_load, 1)
    terms = jax.scipy.special.xlogy(share, share)
    entropy = -terms.sum(-1)
    return {
        f"{stack_name}_max_violation": max_violation.mean(),
        f"{stack_name}_dropped": dropped.mean(),
        f"{stack_name}_load_entropy": entropy.mean(),
    }


class Step(NamedTuple):
    """A compiled training step.

    Args:
      init: (parameters, key) -> (step 0, optimizer state, data of the key).
      update: (state, batch) -> (next state, report). The memory of the state is donated to the
        next one; the position of both is empty.
      state: shapes, types and shardings of the state.
    """

    init: Init
    update: Update
    state: TrainState

    def start(self, params: nnx.State, rest: nnx.State, seed: int) -> TrainState:
        """The state before step 1.

        It contains the arrays given, whose memory `update` donates: pass copies to keep them.
        """
        seed_key = jax.random.key(seed)
        step, optimizer_state, key_data = self.init(params, seed_key)
        return TrainState(step, params, rest, optimizer_state, key_data)


def compiled_step(model: EncoderDecoder, config: TrainConfig) -> Step:
    """The training step of a model (of arrays or of shapes).

    It is cached: a second run of the same configuration and shapes does not compile again.
    """
    graphdef, params, rest = split_model(model)
    params_shapes = _Shapes.of(params)
    rest_shapes = _Shapes.of(rest)
    return _compiled_step(graphdef, params_shapes, rest_shapes, config, model.mesh)


class _Shapes(NamedTuple):
    """Shapes and types of a tree, hashable."""

    leaves: tuple[jax.ShapeDtypeStruct, ...]
    structure: Any

    @classmethod
    def of(cls, tree: Any) -> "_Shapes":
        arrays, structure = jax.tree.flatten(tree)
        leaves = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        return cls(tuple(leaves), structure)

    def tree(self) -> Any:
        return jax.tree.unflatten(self.structure, self.leaves)


@functools.lru_cache(maxsize=16)
def _compiled_step(
    graphdef: nnx.GraphDef,
    params_shapes: _Shapes,
    rest_shapes: _Shapes,
    config: TrainConfig,
    mesh: Mesh | None,
) -> Step:
    params = params_shapes.tree()
    rest = rest_shapes.tree()
    optimizer = make_optimizer(config, params)
    init = make_init(optimizer)
    update = make_update(graphdef, optimizer, config)
    step, optimizer_state, key_data = jax.eval_shape(init, params, jax.random.key(0))
    shapes = TrainState(step, params, rest, optimizer_state, key_data)
    if mesh is None:
        shapes = with_shardings(shapes, replicated(None))
        compiled_update = jax.jit(update, donate_argnums=0)
        return Step(jax.jit(init), compiled_update, shapes)

    shardings = state_shardings(shapes, mesh)
    # explicit out_shardings, so that outputs reuse the donated buffers
    compiled_init = jax.jit(
        init,
        out_shardings=(shardings.step, shardings.optimizer, shardings.key_data),
    )
    compiled_update = jax.jit(
        update,
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
        compiler_options=_compiler_options(mesh),
    )
    sharded_shapes = with_shardings(shapes, shardings)
    return Step(compiled_init, compiled_update, sharded_shapes)


def make_init(optimizer: optax.GradientTransformation) -> Init:
    """The function that makes everything of a state but the model's variables."""

    def init(params: nnx.State, key: Key[Array, ""]) -> tuple[Array, Any, Array]:
        first_step = jnp.zeros((), jnp.int32)
        optimizer_state = optimizer.init(params)
        return first_step, optimizer_state, jax.random.key_data(key)

    return init


def make_update(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
) -> Update:
    """The function that maps a state and a batch to the next state and a report."""
    loss_gradient = jax.grad(training_loss, has_aux=True)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Report]:
        params = state.params
        rest = state.rest
        run_key = jax.random.wrap_key_data(state.key_data)
        key = jax.random.fold_in(run_key, state.step)
        gradients, (report, stats) = loss_gradient(params, rest, graphdef, batch, key, config)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, params)
        params = optax.apply_updates(params, updates)
        if stats:
            rest = update_router_bias(rest, stats)
        report["grad_norm"] = optax.tree.norm(gradients)
        report["health"] = health(report["loss"], report["grad_norm"], stats)
        next_state = replace(
            state,
            step=state.step + 1,
            params=params,
            rest=rest,
            optimizer=optimizer_state,
        )
        if config.on_nonfinite == "skip":
            next_state = keep_if_not_finite(report, state, next_state)
        return next_state, report

    return update


def keep_if_not_finite(report: Report, state: TrainState, next_state: TrainState) -> TrainState:
    """The next state; if loss or gradient norm are not finite, all but its step is the former's."""
    is_finite = jnp.isfinite(report["loss"]) & jnp.isfinite(report["grad_norm"])

    def choose(former: Array, updated: Array) -> Array:
        return jnp.where(is_finite, updated, former)

    chosen = jax.tree.map(choose, state, next_state)
    return replace(chosen, step=next_state.step)


def state_shardings(shapes: TrainState, mesh: Mesh) -> TrainState:
    """A state with the sharding of every array in place of the array."""
    specs = state_specs(shapes.optimizer, shapes.params, mesh)
    optimizer_shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return TrainState(
        step=replicated(mesh),
        params=model_shardings(shapes.params, mesh),
        rest=model_shardings(shapes.rest, mesh),
        optimizer=optimizer_shardings,
        key_data=replicated(mesh),
    )


def _compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Asynchronous all-to-alls where the TPU has them; large slices of v5e and v6e do not."""
    first_device = mesh.devices.flat[0]
    is_tpu = platform(mesh) == "tpu"
    if is_tpu and "lite" not in first_device.device_kind:
        return {"xla_tpu_enable_async_all_to_all": "true"}
    return None


def abstract_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    """Shapes, types and shardings of the batch that `Step.update` takes."""
    sharding = NamedSharding(mesh, BATCH_SPEC)

    def array(length: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        shape = (config.batch_size, length)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return Batch(
        inputs=array(config.input_length),
        input_segments=array(config.input_length),
        input_positions=array(config.input_length),
        targets=array(config.target_length),
        target_segments=array(config.target_length),
        target_positions=array(config.target_length),
        loss_weights=array(config.target_length, jnp.float32),
    )
