"""Beam search against a plain-Python oracle of the rules, and sampling against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moekit as mk
from moekit.data.batch import pad_pairs
from moekit.model.decoding import generate_ids
from moekit.model.sampling import Sampling, choose
from moekit.model.transformer import shift_right

EOS, LENGTH = 1, 5


@pytest.fixture(scope="module")
def model():
    cfg = mk.preset("t5-nano").replace(
        d_model=16, d_ff=32, encoder_layers=1, decoder_layers=2, vocab_size=11
    )
    model = mk.EncoderDecoder(cfg, seed=3)
    model.head_dv[...] = 4 * model.head_dv[...]  # answers of several lengths
    return model


def next_log_probs(model, question):
    """A function from the tokens so far to the log-probabilities of the next one."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def forward(state, batch):
        model = nnx.merge(graphdef, state)
        encoded = model.encode(batch.inputs, batch.input_segments)
        read = shift_right(batch.targets, batch.target_positions)
        segments = jnp.ones_like(read)
        return jax.nn.log_softmax(model.decode(encoded, read, segments).logits)

    def log_probs(tokens):
        pair = {"inputs": question, "targets": [*tokens, 0]}
        batch = pad_pairs([pair], input_length=64, target_length=LENGTH + 1)
        return np.asarray(forward(state, jax.tree.map(jnp.asarray, batch)))[0, len(tokens)]

    return log_probs


def oracle(log_probs, num_beams, normalization, penalty):
    def divisor(count):
        return ((5 + count) / 6 if normalization == "t5" else count) ** penalty

    running, answers = [(0.0, ())], []
    for count in range(1, LENGTH + 1):
        extended = []
        for score, tokens in running:
            following = log_probs(tokens)
            extended += [(score + following[v], (*tokens, v)) for v in range(len(following))]
        extended = sorted(extended, reverse=True)[: 2 * num_beams]
        ended = [tokens[-1] == EOS or count == LENGTH for _, tokens in extended]
        for (score, tokens), ends in list(zip(extended, ended, strict=True))[:num_beams]:
            if ends:
                answers.append((score / divisor(count), tokens))
        answers = sorted(answers, reverse=True)[:num_beams]
        running = [each for each, ends in zip(extended, ended, strict=True) if not ends][:num_beams]
        if len(answers) == num_beams and running:
            longest = LENGTH if normalization == "t5" and penalty > 0 else count
            if running[0][0] / divisor(longest) <= answers[-1][0]:
                break
    return list(answers[0][1])


@pytest.mark.parametrize(("normalization", "penalty"), [("t5", 0.6), ("transformers", 1.0)])
def test_beam_search_follows_its_rules(model, normalization, penalty):
    questions = [[5, 7, 1], [2, 3, 4, 5, 6, 1], [9, 1], [8, 8, 8, 8, 1]]
    for num_beams in (2, 4):
        found = generate_ids(
            model,
            questions,
            max_new_tokens=LENGTH,
            num_beams=num_beams,
            length_penalty=penalty,
            length_normalization=normalization,
        )
        for question, ids in zip(questions, found, strict=True):
            best = oracle(next_log_probs(model, question), num_beams, normalization, penalty)
            assert ids.tolist() == best + [0] * (LENGTH - len(best))


def test_top_p_draws_from_the_smallest_set():
    logits = np.random.default_rng(0).normal(0, 2, (3, 12)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    draws = 400
    for top_k, top_p in ((0, 0.7), (4, 1.0), (5, 0.5)):
        for row in range(3):
            order = np.argsort(-probabilities[row])[: top_k or None]
            own = probabilities[row, order] / probabilities[row, order].sum()
            count = np.searchsorted(np.cumsum(own), top_p) + 1
            allowed = set(order[:count].tolist())
            keys = jax.random.split(jax.random.key(row), draws)
            sampling = Sampling(keys, jnp.float32(1.0), jnp.float32(top_p))
            repeated = jnp.broadcast_to(logits[row], (draws, 12))
            drawn = choose(repeated, sampling, jnp.int32(0), top_k, top_p < 1)
            assert set(np.asarray(drawn).tolist()) <= allowed
            assert len(set(np.asarray(drawn).tolist())) >= min(2, len(allowed))


def test_eight_devices_give_the_same_text():
    cfg = mk.preset("st-nano").replace(
        d_model=16, d_ff=32, encoder_layers=1, decoder_layers=1, num_experts=4, num_heads=2,
        encoder_moe_layers=1, decoder_moe_layers=1, dispatch="dropless",
    )  # fmt: skip
    texts = ["one", "two words", "three"]
    mesh = mk.make_mesh(data=2, expert=4)
    for settings in ({"max_new_tokens": 6}, {"max_new_tokens": 6, "num_beams": 2}):
        alone = mk.generate(mk.EncoderDecoder(cfg, seed=0), texts, **settings)
        assert mk.generate(mk.EncoderDecoder(cfg, seed=0, mesh=mesh), texts, **settings) == alone
