"""Checkpoints: saved and loaded models, full disks, damage."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

import moekit as mk
from moekit.sharding import variable_spec
from moekit.training.checkpoint import Checkpoints, checksums

ARRAYS = {"w": jnp.arange(3.0), "b": {"c": jnp.ones((2, 2), jnp.bfloat16)}}
METADATA = {"model": {}}


def small_model(seed=0, mesh=None):
    cfg = mk.preset("st-nano").replace(
        d_model=16, d_ff=32, encoder_layers=1, decoder_layers=1, router="loss-free"
    )
    return mk.EncoderDecoder(cfg, seed=seed, mesh=mesh)


def assert_equal(first, second):
    first, second = nnx.state(first), nnx.state(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture
def checkpoints(tmp_path):
    """Two checkpoints of a few arrays."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, METADATA, {"model": ARRAYS})
    return checkpoints


def abstract(tree):
    return {"model": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and a folder that holds it."""
    model = small_model(seed=3)
    folder = tmp_path_factory.mktemp("saved")
    mk.save(folder, model)
    return model, folder


@pytest.mark.parametrize(
    "axes", [None, {"data": 2, "expert": 4}, {"data": 2, "expert": 2, "model": 2}]
)
def test_a_loaded_model_equals_the_saved_one(saved, axes):
    model, folder = saved
    mesh = None if axes is None else mk.make_mesh(**axes)
    loaded = mk.load(folder, mesh=mesh)
    assert loaded.cfg == model.cfg and loaded.mesh == mesh
    assert_equal(loaded, model)
    for _, variable in nnx.to_flat_state(nnx.state(loaded)):
        if mesh is not None:
            expected = NamedSharding(mesh, variable_spec(variable, mesh))
            assert variable[...].sharding.is_equivalent_to(expected, variable.ndim)


def test_other_folders_and_configurations_are_refused(saved, tmp_path):
    _, folder = saved
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*: give a folder"):
        mk.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no step 5, only \[0\]"):
        mk.load(folder, step=5)
    with pytest.raises(ValueError, match=r"another configuration.*d_model"):
        mk.load(folder, cfg=mk.preset("st-nano"))


def test_a_failed_write_leaves_the_former_checkpoint(checkpoints, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    message = r"could not write checkpoint 3.*Former checkpoints are intact"
    with pytest.raises(OSError, match=message):
        checkpoints.save(3, METADATA, {"model": ARRAYS})
    assert checkpoints.latest() == 2
    restored = checkpoints.restore(2, abstract(ARRAYS))
    jax.tree.map(np.testing.assert_array_equal, restored["model"], ARRAYS)


def test_checksums_change_with_every_bit_and_not_with_the_sharding():
    for array in (ARRAYS["w"], ARRAYS["b"]["c"]):
        original = np.asarray(array)
        for position in range(original.nbytes):
            changed = original.copy()
            changed.view(np.uint8).reshape(-1)[position] ^= 1
            assert checksums({"x": original}) != checksums({"x": changed})
    sharded = jax.device_put(jnp.arange(16.0), jax.NamedSharding(mk.make_mesh(), jax.P("data")))
    assert checksums({"x": sharded}) == checksums({"x": np.arange(16, dtype=np.float32)})


def array_files(folder: Path) -> list[Path]:
    return [path for path in (folder / "model").rglob("*") if path.is_file() and "/d/" in str(path)]


def flip_a_byte(folder: Path) -> None:
    largest = max(array_files(folder), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def cut_arrays(folder: Path) -> None:
    for path in array_files(folder):
        path.write_bytes(path.read_bytes()[:5])


def remove_arrays(folder: Path) -> None:
    shutil.rmtree(folder / "model")


def cut_metadata(folder: Path) -> None:
    path = folder / "meta/metadata"
    path.write_text(path.read_text()[:5])


@pytest.mark.parametrize("damage", [flip_a_byte, cut_arrays, remove_arrays, cut_metadata])
def test_damage_is_named(tmp_path, damage):
    model = small_model()
    for _ in range(2):
        Checkpoints(tmp_path, keep=2).save(
            len(list(tmp_path.iterdir())) + 1,
            {"model": model.cfg.to_dict()},
            {"model": nnx.to_pure_dict(nnx.state(model))},
        )
    first, second = Checkpoints(tmp_path).steps()
    damage(tmp_path / str(second))
    message = f"checkpoint {second} in .* is damaged .*: delete the folder .* to use checkpoint"
    with pytest.raises(ValueError, match=message):
        mk.load(tmp_path)
    assert_equal(mk.load(tmp_path, step=first), model)


@pytest.mark.parametrize("incomplete", ["empty folder", "no metadata"])
def test_an_incomplete_checkpoint_is_passed_over(checkpoints, incomplete):
    if incomplete == "empty folder":
        (checkpoints.folder / "9").mkdir()
    else:
        shutil.rmtree(checkpoints.folder / "2/meta")
    expected = [1, 2] if incomplete == "empty folder" else [1]
    assert Checkpoints(checkpoints.folder, keep=2).steps() == expected
