"""Upcycled models: at first they compute what the dense model computes, on every mesh."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

import moekit as mk
from moekit.data.batch import pad_pairs
from moekit.model.upcycle import DENSE_NAMES
from moekit.sharding import variable_spec

TOP2 = mk.TopK(k=2, normalise=True)
ROOMY = {"eval_capacity_factor": 16.0}
DROPLESS = {"dispatch": "dropless"}
V1_0 = {"activation": "relu", "tied_logits": True}
# changes of the dense model, and of the sparse one; their combine weights add up to 1
NORMALISED = {
    "top-1, all layers": (V1_0, (2, 2, 1), {"router": mk.TopK(k=1, normalise=True), **DROPLESS}),
    "top-2, every second layer": ({"encoder_layers": 4}, (8, 2, 1), {"router": TOP2, **ROOMY}),
    "top-3 in the encoder": (
        {"tied_logits": True, "scaled_logits": False},
        (3, 1, 0),
        {"router": mk.TopK(k=3, normalise=True, priority="batch"), "group_size": 16, **ROOMY},
    ),
    "gshard and hash": (
        {},
        (4, 1, 1),
        {"router": mk.GShard(), "decoder_router": mk.Hash(), "sparse_layer": 0},
    ),
    "random in the decoder": (
        V1_0 | {"encoder_layers": 1, "decoder_layers": 2},
        (5, 0, 1),
        {"router": mk.Random(), **DROPLESS},
    ),
}


def dense_config(**changes: object) -> mk.ModelConfig:
    cfg = mk.preset("t5-nano").replace(
        d_model=16,
        d_ff=32,
        num_heads=2,
        head_dim=8,
        encoder_layers=2,
        decoder_layers=1,
        eval_capacity_factor=16.0,
    )
    return cfg.replace(**changes)


@functools.cache
def dense_model(**changes: object) -> mk.EncoderDecoder:
    return mk.EncoderDecoder(dense_config(**changes), seed=3)


def sparse_config(
    dense: mk.EncoderDecoder, sizes: tuple[int, int, int] = (8, 2, 1), **changes: object
) -> mk.ModelConfig:
    """Another configuration with that many experts, and sparse layers of encoder and decoder."""
    num_experts, in_encoder, in_decoder = sizes
    cfg = dense.cfg.replace(
        num_experts=num_experts, encoder_moe_layers=in_encoder, decoder_moe_layers=in_decoder
    )
    return cfg.replace(**{"router": TOP2, **changes})


@functools.cache
def random_batch() -> mk.Batch:
    """Eight rows of different lengths, with padding."""
    rng = np.random.default_rng(0)
    pairs = []
    for row in range(8):
        inputs = rng.integers(3, 300, 3 + row)
        pairs.append({"inputs": inputs, "targets": rng.integers(3, 300, 10 - row)})
    return pad_pairs(pairs, input_length=12, target_length=12)


def real_logits(model: mk.EncoderDecoder) -> np.ndarray:
    """The logits of all targets but padding."""
    graphdef, state = nnx.split(model)
    batch = random_batch()
    logits = jax.jit(lambda state: nnx.merge(graphdef, state)(batch).logits)(state)
    return np.asarray(logits)[np.asarray(batch.loss_weights) > 0]


def assert_equal_logits(first: mk.EncoderDecoder, second: mk.EncoderDecoder) -> None:
    expected = real_logits(second)
    np.testing.assert_allclose(real_logits(first), expected, atol=3e-6 * np.abs(expected).max())


def arrays(model: mk.EncoderDecoder) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}


@pytest.mark.parametrize("case", NORMALISED)
def test_outputs_are_the_dense_models_if_weights_add_up_to_1(case: str):
    dense_changes, sizes, changes = NORMALISED[case]
    dense = dense_model(**dense_changes)
    assert_equal_logits(mk.upcycle(dense, sparse_config(dense, sizes, **changes), seed=1), dense)


def test_outputs_differ_with_raw_probabilities():
    dense = dense_model()
    raw = mk.upcycle(dense, sparse_config(dense, router="switch"))
    assert np.abs(real_logits(raw) - real_logits(dense)).max() > 1e-3


@pytest.mark.parametrize("sparse_layer", [None, 0])
@pytest.mark.parametrize("sizes", [(3, 1, 2), (2, 4, 1), (4, 2, 0)], ids=str)
def test_every_layer_has_its_own_arrays_and_experts_are_copies(
    sizes: tuple[int, int, int], sparse_layer: int | None
):
    dense = dense_model(encoder_layers=4, decoder_layers=2)
    before = arrays(dense)
    num_layers = {"encoder": 4, "decoder": 2}
    sparse = mk.upcycle(dense, sparse_config(dense, sizes, sparse_layer=sparse_layer))
    assert sparse.cfg.num_parameters().total == sum(map(np.size, arrays(sparse).values()))
    for name, array in arrays(sparse).items():
        if "router" in name:
            continue
        if "blocks" not in name:
            np.testing.assert_array_equal(array, before[name])
            continue
        stack, _, index, *parts = name.split("/")
        num_blocks = array.shape[0]
        layers_per_block = num_layers[stack] // num_blocks
        if "experts" in parts:
            parts = ["ffn", DENSE_NAMES[parts[-1]]]
        of_layers = before["/".join([stack, "blocks", "0", *parts])]
        for block in range(num_blocks):
            layer = of_layers[block * layers_per_block + int(index)]
            copies = np.broadcast_to(layer, array[block].shape)
            np.testing.assert_array_equal(array[block], copies)


def test_routers_depend_on_the_seed_alone():
    dense = dense_model()
    cfg = sparse_config(dense, (8, 2, 1), router=mk.LossFree(k=2))
    first, again, other = (arrays(mk.upcycle(dense, cfg, seed=seed)) for seed in (0, 0, 1))
    routers = [f"{stack}/blocks/0/moe/router/w_de" for stack in ("encoder", "decoder")]
    for name in routers:
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).all()
        assert first[name].std() == pytest.approx(0.02, rel=0.2)
    assert (first[routers[0]][0] != first[routers[1]][0]).all()
    assert not first["encoder/blocks/0/moe/router/bias_e"].any()


MESHES = {
    "onto a mesh": (None, {"data": 2, "expert": 2, "model": 2}),
    "onto another mesh": ({"data": 8}, {"data": 2, "expert": 4}),
    "onto the model's mesh": ({"expert": 8}, None),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dense model."""
    folder = tmp_path_factory.mktemp("dense")
    mk.save(folder, dense_model())
    return folder


@pytest.mark.parametrize("case", MESHES)
def test_arrays_are_sharded_and_equal_on_every_mesh(saved: Path, case: str):
    before, after = (axes and mk.make_mesh(**axes) for axes in MESHES[case])
    dense = mk.load(saved, mesh=before)
    cfg = sparse_config(dense, router=mk.LossFree(k=2))
    sparse = mk.upcycle(dense, cfg, seed=5, mesh=after)
    mesh = after or before
    assert sparse.mesh == mesh
    for _, variable in nnx.to_flat_state(nnx.state(sparse)):
        expected = NamedSharding(mesh, variable_spec(variable, mesh))
        assert variable[...].sharding.is_equivalent_to(expected, variable.ndim)
    alone = arrays(mk.upcycle(dense_model(), cfg, seed=5))
    for name, array in arrays(sparse).items():
        np.testing.assert_allclose(array, alone[name], rtol=1e-6, atol=1e-9)


def test_outputs_on_a_mesh_of_a_saved_model(saved: Path):
    dense = dense_model()
    mesh = mk.make_mesh(data=2, expert=4)
    cfg = sparse_config(dense, (4, 1, 1), **DROPLESS)
    sparse = mk.upcycle(saved, cfg.replace(tokenizer=None), mesh=mesh)
    assert sparse.cfg == cfg and cfg.tokenizer == "byte"
    assert_equal_logits(sparse, dense)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, r"is dense \(num_experts=0\): give num_experts"),
        (
            {"d_ff": 64, "vocab_size": 512, "activation": "relu", "tied_logits": True},
            r"d_ff=32 there, 64 here; vocab_size=384 there, 512 here; activation='gated_gelu' "
            r"there, 'relu' here; tied_logits=False there, True here; logits_scale=1.0 there, 0.25",
        ),
        ({"expert_d_ff": 16}, r"\(d_ff=32 there, expert_d_ff=16 here\)"),
        ({"extra_d_ff": 16}, r"\(no second FFN there, extra_d_ff=16 here\)"),
        ({"encoder_layers": 4, "relative_buckets": 16}, "encoder_layers=2.*relative_buckets=32"),
    ],
)
def test_configurations_that_do_not_fit(changes: dict, message: str):
    dense = dense_model()
    with pytest.raises(ValueError, match=message):
        mk.upcycle(dense, sparse_config(dense, **changes))


def test_a_sparse_model_is_not_upcycled():
    sparse = mk.upcycle(dense_model(), sparse_config(dense_model(), expert_d_ff=32))
    with pytest.raises(ValueError, match="t5-nano has 8 experts: upcycle starts from a dense"):
        mk.upcycle(sparse, sparse.cfg)
