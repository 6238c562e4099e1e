"""Checkpoints of transformers in and out, and damaged ones: one error, nothing half written."""

import json
import pickle
import shutil
import zipfile

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import moekit as mk
from moekit.commands.convert import convert
from moekit.model import convert_write
from moekit.model.convert import _from_processes, _tensor
from moekit.model.convert_config import generation_from_transformers
from moekit.model.convert_names import Layout
from moekit.moe.routing import TopK

SIZES = {"d_model": 16, "d_ff": 32, "head_dim": 8, "num_heads": 2, "vocab_size": 384}
T5 = mk.preset("t5-nano").replace(encoder_layers=2, decoder_layers=1, **SIZES)
T5_V1_0 = T5.replace(activation="relu", tied_logits=True)
SWITCH = T5_V1_0.replace(
    name="switch",
    num_experts=4,
    encoder_moe_layers=1,
    decoder_moe_layers=1,
    expert_capacity=8,
)


def random_model(cfg):
    """A model with random numbers of numpy: nothing is compiled."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: mk.EncoderDecoder(cfg)))
    arrays = jax.tree.map(lambda each: rng.normal(size=each.shape).astype(np.float32), state)
    return nnx.merge(graphdef, jax.device_put(arrays))


def arrays(model):
    return {names: np.asarray(each[...]) for names, each in nnx.to_flat_state(nnx.state(model))}


def assert_equal(model, other):
    jax.tree.map(np.testing.assert_array_equal, arrays(model), arrays(other))


def assert_refused(folder, error, message):
    """One clear error, and nothing is left at the destination."""
    destination = folder.parent / "converted"
    with pytest.raises(error, match=message):
        convert(str(folder), destination)
    assert not list(folder.parent.glob("*converted*"))


@pytest.fixture(scope="module")
def model():
    return random_model(T5)


@pytest.fixture(scope="module")
def switch():
    return random_model(SWITCH)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("convert") / "t5"
    mk.export(path, model)
    return path


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy of the folder, to be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize("cfg", [T5, SWITCH, T5_V1_0], ids=["v1.1", "switch", "v1.0"])
def test_a_model_returns_bit_for_bit_also_in_shards(cfg, tmp_path, monkeypatch):
    model = random_model(cfg)
    monkeypatch.setattr(convert_write, "SHARD_BYTES", 20_000)
    mk.export(tmp_path / "out", model)
    index = tmp_path / "out" / "model.safetensors.index.json"
    again = mk.load(tmp_path / "out")
    assert_equal(model, again)
    assert again.cfg.tokenizer == "byte" and again.cfg.expert_capacity == cfg.expert_capacity
    with pytest.raises(FileExistsError, match="exists already"):
        mk.export(tmp_path / "out", model)
    shard = sorted((tmp_path / "out").glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused(tmp_path / "out", FileNotFoundError, f"lacks 1 of .*{shard.name}")
    index.write_text(index.read_text().replace(shard.name, "../model.safetensors"))
    assert_refused(tmp_path / "out", ValueError, "outside of its folder: ../model.safetensors")


def test_every_device_of_a_mesh_gets_its_shards(switch, tmp_path):
    mesh = mk.make_mesh(data=2, expert=2, model=2)
    mk.export(tmp_path / "out", switch)
    sharded = mk.load(tmp_path / "out", mesh=mesh)
    assert_equal(switch, sharded)
    weight = sharded.encoder.blocks[-1].moe.experts.wi_edf[...]
    assert weight.addressable_shards[0].data.size == weight.size // 8
    mk.export(tmp_path / "again", sharded)
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("place", [(), (1,), (1, 2)])
def test_a_part_of_an_array_is_copied_from_its_shards(place):
    numbers = np.arange(2 * 4 * 8 * 6.0, dtype=np.float32).reshape(2, 4, 8, 6)
    mesh = mk.make_mesh(data=2, expert=2, model=2)
    part = Layout(numbers.shape, {}, len(place), transposed=False, num_inputs=1)
    for spec in [(), ("data", "expert"), (None, "expert", ("data", "model"))]:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        array = jax.device_put(numbers, sharding)
        np.testing.assert_array_equal(_tensor(array, place, part), numbers[place])
        # what other devices than those of a CPU, and other processes, do
        np.testing.assert_array_equal(_from_processes(array, place), numbers[place])


def test_the_verb_converts_in_both_directions(folder, tmp_path, capsys):
    assert convert(str(folder), tmp_path / "ours") == 0
    assert convert(str(tmp_path / "ours"), tmp_path / "theirs") == 0
    assert "format of transformers" in capsys.readouterr().out
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "theirs" / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        convert(str(folder), tmp_path / "ours")


def test_what_transformers_cannot_express_is_listed_and_not_written(tmp_path):
    cfg = SWITCH.replace(activation="gated_gelu", router=TopK(k=2), expert_capacity=None)
    switch = nnx.eval_shape(lambda: mk.EncoderDecoder(cfg.replace(extra_d_ff=8)))
    with pytest.raises(ValueError, match=r"activation=.*router=.*extra_d_ff=8.*capacity_factor"):
        mk.export(tmp_path / "out", switch)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(model, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_write.SafetensorsWriter, "write", fail)
    with pytest.raises(OSError, match="No space left on device; nothing is left"):
        mk.export(tmp_path / "out", model)
    assert not list(tmp_path.iterdir())


def test_half_precision_is_widened(damaged):
    path = damaged / "model.safetensors"
    tensors = load_file(path)
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    save_file(halves, path)
    embedding = mk.load(damaged).embedding_vd[...]
    np.testing.assert_array_equal(embedding, halves["shared.weight"].astype(np.float32))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, **changes):
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): each for name, each in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bart"}, "type 'bart': only t5 and switch_transformers"),
        ({"model_type": "gpt2"}, "type 'gpt2'"),
        ({"model_type": None}, "type None"),
        ({"model_type": ["t5"]}, "type ..t5"),
        ({"feed_forward_proj": "gated-silu"}, "unknown feed_forward_proj 'gated-silu'"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05 instead of 1e-06"),
        ({"num_layers": 3}, "tensors are missing .encoder.block.2"),
        ({"num_layers": 1}, "have no place in the model .encoder.block.1"),
        ({"num_layers": "2"}, "num_layers is '2' instead of a whole number"),
        ({"d_ff": 32.5, "num_heads": True}, "d_ff is 32.5 instead .*num_heads is True"),
        ({"d_ff": 64}, r"has shape \(32, 16\) instead of \(64, 16\)"),
        ({"d_model": "16"}, "config.json: d_model is '16'"),
    ],
)
def test_a_config_that_does_not_fit_is_one_error(damaged, changes, message):
    change_config(damaged, **changes)
    assert_refused(damaged, ValueError, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared__weight": None}, "1 tensors are missing .shared.weight"),
        ({"extra": np.zeros(2, np.float32)}, "1 have no place in the model .extra"),
        ({"lm_head__weight": np.zeros((384, 16), np.int8)}, r"lm_head.weight \(I8\)"),
        ({"encoder__embed_tokens__weight": np.zeros((384, 16), np.float32)}, "differs from shared"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(damaged, changes, message):
    change_tensors(damaged, **changes)
    assert_refused(damaged, ValueError, message)


def test_damaged_safetensors_are_one_error(damaged):
    path = damaged / "model.safetensors"
    content = path.read_bytes()
    lying = content.replace(b"[384, 16]", b"[999, 16]", 1)
    for changed in (content[:-10], content[:100], lying, b"\xff" * 8 + content[8:], b""):
        path.write_bytes(changed)
        assert_refused(damaged, ValueError, "is damaged or not a safetensors file")
    path.unlink()
    assert_refused(damaged, FileNotFoundError, "has no weights")


class Code:
    """Pickled, a call of an arbitrary function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_with_code_is_refused_and_not_executed(damaged, tmp_path):
    (damaged / "model.safetensors").unlink()
    with zipfile.ZipFile(damaged / "pytorch_model.bin", "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({"shared.weight": Code(tmp_path / "ran")}))
    assert_refused(damaged, ValueError, r"wants to call \w+.open.*nothing was executed")
    assert not (tmp_path / "ran").exists()
    (damaged / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert_refused(damaged, ValueError, "is not a zip archive")


def test_a_length_that_is_not_set_is_that_of_transformers():
    for values, length in (({}, 20), ({"max_length": 20}, 19), ({"max_new_tokens": 7}, 7)):
        assert generation_from_transformers(values).max_new_tokens == length


def test_a_name_of_the_hub_without_a_network_points_to_a_folder():
    with pytest.raises(ConnectionError, match="give that folder"):
        mk.load("google/flan-t5-small")
