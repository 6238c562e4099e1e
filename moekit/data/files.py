"""Reading the rows of data files one by one, within stated limits.

A row that cannot be used is reported with file and row number: `on_error` "stop" raises a
ValueError, "skip" leaves the row out and logs how many were, and a function is called with file,
row and problem.
"""

import csv
import functools
import gzip
import hashlib
import io
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from moekit.data.paths import file_problem
from moekit.errors import unknown

log = logging.getLogger("moekit")
# {field: type}; [str] is a list of texts; a name with ? may be missing or null
Schema = Mapping[str, Any]
OnError = str | Callable[[Path, int, str], None]
KINDS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv", ".tsv")
MAX_ROW = 32 << 20  # characters of one line
MAX_FILE = 256 << 20  # bytes of a .json file, which is read whole
MAX_ROW_GROUP = 4 << 30  # bytes of a parquet row group when it is unpacked
csv.field_size_limit(MAX_ROW)


class BadRow(ValueError):
    """A row that cannot be used."""


class BadFile(ValueError):
    """A file that cannot be read beyond some row."""

    def __init__(self, row: int, problem: str):
        self.row = row
        super().__init__(problem)

    def error(self, name: str | Path) -> ValueError:
        """The error of a file of that name; row 0 is the file as a whole."""
        where = f"{name}:{self.row}" if self.row else name
        return ValueError(f"{where}: {self}")


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


def is_data_file(path: Path) -> bool:
    """Whether a file is of a kind that `scan` reads."""
    return path.name.endswith(KINDS) and not path.name.startswith(".")


def check_on_error(on_error: OnError) -> None:
    """ValueError for an unknown error policy."""
    if not callable(on_error) and on_error not in ("stop", "skip"):
        raise unknown("on_error", on_error, ("stop", "skip"))


def read(
    path: Path,
    schema: Schema,
    make: Callable[[dict, int], Any],
    *,
    columns: Iterable[str] = (),
    on_error: OnError = "stop",
) -> Iterator[Any]:
    """make(row, number) of every row of a file that follows a schema; rows are numbered from 1.

    Rows whose `id` occurred before are malformed.

    Args:
      columns: names for the cells of a .tsv or .csv file without a header.
      on_error: "stop" raises at the first malformed row, "skip" leaves them out and logs a count;
        a function is called with file, row and problem.

    Raises:
      ValueError: a malformed row (naming file and row), a truncated or unreadable file.
    """
    check_on_error(on_error)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"no file {path}: the data folder is incomplete")
    usable, skipped = 0, 0
    ids: set[str] = set()
    try:
        for number, row in scan(path, columns):
            try:
                made = make(_checked(row, schema, ids), number)
            except ValueError as problem:
                _report(path, number, problem, on_error)
                skipped += 1
                continue
            usable += 1
            yield made
    except BadFile as problem:
        if not callable(on_error):
            raise problem.error(path) from None
        on_error(path, problem.row, str(problem))
        return
    _report_total(path, usable, skipped, on_error)


def _report(path: Path, number: int, problem: ValueError, on_error: OnError) -> None:
    if on_error == "stop":
        hint = 'correct the row or use on_error="skip"'
        raise ValueError(f"{path}:{number}: {problem}; {hint}") from None
    if callable(on_error):
        on_error(path, number, str(problem))


def _report_total(path: Path, usable: int, skipped: int, on_error: OnError) -> None:
    if on_error == "skip":
        if skipped or not usable:
            log.warning("%s: skipped %d malformed of %d rows", path, skipped, skipped + usable)
    elif not usable and not callable(on_error):
        raise ValueError(f"{path}: no usable rows")
    elif not usable and not skipped:
        on_error(path, 0, "no rows")


def _checked(row: Any, schema: Schema, ids: set[str]) -> dict:
    """The row if it follows the schema and its id is new; BadRow otherwise."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        expected = f"with {', '.join(schema)}" if schema else "of columns"
        raise BadRow(f"expected an object {expected}, found {type(row).__name__}")
    for key, kind in schema.items():
        name = key.removesuffix("?")
        value = row.get(name)
        if value is None and name != key:
            continue
        if name not in row:
            raise BadRow(f"field {name!r} is missing")
        if not _is_of_kind(value, kind):
            raise BadRow(f"field {name!r} is {type(value).__name__}: {str(value)[:60]!r}")
    if row.get("id") is not None:
        identity = str(row["id"])
        if identity in ids:
            raise BadRow(f"id {identity[:60]!r} occurred before")
        ids.add(identity)
    return dict(row)


def _is_of_kind(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(isinstance(each, kind[0]) for each in value)
    if isinstance(value, bool):
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, kind)


def read_rows(
    path: Path, schema: Schema, *, columns: Iterable[str] = (), on_error: OnError = "stop"
) -> list[dict]:
    """All rows of a file, checked and otherwise as they are; arguments as for `read`."""
    return list(read(path, schema, _as_it_is, columns=columns, on_error=on_error))


def _as_it_is(row: dict, number: int) -> dict:
    return row


def scan(path: Path, columns: Iterable[str] = ()) -> Iterator[tuple[int, Any]]:
    """Every row of a file with its number; in place of a row that cannot be read, a `BadRow`.

    Raises:
      BadFile: it is no file, nothing after this can be read, a limit is exceeded, or the file
        changed while it was read.
      ValueError: an unknown kind of file.
    """
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = _json_lines(path)
    elif path.suffix == ".json":
        rows = _json_list(path)
    elif path.suffix in (".csv", ".tsv"):
        rows = _table_rows(path, tuple(columns))
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        raise ValueError(f"{path}: unknown kind of file; known: {', '.join(KINDS)}")
    return _unchanged(path, rows)


def _unchanged(path: Path, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """The rows of a file, if nothing writes to it meanwhile."""
    number = 0
    problem = file_problem(path)
    if problem:
        raise BadFile(number, problem)
    before = path.stat()
    for number, row in rows:
        yield number, row
    if file_problem(path):
        raise BadFile(number, "the file vanished while it was read")
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise BadFile(number, "the file changed while it was read: wait until it is complete")


def _open(path: Path) -> io.TextIOWrapper:
    opener = gzip.open if path.suffix == ".gz" else open
    # broken bytes become surrogates, so that their row can be named and the next one read
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a file, none of them longer than MAX_ROW."""
    number = 0
    with _open(path) as file:
        next_line = functools.partial(file.readline, MAX_ROW + 1)
        try:
            for number, line in enumerate(iter(next_line, ""), 1):
                if len(line) > MAX_ROW:
                    raise BadFile(number, f"the row is longer than {MAX_ROW:,} characters")
                yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            problem = f"the file is truncated or not gzip ({error}); copy it again"
            raise BadFile(number + 1, problem) from None


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        if line.strip():
            try:
                yield number, _parse_json(line)
            except BadRow as problem:
                yield number, problem


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODE = json.JSONDecoder(parse_constant=_refuse_constant).decode


def _parse_json(text: str) -> Any:
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


def _json_file(path: Path) -> Any:
    problem = file_problem(path)
    if problem:
        raise BadRow(problem)
    if path.stat().st_size > MAX_FILE:
        raise BadRow(f"the file is larger than {MAX_FILE:,} bytes")
    return _parse_json(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON list, or of the list in a task file (NIv2) or a BIG-Bench Hard one."""
    try:
        content = _json_file(path)
    except BadRow as problem:
        raise BadFile(1, str(problem)) from None
    if isinstance(content, dict):
        content = content.get("Instances", content.get("examples"))
    if not isinstance(content, list):
        raise BadFile(1, "no list of rows, no Instances and no examples")
    yield from enumerate(content, 1)


def _table_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
    """Rows of a .csv or .tsv; without column names the first row has them.

    A .tsv with such a header may quote cells, as pandas writes them; FLAN's have no quotes.
    """
    if path.suffix == ".tsv" and columns:
        numbered_cells = _tsv_cells(path)
    else:
        numbered_cells = _csv_cells(path, "\t" if path.suffix == ".tsv" else ",")
    for number, cells in numbered_cells:
        if isinstance(cells, BadRow):
            yield number, cells
        elif any(not _is_utf8(cell) for cell in cells):
            yield number, BadRow("not UTF-8")
        elif not columns:
            columns = tuple(cells)
            twice = sorted({name for name in columns if columns.count(name) > 1})
            if twice:
                raise BadFile(number, f"column {twice[0]!r} occurs twice: rename one of them")
        elif len(cells) != len(columns):
            yield number, BadRow(f"{len(cells)} columns instead of {len(columns)}")
        else:
            yield number, dict(zip(columns, cells, strict=True))


def _tsv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in _lines(path):
        cells = line.rstrip("\r\n").split("\t")
        yield number, [cell.replace("\\n", "\n") for cell in cells]


def _csv_cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str] | BadRow]]:
    lines = (line for _, line in _lines(path))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, BadRow(f"not CSV ({error})")
            continue
        if cells:
            yield reader.line_num, cells


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        file = parquet.ParquetFile(path)
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).total_byte_size
            if size > MAX_ROW_GROUP:
                raise BadFile(1, f"row group {group} unpacks to {size:,} bytes")
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f"not a readable parquet file ({' '.join(str(error).split())[:200]})"
        raise BadFile(number + 1, problem) from None


def read_json(path: Path) -> Any:
    """A whole JSON file; ValueError naming it if it is not JSON or larger than MAX_FILE."""
    try:
        return _json_file(path)
    except BadRow as problem:
        raise ValueError(f"{path}: {problem}") from None


def read_manifest(path: Path) -> dict[str, dict]:
    """The entries {path, bytes, sha256, ..} of a manifest by path.

    Raises:
      ValueError: not a list of such entries, or a path that leads out of the data folder.
    """
    entries = read_json(path)
    schema = {"path": str, "bytes": int, "sha256": str, "rows?": int}
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of files with {', '.join(schema)}")
    found = {}
    for entry in entries:
        try:
            entry = _checked(entry, schema, set())
        except BadRow as problem:
            raise ValueError(f"{path}: {problem}") from None
        name = PurePosixPath(entry["path"])
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"{path}: {entry['path']!r} leads out of the data folder")
        found[entry["path"]] = entry
    return found


@functools.lru_cache(maxsize=4)
def _rows_and_bytes(manifest: Path, stamp: int) -> dict[str, tuple[int, int]]:
    entries = read_manifest(manifest).items()
    return {path: (entry["rows"], entry["bytes"]) for path, entry in entries if entry.get("rows")}


def rows_in_manifest(root: Path, path: Path) -> int | None:
    """Rows of a file, where the folder's manifest.json lists a file of its size."""
    manifest = root / "manifest.json"
    if not manifest.is_file():
        return None
    listed = _rows_and_bytes(manifest, manifest.stat().st_mtime_ns)
    rows, size = listed.get(str(path.relative_to(root)), (None, 0))
    return rows if size == path.stat().st_size else None


def files_digest(paths: Iterable[Path]) -> str:
    """Twelve hexadecimal digits that name the content of files."""
    sha = hashlib.sha256()
    for path in sorted(paths):
        sha.update(bytes.fromhex(sha256(path)))
    return sha.hexdigest()[:12]


def sha256(path: Path) -> str:
    """The SHA-256 checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
