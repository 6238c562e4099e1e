"""Optimizers: Adafactor as in T5X, AdamW, learning-rate schedules, frozen parameters (optax)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from moekit.config import TrainConfig
from moekit.sharding import is_variable, variable_spec
from moekit.train_config import ALL_BUT_ROUTER

MIN_FACTORED_SIZE = 128  # a matrix with a smaller side keeps all its second moments
STACKED_AXES = ("layers", "expert")  # logical axes along which every slice is updated by itself
NOT_DECAYED = {"scale_d", "bias_bn"}  # norms and position biases have no weight decay
Path = tuple[Any, ...]  # of jax.tree_util: the keys from the root of a tree to a leaf
# the components that the path of a parameter must have to belong to a part of the model
FREEZABLE_PATHS = {
    "router": {"moe", "router"},
    "experts": {"moe", "experts"},
    "moe": {"moe"},
}


def schedule(config: TrainConfig) -> Callable[[Any], Any]:
    """Learning rate by step: linear warm-up to the peak, then the schedule.

    "rsqrt" decays as sqrt(warmup / step) after the warm-up: T5X's 1 / sqrt(max(step, warmup))
    scaled to the peak. "cosine" and "linear" reach zero at the last step.
    """
    peak = config.learning_rate
    warmup_steps = config.warmup_steps
    decay_steps = max(1, config.steps - warmup_steps)

    def inverse_square_root(step: Any) -> Any:
        return peak * (1 + jnp.maximum(step, 0) / max(warmup_steps, 1)) ** -0.5

    if config.schedule == "cosine":
        after_warmup = optax.cosine_decay_schedule(peak, decay_steps)
    elif config.schedule == "linear":
        after_warmup = optax.linear_schedule(peak, 0.0, decay_steps)
    elif config.schedule == "rsqrt":
        after_warmup = inverse_square_root
    else:
        after_warmup = optax.constant_schedule(peak)
    if warmup_steps == 0:
        return after_warmup
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, after_warmup], [warmup_steps])


@dataclass(frozen=True)
class MatrixView:
    """How Adafactor sees a parameter: a stack of matrices (or vectors), each updated by itself.

    As in T5X, layers and experts are batch dimensions, and attention heads are joined with their
    head dimension: a kernel [layers, d_model, heads, head_dim] is a stack of matrices
    [d_model, heads x head_dim].
    """

    shape: tuple[int, ...]
    spec: PartitionSpec  # mesh axes of each dimension
    num_batch_dims: int

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.shape[: self.num_batch_dims]


def matrix_view(parameter: nnx.Variable, mesh: Mesh | None = None) -> MatrixView:
    """The view of a parameter, by its logical axes."""
    axes = parameter.axes
    shape = list(parameter.shape)
    spec = [None] * len(shape)
    if mesh is not None:
        spec = list(variable_spec(parameter, mesh))
    num_batch_dims = sum(axis in STACKED_AXES for axis in axes)
    is_attention_kernel = "heads" in axes and "embed" in axes
    if is_attention_kernel:
        heads = axes.index("heads")
        shape[heads] *= shape.pop(heads + 1)
        spec.pop(heads + 1)  # the head dimension is never sharded
    return MatrixView(tuple(shape), PartitionSpec(*spec), num_batch_dims)


def on_matrices(
    optimizer: optax.GradientTransformation, params: nnx.State
) -> optax.GradientTransformation:
    """The optimizer applied to parameters that are reshaped to their matrix views."""
    views = jax.tree.map(matrix_view, params, is_leaf=is_variable)

    def to_matrices(tree: Any) -> Any:
        def reshape(view: MatrixView, variable: Any) -> Any:
            return jax.tree.map(lambda array: array.reshape(view.shape), variable)

        return jax.tree.map(reshape, views, tree)

    def init(params: Any) -> Any:
        return optimizer.init(to_matrices(params))

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        matrices, state = optimizer.update(to_matrices(updates), state, to_matrices(params))
        updates = jax.tree.map(lambda new, old: new.reshape(old.shape), matrices, updates)
        return updates, state

    return optax.GradientTransformation(init, update)


def adafactor(config: TrainConfig, num_batch_dims: int) -> optax.GradientTransformation:
    """Adafactor with T5's settings (Shazeer and Stern 2018) for stacks of matrices.

    Second moments, clipping and parameter scale belong to one matrix: they are mapped over the
    leading batch dimensions. Weight decay is multiplied by the learning rate, as in AdamW.
    """
    one_matrix = optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=MIN_FACTORED_SIZE),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    init = one_matrix.init
    update = one_matrix.update
    for _ in range(num_batch_dims):
        init = jax.vmap(init)
        update = jax.vmap(update)
    return optax.chain(
        optax.GradientTransformation(init, update),
        optax.add_decayed_weights(config.weight_decay, mask=decayed_parameters),
        optax.scale_by_learning_rate(schedule(config)),
    )


def adamw(config: TrainConfig) -> optax.GradientTransformation:
    return optax.adamw(
        schedule(config),
        b2=0.99,
        weight_decay=config.weight_decay,
        mask=decayed_parameters,
    )


def decayed_parameters(params: Any) -> Any:
    """A tree of booleans: whether weight decay applies to a parameter."""

    def is_decayed(path: Path, _: Any) -> bool:
        return NOT_DECAYED.isdisjoint(path_names(path))

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def make_optimizer(config: TrainConfig, params: nnx.State) -> optax.GradientTransformation:
    """The optimizer of a configuration for a model's parameters (arrays or shapes).

    Frozen parameters have no optimizer state.
    """
    transforms = {"frozen": optax.set_to_zero()}

    def label(path: Path, parameter: nnx.Variable) -> str:
        """Name the transform of a parameter, and add it where it is new."""
        if is_frozen(path, config):
            return "frozen"
        if config.optimizer == "adamw":
            transforms["adamw"] = adamw(config)
            return "adamw"
        # parameters with the same batch dimensions are mapped together
        batch_shape = matrix_view(parameter).batch_shape
        name = f"adafactor {batch_shape}"
        transforms[name] = adafactor(config, len(batch_shape))
        return name

    labels = jax.tree_util.tree_map_with_path(label, params, is_leaf=is_variable)
    optimizer = optax.partition(transforms, labels)
    if config.optimizer == "adafactor":
        optimizer = on_matrices(optimizer, params)
    if config.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def is_frozen(path: Path, config: TrainConfig) -> bool:
    names = path_names(path)
    if ALL_BUT_ROUTER in config.freeze:
        return not FREEZABLE_PATHS["router"].issubset(names)
    return any(FREEZABLE_PATHS[part].issubset(names) for part in config.freeze)


def path_names(path: Path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def state_specs(optimizer_state: Any, params: nnx.State, mesh: Mesh) -> Any:
    """PartitionSpecs of an optimizer's state.

    Arrays of a parameter's size are sharded as the parameter, Adafactor's averages as the
    dimensions that are left; everything else is replicated.
    """
    parameters = {
        path_names(path): parameter
        for path, parameter in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable)
    }

    def spec(path: Path, leaf: Any) -> PartitionSpec:
        names = path_names(path)
        for start in range(len(names)):
            parameter = parameters.get(names[start:])
            if parameter is not None:
                return _spec_like(leaf.shape, parameter, "v_row" in names, mesh)
        return PartitionSpec()

    # the arrays of Adafactor's and AdamW's states are in variables, as the parameters are
    return jax.tree_util.tree_map_with_path(spec, optimizer_state, is_leaf=is_variable)


def _spec_like(
    shape: tuple[int, ...], parameter: nnx.Variable, is_row: bool, mesh: Mesh
) -> PartitionSpec:
    """The spec of an array of the optimizer that belongs to a parameter."""
    if shape == parameter.shape:
        return variable_spec(parameter, mesh)
    view = matrix_view(parameter, mesh)
    if shape == view.shape:
        return view.spec
    if len(view.shape) - view.num_batch_dims != 2:
        return PartitionSpec()
    # optax's v_row is averaged over the larger dimension of a matrix, v_col over the other one
    rows_are_averaged = (view.shape[-2] > view.shape[-1]) == is_row
    kept = -1 if rows_are_averaged else -2
    if shape != (*view.batch_shape, view.shape[kept]):
        return PartitionSpec()  # the placeholder of a parameter that is not factored
    return PartitionSpec(*view.spec[: view.num_batch_dims], view.spec[kept])
