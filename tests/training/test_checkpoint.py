"""Checkpoints: saved and loaded models, verification, retention, full disks, damage."""

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

import moekit as mk
from moekit.cli import main
from moekit.data.text import Corpus, Document
from moekit.sharding import variable_spec
from moekit.training.checkpoint import Checkpoints, DamagedCheckpoint, to_path
from moekit.training.manifest import MANIFEST, WORD_SUMS, array_digest, text_digest, word_sum
from moekit.training.retention import BestCheckpoint
from moekit.training.verify import verify_step

ARRAYS = {"w": jnp.arange(3.0), "b": {"c": jnp.ones((2, 2), jnp.bfloat16)}}
METADATA = {"model": {"name": "small"}}


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

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    message = r"could not write checkpoint 3.*Former checkpoints are intact"
    with pytest.raises(OSError, match=message):
        checkpoints.save(3, METADATA, {"model": ARRAYS})
    assert checkpoints.latest() == 2
    restored = checkpoints.restore(2, abstract(ARRAYS))
    jax.tree.map(np.testing.assert_array_equal, restored["model"], ARRAYS)


def digest(array):
    return int(array_digest(array))


@pytest.mark.parametrize("array", [ARRAYS["w"], ARRAYS["b"]["c"], jnp.arange(8, dtype=jnp.uint8)])
def test_a_digest_changes_with_every_bit(array):
    original = np.asarray(array)
    for position in range(8 * original.nbytes):
        changed = original.copy()
        changed.view(np.uint8).reshape(-1)[position // 8] ^= 1 << position % 8
        assert digest(original) != digest(changed)


def test_a_digest_changes_with_the_order_and_not_with_the_sharding():
    numbers = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    others = {digest(numbers[::-1]), digest(numbers.T.copy().reshape(16, 8))}
    for first in range(0, 128, 5):
        swapped = numbers.copy().reshape(-1)
        swapped[[first, 100]] = swapped[[100, first]]
        others.add(digest(swapped.reshape(16, 8)))
    assert len(others) > 20 and digest(numbers) not in others - {digest(numbers)}
    mesh = mk.make_mesh(data=2, expert=4)
    sharded = jax.device_put(numbers, NamedSharding(mesh, jax.P("data", "expert")))
    assert digest(sharded) == digest(numbers)


TEXT = Corpus(
    "text", lambda split: [Document(f"{split} {i} is followed by {i + 1}. " * 3) for i in range(90)]
)
CONFIG = mk.TrainConfig(
    steps=3,
    batch_tokens=8 * 48,
    input_length=32,
    target_length=16,
    save_every=1,
    keep=3,
    log_every=1,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps with three checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    mk.train(small_model(), TEXT, CONFIG, workdir=folder)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to damage."""
    return shutil.copytree(run, tmp_path / "run")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest_file(folder: Path) -> Path:
    return max(files(folder), key=lambda path: path.stat().st_size)


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


def flip_an_array(folder: Path) -> None:
    path = largest_file(folder / "model")
    flip_bit(path, 4 * path.stat().st_size)


def cut_arrays(folder: Path) -> None:
    path = largest_file(folder / "model")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_arrays(folder: Path) -> None:
    path = largest_file(folder / "model")
    path.write_bytes(bytes(path.stat().st_size))


def remove_an_item(folder: Path) -> None:
    shutil.rmtree(folder / "model")


def take_an_item_of_another_step(folder: Path) -> None:
    shutil.rmtree(folder / "model")
    shutil.copytree(folder.parent / "1/model", folder / "model")


def rename_another_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "1", folder)


def write_metadata(text: str, folder: Path) -> None:
    (folder / "meta/metadata").write_text(text)


def change_metadata(folder: Path) -> None:
    path = folder / "meta/metadata"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def rename_the_manifest(folder: Path) -> None:
    path = folder / "meta/metadata"
    path.write_text(path.read_text().replace('"manifest"', '"manifesu"'))


def cut_metadata(folder: Path) -> None:
    path = folder / "meta/metadata"
    path.write_text(path.read_text()[:-5])


def remove_everything(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def put_a_file_in_its_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("3")


def put_a_folder_in_the_place_of_a_file(folder: Path) -> None:
    path = folder / "meta/metadata"
    path.unlink()
    path.mkdir()


DAMAGE = [
    flip_an_array,
    cut_arrays,
    zero_arrays,
    remove_an_item,
    take_an_item_of_another_step,
    rename_another_step,
    change_metadata,
    rename_the_manifest,
    cut_metadata,
    remove_everything,
    put_a_file_in_its_place,
    put_a_folder_in_the_place_of_a_file,
    *(functools.partial(write_metadata, text) for text in ("", "{}", "[]", "3", '{"model": {}}')),
]


@pytest.fixture(scope="module")
def model_arrays(run: Path) -> dict[int, dict]:
    """The arrays of the model at every step."""
    like = abstract(nnx.to_pure_dict(nnx.state(small_model())))
    checkpoints = Checkpoints(run / "checkpoints")
    return {step: checkpoints.restore(step, like) for step in (1, 2, 3)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_is_used(
    copy: Path,
    model_arrays: dict[int, dict],
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoints = Checkpoints(copy / "checkpoints")
    damage(copy / "checkpoints/3")
    content = {path: path.read_bytes() for path in files(copy)}

    def read(step: int) -> dict:
        return checkpoints.restore(step, abstract(model_arrays[2]["model"]))

    found = checkpoints.read_newest(read)
    jax.tree.map(np.testing.assert_array_equal, found, model_arrays[2])
    assert "checkpoint 3 in" in caplog.text and "checkpoint 2 is used, 1 steps" in caplog.text
    assert verify_step(checkpoints, 3).damage
    assert not verify_step(checkpoints, 2).damage
    assert {path: path.read_bytes() for path in files(copy)} == content


def test_a_damaged_checkpoint_is_not_loaded(
    run: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip_an_array(copy / "checkpoints/3")
    assert_equal(mk.load(copy), mk.load(run, step=2))
    assert "checkpoint 2 is used, 1 steps earlier" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint 3 in .* is damaged .* newest good one"):
        mk.load(copy, step=3)
    assert main(["runs", "verify", str(copy)]) == 1


def test_a_damaged_checkpoint_is_set_aside_and_the_run_resumed(
    run: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy / "checkpoints"
    for _ in range(2):
        flip_an_array(folder / "3")
        model = small_model()
        mk.train(model, TEXT, CONFIG, workdir=copy)
        assert_equal(model, mk.load(run))
    names = {path.name for path in folder.iterdir()}
    assert names == {"1", "2", "3", "3.damaged", "3.damaged-2"}
    assert "now named 3.damaged: checkpoint 2 is used, 1 steps earlier" in caplog.text
    assert main(["runs", "verify", str(copy)]) == 0


def test_a_checkpoint_of_another_run_is_set_aside(copy: Path, tmp_path: Path) -> None:
    other = CONFIG.replace(steps=4, seed=1)
    mk.train(small_model(), TEXT, other, workdir=tmp_path / "other")
    shutil.copytree(tmp_path / "other/checkpoints/4", copy / "checkpoints/4")
    mk.train(small_model(), TEXT, CONFIG, workdir=copy)
    assert (copy / "checkpoints/4.damaged").is_dir()


def test_nothing_is_renamed_if_no_checkpoint_is_good(
    copy: Path, capsys: pytest.CaptureFixture
) -> None:
    for step in (1, 2, 3):
        flip_an_array(copy / f"checkpoints/{step}")
    message = r"checkpoint 3 in .* is damaged .*the 2 before it are damaged, too"
    with pytest.raises(DamagedCheckpoint, match=message):
        mk.train(small_model(), TEXT, CONFIG, workdir=copy)
    with pytest.raises(DamagedCheckpoint, match=message):
        mk.load(copy)
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {"1", "2", "3"}
    assert main(["generate", "--checkpoint", str(copy), "a"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_no_single_bit_flip_changes_a_number(
    run: Path, tmp_path: Path, model_arrays: dict[int, dict]
) -> None:
    source = run / "checkpoints/3"
    found = files(source / "model") + files(source / "meta")
    sizes = [path.stat().st_size for path in found]
    expected = model_arrays[3]
    chosen = random.Random(0)
    damaged = 0
    for trial in range(20):
        (path,) = chosen.choices(found, sizes if trial % 2 else None)
        copied = tmp_path / str(trial) / "3"
        shutil.copytree(source, copied)
        flip_bit(copied / path.relative_to(source), chosen.randrange(8 * path.stat().st_size))
        try:
            restored = Checkpoints(copied.parent).restore(3, abstract(expected["model"]))
            jax.tree.map(np.testing.assert_array_equal, restored, expected)
        except DamagedCheckpoint:
            damaged += 1
    assert damaged > 10


def remove_manifest(folder: Path, sums: bool) -> None:
    """Make a checkpoint what an earlier version wrote."""
    path = folder / "meta/metadata"
    metadata = json.loads(path.read_text())
    names = metadata.pop(MANIFEST)["arrays"]
    if sums:
        arrays = nnx.to_pure_dict(nnx.state(mk.load(folder.parent, step=int(folder.name))))
        leaves = jax.tree_util.tree_leaves_with_path(arrays)
        found = {jax.tree_util.keystr(path): int(word_sum(array)) for path, array in leaves}
        metadata[WORD_SUMS] = {"model": found}
        assert len(found) == len(names["model"])
    path.write_text(json.dumps(metadata))


@pytest.mark.parametrize("sums", [False, True])
def test_checkpoints_of_earlier_versions_are_read(run: Path, copy: Path, sums: bool) -> None:
    shutil.rmtree(copy / "checkpoints/2")
    remove_manifest(copy / "checkpoints/3", sums)
    assert_equal(mk.load(copy), mk.load(run))
    mk.train(small_model(), TEXT, CONFIG, workdir=copy)
    assert main(["runs", "verify", str(copy)]) == 0
    flip_an_array(copy / "checkpoints/3")
    if sums:
        with pytest.raises(ValueError, match=r"3 in .* is damaged"):
            mk.load(copy, step=3)
        assert main(["runs", "verify", str(copy)]) == 1


def test_the_manifest(run: Path) -> None:
    metadata = Checkpoints(run / "checkpoints").read_metadata(3)
    manifest = metadata[MANIFEST]
    assert manifest["step"] == 3 and manifest["processes"] == 1 and manifest["mesh"] is None
    assert manifest["versions"]["jax"] == jax.__version__
    assert set(manifest["arrays"]) == {"model", "optimizer", "progress"}
    assert manifest["text_digest"] == text_digest(metadata)


def test_other_shapes_are_no_damage(checkpoints: Checkpoints) -> None:
    other = {"w": jnp.zeros(4), "b": ARRAYS["b"]}
    with pytest.raises(ValueError, match=r"does not fit this model: .* w: float32\[3\] there"):
        checkpoints.restore(2, abstract(other))


def test_verify_finds_all_runs(run: Path, saved: tuple, tmp_path: Path, capsys) -> None:
    _, folder = saved
    shutil.copytree(run, tmp_path / "runs/a")
    shutil.copytree(folder, tmp_path / "runs/b/model")
    (tmp_path / "runs/2024").mkdir()
    assert main(["runs", "verify", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(Path(each["folder"]).name, each["step"]) for each in found] == [
        ("checkpoints", 1),
        ("checkpoints", 2),
        ("checkpoints", 3),
        ("model", 0),
    ]
    assert main(["runs", "verify", str(tmp_path / "runs/2024")]) == 2


def test_a_read_only_folder_is_read(run: Path) -> None:
    before = {path: path.stat().st_mtime for path in run.rglob("*")}
    for path in run.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        mk.load(run)
    finally:
        for path in run.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert {path: path.stat().st_mtime for path in run.rglob("*")} == before


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: tuple) -> None:
    model, _ = saved
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for path in ("relative/model", f"file://{tmp_path}/address", "link/model"):
        mk.save(path, model)
        assert_equal(mk.load(path), model)
        assert_equal(mk.load(Path(path)), model)  # pathlib drops a slash of file://
    assert {path.name for path in tmp_path.iterdir()} == {"relative", "address", "disk", "link"}


def test_a_bucket_without_its_package_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr("etils.epath.gpath.PosixGPath.exists", fail)
    with pytest.raises(OSError, match="cannot read gs://bucket/run: Please install gcsfs"):
        to_path(Path("gs://bucket/run"))


def test_what_is_kept(tmp_path: Path) -> None:
    scores = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 4.0}
    for metric, best in (("valid_loss", 2), ("accuracy", 5)):
        keeper = BestCheckpoint(metric, lambda: scores)
        checkpoints = Checkpoints(tmp_path / metric, keep=1, keep_every=3, best=keeper)
        for step in range(1, 8):
            checkpoints.save(step, METADATA, {"model": ARRAYS})
        assert checkpoints.steps() == sorted({3, 6, 7, best})
        checkpoints.close()


def test_arrays_may_be_donated_while_they_are_written(tmp_path: Path) -> None:
    @functools.partial(jax.jit, donate_argnums=0)
    def step(tree):
        return jax.tree.map(lambda array: array + 1, tree)

    mesh = mk.make_mesh(data=8)
    specs = {"sharded": jax.P("data"), "replicated": jax.P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    for name, sharding in ({"one device": None} | shardings).items():
        arrays = {str(n): jax.device_put(jnp.full((256, 1024), n), sharding) for n in range(8)}
        checkpoints = Checkpoints(tmp_path / name)
        saved = step(arrays)
        expected = jax.tree.map(np.array, saved)
        checkpoints.save(1, METADATA, {"model": saved}, wait=False)
        for _ in range(10):
            saved = step(saved)
        jax.block_until_ready(saved)
        checkpoints.wait()
        restored = checkpoints.restore(1, abstract(expected))["model"]
        jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_a_write_that_fails_in_the_background(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "finalize", fail)
        checkpoints.save(3, METADATA, {"model": ARRAYS}, wait=False)
        with pytest.raises(OSError, match=r"could not write checkpoint 3.*No space left"):
            checkpoints.wait()
        checkpoints.save(3, METADATA, {"model": ARRAYS}, wait=False)
        checkpoints.close()
        assert "could not write checkpoint 3" in caplog.text
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(4, METADATA, {"model": ARRAYS})
    assert {path.name for path in checkpoints.folder.iterdir()} == {"2", "4"}


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_stops_or_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, caplog
) -> None:
    write = Checkpoints.save

    def fail_at_two(checkpoints: Checkpoints, step: int, *arguments, **options) -> None:
        if step == 2:
            raise OSError("could not write checkpoint 2: No space left on device")
        write(checkpoints, step, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", fail_at_two)
    config = CONFIG.replace(on_save_error=policy)
    if policy == "stop":
        with pytest.raises(OSError, match="No space left on device"):
            mk.train(small_model(), TEXT, config, workdir=tmp_path)
        assert Checkpoints(tmp_path / "checkpoints").steps() == [1]
    else:
        mk.train(small_model(), TEXT, config, workdir=tmp_path)
        assert Checkpoints(tmp_path / "checkpoints").steps() == [1, 3]
        assert "No space left on device; training continues" in caplog.text
        assert_equal(mk.load(tmp_path), mk.load(run))


def test_the_last_checkpoint_must_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Checkpoints, "save", fail)
    config = CONFIG.replace(on_save_error="continue")
    with pytest.raises(OSError, match="No space left"):
        mk.train(small_model(), TEXT, config, workdir=tmp_path)
