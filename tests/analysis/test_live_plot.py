"""The figure that follows a run."""

import logging

import pytest

import moekit as mk
from moekit.analysis.plots import live

ROWS = [
    {"step": 2, "loss": 3.0, "tokens": 2_000_000},
    {"step": 3, "valid_loss": 2.5},
    {"step": 4, "loss": 2.0, "tokens": 4_000_000},
]


class Handle:
    def __init__(self):
        self.images = []

    def update(self, image):
        self.images.append(image)


@pytest.fixture
def displayed(monkeypatch):
    """What is displayed, in a notebook that this process does not have."""
    display = pytest.importorskip("IPython.display")
    handles = []

    def show(image, display_id):
        assert display_id
        handles.append(Handle())
        handles[-1].update(image)
        return handles[-1]

    monkeypatch.setattr(display, "display", show)
    monkeypatch.setattr(live, "in_notebook", lambda: True)
    return handles


def test_curves_are_losses_against_tokens(displayed):
    plot = mk.LivePlot("A run")
    for row in ROWS:
        plot(row)
    (axes,) = plot.figure().axes
    training, validation = axes.lines
    assert training.get_xydata().tolist() == [[2, 3.0], [4, 2.0]]
    assert validation.get_xydata().tolist() == [[3, 2.5]]
    assert axes.get_title() == "A run: training loss 2.000, validation loss 2.500"


def test_it_is_redrawn_in_place_once_a_second_and_at_the_end(displayed, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    plot = mk.LivePlot()
    for row in ROWS:
        plot(row)
        now[0] += 0.4
    assert len(displayed) == 1 and len(displayed[0].images) == 1
    now[0] += 1
    plot(ROWS[2])
    assert len(displayed[0].images) == 2
    plot.close()
    plot.close()
    assert len(displayed) == 1 and len(displayed[0].images) == 3
    assert displayed[0].images[-1].data.startswith(b"\x89PNG")
    plot(ROWS[0])
    plot.close()
    assert len(displayed) == 2  # another run, another figure


def test_outside_a_notebook_it_says_so_once_and_draws_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        plot = mk.LivePlot()
        for row in ROWS:
            plot(row)
        plot.close()
    (message,) = caplog.messages
    assert "draws in a notebook only" in message
