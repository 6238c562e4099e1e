"""The T5 encoder-decoder with dense and MoE layers.

B batch, L input length, T target length, D d_model, N heads, H head dimension, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from moekit.config import ModelConfig
from moekit.data.batch import Batch
from moekit.data.tokenizer import PAD
from moekit.model.attention import segment_mask
from moekit.model.layers import float32_logits
from moekit.model.stack import Context, Stack, split_key
from moekit.moe.stats import LayerStats, TokenRouting
from moekit.sharding import check_mesh, param, use_mesh, with_gathered_parameters

Method = TypeVar("Method", bound=Callable)


@no_type_check  # pytrees: tree.map rebuilds them around leaves of any shape
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """Result of a forward pass; `stats` and `routing` have a leading axis over MoE layers."""

    logits: Float[Array, "B T V"]  # float32
    stats: dict[str, LayerStats]  # by stack: "encoder", "decoder"; empty when dense
    routing: dict[str, TokenRouting] | None  # only when traced


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Encoded:
    """Encoder states and the example that each position belongs to (0 is padding)."""

    states: Float[Array, "B L D"]
    segments: Int[Array, "B L"]
    stats: dict[str, LayerStats]
    routing: dict[str, TokenRouting] | None


def _with_mesh(method: Method) -> Method:
    """Run a method of `EncoderDecoder` with its mesh as the current one."""

    @functools.wraps(method)
    def run(self: "EncoderDecoder", *args: Any, **kwargs: Any) -> Any:
        with use_mesh(self.mesh):
            return method(self, *args, **kwargs)

    return run


class EncoderDecoder(nnx.Module):
    """T5 v1.1 with MoE layers where the configuration places them.

    T5 v1.0 has the same code: tied, scaled logits and ReLU are configuration fields.

    Args:
      seed: of the initial parameters.
      mesh: parameters are created sharded over it; batches are sharded over its data and expert
        axes.

    Raises:
      ValueError: the mesh's expert axis does not divide the experts, or its model axis does not
        divide the heads or hidden features.
    """

    def __init__(self, cfg: ModelConfig, seed: int = 0, mesh: Mesh | None = None):
        model_sizes = cfg.split_by_model()
        check_mesh(mesh, cfg.name, experts=cfg.num_experts, **model_sizes)
        rngs = nnx.Rngs(params=seed)
        with use_mesh(mesh):
            shape = (cfg.vocab_size, cfg.d_model)
            self.embedding_vd = param(rngs, shape, ("vocab", "embed"), stddev=1.0)
            self.encoder = Stack(cfg, "encoder", mesh=mesh, rngs=rngs)
            self.decoder = Stack(cfg, "decoder", mesh=mesh, rngs=rngs)
            self.head_dv = None if cfg.tied_logits else _output_head(cfg, rngs)
        self.cfg = cfg
        self.mesh = mesh

    def __call__(
        self,
        batch: Batch,
        *,
        key: Key[Array, ""] | None = None,
        trace: bool = False,
        remat: str = "none",
    ) -> Output:
        """Logits of the targets with teacher forcing.

        Args:
          key: enables training: dropout, the training capacity factor, router randomness. Without
            a key the pass is deterministic and uses the evaluation capacity factor.
          trace: return the routing of every token.
          remat: rematerialization policy, see `TrainConfig`.
        """
        batch = jax.tree.map(jnp.asarray, batch)  # NumPy batches are accepted outside of jit
        encoder_key, decoder_key = split_key(key, 2)
        encoded = self.encode(
            batch.inputs, batch.input_segments, key=encoder_key, trace=trace, remat=remat
        )
        tokens = shift_right(batch.targets, batch.target_positions)
        return self.decode(
            encoded, tokens, batch.target_segments, key=decoder_key, trace=trace, remat=remat
        )

    @_with_mesh
    def encode(
        self,
        inputs: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        *,
        key: Key[Array, ""] | None = None,
        trace: bool = False,
        remat: str = "none",
    ) -> Encoded:
        """Encoder states of inputs; segment 0 is padding."""
        positions = jnp.arange(inputs.shape[1])
        context = Context(
            mask=segments > 0,
            token_ids=inputs,
            self_mask=segment_mask(segments, segments),
            bias=self.encoder.bias(positions, positions),
            remat=remat,
        )
        states, routed = self.encoder(self.embed(inputs), context, key)
        stats = {}
        routing = {}
        if routed is not None:
            stats["encoder"], routing["encoder"] = routed
        return Encoded(states, segments, stats, routing if trace else None)

    @_with_mesh
    def decode(
        self,
        encoded: Encoded,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        *,
        key: Key[Array, ""] | None = None,
        trace: bool = False,
        remat: str = "none",
    ) -> Output:
        """Logits after each of the decoder's input tokens (targets shifted right)."""
        positions = jnp.arange(tokens.shape[1])
        context = Context(
            mask=segments > 0,
            token_ids=tokens,
            self_mask=segment_mask(segments, segments, causal=True),
            bias=self.decoder.bias(positions, positions),
            memory=encoded.states,
            cross_mask=segment_mask(segments, encoded.segments),
            remat=remat,
        )
        states, routed = self.decoder(self.embed(tokens), context, key)
        stats = dict(encoded.stats)
        routing = dict(encoded.routing or {})
        if routed is not None:
            stats["decoder"], routing["decoder"] = routed
        return Output(self.logits(states), stats, routing if trace else None)

    @_with_mesh
    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Embedded tokens in the compute type."""
        # look up in float32: the gradient of a frequent token is a long sum
        x = with_gathered_parameters(_look_up, jnp.float32, tokens, self.embedding_vd)
        return x.astype(jnp.dtype(self.cfg.dtype))

    @_with_mesh
    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of the decoder's states."""
        if self.cfg.logits_scale != 1:
            # T5 v1.0 scales tied logits, because rows of the embedding have unit variance
            scaled = x.astype(jnp.float32) * self.cfg.logits_scale
            x = scaled.astype(x.dtype)
        if self.head_dv is not None:
            return with_gathered_parameters(float32_logits, x.dtype, x, self.head_dv)
        return with_gathered_parameters(_tied_logits, x.dtype, x, self.embedding_vd)


def _output_head(cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Param:
    shape = (cfg.d_model, cfg.vocab_size)
    return param(rngs, shape, ("embed", "vocab"), fan_in=cfg.d_model)


def _look_up(
    tokens: Int[Array, "B L"],
    table_vd: Float[Array, "V D"],
) -> Float[Array, "B L D"]:
    return table_vd[tokens]


def _tied_logits(
    x: Float[Array, "B T D"],
    embedding_vd: Float[Array, "V D"],
) -> Float[Array, "B T V"]:
    return float32_logits(x, embedding_vd.T)


def with_config(model: EncoderDecoder, cfg: ModelConfig) -> EncoderDecoder:
    """A copy of a model with another configuration: other dropout, capacity, losses.

    Raises:
      ValueError: the configuration has other parameters than the model.
    """
    abstract = nnx.eval_shape(lambda: EncoderDecoder(cfg, mesh=model.mesh))
    graphdef, abstract_state = nnx.split(abstract)
    wanted = dict(nnx.to_flat_state(abstract_state))
    existing = dict(nnx.to_flat_state(nnx.state(model)))
    _check_same_parameters(existing, wanted)
    copies = {}
    for path, variable in wanted.items():
        value = jnp.copy(existing[path][...])
        copies[path] = variable.replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state(copies))


def _check_same_parameters(
    existing: dict[tuple, nnx.Variable],
    wanted: dict[tuple, nnx.Variable],
) -> None:
    paths = existing.keys() | wanted.keys()
    for path in sorted(paths, key=str):
        old_shape = existing[path].shape if path in existing else None
        new_shape = wanted[path].shape if path in wanted else None
        if old_shape != new_shape:
            name = "/".join(map(str, path))
            raise ValueError(
                f"the configuration changes the parameter {name} from {old_shape} to {new_shape}: "
                "with_config only changes settings; use EncoderDecoder(cfg) for a new model"
            )


def shift_right(
    targets: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Int[Array, "B T"]:
    """Input tokens of the decoder: the previous target, or padding where an example starts."""
    previous = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(positions == 0, PAD, previous)
