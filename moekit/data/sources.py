"""Where rows come from: a folder of data files, or the Hugging Face hub; and text corpora.

Every row is checked against its schema. A malformed one is reported with file and line: `on_error`
"stop" raises, "skip" leaves it out and logs how many were.
"""

import csv
import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moekit.data.corruption import Corpus, Document
from moekit.errors import unknown

log = logging.getLogger("moekit")
Schema = Mapping[str, type | tuple[type, ...]]
TEXT_DOMAINS = {  # folder of the mirror: domain label
    "books": "books",
    "openstax": "textbooks",
    "factbook": "factbook",
    "speeches": "speeches",
}


def data_dir(explicit: str | Path | None = None) -> Path:
    """The data folder: the argument, else the environment variable MOEKIT_DATA.

    Raises:
      FileNotFoundError: neither is given, or there is no such folder.
    """
    path = explicit or os.environ.get("MOEKIT_DATA")
    if not path:
        raise FileNotFoundError(
            "no data folder: set the environment variable MOEKIT_DATA, pass data_dir=, or use "
            '"builtin", which needs no files'
        )
    if not Path(path).is_dir():
        raise FileNotFoundError(f"data folder {path} does not exist: correct MOEKIT_DATA/data_dir")
    return Path(path)


class BadRow(ValueError):
    """A row that does not follow its schema."""


def _check(row: Any, schema: Schema) -> dict:
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object with {', '.join(schema)}, found {type(row).__name__}")
    for name, kind in schema.items():
        if name not in row:
            raise BadRow(f"field {name!r} is missing")
        value = row[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BadRow(f"field {name!r} is {type(value).__name__}: {str(value)[:60]!r}")
    return dict(row)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}:{number + 1}: the file is truncated or not gzip ({error}); copy it again"
        ) from None


def _lines_of(path: Path) -> Iterator[tuple[int, Any]]:
    """Numbered raw rows of a .jsonl(.gz), .tsv, .csv or .json file, each still to be parsed."""
    name = path.name
    if name.endswith((".jsonl", ".jsonl.gz")):
        yield from ((n, lambda line=line: json.loads(line)) for n, line in _json_lines(path))
    elif name.endswith(".tsv"):
        with path.open(encoding="utf-8", newline="") as file:
            for n, line in enumerate(file, 1):
                cells = [cell.replace("\\n", "\n") for cell in line.rstrip("\r\n").split("\t")]
                yield n, lambda cells=cells: cells
    elif name.endswith(".csv"):
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                yield reader.line_num, lambda cells=cells: cells
    else:
        raise ValueError(f"{path}: unknown kind of file; known: .jsonl, .jsonl.gz, .tsv, .csv")


def read_rows(
    path: Path, schema: Schema, *, columns: Iterable[str] = (), on_error: str = "stop"
) -> list[dict]:
    """Rows of a file that follow a schema {field: type}.

    Args:
      columns: names for the cells of a .tsv or .csv, which have none of their own.
      on_error: "stop" raises at the first malformed row, "skip" leaves them out and logs a count.

    Raises:
      ValueError: a malformed row (naming file and line), a truncated or unreadable file.
    """
    if on_error not in ("stop", "skip"):
        raise unknown("on_error", on_error, ("stop", "skip"))
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: the data folder is incomplete")
    columns, rows, skipped = tuple(columns), [], 0
    for number, parse in _lines_of(path):
        try:
            row = parse()
            if columns:
                if len(row) != len(columns):
                    raise BadRow(f"{len(row)} columns instead of {len(columns)}")
                row = dict(zip(columns, row, strict=True))
            rows.append(_check(row, schema))
        except (BadRow, json.JSONDecodeError) as error:
            problem = "not JSON" if isinstance(error, json.JSONDecodeError) else error
            if on_error == "stop":
                raise ValueError(
                    f'{path}:{number}: {problem}; correct the row or use on_error="skip"'
                ) from None
            skipped += 1
    if skipped:
        log.warning("%s: skipped %d malformed of %d rows", path, skipped, skipped + len(rows))
    if not rows:
        raise ValueError(f"{path}: no usable rows")
    return rows


def read_json(path: Path) -> Any:
    """A whole JSON file; ValueError naming it if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def hub_rows(path: str, *, split: str = "train", name: str | None = None, **kwargs) -> Iterator:
    """Rows of a dataset of the Hugging Face hub (or of local files, with data_files=), streamed.

    FLAN's sub-mixtures lie at conceptofmind/{flan2021,t0,niv2,cot,dialog}_submix_original.

    Raises:
      ConnectionError: the hub cannot be reached.
    """
    from datasets import load_dataset

    try:
        yield from load_dataset(path, name, split=split, streaming=True, **kwargs)
    except FileNotFoundError:
        raise
    except Exception as error:  # the hub client raises many types for one cause
        raise ConnectionError(
            f"could not load {path!r} from the Hugging Face hub ({type(error).__name__}): check "
            "the name and the network, or use local files (MOEKIT_DATA) or the builtin data"
        ) from None


def read_text(folder: Path, split: str, domain: str) -> list[Document]:
    """Documents of a folder of parquet files named {split}*.parquet with a `text` column.

    Raises:
      ValueError: no `text` column, or an empty text (naming file and row).
    """
    import pyarrow
    import pyarrow.parquet as parquet

    documents = []
    for path in sorted(folder.glob(f"{split}*.parquet")):
        try:
            table = parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable parquet file ({error})") from None
        if "text" not in table.column_names:
            raise ValueError(f"{path}: no column 'text' among {table.column_names}")
        for number, row in enumerate(table.to_pylist(), 1):
            text, title = row["text"], row.get("title") or ""
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{path}: row {number} ({title!r}) has an empty text")
            documents.append(Document(text, title, domain))
    return documents


def corpus(name: str = "builtin", folder: str | Path | None = None) -> Corpus:
    """Text to pretrain on: "builtin", "mirror" (all text of the data folder), or its parts by name
    joined with commas ("books,speeches").

    Without validation files of its own, every 50th document of a part validates.
    """
    if name == "builtin":
        from moekit.data.builtin import builtin_corpus

        return builtin_corpus()
    parts = tuple(TEXT_DOMAINS) if name == "mirror" else tuple(name.split(","))
    for part in parts:
        if part not in TEXT_DOMAINS:
            raise unknown("corpus", part, ("builtin", "mirror", *TEXT_DOMAINS))
    root = data_dir(folder) / "text"
    for part in parts:
        if not (root / part).is_dir():
            raise FileNotFoundError(f"no folder {root / part}: the data folder has no {part}")

    def load(split: str) -> list[Document]:
        documents = []
        for part in parts:
            own = any((root / part).glob("valid*.parquet"))
            if own or split == "train":
                found = read_text(root / part, split, TEXT_DOMAINS[part])
            else:
                found = read_text(root / part, "train", TEXT_DOMAINS[part])
            if not own:
                found = [d for i, d in enumerate(found) if (i % 50 == 0) == (split == "valid")]
            documents += found
        return documents

    return Corpus(name, load)
