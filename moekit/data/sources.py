"""Rows of data files, checked one by one, and text corpora.

Every row is checked against its schema. What is wrong with one is said with file and row:
`on_error` "stop" raises it, "skip" leaves the row out and logs how many were, a function gets it.
"""

import csv
import gzip
import hashlib
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moekit.data.text import Corpus, Document
from moekit.errors import unknown

log = logging.getLogger("moekit")
# {field: type}; [str] is a list of texts; a name with ? may be missing or null
Schema = Mapping[str, Any]
OnError = str | Callable[[Path, int, str], None]  # "stop", "skip", or told of file, row, problem
KINDS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv", ".tsv")
TEXT_DOMAINS = {  # folder of the mirror: domain label
    "books": "books",
    "openstax": "textbooks",
    "factbook": "factbook",
    "speeches": "speeches",
}
csv.field_size_limit(1 << 30)  # rows may be long; the default refuses 128 KiB


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


class BadFile(ValueError):
    """A file that cannot be read further than some row."""

    def __init__(self, number: int, problem: str):
        self.number = number
        super().__init__(problem)


def is_kind(path: Path) -> bool:
    """Whether a file is of a kind that `scan` reads."""
    return path.name.endswith(KINDS) and not path.name.startswith(".")


def _check(row: Any, schema: Schema) -> dict:
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object with {', '.join(schema)}, found {type(row).__name__}")
    for key, kind in schema.items():
        name = key.removesuffix("?")
        value = row.get(name)
        if value is None and name != key:
            continue
        if name not in row:
            raise BadRow(f"field {name!r} is missing")
        if not _is(value, kind):
            raise BadRow(f"field {name!r} is {type(value).__name__}: {str(value)[:60]!r}")
    return dict(row)


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(isinstance(each, kind[0]) for each in value)
    endless = isinstance(value, float) and not math.isfinite(value)
    return isinstance(value, kind) and not isinstance(value, bool) and not endless


def _constant(name: str):
    raise ValueError(f"{name} is not JSON")


_DECODE = json.JSONDecoder(parse_constant=_constant).decode


def _parse(text: str) -> Any:
    """JSON text, refused if it holds what UTF-8 cannot write (from broken bytes or escapes)."""
    try:
        text.encode()
        value = _DECODE(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRow("not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadRow("not JSON") from None
    return value


def _open(path: Path):
    opener = gzip.open if path.suffix == ".gz" else open
    # broken bytes become surrogates, so that their row can be named and the next one read
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, _parse(line)
                    except BadRow as problem:
                        yield number, problem
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"the file is truncated or not gzip ({error}); copy it again"
        raise BadFile(number + 1, problem) from None


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON list, or of the list in a task file (NIv2) or a BIG-Bench Hard one."""
    try:
        content = _whole(path)
    except BadRow as problem:
        raise BadFile(1, str(problem)) from None
    if isinstance(content, dict):
        content = next((content[key] for key in ("Instances", "examples") if key in content), None)
    if not isinstance(content, list):
        raise BadFile(1, "no list of rows, no Instances and no examples")
    yield from enumerate(content, 1)


def _cells(path: Path) -> Iterator[tuple[int, list[str] | BadRow]]:
    with _open(path) as file:
        if path.suffix == ".tsv":
            for number, line in enumerate(file, 1):
                cells = [cell.replace("\\n", "\n") for cell in line.rstrip("\r\n").split("\t")]
                yield number, cells
            return
        reader = csv.reader(file, strict=True)
        while True:
            try:
                cells = next(reader)
                if cells:
                    yield reader.line_num, cells
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.line_num, BadRow(f"not CSV ({error})")


def _table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
    """Rows of a .csv or .tsv; without column names the first row has them."""
    for number, cells in _cells(path):
        if not isinstance(cells, BadRow) and any(not _utf8(cell) for cell in cells):
            cells = BadRow("not UTF-8")
        if isinstance(cells, BadRow):
            yield number, cells
        elif not columns:
            columns = tuple(cells)
        elif len(cells) != len(columns):
            yield number, BadRow(f"{len(cells)} columns instead of {len(columns)}")
        else:
            yield number, dict(zip(columns, cells, strict=True))


def _utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                yield (number := number + 1), row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f"not a readable parquet file ({' '.join(str(error).split())[:200]})"
        raise BadFile(number + 1, problem) from None


def scan(path: Path, columns: Iterable[str] = ()) -> Iterator[tuple[int, Any]]:
    """Every row of a file with its number; in place of a row that cannot be read, a `BadRow`.

    Raises:
      BadFile: nothing after this can be read, or an unknown kind of file.
    """
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(path)
    if path.suffix == ".json":
        return _json(path)
    if path.suffix in (".csv", ".tsv"):
        return _table(path, tuple(columns))
    if path.suffix == ".parquet":
        return _parquet(path)
    raise ValueError(f"{path}: unknown kind of file; known: {', '.join(KINDS)}")


def read(
    path: Path,
    schema: Schema,
    make: Callable[[dict, int], Any],
    *,
    columns: Iterable[str] = (),
    on_error: OnError = "stop",
) -> Iterator[Any]:
    """make(row, number) of every row of a file that follows a schema.

    Rows with an `id` that was there already are malformed.

    Args:
      columns: names for the cells of a .tsv or .csv that has none of its own.
      on_error: "stop" raises at the first malformed row, "skip" leaves them out and logs a count;
        a function is told of each.

    Raises:
      ValueError: a malformed row (naming file and row), a truncated or unreadable file.
    """
    check_policy(on_error)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: the data folder is incomplete")
    good, skipped, ids = 0, 0, set()
    try:
        for number, row in scan(path, columns):
            try:
                if isinstance(row, BadRow):
                    raise row
                row = _check(row, schema)
                if (identity := row.get("id")) is not None:
                    if (key := str(identity)) in ids:
                        raise BadRow(f"id {key[:60]!r} was there already")
                    ids.add(key)
                made = make(row, number)
            except ValueError as problem:
                if on_error == "stop":
                    hint = 'correct the row or use on_error="skip"'
                    raise ValueError(f"{path}:{number}: {problem}; {hint}") from None
                if callable(on_error):
                    on_error(path, number, str(problem))
                skipped += 1
                continue
            good += 1
            yield made
    except BadFile as problem:
        if not callable(on_error):
            raise ValueError(f"{path}:{problem.number}: {problem}") from None
        on_error(path, problem.number, str(problem))
        return
    if on_error == "skip":
        if skipped or not good:
            log.warning("%s: skipped %d malformed of %d rows", path, skipped, skipped + good)
    elif not good and not callable(on_error):
        raise ValueError(f"{path}: no usable rows")
    elif not good and not skipped:
        on_error(path, 0, "no rows")


def check_policy(on_error: OnError) -> None:
    if not callable(on_error) and on_error not in ("stop", "skip"):
        raise unknown("on_error", on_error, ("stop", "skip"))


def read_rows(path: Path, schema: Schema, **kwargs) -> list[dict]:
    """All rows of a file as they are, checked; arguments as for `read`."""
    return list(read(path, schema, lambda row, number: row, **kwargs))


def _whole(path: Path) -> Any:
    return _parse(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))


def read_json(path: Path) -> Any:
    """A whole JSON file; ValueError naming it if it is not JSON."""
    try:
        return _whole(path)
    except BadRow as problem:
        raise ValueError(f"{path}: {problem}") from None


def read_manifest(path: Path) -> dict[str, dict]:
    """The entries {path, bytes, sha256, ..} of a manifest by path; ValueError if it has others."""
    entries = read_json(path)
    wanted = {"path": str, "bytes": int, "sha256": str, "rows?": int}
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of files with {', '.join(wanted)}")
    try:
        return {entry["path"]: entry for entry in (_check(entry, wanted) for entry in entries)}
    except BadRow as problem:
        raise ValueError(f"{path}: {problem}") from None


def rank(fields: Mapping[str, str]) -> float:
    """A number between 0 and 1 that depends on the question alone, in whichever file it stands:
    it decides which rows validate."""
    text = fields.get("question") or fields.get("input") or "".join(fields.values())
    sha = hashlib.sha256(re.sub(r"\W+", "", text.lower()).encode())
    return int.from_bytes(sha.digest()[:8], "big") / 2**64


def files_digest(paths: Iterable[Path]) -> str:
    """Twelve hexadecimal digits that name the content of files."""
    sha = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:12]


def read_text(folder: Path, split: str, domain: str, on_error: OnError = "stop") -> list[Document]:
    """Documents of a folder of parquet files named {split}*.parquet with a `text` column.

    Raises:
      ValueError: no `text` column, or an empty text (naming file and row).
    """

    def make(row: dict, number: int) -> Document:
        return Document(row["text"], str(row.get("title") or ""), domain)

    return [
        document
        for path in sorted(folder.glob(f"{split}*.parquet"))
        for document in read(path, {"text": str}, make, on_error=on_error)
    ]


def corpus(name: str = "builtin", folder: str | Path | None = None) -> Corpus:
    """Text to pretrain on: "builtin", "mirror" (all text of the data folder), or its parts by name
    joined with commas ("books,speeches").

    Without validation files of its own, every 50th document of a part validates.
    """
    if name == "builtin":
        from moekit.data.builtin.tasks import builtin_corpus

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
