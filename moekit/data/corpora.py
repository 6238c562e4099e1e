"""Text to pretrain on: the embedded text, that of the data folder, or a user's own."""

import functools
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moekit.data.builtin.tasks import builtin_corpus
from moekit.data.column_names import TEXTS
from moekit.data.files import BadRow, OnError, check_on_error, data_dir, is_data_file, read
from moekit.data.own_rows import (
    TEXT_KINDS,
    RowSource,
    file_rows,
    files_by_split,
    is_path,
    path_name,
    split_of,
)
from moekit.data.paths import require_file
from moekit.data.text import Corpus, Document
from moekit.errors import unknown
from moekit.progress import ProgressBar

log = logging.getLogger("moekit")
TEXT_DOMAINS = {  # folder under text/: domain label
    "books": "books",
    "openstax": "textbooks",
    "factbook": "factbook",
    "speeches": "speeches",
}
LOCAL_NAMES = ("local", "mirror")  # every text of the data folder; "mirror" is its former name
EVERY = 50  # every 50th document validates
MAX_TEXT = 1 << 30  # bytes of a text file, which is read whole
TAIL = 20  # of fewer documents, the last 1/20 of each
LONG_ENOUGH = 2000  # characters of a document whose tail validates
MAX_FILE_DOMAINS = 32  # of more files beside each other, the folder is the domain


def read_text(folder: Path, split: str, domain: str, on_error: OnError = "stop") -> list[Document]:
    """Documents of a folder of parquet files named {split}*.parquet with a `text` column.

    Raises:
      ValueError: no `text` column, or an empty text (naming file and row).
    """

    def make(row: dict, number: int) -> Document:
        return Document(row["text"], str(row.get("title") or ""), domain)

    documents = []
    for path in sorted(folder.glob(f"{split}*.parquet")):
        documents += read(path, {"text": str}, make, on_error=on_error)
    return documents


def corpus(
    name: str | Path | Sequence[str | Document] = "builtin",
    folder: str | Path | None = None,
    *,
    text: str | None = None,
    on_error: str = "stop",
) -> Corpus:
    """Text to pretrain on: "builtin", "local" (all text of the data folder), its parts by name,
    joined with commas ("books,speeches"), or your own.

    Your own is a file or a folder (.txt, .md, .jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet, also
    in subfolders), or a list of strings or of `mk.Document`. The domain of a document is the
    subfolder of its file, or the file's name where there are no more than 32 files beside it.
    Files named train, valid, dev or test are splits. Else, of 50 documents or more every 50th
    validates; of fewer, the last twentieth of each that has 2,000 characters or more, or the last
    one if none is that long.

    Args:
      folder: the data folder.
      text: the column of the text in your own files, default "text", "content", "body" or alike.
      on_error: "stop" at an unusable row of your own files, or "skip" it.

    Raises:
      ValueError: an unknown part, no text, no such column, an unusable row or file.
      FileNotFoundError: no data folder, or it lacks a part; no such file.
    """
    if not isinstance(name, str | Path):
        return _own_corpus("own", {"train": _documents_of_list(name)})
    parts = tuple(TEXT_DOMAINS) if name in LOCAL_NAMES else tuple(str(name).split(","))
    if name == "builtin":
        return builtin_corpus()
    if any(part not in TEXT_DOMAINS for part in parts) and is_path(name):
        return _corpus_of_path(Path(name).expanduser(), text, on_error)
    for part in parts:
        if part not in TEXT_DOMAINS:
            raise unknown("corpus", part, ("builtin", "local", *TEXT_DOMAINS))
    root = data_dir(folder) / "text"
    for part in parts:
        if not (root / part).is_dir():
            raise FileNotFoundError(f"no folder {root / part}: the data folder has no {part}")

    def load(split: str) -> list[Document]:
        documents = []
        for part in parts:
            documents += _documents(root / part, split, TEXT_DOMAINS[part])
        return documents

    return Corpus(name, load)


def _documents(folder: Path, split: str, domain: str) -> list[Document]:
    if split == "train" or any(folder.glob("valid*.parquet")):
        documents = read_text(folder, split, domain)
    else:
        documents = read_text(folder, "train", domain)
    if any(folder.glob("valid*.parquet")):
        return documents
    return _every_50th(documents, split)


def _every_50th(documents: Sequence[Document], split: str) -> list[Document]:
    """The "train" or "valid" part of documents by position."""
    is_wanted = split == "valid"
    return [each for index, each in enumerate(documents) if (index % EVERY == 0) == is_wanted]


def is_text_path(path: Path) -> bool:
    """Whether a path is a text file, or a folder of text files and none of rows."""
    path = path.expanduser()
    if not path.is_dir():
        return _is_text_file(path)
    files = files_by_split(path, _is_corpus_file)
    return bool(files) and not any(is_data_file(each) for paths in files.values() for each in paths)


def _is_text_file(path: Path) -> bool:
    return path.suffix.lower() in TEXT_KINDS


def _is_corpus_file(path: Path) -> bool:
    return _is_text_file(path) or is_data_file(path)


def _own_corpus(name: str, splits: dict[str, list[Document]]) -> Corpus:
    """A corpus of documents by split, with a validation split if there is enough text."""
    documents = splits.get("train", [])
    if not documents:
        raise ValueError(f"corpus {name!r} has no text to train on")
    if "valid" not in splits:
        splits = _with_validation(documents)
    return Corpus(name, functools.partial(_of_split, splits))


def _of_split(splits: dict[str, list[Document]], split: str) -> list[Document]:
    return splits.get(split, [])


def _with_validation(documents: list[Document]) -> dict[str, list[Document]]:
    """Documents for training and validation."""
    if len(documents) >= EVERY:
        return _without_every(documents, EVERY)
    if all(len(each.text) < LONG_ENOUGH for each in documents):
        return _without_every(documents, max(2, len(documents)))
    heads, tails = [], []
    for document in documents:
        head, tail = _divide(document)
        heads.append(head)
        tails += tail
    return {"train": heads, "valid": tails}


def _without_every(documents: Sequence[Document], every: int) -> dict[str, list[Document]]:
    """Documents of which each n-th validates; a single one only trains."""
    splits: dict[str, list[Document]] = {"train": [], "valid": []}
    for number, document in enumerate(documents, 1):
        splits["train" if number % every else "valid"].append(document)
    return splits


def _divide(document: Document) -> tuple[Document, list[Document]]:
    """A document without its tail, and its tail if it is long; divided between two words."""
    length = len(document.text)
    if length < LONG_ENOUGH:
        return document, []
    start = length - length // TAIL
    space = document.text.find(" ", start)
    if 0 < space < length - length // (2 * TAIL):
        start = space
    head, tail = document.text[:start], document.text[start:]
    if not head.strip() or not tail.strip():
        return document, []
    return replace(document, text=head), [replace(document, text=tail)]


def _documents_of_list(texts: Sequence[str | Document]) -> list[Document]:
    """The documents of a list of texts."""
    documents = []
    for number, each in enumerate(texts, 1):
        if isinstance(each, str) and each.strip():
            each = Document(each, domain="own")
        if not isinstance(each, Document):
            raise ValueError(
                f"text {number} of the corpus is {str(each)[:60]!r} ({type(each).__name__}): give "
                "texts that are not empty, or mk.Document"
            )
        documents.append(each)
    return documents


def _corpus_of_path(path: Path, text: str | None, on_error: str) -> Corpus:
    """The corpus of a file or folder."""
    if not os.path.lexists(path):
        raise FileNotFoundError(f"no file or folder {path}: correct the path")
    check_on_error(on_error)
    files = files_by_split(path, _is_corpus_file) if path.is_dir() else {"train": [path]}
    splits: dict[str, list[Document]] = {}
    for split, paths in files.items():
        per_folder = Counter(each.parent for each in paths)
        documents: list[Document] = []
        for each in ProgressBar(paths, desc=f"read {path.name}", unit="file", leave=False):
            domain = _domain(path, each, per_folder[each.parent])
            if _is_text_file(each):
                documents += _documents_of_text(each, domain)
            else:
                documents += _documents_of_rows(file_rows(each), text, domain, on_error)
        splits[split] = documents
    return _own_corpus(str(path), splits)


def _domain(root: Path, file: Path, num_beside: int) -> str:
    """The name of a file's subfolder, or of the file itself where there are few beside it."""
    parts = file.relative_to(root).parts if file != root else (file.name,)
    folders = [part for part in parts[:-1] if not split_of([part])]
    if folders:
        return folders[0]
    if num_beside > MAX_FILE_DOMAINS or split_of([file.name]):
        return path_name(root)
    return path_name(file)


def _documents_of_text(path: Path, domain: str) -> list[Document]:
    """The document of a text file; none of an empty one."""
    require_file(path, MAX_TEXT)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; convert the file") from None
    return [Document(text, path.stem, domain)] if text.strip() else []


def _documents_of_rows(
    source: RowSource, text: str | None, domain: str, on_error: str
) -> list[Document]:
    """The documents of a file of rows."""
    documents = []
    column = ""
    num_skipped = 0
    for number, row in source.rows():
        try:
            if isinstance(row, BadRow):
                raise row
            column = column or _text_column(row, text, source.name)
            documents.append(_document(row, column, domain))
        except BadRow as problem:
            if on_error == "stop":
                hint = 'correct the row or use on_error="skip"'
                raise ValueError(f"{source.name}:{number}: {problem}; {hint}") from None
            num_skipped += 1
    if num_skipped:
        log.warning("%s: skipped %d unusable rows", source.name, num_skipped)
    return documents


def _text_column(row: Mapping[str, Any], named: str | None, source: str) -> str:
    """The column that is named, else the one of a usual name for text, whatever its case."""
    if named in row:
        return named
    if named is not None:
        raise unknown(f"column of {source}", named, row)
    by_usual_name = {name.strip().lower(): name for name in row}
    for name in TEXTS:
        if name in by_usual_name:
            return by_usual_name[name]
    shown = ", ".join(map(repr, row))
    raise ValueError(
        f"{source} has the columns {shown}, none with a usual name for text: name it, as in "
        f"mk.corpus(.., text={next(iter(row))!r})"
    )


def _document(row: Mapping[str, Any], column: str, domain: str) -> Document:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise BadRow(f"column {column!r} holds no text: {str(text)[:60]!r}")
    title = row.get("title")
    return Document(text, title if isinstance(title, str) else "", domain)
