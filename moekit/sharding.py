"""The device mesh, and how parameters and batches are sharded over it.

The mesh has three axes: "data", "expert" and "model". Rows of a batch are sharded over data and
expert. Every parameter names its dimensions ("embed", "expert", ..), and `Sharding` lists the mesh
axes over which a dimension of each name is sharded. Only this module knows both kinds of axes.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Shaped

from moekit.versions import to_varying, varying_axes

MESH_AXES = ("data", "expert", "model")
BATCH_AXES = ("data", "expert")
BATCH_SPEC = PartitionSpec(BATCH_AXES)
TRUNCATED_NORMAL_STDDEV = 0.87962566103423978  # of a unit normal truncated at -2 and 2
MAX_VIRTUAL_DEVICES = 512  # of a CPU; more take minutes to start
# not jax.set_mesh, which fails inside a trace such as nnx.eval_shape
_CURRENT_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@dataclass(frozen=True)
class Sharding:
    """The mesh axes that shard each named dimension; dense parameters are fully sharded (FSDP)."""

    expert: tuple[str, ...] = ("expert",)
    mlp: tuple[str, ...] = ("model",)
    heads: tuple[str, ...] = ("model",)
    vocab: tuple[str, ...] = ("model",)
    embed: tuple[str, ...] = ("expert", "data")  # `gather_steps` explains the order
    layers: tuple[str, ...] = ()

    def spec(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        mesh: Mesh,
    ) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions are named `axes`.

        A mesh axis shards at most one dimension, and only if it divides that dimension.
        """
        entries: list[tuple[str, ...] | None] = [None] * len(shape)
        used: set[str] = set()
        # "embed" comes last: it takes the mesh axes that the other dimensions leave
        dimensions = sorted(range(len(shape)), key=lambda dimension: axes[dimension] == "embed")
        for dimension in dimensions:
            name = axes[dimension]
            wanted = getattr(self, name) if name else ()
            free = []
            num_shards = 1
            for axis in wanted:
                if axis not in used and mesh.shape[axis] > 1:
                    free.append(axis)
                    num_shards *= mesh.shape[axis]
            if free and shape[dimension] % num_shards == 0:
                entries[dimension] = tuple(free)
                used.update(free)
        return PartitionSpec(*entries)


def make_mesh(*, data: int | None = None, expert: int = 1, model: int = 1) -> Mesh:
    """A mesh of all devices with axes data, expert and model; leftover devices go to data.

    On a machine that only has a CPU, and before jax has started, this creates as many virtual CPU
    devices as the mesh needs, so that sharded code runs (slowly) anywhere.

    Raises:
      ValueError: the sizes do not divide the device count.
    """
    for name, size in (("data", data), ("expert", expert), ("model", model)):
        if size is not None and size < 1:
            raise ValueError(f"make_mesh({name}={size}): mesh axes have at least one device")
    group_size = expert * model
    needed = (data or 1) * group_size
    _create_virtual_cpu_devices(needed)
    num_devices = jax.device_count()
    leftover = num_devices // group_size
    data_size = data or leftover
    if data_size * group_size != num_devices:
        divisors = ", ".join(str(size) for size in _divisors(num_devices))
        raise ValueError(
            f"a mesh of data={data or 'rest'}, expert={expert}, model={model} does not fill "
            f"{num_devices} {jax.default_backend()} device(s): choose sizes whose product divides "
            f"{num_devices} ({divisors}); on a CPU call make_mesh before any other "
            f"use of jax, or start with JAX_NUM_CPU_DEVICES={needed}"
        )
    sizes = (data_size, expert, model)
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=axis_types)


def _create_virtual_cpu_devices(count: int) -> None:
    """Configure `count` CPU devices unless their number is already set or jax is distributed."""
    already_set = jax.config.jax_num_cpu_devices > 1
    if count == 1 or already_set or jax.distributed.is_initialized():
        return
    if count > MAX_VIRTUAL_DEVICES:
        raise ValueError(
            f"a mesh of {count:,} devices: a CPU is divided into at most {MAX_VIRTUAL_DEVICES} "
            "virtual devices; choose smaller sizes"
        )
    # jax refuses once its backend has started; the caller then reports the devices that exist
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def check_mesh(
    mesh: Mesh | None,
    owner: str,
    *,
    experts: int = 0,
    **model_sizes: int,
) -> None:
    """Check that the mesh divides a model's sizes.

    Args:
      owner: the model or layer that the error message names.
      experts: number of experts, which the expert axis must divide; 0 if there are none.
      model_sizes: named sizes, each of which the model axis must divide (heads, hidden features).

    Raises:
      ValueError: a size is not divisible; the message lists the axis sizes that are possible.
    """
    if mesh is None:
        return
    _check_axis(mesh, "expert", {"experts": experts}, owner)
    _check_axis(mesh, "model", model_sizes, owner)


def _check_axis(
    mesh: Mesh,
    axis: str,
    sizes: dict[str, int],
    owner: str,
) -> None:
    num_devices = mesh.shape[axis]
    for name, size in sizes.items():
        if size % num_devices:
            common = math.gcd(*sizes.values())
            possible = _divisors(common)
            raise ValueError(
                f"{owner} has {size} {name}, which {axis}={num_devices} devices cannot share "
                f"evenly: use make_mesh({axis}=n) with n in {possible}"
            )


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """A context in which parameters are created, and used, sharded over a mesh."""
    token = _CURRENT_MESH.set(mesh)
    try:
        yield
    finally:
        _CURRENT_MESH.reset(token)


def platform(mesh: Mesh | None = None) -> str:
    """Platform ("cpu", "gpu", "tpu") of a mesh, else of the current mesh, else jax's default."""
    mesh = mesh or _CURRENT_MESH.get()
    if mesh is None:
        return jax.default_backend()
    first_device = mesh.devices.flat[0]
    return first_device.platform


def batch_shards(mesh: Mesh | None) -> int:
    """Number of shards of a batch: data times expert."""
    if mesh is None:
        return 1
    return mesh.shape["data"] * mesh.shape["expert"]


def current_batch_shards() -> int:
    """Number of shards of a batch on the mesh that `use_mesh` has set."""
    mesh = _CURRENT_MESH.get()
    return batch_shards(mesh)


def shard_batch(batch: Any, mesh: Mesh | None) -> Any:
    """A tree of arrays, sharded over the mesh by their leading dimension; unchanged without one."""
    if mesh is None:
        return batch
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return jax.device_put(batch, sharding)


def constrain_batch(x: Float[Array, "B *S"]) -> Float[Array, "B *S"]:
    """Constrain activations to be sharded over the batch alone, if the mesh divides the batch."""
    mesh = _CURRENT_MESH.get()
    if mesh is None or x.shape[0] % batch_shards(mesh):
        return x
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return jax.lax.with_sharding_constraint(x, sharding)


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    fan_in: int | None = None,
    stddev: float | None = None,
    value: float | None = None,
) -> nnx.Param:
    """A float32 parameter with named dimensions, created sharded over the current mesh.

    Truncated normal of variance 0.1 / fan_in (Fedus 2021), or normal of `stddev`, or constant.
    """

    def create(key: Key[Array, ""]) -> Array:
        if value is not None:
            # without the dtype the array is weakly typed and the second step compiles again
            return jnp.full(shape, value, jnp.float32)
        if stddev is not None:
            return stddev * jax.random.normal(key, shape)
        target_stddev = math.sqrt(0.1 / fan_in)
        scale = target_stddev / TRUNCATED_NORMAL_STDDEV
        return scale * jax.random.truncated_normal(key, -2, 2, shape)

    mesh = _CURRENT_MESH.get()
    if mesh is not None:
        spec = Sharding().spec(shape, axes, mesh)
        sharding = NamedSharding(mesh, spec)
        create = jax.jit(create, out_shardings=sharding)
    initial_value = create(rngs.params())
    return nnx.Param(initial_value, axes=axes)


def is_variable(leaf: Any) -> bool:
    """Whether a node of a state tree is an nnx.Variable: `is_leaf` for jax.tree functions."""
    return isinstance(leaf, nnx.Variable)


def variable_spec(variable: nnx.Variable, mesh: Mesh) -> PartitionSpec:
    """PartitionSpec of a parameter from the named dimensions that `param` gave it.

    Inside a scan over layers a parameter lacks its leading axes, so names count from the last.
    """
    shape = variable.shape
    num_missing = len(variable.axes) - len(shape)
    axes = variable.axes[num_missing:]
    return Sharding().spec(shape, axes, mesh)


def variable_sharding(variable: nnx.Variable, mesh: Mesh | None) -> jax.sharding.Sharding:
    """Where a parameter is stored: sharded over a mesh, or on the first device."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, variable_spec(variable, mesh))


def restrict_spec(
    spec: PartitionSpec,
    kept: tuple[str, ...] = BATCH_AXES,
) -> PartitionSpec:
    """A spec reduced to the mesh axes in `kept`."""
    entries = []
    for entry in spec:
        kept_axes = [axis for axis in _mesh_axes(entry) if axis in kept]
        entries.append(tuple(kept_axes))
    return PartitionSpec(*entries)


def _mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if isinstance(entry, str):
        return (entry,)
    return entry or ()


def gather_steps(
    spec: PartitionSpec, axes: tuple[str, ...] = BATCH_AXES
) -> tuple[tuple[str, int], ...]:
    """The all-gathers that restore a parameter: (mesh axis, dimension) of each, in order.

    First over data, which a spec names last: the shards are then still small, and one all-gather
    over data and expert together would be compiled to an all-reduce on TPUs.
    """
    steps = []
    for axis in axes:
        for dimension, entry in enumerate(spec):
            if axis in _mesh_axes(entry):
                steps.append((axis, dimension))
    return tuple(steps)


def all_gather_parameter(shard: Array, steps: tuple[tuple[str, int], ...]) -> Array:
    """All-gather a parameter inside shard_map; its gradient is reduce-scattered."""
    for axis, dimension in steps:
        shard = jax.lax.all_gather(shard, axis, axis=dimension, tiled=True)
    return shard


def with_gathered_parameters(
    function: Callable[..., Array],
    dtype: DTypeLike,
    x: Shaped[Array, "B *S"],
    *parameters: nnx.Variable,
) -> Array:
    """function(x, *values) where the batch is sharded and the parameters' values are all-gathered.

    Parameters are cast to `dtype` and all-gathered over the batch axes just before use; their
    gradients are reduce-scattered. Both are explicit because XLA may otherwise choose all-reduces
    of twice the bytes. Sharding over the model axis is left to XLA, and so is everything for a
    batch that the mesh does not divide.
    """
    mesh = _CURRENT_MESH.get()
    values = [parameter[...].astype(dtype) for parameter in parameters]
    if mesh is None or x.shape[0] % batch_shards(mesh):
        return function(x, *values)
    specs = []
    for parameter in parameters:
        full_spec = variable_spec(parameter, mesh)
        specs.append(restrict_spec(full_spec))

    def per_device(x: Array, *shards: Array) -> Array:
        axes = varying_axes(x)
        gathered = []
        for shard, spec in zip(shards, specs, strict=True):
            steps = gather_steps(spec)
            value = all_gather_parameter(shard, steps)
            gathered.append(cast_varying(value, axes))
        return function(x, *gathered)

    sharded = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(BATCH_SPEC, *specs),
        out_specs=BATCH_SPEC,
        axis_names=set(BATCH_AXES),
    )
    return sharded(x, *values)


def cast_varying(x: Array, axes: Iterable[str]) -> Array:
    """Cast a replicated array to device-varying over `axes`.

    The gradient is psummed over these axes here, and nowhere later.
    """
    already_varying = varying_axes(x)
    missing = tuple(axis for axis in axes if axis not in already_varying)
    if not missing:
        return x
    return to_varying(x, missing)
