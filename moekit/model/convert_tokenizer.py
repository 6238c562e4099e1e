"""The tokenizer files of a folder of transformers."""

import json
import shutil
from pathlib import Path

from moekit.data.tokenizer import NUM_SENTINELS
from moekit.model.convert_files import read_json

SENTENCEPIECE = "spiece.model"
TOKENIZERS = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
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


def _write_settings(folder: Path, tokenizer_class: str) -> None:
    # <extra_id_0> has the highest id
    sentinels = [f"<extra_id_{index}>" for index in reversed(range(NUM_SENTINELS))]
    settings = {
        "tokenizer_class": tokenizer_class,
        "extra_ids": NUM_SENTINELS,
        "additional_special_tokens": sentinels,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    text = json.dumps(settings, indent=2)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
