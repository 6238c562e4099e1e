"""Texts with every token in the colour of its expert: HTML for notebooks, a figure for files.

Y MoE layers of a stack, N tokens of an example, K choices per token.
"""

import html
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy import ndarray

from moekit.analysis.plots.style import save_figure
from moekit.analysis.trace import RouterTrace
from moekit.data.tokenizer import EOS, Tokenizer

# Okabe and Ito's colours, which colour-blind readers can tell apart
EXPERT_COLORS = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#999999",
)
PALEST, DARKEST = 0.2, 0.85  # share of the expert's colour at weights 0 and 1
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories of characters that cannot be seen
COLUMNS = 100  # characters in a line of the figure
LINE_HEIGHT = 0.24  # inches
CHARACTER_WIDTH = 0.085


@dataclass(frozen=True)
class TokenLine:
    """The tokens of one example in one MoE layer.

    Args:
      title: what the line shows.
      texts: of the tokens; together they are the example's text.
      expert: chosen experts, the heaviest choice first; -1 where there is none.
      weight: their combine weights.
      kept: whether a choice was dispatched, not dropped.
    """

    title: str
    texts: tuple[str, ...]
    expert: Int[ndarray, "N K"]
    weight: Float[ndarray, "N K"]
    kept: Bool[ndarray, "N K"]

    def is_dropped(self, token: int) -> bool:
        """Whether none of a token's choices was dispatched."""
        return not self.kept[token].any()

    def description(self, token: int) -> str:
        """The experts of a token with their weights."""
        parts = []
        for expert, weight, kept in zip(
            self.expert[token], self.weight[token], self.kept[token], strict=True
        ):
            if expert >= 0:
                parts.append(f"expert {expert}: {weight:.2f}" if kept else f"expert {expert}: full")
        return ", ".join(parts) or "no expert"


@dataclass(frozen=True)
class TokenView:
    """Texts whose tokens have the colour of their expert, as `plot_tokens` returns them.

    A notebook shows it; `figure` draws it, `save` writes it to a file.
    """

    lines: tuple[TokenLine, ...]
    num_experts: int

    def __repr__(self) -> str:
        titles = "; ".join(line.title for line in self.lines)
        return f"TokenView({titles})"

    def _repr_html_(self) -> str:
        blocks = [self._legend()]
        for line in self.lines:
            tokens = "".join(self._token(line, index) for index in range(len(line.texts)))
            blocks.append(f"<div><b>{html.escape(line.title)}</b></div>")
            blocks.append(
                '<div style="line-height:1.9;margin-bottom:0.8em;overflow-wrap:anywhere;'
                f'font-family:monospace">{tokens}</div>'
            )
        return "\n".join(blocks)

    def _legend(self) -> str:
        shown = []
        for expert in range(self.num_experts):
            color = _mixed(_color(expert, self.num_experts), DARKEST)
            style = "display:inline-block;color:black;padding:0 0.4em;margin-right:0.3em;"
            style += f"background:{color}"
            shown.append(f'<span style="{style}">expert {expert}</span>')
        note = "paler: smaller weight; struck out: dropped"
        return f'<div style="line-height:1.9">{"".join(shown)} {note}</div>'

    def _token(self, line: TokenLine, index: int) -> str:
        """A token; what the text contains is never markup."""
        text = html.escape(visible(line.texts[index])).replace("\n", "&#x23CE;<br>")
        title = html.escape(line.description(index), quote=True)
        style = "white-space:pre-wrap;color:black;border-radius:2px;"
        style += f"background:{self._background(line, index)}"
        if line.is_dropped(index):
            style += ";text-decoration:line-through"
        return f'<span title="{title}" style="{style}">{text}</span>'

    def _background(self, line: TokenLine, index: int) -> str:
        expert, weight = int(line.expert[index, 0]), float(line.weight[index, 0])
        if expert < 0 or line.is_dropped(index):
            return "#ffffff"
        share = PALEST + (DARKEST - PALEST) * min(weight, 1.0)
        return _mixed(_color(expert, self.num_experts), share)

    def figure(self) -> Figure:
        """The same as a matplotlib figure."""
        placed = [_wrap(line.texts) for line in self.lines]
        num_rows = sum(2 + rows[-1][0] for rows in placed) + 1
        size = (CHARACTER_WIDTH * COLUMNS + 0.4, LINE_HEIGHT * (num_rows + 1))
        figure, axes = plt.subplots(figsize=size)
        figure.subplots_adjust(left=0.02, right=0.98, top=0.99, bottom=0.01)
        axes.set_xlim(0, COLUMNS)
        axes.set_ylim(num_rows + 0.5, -0.5)
        axes.axis("off")
        self._draw_legend(axes)
        top = 1
        for line, rows in zip(self.lines, placed, strict=True):
            axes.text(0, top, line.title, fontsize=9, weight="bold", va="center", parse_math=False)
            for index, (row, column) in enumerate(rows):
                self._draw_token(axes, line, index, top + 1 + row, column)
            top += 2 + rows[-1][0]
        return figure

    def _draw_legend(self, axes: Axes) -> None:
        width = COLUMNS / max(self.num_experts, 8)
        for expert in range(self.num_experts):
            color = _mixed(_color(expert, self.num_experts), DARKEST)
            box = {"facecolor": color, "edgecolor": "none", "pad": 2}
            axes.text(expert * width, 0, f"expert {expert}", fontsize=8, va="center", bbox=box)

    def _draw_token(self, axes: Axes, line: TokenLine, index: int, row: int, column: int) -> None:
        text = _in_figure(line.texts[index])
        axes.add_patch(
            plt.Rectangle(
                (column, row - 0.42),
                len(text),
                0.84,
                facecolor=self._background(line, index),
                edgecolor="none",
            )
        )
        for offset, character in enumerate(text):
            axes.text(
                column + offset + 0.5,
                row,
                character,
                fontsize=8,
                family="monospace",
                ha="center",
                va="center",
                parse_math=False,
            )
        if line.is_dropped(index):
            axes.plot([column, column + len(text)], [row, row], color="black", linewidth=0.8)

    def save(self, path: str | Path) -> Path:
        """Write a page (.html) or a figure (.png, .svg)."""
        path = Path(path)
        if path.suffix != ".html":
            return save_figure(self.figure(), path)
        path.parent.mkdir(parents=True, exist_ok=True)
        head = '<!DOCTYPE html><meta charset="utf-8"><title>Tokens and experts</title>'
        width = '<meta name="viewport" content="width=device-width">'
        path.write_text(f"{head}{width}\n<body>\n{self._repr_html_()}\n</body>\n", "utf-8")
        return path


def plot_tokens(
    traces: RouterTrace | Mapping[str, RouterTrace],
    tokenizer: Tokenizer,
    *,
    examples: int | Sequence[int] = 3,
    stack: str = "encoder",
    layers: Sequence[int] | None = None,
) -> TokenView:
    """Texts with every token in the colour of its expert.

    The shade is the combine weight, dropped tokens are struck out, and the mouse over a token shows
    its experts and weights. Several traces of the same prompts, such as {"before": .., "after": ..}
    tuning, are shown below each other.

    Args:
      tokenizer: of the traced model.
      examples: number of examples, or their indices in the trace.
      stack: "encoder" or "decoder".
      layers: indices of MoE layers, by default all of the stack.

    Raises:
      ValueError: a trace has no such stack, layer or example, or traces are of other prompts.
    """
    named = {"": traces} if isinstance(traces, RouterTrace) else dict(traces)
    if not named:
        raise ValueError("there is no trace: pass one, or a dict of several by name")
    first = next(iter(named.values()))
    indices = range(min(examples, len(first.tasks))) if isinstance(examples, int) else examples
    lines = []
    for example in indices:
        for name, trace in named.items():
            lines += _lines(name, trace, first, tokenizer, example, stack, layers)
    if not lines:
        raise ValueError("there are no examples to show: the trace is empty, or examples is")
    return TokenView(tuple(lines), max(trace.num_experts for trace in named.values()))


def _lines(
    name: str,
    trace: RouterTrace,
    first: RouterTrace,
    tokenizer: Tokenizer,
    example: int,
    stack: str,
    layers: Sequence[int] | None,
) -> list[TokenLine]:
    """The lines of an example, one for each layer."""
    if not 0 <= example < len(trace.tasks):
        raise ValueError(f"example {example}: the trace has examples 0 to {len(trace.tasks) - 1}")
    routed = trace.stack(stack)
    chosen = np.flatnonzero(routed.example == example)
    ids = routed.token[chosen].tolist()
    reference = first.stack(stack)
    if ids != reference.token[reference.example == example].tolist():
        raise ValueError(f"trace {name!r}: its example {example} has other tokens than the first's")
    if not ids:
        return []
    texts = token_texts(ids, tokenizer)
    num_layers = len(routed.expert)
    lines = []
    for layer in range(num_layers) if layers is None else layers:
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer {layer}: the {stack} has MoE layers 0 to {num_layers - 1}")
        labels = (trace.domains[example] or trace.tasks[example], name, f"MoE layer {layer}")
        weight = routed.weight[layer, chosen]
        heaviest_first = np.argsort(-weight, axis=1, kind="stable")
        lines.append(
            TokenLine(
                title=", ".join(filter(None, (f"example {example}", *labels))),
                texts=texts,
                expert=np.take_along_axis(routed.expert[layer, chosen], heaviest_first, 1),
                weight=np.take_along_axis(weight, heaviest_first, 1),
                kept=np.take_along_axis(routed.kept[layer, chosen], heaviest_first, 1),
            )
        )
    return lines


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, ...]:
    """The text that each token adds; a character of several tokens belongs to the last of them."""
    texts = []
    shown = ""
    for end in range(1, len(ids) + 1):
        if ids[end - 1] == EOS:
            texts.append("</s>")
            continue
        decoded = tokenizer.decode(ids[:end])
        if decoded.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            texts.append("")
            continue
        texts.append(decoded[len(shown) :])
        shown = decoded
    return tuple(texts)


def visible(text: str) -> str:
    """A text with the characters that cannot be seen, except newlines, written as escapes."""
    shown = []
    for character in text:
        if unicodedata.category(character) in HIDDEN and character != "\n":
            character = character.encode("unicode_escape").decode()
        shown.append(character)
    return "".join(shown)


def _in_figure(text: str) -> str:
    """A text as the figure's font can show it; a square stands for a character that it lacks."""
    font = font_manager.get_font(font_manager.findfont("monospace"))
    shown = visible(text).replace("\n", "\N{RETURN SYMBOL}")
    return "".join(
        character if font.get_char_index(ord(character)) else "\N{WHITE SQUARE}"
        for character in shown
    )


def _wrap(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Row and column of each token of a line of the figure."""
    placed = []
    row = column = 0
    for text in texts:
        length = len(_in_figure(text))
        if column + length > COLUMNS:
            row, column = row + 1, 0
        placed.append((row, column))
        column += length
    return placed


def _color(expert: int, num_experts: int) -> str | tuple[float, ...]:
    if num_experts <= len(EXPERT_COLORS):
        return EXPERT_COLORS[expert]
    return colormaps["turbo"]((expert + 0.5) / num_experts)[:3]


def _mixed(color: str | tuple[float, ...], share: float) -> str:
    """A colour mixed with white, as #rrggbb."""
    channels = [1 - share * (1 - channel) for channel in to_rgb(color)]
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)
