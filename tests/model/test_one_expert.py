"""A switch model with one expert is the dense model: equal parameters give equal training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moekit as mk

DENSE_NAMES = {"wi_edf": "wi_df", "wg_edf": "wg_df", "wo_efd": "wo_fd"}
Arrays = dict[tuple[str, ...], np.ndarray]


def config(num_experts: int, **changes: Any) -> mk.ModelConfig:
    return mk.preset("switch-nano" if num_experts else "t5-nano").replace(
        d_model=16,
        d_ff=32,
        num_heads=2,
        head_dim=8,
        vocab_size=32,
        num_experts=num_experts,
        balance_loss=0.0,
        **changes,
    )


def arrays(state: Any) -> Arrays:
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    return {tuple(str(part.key) for part in path): np.asarray(leaf) for path, leaf in leaves}


def dense_path(path: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """The dense model's path of a sparse model's layer parameter, and its layer.

    The dense stack is two blocks of one layer, the sparse one a block of two layers.
    """
    stack, _, layer, *rest = path
    if "experts" in rest:
        rest = ["ffn", DENSE_NAMES[rest[-1]]]
    return (stack, "blocks", "0", *rest), int(layer)


def copied(sparse: mk.EncoderDecoder, dense: mk.EncoderDecoder) -> None:
    """Copy the dense model's parameters into the one expert and everything around it."""
    source = arrays(nnx.state(dense, nnx.Param))
    state = nnx.state(sparse, nnx.Param)

    def value(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
        if "router" in path:
            return array
        if "blocks" not in path:
            return source[path]
        source_path, layer = dense_path(path)
        return source[source_path][layer].reshape(array.shape)

    values = {path: value(path, array) for path, array in arrays(state).items()}
    leaves, structure = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    new = [jnp.asarray(values[tuple(str(part.key) for part in path)]) for path, _ in leaves]
    nnx.replace_by_pure_dict(state, jax.tree.unflatten(structure, new))
    nnx.update(sparse, state)


def loss_and_gradients(model: mk.EncoderDecoder, batch: mk.Batch) -> tuple[float, Arrays]:
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: nnx.State) -> jax.Array:
        output = nnx.merge(graphdef, params, rest)(batch, key=jax.random.key(0))
        log_probs = jax.nn.log_softmax(output.logits)
        chosen = jnp.take_along_axis(log_probs, jnp.asarray(batch.targets)[..., None], -1)
        return -jnp.sum(chosen[..., 0] * batch.loss_weights)

    run: Callable[..., Any] = jax.jit(jax.value_and_grad(loss))
    value, gradients = run(params)
    return float(value), arrays(gradients)


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_one_expert_has_the_dense_models_loss_and_gradients(dispatch: str):
    dense = mk.EncoderDecoder(config(0), seed=0)
    sparse = mk.EncoderDecoder(config(1, dispatch=dispatch), seed=1)
    copied(sparse, dense)
    prompts = [mk.Prompt(input="a b c", target="d e"), mk.Prompt(input="f", target="g h i j")]
    tokenizer = mk.ByteTokenizer()
    batch = mk.pad_prompts(prompts, tokenizer, input_length=8, target_length=8)
    batch = jax.tree.map(lambda x: x % 32 if x.dtype == np.int32 else x, batch)
    dense_loss, dense_gradients = loss_and_gradients(dense, batch)
    sparse_loss, sparse_gradients = loss_and_gradients(sparse, batch)
    assert sparse_loss == pytest.approx(dense_loss, rel=1e-6)
    for path, gradient in sparse_gradients.items():
        if "router" in path:
            np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
            continue
        expected = dense_gradients.get(path)
        if "blocks" in path:
            source_path, layer = dense_path(path)
            expected = dense_gradients[source_path][layer].reshape(gradient.shape)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
