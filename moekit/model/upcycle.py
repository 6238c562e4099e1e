"""Sparse upcycling (Komatsuzaki 2022): the arrays of an MoE model, from those of a dense one.

Layer l of a dense stack is row l of its arrays. A sparse stack repeats blocks of P layers: row b of
the arrays of `blocks[i]` belongs to layer b * P + i. An expert is a copy of its layer's dense FFN;
routers are new.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, Sharding
from jaxtyping import Array

from moekit.config import ModelConfig
from moekit.model.transformer import EncoderDecoder
from moekit.moe.layer import RouterWeights
from moekit.sharding import use_mesh, variable_sharding

Names = tuple[str, ...]  # the path of an array in a model
# what the parameters of a dense model depend on, and what they mean
KEPT_FIELDS = (
    "d_model",
    "d_ff",
    "num_heads",
    "head_dim",
    "encoder_layers",
    "decoder_layers",
    "vocab_size",
    "activation",
    "tied_logits",
    "logits_scale",
    "relative_buckets",
    "relative_max_distance",
)
DENSE_NAMES = {"wi_edf": "wi_df", "wg_edf": "wg_df", "wo_efd": "wo_fd"}


@dataclass(frozen=True)
class Origin:
    """The rows of a dense model's array that an array of the sparse model consists of.

    Args:
      names: path of the dense array.
      first_row: index of the first row.
      step: distance to the next one.
      num_experts: copies of each row, along a new second axis; 0: no such axis.
    """

    names: Names
    first_row: int = 0
    step: int = 1
    num_experts: int = 0


def origin(names: Names, cfg: ModelConfig) -> Origin | None:
    """Where an array of a sparse model comes from; None for a router's, which is new."""
    if "router" in names:
        return None
    if "blocks" not in names:
        return Origin(names)
    stack, _, index, *parts = names
    num_experts = 0
    if "experts" in parts:
        parts = ["ffn", DENSE_NAMES[parts[-1]]]
        num_experts = cfg.num_experts
    return Origin(
        names=(stack, "blocks", "0", *parts),
        first_row=int(index),
        step=cfg.num_layers(stack) // cfg.num_blocks(stack),
        num_experts=num_experts,
    )


def upcycle_array(array: Array, origin: Origin, sharding: Sharding) -> Array:
    """The array of the sparse model, from the one that `origin` names.

    One that stays as it is, is shared with the dense model, not copied.
    """
    if origin.step == 1 and not origin.num_experts:
        return jax.device_put(array, sharding)
    select = _select_rows(origin.first_row, origin.step, origin.num_experts, sharding)
    return select(array)


@functools.lru_cache(maxsize=128)
def _select_rows(
    first_row: int,
    step: int,
    num_experts: int,
    sharding: Sharding,
) -> Callable[[Array], Array]:
    def select(array: Array) -> Array:
        rows = array[first_row::step]
        if not num_experts:
            return rows
        num_rows, *matrix = rows.shape
        return jnp.broadcast_to(rows[:, None], (num_rows, num_experts, *matrix))

    return jax.jit(select, out_shardings=sharding)


def upcycle_model(
    dense: EncoderDecoder,
    cfg: ModelConfig,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> EncoderDecoder:
    """The MoE model of `mk.upcycle`; `mesh`: default the dense model's.

    Beside both models it holds one array at a time.

    Raises:
      ValueError: `dense` or `cfg` do not fit.
    """
    check_upcycle(dense.cfg, cfg)
    mesh = mesh or dense.mesh
    cfg = cfg.replace(tokenizer=cfg.tokenizer or dense.cfg.tokenizer)
    abstract = nnx.eval_shape(lambda: EncoderDecoder(cfg, mesh=mesh))
    graphdef, state = nnx.split(abstract)
    dense_variables = {}
    for path, variable in nnx.to_flat_state(nnx.state(dense)):
        dense_variables[to_names(path)] = variable
    routers = _new_routers(cfg, seed, mesh)
    upcycled = {}
    for path, variable in nnx.to_flat_state(state):
        names = to_names(path)
        sharding = variable_sharding(variable, mesh)
        source = origin(names, cfg)
        if source is None:
            stack, *_, name = names
            new = getattr(routers[stack], name)[...]
            value = jax.device_put(new, sharding)
        else:
            existing = dense_variables[source.names]
            array = jax.device_put(existing[...], variable_sharding(existing, mesh))
            value = upcycle_array(array, source, sharding)
        upcycled[path] = variable.replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state(upcycled))


def to_names(path: tuple[str | int, ...]) -> Names:
    return tuple(str(part) for part in path)


def _new_routers(cfg: ModelConfig, seed: int, mesh: Mesh | None) -> dict[str, RouterWeights]:
    """The routers of each stack that has some, as a new model has them."""
    rngs = nnx.Rngs(params=seed)
    routers = {}
    for stack in ("encoder", "decoder"):
        num_blocks = cfg.moe_layers(stack)
        if num_blocks:
            with use_mesh(mesh):
                routers[stack] = RouterWeights(
                    cfg.d_model,
                    cfg.num_experts,
                    cfg.stack_router(stack),
                    stack=(num_blocks,),
                    rngs=rngs,
                )
    return routers


def check_upcycle(dense: ModelConfig, cfg: ModelConfig) -> None:
    """Check that a dense model can be upcycled to a configuration.

    Raises:
      ValueError: the model is sparse, the configuration is dense, or it needs parameters of
        another shape or meaning; the message names the fields.
    """
    if dense.num_experts:
        raise ValueError(
            f"{dense.name} has {dense.num_experts} experts: upcycle starts from a dense model"
        )
    if not cfg.num_experts:
        raise ValueError(
            f"{cfg.name} is dense (num_experts=0): give num_experts, encoder_moe_layers and "
            "decoder_moe_layers"
        )
    differences = []
    for field in KEPT_FIELDS:
        existing = getattr(dense, field)
        wanted = getattr(cfg, field)
        if existing != wanted:
            differences.append(f"{field}={existing!r} there, {wanted!r} here")
    if cfg.expert_d_ff not in (None, dense.d_ff):
        differences.append(f"d_ff={dense.d_ff} there, expert_d_ff={cfg.expert_d_ff} here")
    if cfg.extra_d_ff:
        differences.append(f"no second FFN there, extra_d_ff={cfg.extra_d_ff} here")
    if differences:
        raise ValueError(
            f"{dense.name} cannot be upcycled to {cfg.name} ({'; '.join(differences)}): an expert "
            "is a copy of the dense FFN and everything else is kept, so start from "
            "model.cfg.replace(num_experts=.., ..)"
        )
