"""Matrix products, RMS norm, dropout and the dense feed-forward layer.

B batch, L length, D d_model, F d_ff, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from moekit.moe.layer import Activation, activate, check_activation, gated_gelu
from moekit.sharding import param, platform, with_gathered_parameters


def matmul(
    x: Float[Array, "*B D"],
    weight_df: Float[Array, "D F"],
) -> Float[Array, "*B F"]:
    """x @ weight_df, two-dimensional on CPU.

    XLA for CPU takes twice as long for the same product with a batch dimension, and up to twice
    as long for the gradient that autodiff derives.
    """
    if platform() != "cpu":
        return x @ weight_df
    *leading, features = x.shape
    product = _flat_matmul(x.reshape(-1, features), weight_df)
    return product.reshape(*leading, -1)


@jax.custom_vjp
def _flat_matmul(
    x: Float[Array, "S D"],
    weight_df: Float[Array, "D F"],
) -> Float[Array, "S F"]:
    return x @ weight_df


def _flat_matmul_forward(
    x: Float[Array, "S D"],
    weight_df: Float[Array, "D F"],
) -> tuple[Float[Array, "S F"], tuple[Array, Array]]:
    residuals = (x, weight_df)
    return x @ weight_df, residuals


def _flat_matmul_backward(
    residuals: tuple[Array, Array],
    cotangent: Float[Array, "S F"],
) -> tuple[Float[Array, "S D"], Float[Array, "D F"]]:
    x, weight_df = residuals
    barrier = jax.lax.optimization_barrier
    # Transpose the smaller operand in memory (the barriers forbid to fold it into the product):
    # a product that sums over leading axes is slow.
    if x.shape[1] <= cotangent.shape[1]:
        transposed = barrier(x.T)
        weight_gradient = barrier(transposed @ cotangent)
    else:
        transposed = barrier(cotangent.T)
        weight_gradient = barrier(transposed @ x).T
    x_gradient = cotangent @ weight_df.T
    return x_gradient, weight_gradient


_flat_matmul.defvjp(_flat_matmul_forward, _flat_matmul_backward)


def float32_logits(
    x: Float[Array, "B L D"],
    weight_dv: Float[Array, "D V"],
) -> Float[Array, "B L V"]:
    """Output logits in float32: products of the compute type, summed and kept in float32."""
    if x.dtype == jnp.float32:
        return matmul(x, weight_dv)
    return jnp.dot(x, weight_dv, preferred_element_type=jnp.float32)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale in float32, without mean or bias (Zhang 2019): T5's layer norm."""

    def __init__(self, d_model: int, *, stack: tuple[int, ...] = (), rngs: nnx.Rngs):
        axes = (*("layers",) * len(stack), None)
        self.scale_d = param(rngs, (*stack, d_model), axes, value=1.0)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        exact = x.astype(jnp.float32)
        mean_square = jnp.mean(exact * exact, -1, keepdims=True)
        inverse_rms = jax.lax.rsqrt(mean_square + 1e-6)
        scaled = exact * inverse_rms * self.scale_d[...]
        return scaled.astype(x.dtype)


def dropout(
    x: Float[Array, "B L D"],
    rate: float,
    key: Key[Array, ""] | None,
) -> Float[Array, "B L D"]:
    """T5's dropout: one mask [B, 1, D] for all positions. Without a key, x itself."""
    if key is None or rate == 0:
        return x
    batch, _, features = x.shape
    keep = jax.random.bernoulli(key, 1 - rate, (batch, 1, features))
    scaled = x / (1 - rate)
    return jnp.where(keep, scaled, 0).astype(x.dtype)


class FFN(nnx.Module):
    """The dense feed-forward layer: gated GELU (T5 v1.1), ReLU (v1.0) or another activation.

    Args:
      activation: "gated_gelu", "relu", or an elementwise function such as jnp.tanh.
      dtype: compute type of the products.
      stack: leading axes of all parameters, which the caller scans over.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: Activation = "gated_gelu",
        dtype: DTypeLike = jnp.float32,
        stack: tuple[int, ...] = (),
        rngs: nnx.Rngs,
    ):
        check_activation(activation, d_ff)
        self.activation = activation
        layers = ("layers",) * len(stack)
        shape = (*stack, d_model, d_ff)
        axes = (*layers, "embed", "mlp")
        self.wi_df = param(rngs, shape, axes, fan_in=d_model)
        gated = activation == "gated_gelu"
        self.wg_df = param(rngs, shape, axes, fan_in=d_model) if gated else None
        output_axes = (*layers, "mlp", "embed")
        self.wo_fd = param(rngs, (*stack, d_ff, d_model), output_axes, fan_in=d_ff)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        x = x.astype(self.dtype)
        function = functools.partial(_plain_ffn, self.activation)
        parameters = [self.wi_df, self.wo_fd]
        if self.wg_df is not None:
            function = _gated_gelu_ffn
            parameters.append(self.wg_df)
        return with_gathered_parameters(function, self.dtype, x, *parameters)


def _plain_ffn(
    activation: Activation,
    x: Float[Array, "B L D"],
    wi_df: Float[Array, "D F"],
    wo_fd: Float[Array, "F D"],
) -> Float[Array, "B L D"]:
    hidden = activate(activation, matmul(x, wi_df))
    return matmul(hidden, wo_fd)


def _gated_gelu_ffn(
    x: Float[Array, "B L D"],
    wi_df: Float[Array, "D F"],
    wo_fd: Float[Array, "F D"],
    wg_df: Float[Array, "D F"],
) -> Float[Array, "B L D"]:
    hidden = matmul(x, wi_df)
    gate = matmul(x, wg_df)
    return matmul(gated_gelu(gate, hidden), wo_fd)
