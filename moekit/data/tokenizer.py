"""Text to token ids and back: bytes, or a SentencePiece model with T5's special ids.

Both share T5's conventions: padding 0, end of sequence 1, unknown 2, and 100 sentinels for span
corruption above the vocabulary, `<extra_id_0>` the highest. Vocabulary sizes are multiples of 128.
"""

import functools
import hashlib
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAD, EOS, UNK = 0, 1, 2
NUM_SENTINELS = 100
SENTINEL = re.compile(r"(<extra_id_[1-9]?[0-9]>)")


class Tokenizer:
    """The interface of a tokenizer; `pieces` is the number of ids below the sentinels."""

    pieces: int
    pad_id, eos_id, unk_id, num_sentinels = PAD, EOS, UNK, NUM_SENTINELS

    @property
    def vocab_size(self) -> int:
        """Pieces and sentinels, rounded up to a multiple of 128."""
        num_ids = self.pieces + NUM_SENTINELS
        return math.ceil(num_ids / 128) * 128

    def sentinel(self, index: int) -> int:
        """The id of `<extra_id_{index}>`; a ValueError if there is none."""
        if not 0 <= index < NUM_SENTINELS:
            raise ValueError(f"sentinel {index} does not exist: there are {NUM_SENTINELS}")
        return self.pieces + NUM_SENTINELS - 1 - index

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without end of sequence; `<extra_id_i>` becomes a sentinel."""
        ids: list[int] = []
        for part in SENTINEL.split(text):
            if SENTINEL.fullmatch(part):
                index = int(part.removeprefix("<extra_id_").removesuffix(">"))
                ids.append(self.sentinel(index))
            else:
                ids += self._encode_pieces(part)
        return ids

    def _encode_pieces(self, text: str) -> list[int]:
        """Ids of a text without sentinels."""
        raise NotImplementedError

    def _decode_pieces(self, ids: list[int]) -> str:
        raise NotImplementedError

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids: padding and end of sequence are removed, sentinels become `<extra_id_i>`."""
        highest_sentinel = self.sentinel(0)
        texts = []
        pieces: list[int] = []  # since the last sentinel
        for token in map(int, ids):
            if token <= EOS:  # or padding
                continue
            if token < self.pieces:
                pieces.append(token)
                continue
            texts.append(self._decode_pieces(pieces))
            pieces = []
            if token <= highest_sentinel:
                texts.append(f"<extra_id_{highest_sentinel - token}>")
        texts.append(self._decode_pieces(pieces))
        return "".join(texts)

    def digest(self) -> str:
        """Twelve hexadecimal digits for the meaning of the ids."""
        raise NotImplementedError


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 3 to 258 (ByT5, Xue 2022): nothing to train, nothing unknown."""

    pieces = 259

    def _encode_pieces(self, text: str) -> list[int]:
        return (np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3).tolist()

    def _decode_pieces(self, ids: list[int]) -> str:
        return bytes(token - 3 for token in ids if token > UNK).decode(errors="replace")

    def digest(self) -> str:
        return "byte"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model: one trained by `train_sentencepiece`, or T5's own spiece.model.

    A model with byte pieces encodes line by line, with the byte of a newline between the lines. So
    `decode(encode(text))` equals the text for models of `train_sentencepiece`, except for U+2581,
    SentencePiece's own mark of a space. T5's model has no byte pieces: it replaces whitespace,
    newlines included, by single spaces and normalizes characters (NFKC), as when T5 was trained.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a SentencePiece model, or its special ids are not T5's.
    """

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no SentencePiece model at {path}: give the path of a .model")
        model = path.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise ValueError(f"{path} is not a SentencePiece model") from None
        special_ids = (
            self._processor.pad_id(),
            self._processor.eos_id(),
            self._processor.unk_id(),
        )
        _check_special_ids(path, special_ids)
        self.path = path
        self.pieces = self._processor.GetPieceSize()
        self._digest = hashlib.sha256(model).hexdigest()[:12]
        self._newline = self._processor.PieceToId("<0x0A>")  # UNK without byte pieces
        # definitions, options and cues are repeated in many prompts
        self._encode_line = functools.lru_cache(maxsize=8192)(self._processor.EncodeAsIds)

    def __reduce__(self) -> tuple:
        return SentencePieceTokenizer, (self.path,)

    @property
    def has_byte_pieces(self) -> bool:
        """Whether characters without a piece are encoded as bytes."""
        return self._newline != UNK

    def scores(self) -> list[tuple[str, float]]:
        """All pieces with their scores, by id."""
        processor = self._processor
        return [(processor.IdToPiece(id), processor.GetScore(id)) for id in range(self.pieces)]

    def _encode_pieces(self, text: str) -> list[int]:
        if not self.has_byte_pieces:
            return self._processor.EncodeAsIds(text)
        first, *rest = text.split("\n")
        ids = self._encode_line(first).copy()
        for line in rest:
            ids.append(self._newline)
            ids += self._encode_line(line)
        return ids

    def _decode_pieces(self, ids: list[int]) -> str:
        lines: list[list[int]] = [[]]
        for token in ids:
            if token == self._newline and token != UNK:
                lines.append([])
            else:
                lines[-1].append(token)
        texts = [self._processor.DecodeIds(line) if line else "" for line in lines]
        return "\n".join(texts)

    def digest(self) -> str:
        return self._digest


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of the library tokenizers with T5's special ids.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a file, or its special ids are not T5's.
    """

    def __init__(self, path: str | Path) -> None:
        import tokenizers

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}: give the path of a tokenizer.json")
        content = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{path} is not a tokenizer.json ({error})") from None
        special_ids = tuple(map(self._tokenizer.token_to_id, ("<pad>", "</s>", "<unk>")))
        _check_special_ids(path, special_ids)
        first_sentinel = self._tokenizer.token_to_id("<extra_id_0>")
        self.pieces = self._tokenizer.get_vocab_size()
        if first_sentinel is not None:
            self.pieces = first_sentinel + 1 - NUM_SENTINELS
        self.path = path
        self._digest = hashlib.sha256(content).hexdigest()[:12]

    def __reduce__(self) -> tuple:
        return JsonTokenizer, (self.path,)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _decode_pieces(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids) if ids else ""

    def digest(self) -> str:
        return self._digest


def _check_special_ids(path: Path, special_ids: tuple[int | None, ...]) -> None:
    if special_ids != (PAD, EOS, UNK):
        raise ValueError(
            f"{path} has pad, eos, unk = {special_ids}; T5's ids are {(PAD, EOS, UNK)}"
        )


def train_sentencepiece(
    texts: Iterable[str], path: str | Path, vocab_size: int = 8192
) -> SentencePieceTokenizer:
    """Train a unigram model with T5's special ids and byte fallback, and write it to `path`.

    The model preserves texts: it normalizes nothing and keeps every space.

    Args:
      texts: documents; read once.
      vocab_size: number of ids, the 100 sentinels included; a multiple of 128 above 512.

    Raises:
      ValueError: another vocab_size, or too little text for it.
    """
    import sentencepiece

    if vocab_size % 128 or vocab_size <= 512:
        raise ValueError(f"vocab_size is {vocab_size}; use a multiple of 128 above 512")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    lines = (line for text in texts for line in re.split(r"\n+", text) if line.strip())
    try:
        with partial.open("wb") as file:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(lines),
                model_writer=file,
                model_type="unigram",
                vocab_size=vocab_size - NUM_SENTINELS,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                pad_id=PAD,
                eos_id=EOS,
                unk_id=UNK,
                bos_id=-1,
                input_sentence_size=200_000,
                shuffle_input_sentence=False,
                max_sentence_length=16_384,
                num_threads=os.cpu_count() or 1,
                minloglevel=2,
            )
        os.replace(partial, path)
    except RuntimeError as error:
        raise ValueError(
            f"could not train {vocab_size} pieces: {str(error).splitlines()[-1]}; "
            "give more text or a smaller vocab_size"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return SentencePieceTokenizer(path)


@functools.lru_cache(maxsize=8)
def _load(spec: str) -> Tokenizer:
    if spec == "byte":
        return ByteTokenizer()
    return JsonTokenizer(spec) if spec.endswith(".json") else SentencePieceTokenizer(spec)


def load_tokenizer(spec: str | Path | Tokenizer | None) -> Tokenizer:
    """The tokenizer that a configuration names: "byte", or the path of a SentencePiece model or
    of a tokenizer.json."""
    if spec is None:
        raise ValueError(
            "this model names no tokenizer: use cfg.replace(tokenizer='byte') or the path of a "
            "SentencePiece model (mk.train_sentencepiece makes one; T5's is spiece.model)"
        )
    return spec if isinstance(spec, Tokenizer) else _load(str(spec))
