"""Text corpora of the data folder: parquet files with a `text` column, a folder for each domain."""

from pathlib import Path

from moekit.data.builtin.tasks import builtin_corpus
from moekit.data.files import OnError, data_dir, read
from moekit.data.text import Corpus, Document
from moekit.errors import unknown

TEXT_DOMAINS = {  # folder under text/: domain label
    "books": "books",
    "openstax": "textbooks",
    "factbook": "factbook",
    "speeches": "speeches",
}
LOCAL_NAMES = ("local", "mirror")  # every text of the data folder; "mirror" is its former name


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


def corpus(name: str = "builtin", folder: str | Path | None = None) -> Corpus:
    """Text to pretrain on: "builtin", "local" (all text of the data folder), or its parts by name,
    joined with commas ("books,speeches").

    Where a part has no validation files, every 50th of its documents validates.

    Raises:
      ValueError: an unknown part.
      FileNotFoundError: no data folder, or it lacks a part.
    """
    if name == "builtin":
        return builtin_corpus()
    parts = tuple(TEXT_DOMAINS) if name in LOCAL_NAMES else tuple(name.split(","))
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
    wanted = split == "valid"
    return [each for index, each in enumerate(documents) if (index % 50 == 0) == wanted]
