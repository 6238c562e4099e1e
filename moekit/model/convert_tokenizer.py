"""The tokenizer files of a folder of transformers."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.data.tokenizer import NUM_SENTINELS, SentencePieceTokenizer, load_tokenizer
from moekit.model.convert_files import read_json

if TYPE_CHECKING:
    import tokenizers

SENTENCEPIECE = "spiece.model"
TOKENIZERS = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
SPECIAL = ["<pad>", "</s>", "<unk>"]
# <extra_id_0> has the highest id
SENTINELS = [f"<extra_id_{index}>" for index in reversed(range(NUM_SENTINELS))]
# spaces, lines and characters that tokenizers treat differently
EXAMPLE = "  Two  spaces\n\n \tﬁne ① Å \u00a0 東京 🙂\n<extra_id_0> end<extra_id_12>.\n"
COMPANIONS = (SENTENCEPIECE, TOKENIZERS, SETTINGS, "special_tokens_map.json", "added_tokens.json")


def tokenizer_of(folder: Path) -> str | None:
    """What a configuration calls the tokenizer of a folder; None if it has none."""
    for name in (SENTENCEPIECE, TOKENIZERS):
        if (folder / name).is_file():
            return str(folder / name)
    if not (folder / SETTINGS).is_file():
        return None
    tokenizer_class = read_json(folder / SETTINGS).get("tokenizer_class")
    return "byte" if tokenizer_class == "ByT5Tokenizer" else None


def check_tokenizer(tokenizer: str | None) -> None:
    """Raise FileNotFoundError if the file that a configuration names is missing."""
    if tokenizer not in (None, "byte") and not Path(tokenizer).is_file():
        raise FileNotFoundError(
            f"the model's tokenizer {tokenizer} is missing: put it there, or set tokenizer to "
            "another path with mk.with_config"
        )


def copy_tokenizer(tokenizer: str | None, folder: Path) -> str | None:
    """Copy a tokenizer and its settings, or write them as transformers reads them.

    Returns:
      What a configuration calls the copy.
    """
    if tokenizer is None:
        return None
    if tokenizer == "byte":
        _write_settings(folder, "ByT5Tokenizer")
        return tokenizer
    path = Path(tokenizer)
    if path.name not in (SENTENCEPIECE, TOKENIZERS):  # of our own
        name = TOKENIZERS if path.suffix == ".json" else SENTENCEPIECE
        shutil.copyfile(path, folder / name)
        _write_settings(folder, "T5Tokenizer")
        return str(folder / name)
    for name in COMPANIONS:
        if (path.parent / name).is_file():
            shutil.copyfile(path.parent / name, folder / name)
    if not (folder / SETTINGS).exists():
        _write_settings(folder, "T5Tokenizer")
    return str(folder / path.name)


def with_byte_pieces(tokenizer: str | None) -> "tokenizers.Tokenizer | None":
    """A SentencePiece model with byte pieces as transformers reads it, which ignores these pieces
    in a spiece.model; None for every other tokenizer.

    Raises:
      ValueError: transformers would encode texts differently.
    """
    if tokenizer in (None, "byte"):
        return None
    ours = load_tokenizer(tokenizer)
    if not isinstance(ours, SentencePieceTokenizer) or not ours.has_byte_pieces:
        return None
    theirs = _unigram_with_byte_pieces(ours)
    if theirs.encode(EXAMPLE, add_special_tokens=False).ids != ours.encode(EXAMPLE):
        raise ValueError(
            f"{tokenizer} cannot be exported: transformers would give texts other ids, as it has "
            "no such SentencePiece model (with byte pieces, but another algorithm or "
            "normalization than those of mk.train_sentencepiece); export the model without its "
            "tokenizer: mk.with_config(model, tokenizer=None)"
        )
    return theirs


def write_byte_pieces(theirs: "tokenizers.Tokenizer", folder: Path) -> None:
    """Write the result of `with_byte_pieces`, which transformers prefers to a spiece.model."""
    theirs.save(str(folder / TOKENIZERS))
    _write_settings(folder, "PreTrainedTokenizerFast")


def _unigram_with_byte_pieces(ours: SentencePieceTokenizer) -> "tokenizers.Tokenizer":
    """A model of `train_sentencepiece`: every line begins with a space of its own."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers.processors import TemplateProcessing

    theirs = Tokenizer(models.Unigram(ours.scores(), unk_id=ours.unk_id, byte_fallback=True))
    start_of_line = Regex(r"(?<![^\n])(?=[^\n])")
    theirs.normalizer = normalizers.Sequence(
        [normalizers.Replace(" ", "▁"), normalizers.Replace(start_of_line, "▁")]
    )
    added_space = Regex(r"\A |(?<=\n|<extra_id_\d>|<extra_id_\d\d>) ")
    theirs.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(added_space, ""),
        ]
    )
    theirs.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", ours.eos_id)]
    )
    names = SPECIAL + SENTINELS
    theirs.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return theirs


def _write_settings(folder: Path, tokenizer_class: str) -> None:
    settings = {
        "tokenizer_class": tokenizer_class,
        "extra_ids": NUM_SENTINELS,
        "additional_special_tokens": SENTINELS,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    text = json.dumps(settings, indent=2)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
