"""Tables as text and as HTML: the same cells, escaped."""

import html
import json
import re
from pathlib import Path

import pytest

import moekit as mk
from moekit.analysis.balance import BalanceTable
from moekit.data.summary import MixtureRow, Overview
from moekit.evaluation.scores import TaskScore
from moekit.table import Table

PLANS = sorted((Path(__file__).parent.parent / "assets/plans").glob("*.json"))
BALANCE = {
    "stack": "encoder",
    "layer": 1,
    "load_entropy": 1.5,
    "effective_experts": 4.5,
    "cv": 0.1,
    "max_violation": 0.2,
    "dropped_tokens": 0.01,
    "dropped_assignments": 0.02,
    "confidence": 0.9,
    "router_entropy": 0.5,
}


def html_lines(shown):
    """The lines of an HTML table as lists of words."""
    rows = re.findall(r"<(?:tr|div)>(.*?)</(?:tr|div)>", shown)
    lines = [re.sub(r"<[^>]+>", " ", row) for row in rows]
    return [html.unescape(line).split() for line in lines]


def text_lines(text):
    return [line.split() for line in text.splitlines()]


def scores():
    task = TaskScore.of("a<b>&c", "c", "accuracy", [1, 0, 1, 0], 0.25, 0.5)
    return mk.Scores("m on s", (task,), 2, dropped_shots=3, missing=("gone",), split="valid")


def overview():
    row = MixtureRow("flan", "<script>", "t", 1, 90, 5, 1.0, 12.0, 3.0, 0.0)
    return Overview("m", (row,), 0.0, {"lost": "no <file>"}).for_run()


def recorded_plan():
    values = json.loads(PLANS[0].read_text())
    return mk.Plan.from_dict(values[0] if isinstance(values, list) else values)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Table(("a", "<b>"), [("1", "&amp;"), ("x & y", "2")], ["t"], ["n"]),
        scores,
        overview,
        recorded_plan,
        lambda: BalanceTable("<m>", 8, (BALANCE,)),
        lambda: mk.flan_mixture("builtin"),
    ],
    ids=["table", "scores", "overview", "plan", "balance", "mixture"],
)
def test_html_has_the_cells_of_the_text_escaped(make):
    shown = make()
    text = shown.table() if isinstance(shown, mk.Scores) else str(shown)
    markup = shown._repr_html_()
    assert html_lines(markup) == text_lines(text)
    tags = set(re.findall(r"<(/?\w+)", markup))
    assert tags <= {"table", "/table", "tr", "/tr", "th", "/th", "td", "/td", "div", "/div"}


def test_columns_are_aligned():
    table = Table(("task", "n"), [("a", "10"), ("long name", "5")], title=["Title"])
    assert str(table) == "Title\ntask        n\na          10\nlong name   5"
    cells = re.findall(r"text-align:(\w+);[^>]*>(.*?)<", table._repr_html_())
    assert cells[:2] == [("left", "task"), ("right", "n")]


def test_a_configuration_shows_what_differs_from_the_default():
    cfg = mk.preset("st-nano").replace(capacity_factor=3.0, router=mk.TopK(k=2), dropout=0.0)
    lines = html_lines(cfg._repr_html_())
    assert lines[0] == ["ModelConfig"]
    assert ["capacity_factor", "3.0", "1.25"] in lines and ["dropout", "0.0"] in lines
    (router,) = [line for line in lines if line[0] == "router"]
    assert str(mk.TopK(k=2)).split()[0] in router and len(router) > 2
    lines = html_lines(mk.TrainConfig(steps=7, freeze=("router",))._repr_html_())
    assert ["steps", "7", "1000"] in lines and ["warmup_steps", "0"] in lines
    assert ["freeze", "('router',)", "()"] in lines
