"""Ours beside transformers: models that it saved give equal logits, and a bench at equal drops.

Skipped where torch or transformers is missing; `make parity` installs both.
"""

import jax
import numpy as np
import pytest
from flax import nnx

import moekit as mk
from moekit.bench.baselines import peers
from moekit.data.batch import Batch
from moekit.model.convert import _tensor
from moekit.model.convert_names import layouts

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.numpy import load_file  # noqa: E402

torch.set_num_threads(2)
V = 96
T5 = "T5"
SWITCH = "SwitchTransformers"
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SPARSE = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 3}
MODELS = {
    "v1.0": (T5, {}),
    "v1.1": (T5, V1_1),
    "v1.1 untied": (T5, V1_1 | {"untied": True}),
    "scaled untied": (T5, {"untied": True}),
    "switch": (SWITCH, SPARSE | {"num_experts": 4, "expert_capacity": 64}),
    "switch drops": (SWITCH, SPARSE | {"num_experts": 4, "expert_capacity": 3}),
    "switch many": (SWITCH, SPARSE | {"num_experts": 16, "expert_capacity": 1}),
}


def peer_of(name, seed=0):
    family, changes = MODELS[name]
    changes = dict(changes)
    untied = changes.pop("untied", False)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=V,
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **changes,
    )
    peer = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    if untied:
        peer.lm_head.weight = torch.nn.Parameter(torch.randn(V, 32))
    return peer


def padded_batch(input_length, target_length, *, left, seed=0):
    rng = np.random.default_rng(seed)

    def side(length):
        lengths = np.array([length, length - 7, length // 2, 5])[:, None]
        index = np.arange(length)
        mask = index >= length - lengths if left else index < lengths
        ids = np.where(mask, rng.integers(3, V, mask.shape), 0).astype(np.int32)
        positions = np.where(mask, np.cumsum(mask, 1) - 1, 0).astype(np.int32)
        return ids, mask.astype(np.int32), positions

    targets = side(target_length)
    return Batch(*side(input_length), *targets, targets[1].astype(np.float32))


def peer_output(peer, batch, **settings):
    labels = np.where(batch.loss_weights > 0, batch.targets, -100)
    return peer(
        input_ids=torch.tensor(batch.inputs).long(),
        attention_mask=torch.tensor(batch.input_segments).long(),
        decoder_attention_mask=torch.tensor(batch.target_segments).long(),
        labels=torch.tensor(labels).long(),
        **settings,
    )


def record_routing(peer):
    """The expert of each token by stack, one array a sparse layer; -1 if it was dropped."""
    found = {"encoder": [], "decoder": []}
    for stack, experts in found.items():
        for module in getattr(peer, stack).modules():
            if type(module).__name__.endswith("Top1Router"):
                module.register_forward_hook(
                    lambda module, inputs, outputs, experts=experts: experts.append(
                        np.where(outputs[0].sum(-1) > 0, outputs[0].argmax(-1), -1)
                    )
                )
    return found


def assert_gradients_equal(gradients, cfg, peer):
    """Those of all parameters, by the table of names."""
    arrays = {names: each[...] for names, each in nnx.to_flat_state(gradients)}
    expected = {}
    for name, parameter in peer.named_parameters():
        gradient = parameter.grad  # None of an expert without tokens
        expected[name] = np.zeros(parameter.shape) if gradient is None else gradient.numpy()
    shapes = {names: array.shape for names, array in arrays.items()}
    compared = set()
    for names, part in layouts(shapes, cfg).items():
        for place, name in part.names.items():
            gradient = _tensor(arrays[names], place, part)
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(
                gradient, expected[name], atol=1e-4 * scale + 1e-9, rtol=0, err_msg=name
            )
            compared.add(name)
    assert compared == expected.keys()


@jax.jit
def mean_loss(logits, batch):
    log_probs = jax.nn.log_softmax(logits)
    picked = jax.numpy.take_along_axis(log_probs, batch.targets[..., None], -1)[..., 0]
    return -(picked * batch.loss_weights).sum() / batch.loss_weights.sum()


@pytest.mark.parametrize("left", [False, True], ids=["right padding", "left padding"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_gradients_and_drops_are_equal(name, left, tmp_path):
    peer = peer_of(name)
    peer.save_pretrained(tmp_path / "theirs")
    model = mk.load(tmp_path / "theirs")
    batch = padded_batch(40, 24, left=left)
    experts = record_routing(peer)
    theirs = peer_output(peer, batch)
    theirs.loss.backward()
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, batch):
        def loss(state):
            output = nnx.merge(graphdef, state)(batch, trace=True)
            return mean_loss(output.logits, batch), output

        return jax.value_and_grad(loss, has_aux=True)(state)

    (loss, output), gradients = run(state, batch)
    real = batch.loss_weights > 0
    expected = theirs.logits.detach().numpy()[real]
    np.testing.assert_allclose(
        output.logits[real], expected, atol=1e-5 * np.abs(expected).max(), rtol=0
    )
    assert float(loss) == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert_gradients_equal(gradients, model.cfg, peer)
    masks = {"encoder": batch.input_segments > 0, "decoder": real}
    for stack, routing in output.routing.items():
        ours = np.where(routing.kept, routing.expert, -1)[..., 0]
        assert len(ours) == len(experts[stack])
        for layer, expected in zip(ours, experts[stack], strict=True):
            np.testing.assert_array_equal(layer[masks[stack]], expected[masks[stack]])
    dropped = sum(float(stats.dropped_tokens.sum()) for stats in output.stats.values())
    assert (dropped > 0) == (name in ("switch drops", "switch many"))


def test_distances_beyond_the_buckets(tmp_path):
    peer = peer_of("v1.0")
    peer.save_pretrained(tmp_path)
    batch = padded_batch(300, 180, left=False)
    with torch.no_grad():
        expected = peer_output(peer, batch).logits.numpy()
    logits = nnx.jit(lambda model, batch: model(batch).logits)(mk.load(tmp_path), batch)
    real = batch.loss_weights > 0
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_files_return_bit_for_bit_and_load_without_missing_keys(name, tmp_path):
    peer = peer_of(name)
    peer.save_pretrained(tmp_path / "theirs")
    mk.export(tmp_path / "ours", mk.load(tmp_path / "theirs"))
    first, second = (
        load_file(tmp_path / each / "model.safetensors") for each in ("theirs", "ours")
    )
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        np.testing.assert_array_equal(second[key], tensor)
    again, report = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    batch = padded_batch(16, 12, left=False)
    with torch.no_grad():
        logits = [peer_output(each.eval(), batch).logits for each in (peer, again)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["v1.1 untied", "switch"])
def test_torch_files_are_read_without_torch(name, tmp_path):
    peer = peer_of(name)
    peer.save_pretrained(tmp_path)
    expected = mk.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(peer.state_dict(), tmp_path / "pytorch_model.bin")
    found = mk.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(expected))


def test_the_bench_drops_the_same_on_both_sides():
    rows = peers(
        experts=(0, 4),
        batch=2,
        input_length=16,
        target_length=12,
        d_model=64,
        d_ff=32,
        vocab_size=V,
        repeats=2,
    )
    assert [(r["model"], r["experts"], r["direction"]) for r in rows] == [
        (model, experts, direction)
        for model, experts in (("t5", 0), ("switch", 4))
        for direction in ("forward", "forward + backward")
    ]
    for row in rows:
        assert row["dropped_ours"] == row["dropped_peer"] == 0
        assert row["ours_ms"] > 0 and row["peer_ms"] > 0 and row["threads"] > 0
