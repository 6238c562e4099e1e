"""The rows of a user's data, whatever holds them: files, lists, DataFrames, `datasets` objects."""

import functools
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moekit.data.files import KINDS, BadFile, BadRow, is_data_file, scan
from moekit.data.paths import named_files, require_file

log = logging.getLogger("moekit")
_SPLIT_NAME = re.compile(
    "(?:(?P<train>train|training)|(?P<valid>valid|validation|val|dev)|(?P<test>test|testing))"
    "(?![a-z])",
    re.IGNORECASE,
)
SPLITS = ("train", "valid", "test")
TEXT_KINDS = (".txt", ".md")
_FRAME_ROWS = 1000  # rows of a DataFrame that are converted at once
_MISSING_TYPES = ("NAType", "NaTType")  # of pandas, which need not be installed
ACCEPTED = (
    "a list of dicts, a datasets.Dataset, a DataFrame, a path, or a dict of these by split "
    '({"train": .., "test": ..})'
)


@dataclass(frozen=True)
class RowSource:
    """The rows of one file or object.

    Args:
      name: what error messages call it.
      numbered_rows: the rows with their numbers, from the first one at every call. A `BadRow` is
        in place of a row that cannot be read.
      labels: the names of the classes of a column, where the data has them.
    """

    name: str
    numbered_rows: Callable[[], Iterator[tuple[int, Any]]]
    labels: Mapping[str, list[str]] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[int, dict | BadRow]]:
        """Numbered rows of plain Python values, or what is wrong with them.

        Raises:
          ValueError: nothing can be read after some row.
        """
        try:
            for number, row in self.numbered_rows():
                if isinstance(row, Mapping):
                    row = {str(name): plain(value) for name, value in row.items()}
                elif not isinstance(row, BadRow):
                    kind = type(row).__name__
                    row = BadRow(f"expected a dict of columns, found {kind} (texts: mk.corpus)")
                yield number, row
        except BadFile as problem:
            raise problem.error(self.name) from None


@dataclass(frozen=True)
class OwnData:
    """Rows by split, "train", "valid" or "test"; `name` is that of the file or folder."""

    name: str
    splits: Mapping[str, Sequence[RowSource]]

    def head(self, count: int) -> list[dict]:
        """The first usable rows, of the training split if there is one.

        Raises:
          ValueError: there are no rows, or none of the first ones can be used.
        """
        problem = ""
        found: list[dict] = []
        for source in self.sources:
            for number, row in itertools.islice(source.rows(), count - len(found)):
                if isinstance(row, dict):
                    found.append(row)
                else:
                    problem = problem or f"{source.name}:{number}: {row}"
        if not found:
            raise ValueError(problem or f"{self.sources[0].name} is empty: it has no rows")
        return found

    @property
    def sources(self) -> Sequence[RowSource]:
        """The sources of the training rows, or of those of another split if there are none."""
        return next(iter(self.splits.values()))

    @property
    def labels(self) -> Mapping[str, list[str]]:
        """The names of the classes of columns, where the data has them."""
        return self.sources[0].labels


def open_data(data: Any) -> OwnData:
    """The rows of a path, a list of dicts, a DataFrame, a data set, or of several by split.

    Raises:
      FileNotFoundError: no such file or folder.
      ValueError: an unknown kind of data or file, or a folder without data files.
    """
    if isinstance(data, str | Path):
        path = Path(data).expanduser()
        return OwnData(path_name(path), _path_splits(path))
    if not isinstance(data, Mapping):
        return OwnData("own", {"train": [_object_rows(data, "rows")]})
    found: dict[str, list[RowSource]] = {}
    for key, rows in data.items():
        split = split_of([str(key)])
        if split:
            found.setdefault(split, []).append(_object_rows(rows, f"rows of {key!r}"))
        else:
            log.warning("%r is left out: it is not named like a split (train, valid, test)", key)
    if not found:
        raise ValueError(f"a dict without train, valid or test: give {ACCEPTED}")
    return OwnData("own", {split: found[split] for split in SPLITS if split in found})


def is_path(name: str | Path) -> bool:
    """Whether a text is a path: it exists, ends like a data file, or is one word with a slash."""
    if isinstance(name, Path):
        return True
    has_ending = name.lower().endswith((*KINDS, *TEXT_KINDS))
    is_word_with_slash = "/" in name and not re.search(r"\s", name)
    return has_ending or is_word_with_slash or os.path.exists(name)


def path_name(path: Path) -> str:
    """The name of a file or folder without its ending."""
    kinds = [kind for kind in KINDS if path.name.endswith(kind)]
    name = os.path.basename(os.path.realpath(path))
    return name.removesuffix(max(kinds, key=len, default=path.suffix))


def split_of(names: Iterable[str]) -> str:
    """The split that the first of these names begins with (dev, train-00000.parquet), or ""."""
    for name in names:
        match = _SPLIT_NAME.match(name)
        if match:
            return match.lastgroup
    return ""


def files_by_split(
    folder: Path, is_wanted: Callable[[Path], bool] = is_data_file
) -> dict[str, list[Path]]:
    """The files of a folder and its subfolders by split, all "train" where no name is a split's.

    Raises:
      OSError, ValueError: something is named like a wanted file, but cannot be read as one.
    """
    found: dict[str, list[Path]] = {}
    for path in named_files(folder, is_wanted):
        require_file(path)
        parts = path.relative_to(folder).parts
        found.setdefault(split_of(parts), []).append(path)
    others = found.pop("", [])
    if others and not found:
        return {"train": others}
    if others:
        log.warning("%s: %s left out, not of a split", folder, ", ".join(map(str, others)))
    return {split: found[split] for split in SPLITS if split in found}


def _path_splits(path: Path) -> dict[str, list[RowSource]]:
    if not os.path.lexists(path):
        raise FileNotFoundError(f"no file or folder {path}: correct the path")
    if not path.is_dir():
        require_file(path)
        if not is_data_file(path):
            raise ValueError(f"{path}: unknown kind of file; known: {', '.join(KINDS)}")
        return {"train": [file_rows(path)]}
    files = files_by_split(path)
    if not files:
        raise ValueError(f"{path} holds no data files; known kinds: {', '.join(KINDS)}")
    return {split: [file_rows(each) for each in paths] for split, paths in files.items()}


def file_rows(path: Path) -> RowSource:
    return RowSource(str(path), functools.partial(scan, path))


def _object_rows(data: Any, name: str) -> RowSource:
    """The rows of a list, a DataFrame or a data set."""
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")
    if pandas and isinstance(data, pandas.DataFrame):
        return RowSource(name, functools.partial(_frame_rows, data.convert_dtypes()))
    if datasets and isinstance(data, datasets.Dataset | datasets.IterableDataset):
        features = data.features or {}
        class_label = datasets.ClassLabel
        labels = {
            column: kind.names for column, kind in features.items() if isinstance(kind, class_label)
        }
        plain_rows = data.with_format(None)
        return RowSource(name, functools.partial(enumerate, plain_rows, 1), labels)
    if isinstance(data, list | tuple):
        return RowSource(name, functools.partial(enumerate, data, 1))
    raise ValueError(f"{name} are {type(data).__name__}: give {ACCEPTED}")


def _frame_rows(frame: Any) -> Iterator[tuple[int, dict]]:
    """The rows of a DataFrame."""
    for start in range(0, len(frame), _FRAME_ROWS):
        records = frame.iloc[start : start + _FRAME_ROWS].to_dict("records")
        yield from enumerate(records, start + 1)


def plain(value: Any) -> Any:
    """A value as plain Python: numpy's and pandas' converted, every kind of missing value None."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    is_nan = isinstance(value, float) and value != value
    if is_nan or type(value).__name__ in _MISSING_TYPES:
        return None
    return value
