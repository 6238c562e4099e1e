"""Ours beside transformers: equal weights give equal logits, and a bench at equal drops.

Skipped where torch or transformers is missing; `make parity` installs both.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moekit.bench.baselines import peers
from moekit.bench.timing import full_batch
from moekit.config import ModelConfig
from moekit.model.transformer import EncoderDecoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYERS, D, F, HEADS, H, V = 2, 32, 48, 2, 16, 64
ATTENTION = {"wq_dnh": "q", "wk_dnh": "k", "wv_dnh": "v", "wo_nhd": "o"}
FFN = {"relu": {"wi_df": "wi"}, "gated_gelu": {"wg_df": "wi_0", "wi_df": "wi_1"}}


def read_from(peer, model: EncoderDecoder, activation: str) -> None:
    """Overwrite the parameters of ours with those of a transformers T5."""
    weights = {name: jnp.asarray(p.detach().numpy()) for name, p in peer.named_parameters()}

    def put(parameter, *names, rows=True):
        # torch keeps [out, in]
        stacked = jnp.stack([weights[n].T if rows else weights[n] for n in names])
        parameter[...] = stacked.reshape(parameter[...].shape)

    put(model.embedding_vd, "shared.weight", rows=False)
    if model.head_dv is not None:
        put(model.head_dv, "lm_head.weight")
    for stack in ("encoder", "decoder"):
        ours, blocks = getattr(model, stack), [f"{stack}.block.{i}.layer" for i in range(LAYERS)]
        (layer,) = ours.blocks
        parts = [("self", layer.self_attention, "SelfAttention")]
        if stack == "decoder":
            parts.append(("cross", layer.cross_attention, "EncDecAttention"))
        for i, (kind, attention, theirs) in enumerate(parts):
            norm = getattr(layer, f"{kind}_norm")
            put(norm.scale_d, *(f"{b}.{i}.layer_norm.weight" for b in blocks), rows=False)
            for name, there in ATTENTION.items():
                parameter = getattr(attention, name)
                put(parameter, *(f"{b}.{i}.{theirs}.{there}.weight" for b in blocks))
        i = len(parts)
        put(layer.ffn_norm.scale_d, *(f"{b}.{i}.layer_norm.weight" for b in blocks), rows=False)
        for name, there in (FFN[activation] | {"wo_fd": "wo"}).items():
            parameter = getattr(layer.ffn, name)
            put(parameter, *(f"{b}.{i}.DenseReluDense.{there}.weight" for b in blocks))
        bias = f"{blocks[0]}.0.SelfAttention.relative_attention_bias.weight"
        put(ours.bias.bias_bn, bias, rows=False)
        put(ours.norm.scale_d, f"{stack}.final_layer_norm.weight", rows=False)


@pytest.mark.parametrize("activation", ["relu", "gated_gelu"])
def test_equal_weights_give_equal_logits(activation):
    peer = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V,
            d_model=D,
            d_ff=F,
            d_kv=H,
            num_layers=LAYERS,
            num_heads=HEADS,
            feed_forward_proj=activation.replace("_", "-"),
            decoder_start_token_id=0,
        )
    ).eval()
    shape = {"d_model": D, "d_ff": F, "num_heads": HEADS, "head_dim": H, "vocab_size": V}
    model = EncoderDecoder(
        ModelConfig(
            name="t5",
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            activation=activation,
            tied_logits=True,
            **shape,
        )
    )
    read_from(peer, model, activation)
    batch = full_batch(3, 40, 24, V)
    with torch.no_grad():
        theirs = peer(
            input_ids=torch.tensor(batch.inputs.tolist()),
            labels=torch.tensor(batch.targets.tolist()),
        ).logits
    graphdef, state = nnx.split(model)
    ours = jax.jit(lambda state, batch: nnx.merge(graphdef, state)(batch).logits)(state, batch)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-4)


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
