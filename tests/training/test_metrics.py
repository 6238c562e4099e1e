"""The log of a run."""

import errno
import json
import logging

import pytest

from moekit.training.metrics import Metrics

ROWS = [
    {"step": step, "loss": 3.0 / step, "encoder_dropped": 0.1, "exact_match": 0.5, "tokens": 7}
    for step in (1, 2, 3)
]


@pytest.fixture
def path(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for row in ROWS:
        metrics.add(row)
    return metrics.path


@pytest.mark.parametrize(
    "broken", ['{"step": 2, "lo', "", "null", "[2]", '{"loss": 2}', "\x00\x00"]
)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_broken_line_loses_no_other_row(path, caplog, broken, number):
    lines = path.read_text().splitlines()
    lines[number - 1] = broken
    path.write_text("\n".join(lines) + "\n")
    with caplog.at_level(logging.WARNING):
        loaded = Metrics.load(path)
    assert loaded.rows == [row for row in ROWS if row["step"] != number]
    (message,) = caplog.messages
    assert str(path) in message and f"line {number} is broken" in message


def test_rows_after_a_step_are_removed_from_the_file_too(path):
    metrics = Metrics.load(path)
    metrics.keep_until(2)
    assert metrics.rows == ROWS[:2]
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS[:2]


def test_columns(path):
    metrics = Metrics.load(path)
    assert metrics["loss"] == ([1, 2, 3], [3.0, 1.5, 1.0])
    assert metrics.last("loss") == 1.0
    with pytest.raises(KeyError, match=r"lss; this run logged .*loss"):
        metrics["lss"]


def test_every_logged_panel_is_drawn(path):
    figure = Metrics.load(path).plot("A run")
    drawn = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_ylabel() for axis in drawn] == [
        "cross-entropy (nats a token)",
        "share of tokens dropped",
        "score",
    ]
    assert drawn[2].lines[0].get_label() == "exact_match"


def test_rows_that_a_full_disk_refuses_are_written_later(path, caplog, monkeypatch):
    def write_a_part(metrics):
        with metrics.path.open("ab") as file:
            file.write(b'{"step": 4, "lo')
        raise OSError(errno.ENOSPC, "No space left on device")

    metrics = Metrics.load(path)
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "_write_rows", write_a_part)
        metrics.add({"step": 4, "loss": 0.5})
        metrics.add({"step": 5, "loss": 0.4})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text and str(path) in caplog.text
    assert Metrics.load(path).rows == ROWS
    metrics.add({"step": 6, "loss": 0.3})
    assert Metrics.load(path).rows == metrics.rows
    assert [row["step"] for row in metrics.rows] == [1, 2, 3, 4, 5, 6]
