"""Tables of text cells: aligned in a terminal, HTML in a notebook."""

import dataclasses
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows of text cells under headings.

    Args:
      headings: one for each column; none without a row of headings.
      title: lines above the table.
      notes: lines below it.
      num_left: number of columns, from the left, that are aligned left; the others right.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: Sequence[str] = ()
    notes: Sequence[str] = ()
    num_left: int = 1

    def __str__(self) -> str:
        lines = [self.headings, *self.rows] if self.headings else self.rows
        widths = []
        for column in zip(*lines, strict=True):
            width = max(len(cell) for cell in column)
            widths.append(width)
        aligned = [self._aligned(cells, widths) for cells in lines]
        return "\n".join([*self.title, *aligned, *self.notes])

    def _aligned(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        padded = []
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            is_left = column < self.num_left
            padded.append(cell.ljust(width) if is_left else cell.rjust(width))
        return "  ".join(padded).rstrip()

    def _repr_html_(self) -> str:
        lines = [f"<div>{html.escape(line)}</div>" for line in self.title]
        lines.append("<table>")
        if self.headings:
            lines.append(self._html_row("th", self.headings))
        lines += [self._html_row("td", cells) for cells in self.rows]
        lines.append("</table>")
        lines += [f"<div>{html.escape(line)}</div>" for line in self.notes]
        return "\n".join(lines)

    def _html_row(self, tag: str, cells: Sequence[str]) -> str:
        shown = []
        for column, cell in enumerate(cells):
            side = "left" if column < self.num_left else "right"
            style = f"text-align:{side};padding:0 0.6em"
            shown.append(f'<{tag} style="{style}">{html.escape(cell)}</{tag}>')
        return f"<tr>{''.join(shown)}</tr>"


def fields_table(config: Any) -> Table:
    """The fields of a dataclass and their values; the default where a value differs from it."""
    rows = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        has_default = field.default is not dataclasses.MISSING
        is_changed = has_default and value != field.default
        rows.append((field.name, str(value), str(field.default) if is_changed else ""))
    headings = ("field", "value", "default, if different")
    return Table(headings, rows, title=[type(config).__name__], num_left=3)
