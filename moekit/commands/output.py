"""How every verb prints its result: as text for a terminal, or as JSON."""

import json as json_format
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from moekit.table import Table

AsJson = Annotated[bool, tyro.conf.arg(help="Print the result as JSON.")]
# control characters, formatting (bidirectional marks), lone surrogates, line separators
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def escape(text: str) -> str:
    """Escape what a terminal would interpret or reorder, except newlines and tabs.

    Rows of a data set may hold ANSI escape sequences and bidirectional marks.
    """
    shown = []
    for character in text:
        if unicodedata.category(character) in _ESCAPED and character not in "\n\t":
            character = character.encode("unicode_escape").decode()
        shown.append(character)
    return "".join(shown)


class EscapedMessages(logging.Handler):
    """Writes messages to stderr with what a terminal would interpret escaped."""

    def emit(self, record: logging.LogRecord) -> None:
        print(escape(self.format(record)), file=sys.stderr)


def print_messages() -> None:
    """Write the messages of all libraries to stderr, escaped, without repeating our own errors.

    This replaces logging's handler of last resort, so an application's own handlers stay.
    """
    if isinstance(logging.lastResort, EscapedMessages):
        return
    logging.lastResort = EscapedMessages(logging.WARNING)
    # orbax drops the writes that are left when one of them fails
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if not _is_of_another_array(unraisable):
            report(unraisable)

    sys.unraisablehook = report_others


def _is_of_another_array(unraisable: Any) -> bool:
    """Whether orbax was reading or writing an array when it gave up because of another one."""
    if str(unraisable.exc_value) == "Event loop is closed":  # of a thread of tensorstore
        return True
    code = getattr(unraisable.object, "cr_code", None)
    return code is not None and "orbax" in code.co_filename


def prepare_file(path: Path | None) -> None:
    """Create the folder of a file that is written at the end of long work.

    Raises:
      OSError: the file cannot be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}: choose another folder") from None
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: the folder is read-only: choose another one")


def print_result(result: object, text: str, json: bool) -> None:
    """Print a result as text, or as one line of JSON."""
    print(json_format.dumps(result, default=str) if json else escape(text))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as aligned columns under their names."""
    cells = [[str(value) for value in row.values()] for row in rows]
    return str(Table(list(rows[0]), cells, num_left=0))
