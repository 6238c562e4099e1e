"""The dense feed-forward layer with a function as its activation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moekit.model.layers import FFN


def test_any_function_is_an_activation():
    ffn = FFN(8, 16, activation=jnp.tanh, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    expected = jnp.tanh(x @ ffn.wi_df[...]) @ ffn.wo_fd[...]
    np.testing.assert_allclose(ffn(x), expected, rtol=1e-5)
    assert ffn.wg_df is None
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        FFN(8, 16, activation="gelu", rngs=nnx.Rngs(0))
