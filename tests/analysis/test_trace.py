"""Traces of a model: recorded, saved, loaded; damaged files are refused in one line."""

import dataclasses
import io
import json
import zipfile

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st

import moekit as mk
from moekit.analysis.trace import RouterTrace, text_prompts
from moekit.data.text import Corpus, Document


@pytest.fixture(scope="module")
def model() -> mk.EncoderDecoder:
    return mk.EncoderDecoder(mk.preset("st-nano").replace(d_model=16, d_ff=32), seed=0)


def some_text() -> list[mk.Prompt]:
    documents = [Document(f"text {i} " * 9, "", "ab"[i % 2]) for i in range(8)]
    return text_prompts(Corpus("c", lambda split: documents), 3, characters=40)


def test_text_without_targets_has_no_decoder(model, tmp_path):
    prompts = some_text()
    trace = mk.trace_routing(model, prompts, batch_size=4, target_length=8)
    assert list(trace.stacks) == ["encoder"] and set(trace.domains) == {"a", "b"}
    encoder = trace.stack("encoder")
    tokens = sum(len(prompt.input) + 1 for prompt in prompts)
    assert encoder.expert.shape == (1, tokens, 2)
    order = np.lexsort((encoder.position, encoder.example))
    first = [index for index in order if encoder.example[index] == 0]
    assert mk.ByteTokenizer().decode(encoder.token[first]) == prompts[0].input
    assert {row["stack"] for row in mk.balance_table(trace).rows} == {"encoder"}
    assert len(mk.plot_expert_load(trace).axes) == 1
    with pytest.raises(ValueError, match=r"no decoder, only encoder: its prompts have no targets"):
        mk.plot_domain_specialization(trace, "decoder")


def test_the_decoder_has_the_tokens_of_prompts_with_targets_alone(model):
    prompts = [
        dataclasses.replace(prompt, target="answer" if index % 2 else "")
        for index, prompt in enumerate(some_text())
    ]
    trace = mk.trace_routing(model, prompts, batch_size=4, target_length=8)
    decoder = trace.stack("decoder")
    assert decoder.example.tolist().count(1) == len("answer") + 1
    assert set(decoder.example.tolist()) == {1, 3, 5}
    first = decoder.token[decoder.example == 1]
    assert first[0] == 0 and mk.ByteTokenizer().decode(first) == "answer"


def test_truncated_inputs_are_counted(model):
    prompts = [mk.Prompt("x" * length, "") for length in (62, 63, 64, 80)]
    trace = mk.trace_routing(model, prompts, batch_size=4, input_length=64, target_length=8)
    assert trace.truncated == 2
    assert np.bincount(trace.stack("encoder").example).tolist() == [63, 64, 64, 64]


def test_models_that_cannot_be_traced_are_named(model):
    with pytest.raises(ValueError, match="t5-nano is dense"):
        mk.trace_routing(mk.EncoderDecoder(mk.preset("t5-nano").replace(d_model=16)), [])
    with pytest.raises(ValueError, match="no prompts"):
        mk.trace_routing(model, [])
    graphdef, state = nnx.split(model)
    broken = nnx.merge(graphdef, jax.tree.map(lambda array: array * np.nan, state))
    with pytest.raises(ValueError, match="parameters of st-nano are not finite"):
        mk.trace_routing(broken, some_text(), batch_size=4, target_length=8)


def test_a_trace_saves_and_loads(synthetic, tmp_path):
    trace = synthetic([[[0, 1], [2, -1], [3, 0], [1, 2]]])
    trace.save(tmp_path / "new" / "t.npz")
    again = RouterTrace.load(tmp_path / "new" / "t.npz")
    for field in ("model", "num_experts", "tasks", "clusters", "domains", "truncated"):
        assert getattr(again, field) == getattr(trace, field)
    for field in dataclasses.fields(again.stack("encoder")):
        mine = getattr(trace.stack("encoder"), field.name)
        np.testing.assert_array_equal(mine, getattr(again.stack("encoder"), field.name))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.npz"]
    with pytest.raises(ValueError, match="unknown stack of this trace 'encode'"):
        trace.stack("encode")
    with pytest.raises(ValueError, match="unknown label 'domian': did you mean 'domain'"):
        trace.labels("domian")


def stored(**changes):
    """Header and arrays of a trace file of format 1; the names of changes replace theirs."""
    header = {
        "format": 1,
        "model": "m",
        "num_experts": 4,
        "truncated": 0,
        "labels": [["t", "t"], ["c", "c"], ["d", "d"]],
    }
    arrays = {
        "token": np.array([3, 4, 5], np.int32),
        "example": np.array([0, 0, 1], np.int32),
        "position": np.array([0, 1, 0], np.int16),
        "expert": np.array([[[0], [3], [-1]]], np.int16),
        "weight": np.array([[[0.5], [1], [0]]], np.float16),
        "kept": np.array([[[True], [False], [False]]]),
        "entropy": np.array([[0.1, 0.2, 0.3]], np.float16),
    }
    header |= {name: value for name, value in changes.items() if name in header}
    arrays |= {name: value for name, value in changes.items() if name not in header}
    return header, {f"encoder.{name}": each for name, each in arrays.items() if each is not None}


def write(path, header, arrays):
    np.savez_compressed(path, header=np.array(json.dumps(header)), **arrays)
    return path


def test_files_of_the_first_format_load(tmp_path):
    trace = RouterTrace.load(write(tmp_path / "t.npz", *stored()))
    assert trace.stack("encoder").expert.ravel().tolist() == [0, 3, -1]
    assert trace.stack("encoder").weight.dtype == np.float32 and trace.domains == ("d", "d")


ONE = np.zeros((1, 3, 1))
DAMAGES = {
    "format": 2,
    "model": None,
    "num_experts": True,
    "truncated": -1,
    "labels": [["t"], ["c", "c"], ["d", "d"]],
    "token": np.array([-1, 4, 5], np.int32),
    "example": np.array([0, 0, 2], np.int32),
    "position": np.array([0.0, 1, 0]),
    "expert": np.array([[[0], [77], [1]]], np.int16),
    "weight": np.full((1, 3, 1), np.nan, np.float16),
    "kept": ONE.astype(np.int8),
    "entropy": np.full((1, 3), np.inf, np.float16),
    "other": ONE,
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("kind", ["wrong", "missing", "type"])
def test_damaged_traces_are_refused_in_one_line_with_the_name_of_the_file(tmp_path, name, kind):
    header, arrays = stored()
    changes = {"wrong": DAMAGES[name], "missing": None, "type": ["?"]}
    if name in header:
        header[name] = changes[kind]
    elif kind == "wrong":
        header, arrays = stored(**{name: DAMAGES[name]})
    elif kind == "missing":
        arrays.pop(f"encoder.{name}", None) if name != "other" else arrays.clear()
    else:
        arrays[f"encoder.{name}"] = np.array(["?"])
    with pytest.raises(
        ValueError, match=r"^.*broken\.npz is not a routing trace, or damaged \(.+\)$"
    ):
        RouterTrace.load(write(tmp_path / "broken.npz", header, arrays))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_any_changed_or_lost_byte_gives_a_trace_or_one_line(tmp_path_factory, place, value, cut):
    path = tmp_path_factory.getbasetemp() / "bytes.npz"
    data = bytearray(write(path, *stored()).read_bytes())
    place %= len(data)
    data[place] = value
    path.write_bytes(data[:place] if cut else data)
    try:
        RouterTrace.load(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_a_small_file_of_huge_arrays_is_refused_before_it_is_read(tmp_path):
    path = write(tmp_path / "bomb.npz", *stored())
    header = io.BytesIO()
    shape = {"descr": "<i4", "fortran_order": False, "shape": (500_000_000,)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("decoder.token.npy", header.getvalue())
    with pytest.raises(ValueError, match=r"bomb\.npz .*2000 MB, more than the 400 MB allowed"):
        RouterTrace.load(path)


def test_a_trace_that_could_not_be_loaded_is_not_saved(synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr("moekit.analysis.trace_file.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="trace fewer prompts"):
        synthetic(np.zeros((2, 100, 1), int)).save(tmp_path / "t.npz")
    assert not list(tmp_path.iterdir())
