"""Texts, ids and generated answers of exported folders, ours beside those of transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

import moekit as mk
from moekit.data.tokenizer import load_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(2)
WORDS = ["the", "quick", "brown", "fox", "lazy", "Haus", "Straße", "café", "東京", "мир"]
ODD = [
    "",
    " ",
    "the quick brown fox",
    "  two  spaces  ",
    "lines\nand\n\n  more\n",
    "\ttabs\r\n",
    "東京 привет, мир",
    "emoji 🙂🎉 fox",
    "ﬁne ① Å",
    "a\u00a0b\u3000c\u200bd",
    "<extra_id_0> the <extra_id_1>",
    "the<extra_id_0>fox <extra_id_99>.",
    "the  <extra_id_12>  fox <extra_id_100>",
]
SIZES = dict(encoder_layers=1, decoder_layers=1, d_model=32, d_ff=32, num_heads=2, head_dim=16)


def texts() -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, 12)) for _ in range(300)]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names of tokenizers: as T5's, as we train them, the former saved by transformers, bytes."""
    folder = tmp_path_factory.mktemp("tokenizers")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts()),
        model_prefix=str(folder / "spiece"),
        vocab_size=128,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    alphabet = [chr(code) * 3 + " " + chr(code + 1) for code in range(33, 230)]
    mk.train_sentencepiece(texts() + alphabet, folder / "own.model", vocab_size=640)
    mk.export(folder / "t5", small_model("t5", str(folder / "spiece.model")))
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "t5")
    theirs.save_pretrained(folder / "json")
    return {
        "spiece.model": str(folder / "spiece.model"),
        "byte pieces": str(folder / "own.model"),
        "tokenizer.json": str(folder / "json" / "tokenizer.json"),
        "byte": "byte",
    }


def small_model(family: str, tokenizer: str) -> Any:
    changes = SIZES | {"tokenizer": tokenizer}
    changes["vocab_size"] = load_tokenizer(tokenizer).vocab_size
    changes["generation"] = mk.GenerationSettings(
        max_new_tokens=24, temperature=0.0, num_beams=2, length_normalization="transformers"
    )
    if family == "switch":
        sparse = dict(num_experts=4, encoder_moe_layers=1, decoder_moe_layers=1, expert_capacity=64)
        changes |= sparse | {"activation": "relu", "tied_logits": True}
    return mk.EncoderDecoder(mk.preset("t5-nano").replace(**changes))


@pytest.mark.parametrize("name", ["spiece.model", "byte pieces", "tokenizer.json", "byte"])
def test_ids_and_texts_of_an_exported_folder_are_equal(
    name: str, tokenizers: dict[str, str], tmp_path: Path
) -> None:
    mk.export(tmp_path / "out", small_model("t5", tokenizers[name]))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_tokenizer(mk.load(tmp_path / "out").cfg.tokenizer)
    for text in ODD:
        ids = ours.encode(text)
        assert theirs(text).input_ids == [*ids, 1], text
        again = theirs.decode(ids, skip_special_tokens=False) if ids else ""
        if name in ("byte pieces", "byte"):
            assert again == ours.decode(ids) == text
        elif min(ids, default=3) > 2:  # theirs writes <unk>, and a space after sentinels
            assert again.replace("> ", ">") == ours.decode(ids).replace("> ", ">")


def test_byte_pieces_that_transformers_would_read_otherwise_are_refused(
    tokenizers: dict[str, str], tmp_path: Path
) -> None:
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts()),
        model_prefix=str(tmp_path / "other"),
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    model = small_model("t5", str(tmp_path / "other.model"))
    with pytest.raises(ValueError, match=r"other\.model cannot be exported: .*other ids"):
        mk.export(tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["t5", "switch"])
def test_an_exported_folder_generates_the_same_text(
    family: str, tokenizers: dict[str, str], tmp_path: Path
) -> None:
    model = small_model(family, tokenizers["byte pieces"])
    embedding = model.embedding_vd
    embedding[...] = embedding[...].at[:2].set(0.0)  # or padding echoes itself
    mk.export(tmp_path / "out", model)
    automatic = transformers.AutoModelForSeq2SeqLM
    peer = automatic.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    questions = ["the quick brown fox", "東京 привет", "a lazy\n\ndog <extra_id_0> jumps", "fox"]
    batch = tokenizer(questions, return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = peer.generate(**batch)
    # random bytes are rarely UTF-8, which the two decode differently
    ours = load_tokenizer(model.cfg.tokenizer)
    expected = [ours.decode(row) for row in outputs.tolist()]
    assert mk.generate(model, questions) == expected
    assert len(set(expected)) > 1 and max(map(len, expected)) > 10
