"""How every verb prints its result: as text for a terminal, or as JSON."""

import json as json_format
import unicodedata
from collections.abc import Mapping, Sequence
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


def print_result(result: object, text: str, json: bool) -> None:
    """Print a result as text, or as one line of JSON."""
    print(json_format.dumps(result, default=str) if json else escape(text))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as aligned columns under their names."""
    cells = [[str(value) for value in row.values()] for row in rows]
    return str(Table(list(rows[0]), cells, num_left=0))
