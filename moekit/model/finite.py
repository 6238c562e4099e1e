"""Whether the parameters of a model are numbers: checked once before it generates or is read."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool

from moekit.distributed import to_host
from moekit.errors import not_finite
from moekit.model.transformer import EncoderDecoder


def require_finite(model: EncoderDecoder) -> None:
    """Raise ValueError, with its name, for the first parameter that holds NaN or infinity.

    All parameters are read once on their devices.
    """
    names = []
    arrays = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        array = variable[...]
        if jnp.issubdtype(array.dtype, jnp.floating):
            names.append(".".join(map(str, path)))
            arrays.append(array)
    is_on_cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
    if is_on_cpu:  # numpy reads the same memory, and nothing is compiled
        found = [np.isfinite(np.asarray(array)).all() for array in arrays]
    else:
        found = to_host(_are_finite(arrays))
    for name, is_finite in zip(names, found, strict=True):
        if not is_finite:
            raise not_finite(model.cfg.name, name)


@jax.jit
def _are_finite(arrays: Sequence[Array]) -> Bool[Array, "arrays"]:
    return jnp.stack([jnp.isfinite(array).all() for array in arrays])
