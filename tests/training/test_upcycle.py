"""Upcycled runs: the optimizer's statistics belong to the right layers, and training continues."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moekit as mk
from moekit.data.text import Corpus, Document
from moekit.model.upcycle import DENSE_NAMES
from moekit.sharding import is_variable
from moekit.training.checkpoint import Checkpoints
from moekit.training.optim import path_names
from moekit.training.run_settings import FORMAT
from moekit.training.state import TrainState, checkpoint_items, split_model, state_from_items
from moekit.training.step import compiled_step

CONFIG = mk.TrainConfig(
    steps=3,
    batch_tokens=8 * 48,
    input_length=32,
    target_length=16,
    learning_rate=1e-2,
)
# kernels are just large enough for Adafactor to factor their second moments
DENSE = mk.preset("t5-nano").replace(
    d_model=128, d_ff=160, num_heads=2, head_dim=64, encoder_layers=4, decoder_layers=1
)
SPARSE = DENSE.replace(
    num_experts=3,
    encoder_moe_layers=2,
    decoder_moe_layers=1,
    router=mk.TopK(k=2, normalise=True),
    dispatch="dropless",
    balance_loss=0.0,
)
Arrays = dict[tuple[str, ...], np.ndarray]


def abstract_state(cfg: mk.ModelConfig, config: mk.TrainConfig) -> TrainState:
    return compiled_step(nnx.eval_shape(lambda: mk.EncoderDecoder(cfg)), config).state


def write_run(folder: Path, config: mk.TrainConfig) -> TrainState:
    """Write a dense run at step 7 with random statistics; returns its state."""
    abstract = abstract_state(DENSE, config)
    rng = np.random.default_rng(0)

    def random(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if shape.dtype == jnp.int32:
            return jnp.full(shape.shape, 7, jnp.int32)
        return jnp.asarray(rng.normal(size=shape.shape), shape.dtype)

    _, params, rest = split_model(mk.EncoderDecoder(DENSE, seed=1))
    state = replace(
        abstract,
        step=jnp.array(7, jnp.int32),
        params=params,
        rest=rest,
        optimizer=jax.tree.map(random, abstract.optimizer),
        key_data=jnp.arange(2, dtype=jnp.uint32),
    )
    metadata = {"format": FORMAT, "model": DENSE.to_dict(), "train": config.to_dict()}
    metadata |= {"source": "a", "tokenizer": "b", "stream": {"0": "position"}}
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(7, metadata, checkpoint_items(state))
    checkpoints.close()
    return state


def statistics(state: TrainState) -> Arrays:
    """The arrays of an optimizer's state: by kind and parameter, numbers of updates by path."""
    leaves = jax.tree_util.tree_leaves_with_path(state.params, is_leaf=is_variable)
    parameters = {path_names(path) for path, _ in leaves}
    found = {}
    leaves = jax.tree_util.tree_leaves_with_path(state.optimizer, is_leaf=is_variable)
    for path, leaf in leaves:
        names = path_names(path)
        for start in range(len(names)):
            if names[start:] in parameters:
                names = names[start - 1 :]
        (found[names],) = jax.tree.leaves(leaf)
    return {names: np.asarray(array) for names, array in found.items()}


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_experts_have_the_statistics_of_their_ffn(tmp_path: Path, optimizer: str):
    config = CONFIG.replace(optimizer=optimizer)
    dense = statistics(write_run(tmp_path / "dense", config))
    model = mk.upcycle(tmp_path / "dense", SPARSE, workdir=tmp_path / "sparse")
    checkpoints = Checkpoints(tmp_path / "sparse/checkpoints")
    assert checkpoints.steps() == [7]
    metadata = checkpoints.metadata(7)
    assert metadata["stream"] == {"0": "position"} and metadata["model"]["num_experts"] == 3
    abstract = abstract_state(SPARSE, config)
    items = checkpoints.restore(7, checkpoint_items(abstract))
    state = state_from_items(abstract, items, {})
    assert int(state.step) == 7 and state.key_data.tolist() == [0, 1]
    jax.tree.map(np.testing.assert_array_equal, state.params, nnx.state(model, nnx.Param))
    kinds = set()
    for (kind, *parameter), array in statistics(state).items():
        kinds.add(kind)
        if "count" in parameter:
            assert (array == 7).all()
        elif "router" in parameter:
            assert not array.any()
        elif "blocks" not in parameter:
            np.testing.assert_array_equal(array, dense[kind, *parameter])
        else:
            stack, _, index, *parts = parameter
            if "experts" in parts:
                parts = ["ffn", DENSE_NAMES[parts[-1]]]
            layers = dense[kind, stack, "blocks", "0", *parts]
            step = 2 if stack == "encoder" else 1
            for block, of_block in enumerate(array):
                of_layer = np.broadcast_to(layers[step * block + int(index)], of_block.shape)
                np.testing.assert_array_equal(of_block, of_layer)
    assert kinds >= ({"v_row", "v_col", "v"} if optimizer == "adafactor" else {"mu", "nu"})


def documents(split: str) -> list[Document]:
    return [Document(f"{split} {number}, then {number + 1}. " * 3) for number in range(60)]


def test_an_upcycled_run_continues_like_the_dense_one(tmp_path: Path):
    """With weights that add up to 1, all parameters but experts and routers have equal updates."""
    text = Corpus("text", documents)
    sizes = {"d_model": 16, "d_ff": 32, "head_dim": 8, "encoder_layers": 2}
    dense = mk.EncoderDecoder(DENSE.replace(**sizes), seed=1)
    mk.train(dense, text, CONFIG.replace(steps=2), workdir=tmp_path / "dense")
    cfg = SPARSE.replace(encoder_moe_layers=1, **sizes)
    sparse = mk.upcycle(tmp_path / "dense", cfg, workdir=tmp_path / "sparse")
    dense_run = mk.train(dense, text, CONFIG, workdir=tmp_path / "dense")
    run = mk.train(sparse, text, CONFIG, workdir=tmp_path / "sparse")
    assert run.metrics["loss"][0] == [3]
    assert run.metrics.last("loss") == pytest.approx(dense_run.metrics.last("loss"), rel=1e-5)
    query = dense.encoder.blocks[0].self_attention.wq_dnh[...]
    for index in range(2):
        found = sparse.encoder.blocks[index].self_attention.wq_dnh[...][0]
        np.testing.assert_allclose(found, query[index], atol=1e-5)
    np.testing.assert_allclose(sparse.embedding_vd[...], dense.embedding_vd[...], atol=1e-4)
    experts = np.asarray(sparse.encoder.blocks[1].moe.experts.wi_edf[...])
    assert (experts[0, 0] != experts[0, 1]).any()


def test_runs_that_cannot_be_upcycled(tmp_path: Path):
    dense = mk.EncoderDecoder(DENSE)
    with pytest.raises(ValueError, match="t5-nano has no optimizer state: with workdir="):
        mk.upcycle(dense, SPARSE, workdir=tmp_path / "sparse")
    mk.save(tmp_path / "model", dense)
    with pytest.raises(ValueError, match="model has no optimizer state"):
        mk.upcycle(tmp_path / "model", SPARSE, workdir=tmp_path / "sparse")
    write_run(tmp_path / "dense", CONFIG)
    with pytest.raises(ValueError, match="expert_d_ff=64 here"):
        mk.upcycle(tmp_path / "dense", SPARSE.replace(expert_d_ff=64), workdir=tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()
    with pytest.raises(ValueError, match="dense already holds a run: choose another workdir"):
        mk.upcycle(tmp_path / "dense", SPARSE, workdir=tmp_path / "dense")


def test_a_full_disk_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path / "dense", CONFIG)

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Checkpoints, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        mk.upcycle(tmp_path / "dense", SPARSE, workdir=tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()
