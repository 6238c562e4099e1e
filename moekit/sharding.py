"""Devices in a mesh, and where each parameter lives on it.

Parameters carry logical axis names ("embed", "expert", ..); `Sharding` says which mesh axes split
them. Only this module knows both. Mesh axes: data, expert, model.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

AXES = ("data", "expert", "model")
ROW_AXES = ("data", "expert")  # the rows of a batch are split over both
BATCH = PartitionSpec(ROW_AXES)
# jax's own ambient mesh cannot be set while tracing, as under nnx.eval_shape
_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@dataclass(frozen=True)
class Sharding:
    """Mesh axes for each logical axis of a parameter; dense ones are fully sharded."""

    expert: tuple[str, ...] = ("expert",)
    mlp: tuple[str, ...] = ("model",)
    heads: tuple[str, ...] = ("model",)
    vocab: tuple[str, ...] = ("model",)
    embed: tuple[str, ...] = ("expert", "data")  # see `gathered` for the order
    layers: tuple[str, ...] = ()

    def spec(self, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh):
        """PartitionSpec of an array: every mesh axis at most once, only where it divides."""
        used: set[str] = set()
        entries: list[tuple[str, ...] | None] = [None] * len(shape)
        # "embed" goes last: it takes whichever mesh axes the others left
        for i in sorted(range(len(shape)), key=lambda i: axes[i] == "embed"):
            wanted = getattr(self, axes[i]) if axes[i] else ()
            names = tuple(n for n in wanted if n not in used and mesh.shape[n] > 1)
            if names and shape[i] % math.prod(mesh.shape[n] for n in names) == 0:
                entries[i] = names
                used.update(names)
        return PartitionSpec(*entries)


def make_mesh(*, data: int | None = None, expert: int = 1, model: int = 1) -> Mesh:
    """A mesh of all devices with axes data, expert and model; leftover devices go to data.

    On a machine with only a CPU whose backend has not started yet, as many virtual CPU devices are
    made as the mesh asks for, so that sharded code runs, slowly, anywhere.

    Raises:
      ValueError: the sizes do not divide the device count.
    """
    for name, size in (("data", data), ("expert", expert), ("model", model)):
        if size is not None and size < 1:
            raise ValueError(f"make_mesh({name}={size}): mesh axes have at least one device")
    wanted = (data or 1) * expert * model
    _virtual_cpu_devices(wanted)
    devices = jax.device_count()
    leftover, rest = divmod(devices, expert * model)
    if rest or (data or leftover) * expert * model != devices:
        fits = [n for n in range(1, devices + 1) if devices % n == 0]
        raise ValueError(
            f"a mesh of data={data or 'rest'}, expert={expert}, model={model} does not fill "
            f"{devices} {jax.default_backend()} device(s): choose sizes whose product divides "
            f"{devices} ({', '.join(map(str, fits))}); on a CPU call make_mesh before any other "
            f"use of jax, or start with JAX_NUM_CPU_DEVICES={wanted}"
        )
    return jax.make_mesh((leftover, expert, model), AXES, axis_types=(AxisType.Auto,) * 3)


def _virtual_cpu_devices(count: int) -> None:
    """Ask for `count` CPU devices while that is still possible and nobody has asked otherwise."""
    if count == 1 or jax.config.jax_num_cpu_devices > 1 or jax.distributed.is_initialized():
        return
    # once the backend has started it is too late: the caller then reports the devices there are
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def row_shards(mesh: Mesh | None) -> int:
    """Into how many parts the rows of a batch are split."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["expert"]


def split_rows(batch, mesh: Mesh | None):
    """A tree of arrays with their rows split over the mesh; without one as they are."""
    return batch if mesh is None else jax.device_put(batch, NamedSharding(mesh, BATCH))


def variable_spec(variable: nnx.Variable, mesh: Mesh) -> PartitionSpec:
    """Where a parameter lives, from the logical axes that `param` gave it; one that a scan has
    stripped of its leading axes is recognised by its rank."""
    shape = variable.shape
    return Sharding().spec(shape, variable.axes[len(variable.axes) - len(shape) :], mesh)


def check_mesh(mesh: Mesh | None, what: str, *, experts: int = 0, **model: int) -> None:
    """ValueError, with the sizes that would do, if the expert axis does not divide the experts or
    the model axis not every one of the other sizes (heads, hidden features; 0: there is none)."""
    if mesh is None:
        return
    sizes = {"expert": {"experts": experts}, "model": model}
    for axis, counts in sizes.items():
        devices = mesh.shape[axis]
        for name, count in counts.items():
            if count % devices:
                common = math.gcd(*counts.values())
                fits = [n for n in range(1, common + 1) if common % n == 0]
                raise ValueError(
                    f"{what} has {count} {name}, which {axis}={devices} devices cannot share "
                    f"evenly: use make_mesh({axis}=n) with n in {fits}"
                )


@contextlib.contextmanager
def placed_on(mesh: Mesh | None):
    """A context in which parameters are born, and used, sharded over a mesh."""
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def on_rows(function: Callable, dtype, x: Shaped[Array, "B *S"], *parameters: nnx.Variable):
    """function(x, *arrays of the parameters), each device on its rows.

    The parameters, in a compute type, are gathered over the axes that split rows just before use
    and their gradients come back by reduce-scatter, both stated here because XLA, left alone, may
    choose all-reduces of twice the bytes. How the model axis splits them is left to XLA. Rows that
    the mesh does not divide are left to it altogether.
    """
    mesh, values = _MESH.get(), [p[...].astype(dtype) for p in parameters]
    if mesh is None or x.shape[0] % row_shards(mesh):
        return function(x, *values)
    specs = [rows_only(variable_spec(p, mesh)) for p in parameters]

    def local(x, *values):
        axes = varying(x)
        values = [vary(gathered(v, spec), axes) for v, spec in zip(values, specs, strict=True)]
        return function(x, *values)

    split = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(BATCH, *specs),
        out_specs=BATCH,
        axis_names={*ROW_AXES},
    )
    return split(x, *values)


def rows_only(spec: PartitionSpec, kept: tuple[str, ...] = ROW_AXES) -> PartitionSpec:
    """A spec without the mesh axes that are not kept."""
    return PartitionSpec(*(tuple(n for n in _names(entry) if n in kept) for entry in spec))


def gathered(value: Array, spec: PartitionSpec) -> Array:
    """A parameter's part made whole, inside shard_map, over the axes in its spec.

    First over data, which a spec names last: the parts are small then, and a gather over all of a
    slice at once would run as an all-reduce on TPUs.
    """
    for axis in ROW_AXES:
        for dim, entry in enumerate(spec):
            if axis in _names(entry):
                value = jax.lax.all_gather(value, axis, axis=dim, tiled=True)
    return value


def _names(entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def devices_of_rows() -> int:
    """How many devices split the rows of a batch where the code runs."""
    return row_shards(_MESH.get())


def platform(mesh: Mesh | None = None) -> str:
    """Where traced code will run: the kind of device of a mesh (or of the one that `placed_on` has
    set), or the default one."""
    mesh = mesh or _MESH.get()
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def varying(x: Array) -> frozenset[str]:
    """The mesh axes along which an array inside shard_map differs between devices."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary(x: Array, axes: Iterable[str]) -> Array:
    """Equal copies of x as the start of different work along some mesh axes: here, and nowhere
    later, their cotangents are summed."""
    missing = tuple(axis for axis in axes if axis not in varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def by_rows(x: Float[Array, "B *S"]) -> Float[Array, "B *S"]:
    """Activations with their rows split over the mesh, if it divides them, and nothing else."""
    mesh = _MESH.get()
    if mesh is None or x.shape[0] % row_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    fan_in: int | None = None,
    stddev: float | None = None,
    value: float | None = None,
) -> nnx.Param:
    """A float32 parameter with logical axes, born sharded over the mesh that `placed_on` sets.

    Truncated normal of variance 0.1 / fan_in (Fedus 2021), or normal of `stddev`, or constant.
    """

    def create(key):
        if value is not None:
            return jnp.full(shape, value, jnp.float32)  # a weak type would compile step 2 anew
        if stddev is not None:
            return stddev * jax.random.normal(key, shape)
        # .87962566 is the standard deviation of a unit normal cut at 2
        std = math.sqrt(0.1 / fan_in) / 0.87962566103423978
        return std * jax.random.truncated_normal(key, -2, 2, shape)

    if (mesh := _MESH.get()) is not None:
        sharding = NamedSharding(mesh, Sharding().spec(shape, axes, mesh))
        create = jax.jit(create, out_shardings=sharding)
    return nnx.Param(create(rngs.params()), axes=axes)
