"""One training step: losses, gradients, optimizer, where everything lives.

B batch, T target length, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from moekit.config import ModelConfig, TrainConfig
from moekit.data.batch import Batch
from moekit.model.transformer import EncoderDecoder
from moekit.moe.stats import LayerStats, update_router_bias
from moekit.sharding import BATCH_SPEC, platform, variable_spec
from moekit.training.optim import make_optimizer, state_specs


@jax.custom_vjp
def _chosen(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The logits of the targets. Their cotangent is a comparison, which joins the softmax's in one
    pass over [B, T, V]; the transpose of a gather would be zeros and a scatter."""
    return jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]


def _chosen_backward(residuals, g):
    logits, targets = residuals
    here = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.where(here, g[..., None], 0).astype(logits.dtype), None


_chosen.defvjp(
    lambda logits, targets: (_chosen(logits, targets), (logits, targets)), _chosen_backward
)


def token_losses(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    label_smoothing: float = 0.0,
) -> dict[str, Float[Array, ""]]:
    """Sums over real targets: cross-entropy (smoothed and not), log(Z)^2, hits, count; nats.

    A hit is a target that greedy decoding would choose: the first of the largest logits.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = _chosen(logits, targets)
    objective = cross_entropy = log_z - chosen
    if label_smoothing:  # a pass over all logits less where there is none
        smoothed = log_z - logits.mean(-1)
        objective = (1 - label_smoothing) * cross_entropy + label_smoothing * smoothed
    return {
        "objective": jnp.sum(weights * objective),
        "cross_entropy": jnp.sum(weights * cross_entropy),
        "z": jnp.sum(weights * log_z**2),
        "hits": jnp.sum(weights * (logits.argmax(-1) == targets)),
        "count": jnp.sum(weights),
    }


def auxiliary_losses(cfg: ModelConfig, stats: dict[str, LayerStats]) -> dict[str, Float[Array, ""]]:
    """The router losses with their coefficients, as the mean over all MoE layers."""
    if not stats:
        return {"balance": jnp.zeros(()), "router_z": jnp.zeros(())}
    balance = jnp.concatenate([each.balance_loss() for each in stats.values()])
    router_z = jnp.concatenate([each.router_z_loss() for each in stats.values()])
    return {
        "balance": cfg.balance_loss * balance.mean(),
        "router_z": cfg.router_z_loss * router_z.mean(),
    }


def _loss(params, rest, graphdef, batch: Batch, key, config: TrainConfig):
    """The training objective and what is reported of it."""
    model = nnx.merge(graphdef, params, rest)
    out = model(batch, key=key, remat=config.remat)
    sums = token_losses(out.logits, batch.targets, batch.loss_weights, config.label_smoothing)
    count = jnp.maximum(sums["count"], 1)
    auxiliary = auxiliary_losses(model.cfg, out.stats)
    z_loss = config.z_loss * sums["z"] / count
    total = sums["objective"] / count + z_loss + auxiliary["balance"] + auxiliary["router_z"]
    report = {
        "loss": sums["cross_entropy"] / count,
        "accuracy": sums["hits"] / count,
        "z_loss": z_loss,
        **auxiliary,
        **_router_report(out.stats),
    }
    return total, (report, out.stats)


def _router_report(stats: dict[str, LayerStats]) -> dict[str, Float[Array, ""]]:
    """Balance of each stack, as the mean over its MoE layers."""
    report = {}
    for stack, s in stats.items():
        mean = s.load.mean(-1)
        share = s.load / jnp.maximum(s.load.sum(-1, keepdims=True), 1)
        entropy = -jax.scipy.special.xlogy(share, share).sum(-1)
        report |= {
            f"{stack}_max_violation": jnp.mean(s.load.max(-1) / jnp.maximum(mean, 1e-9) - 1),
            f"{stack}_dropped": jnp.mean(s.dropped_tokens / jnp.maximum(s.tokens, 1)),
            f"{stack}_load_entropy": entropy.mean(),
        }
    return report


class Step(NamedTuple):
    """A compiled training step and what goes into it.

    `start(params)` makes the optimizer's state; `update(params, rest, opt_state, batch, key)`
    returns the next three, in the memory of the former, and a report.
    """

    start: Callable
    update: Callable
    params: nnx.State  # shapes, types and shardings
    rest: nnx.State
    opt_state: Any


def compiled_step(model: EncoderDecoder, config: TrainConfig) -> Step:
    """The step of a model (of arrays or of shapes alone), kept so that a second run of the same
    shape does not compile again."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return _compiled_step(graphdef, _shapes(params), _shapes(rest), config, model.mesh)


def _shapes(tree):
    """Leaves and structure of a tree, hashable."""
    leaves, structure = jax.tree.flatten(tree)
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves), structure


@functools.lru_cache(maxsize=16)
def _compiled_step(graphdef, params, rest, config: TrainConfig, mesh: Mesh | None) -> Step:
    params, rest = (jax.tree.unflatten(tree[1], tree[0]) for tree in (params, rest))
    optimizer = make_optimizer(config, params)

    def update(params, rest, opt_state, batch, key):
        grads, (report, stats) = jax.grad(_loss, has_aux=True)(
            params, rest, graphdef, batch, key, config
        )
        updates, opt_state = optimizer.update(grads, opt_state, params)
        report["grad_norm"] = optax.tree.norm(grads)
        if stats:
            rest = update_router_bias(rest, stats)
        return optax.apply_updates(params, updates), rest, opt_state, report

    opt_state = jax.eval_shape(optimizer.init, params)
    if mesh is None:
        start, update = jax.jit(optimizer.init), jax.jit(update, donate_argnums=(0, 1, 2))
        return Step(start, update, params, rest, opt_state)
    # stated, so that results lie where the donated arguments lay
    places = [
        jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        for specs in (*_specs((params, rest), mesh), state_specs(opt_state, params, mesh))
    ]
    # lets other work go on while tokens travel; large slices of v5e and v6e cannot
    overlap = {"xla_tpu_enable_async_all_to_all": "true"}
    overlaps = platform(mesh) == "tpu" and "lite" not in mesh.devices.flat[0].device_kind
    update = jax.jit(
        update,
        donate_argnums=(0, 1, 2),
        out_shardings=(*places, NamedSharding(mesh, PartitionSpec())),
        compiler_options=overlap if overlaps else None,
    )
    start = jax.jit(optimizer.init, out_shardings=places[2])
    return Step(start, update, *map(_placed, (params, rest, opt_state), places))


def _specs(tree, mesh: Mesh):
    is_variable = {"is_leaf": lambda leaf: isinstance(leaf, nnx.Variable)}
    return jax.tree.map(lambda v: variable_spec(v, mesh), tree, **is_variable)


def _placed(tree, places):
    """The shapes of a tree with the shardings of a prefix of it."""
    places = jax.tree.broadcast(places, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places
    )


def abstract_batch(config: TrainConfig, mesh: Mesh) -> tuple[Batch, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of the batch and key that `Step.update` takes."""

    def rows(length, dtype):
        shape = (config.batch_size, length)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, BATCH_SPEC))

    batch = {
        f.name: rows(
            config.input_length if f.name.startswith("input") else config.target_length,
            jnp.float32 if f.name == "loss_weights" else jnp.int32,
        )
        for f in dataclasses.fields(Batch)
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Batch(**batch), _placed(key, NamedSharding(mesh, PartitionSpec()))
