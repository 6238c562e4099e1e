"""Optimizers: Adafactor with T5's settings, AdamW; schedules; freezing (all optax)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from moekit.config import TrainConfig
from moekit.sharding import variable_spec

# parts of the model by the components of a parameter's path
_PARTS = {"router": ("moe", "router"), "experts": ("moe", "experts"), "moe": ("moe",)}


def schedule(config: TrainConfig) -> Callable:
    """Learning rate by step: warm-up to the peak, then the schedule.

    "rsqrt" decays as sqrt(warmup / step) after the warm-up, T5X's 1 / sqrt(max(step, warm-up))
    scaled to its peak; "cosine" and "linear" reach zero at the last step.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(1, config.steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "rsqrt": lambda: lambda step: peak * (1 + jnp.maximum(step, 0) / max(warmup, 1)) ** -0.5,
    }[config.schedule]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def _label(path, leaf, config: TrainConfig) -> str:
    """How a parameter is updated: not at all, as one array, or layer by layer."""
    names = _names(path)
    for part in config.freeze:
        if all(component in names for component in _PARTS[part]):
            return "frozen"
    return f"{leaf.shape[0]} layers" if "blocks" in names else "whole"


def _decayed(params):
    """Weight decay leaves out norms and position biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not {"scale_d", "bias_bn"} & set(_names(path)), params
    )


def _core(config: TrainConfig) -> optax.GradientTransformation:
    if config.optimizer == "adamw":
        return optax.adamw(
            schedule(config), b2=0.99, weight_decay=config.weight_decay, mask=_decayed
        )
    return optax.adafactor(
        schedule(config),
        min_dim_size_to_factor=128,
        decay_rate=0.8,
        multiply_by_parameter_scale=True,
        clipping_threshold=1.0,
        momentum=None,
        weight_decay_rate=config.weight_decay or None,
        weight_decay_mask=_decayed if config.weight_decay else None,
    )


def make_optimizer(config: TrainConfig, params) -> optax.GradientTransformation:
    """The optimizer of a configuration for a parameter tree.

    Adafactor's factors, clipping and parameter scale act on each layer: for parameters stacked
    over layers (below "blocks") the transformation is mapped over the leading axis.
    """
    labels = jax.tree_util.tree_map_with_path(lambda p, x: _label(p, x, config), params)
    core = _core(config)
    mapped = optax.GradientTransformation(jax.vmap(core.init), jax.vmap(core.update))
    transforms = {
        label: {"frozen": optax.set_to_zero(), "whole": core}.get(label, mapped)
        for label in set(jax.tree.leaves(labels))
    }
    optimizer = optax.partition(transforms, labels)
    if config.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def state_specs(opt_state, params, mesh: Mesh):
    """PartitionSpecs of an optimizer's state: of every array that of its parameter, without the
    dimension over which Adafactor has averaged; numbers are on every device."""
    variables = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    owners = {_names(path): v for (path, _), v in zip(paths, variables, strict=True)}

    def spec(path, leaf):
        names = _names(path)
        owner = next((v for own, v in owners.items() if names[-len(own) :] == own), None)
        if owner is None:
            return PartitionSpec()
        entries = [*variable_spec(owner, mesh), *[None] * owner.ndim][: owner.ndim]
        if leaf.shape == owner.shape:
            return PartitionSpec(*entries)
        for i in range(owner.ndim):
            if leaf.shape == owner.shape[:i] + owner.shape[i + 1 :]:
                return PartitionSpec(*entries[:i], *entries[i + 1 :])
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, opt_state)
