"""The log sent to TensorBoard and to Weights & Biases."""

import sys
import types

import pytest

import moekit as mk
from moekit.training.loggers import scalars

ROWS = [
    {"step": 2, "loss": 3.0, "examples": 8, "cluster_tokens": {"qa": 5, "nli": 3}},
    {"step": 2, "valid_loss": 2.5},
    {"step": 4, "loss": 2.0, "name": "left out"},
]


def test_numbers_of_a_row():
    assert scalars(ROWS[0]) == {
        "step": 2.0,
        "loss": 3.0,
        "examples": 8.0,
        "cluster_tokens/qa": 5.0,
        "cluster_tokens/nli": 3.0,
    }
    assert scalars(ROWS[2]) == {"step": 4.0, "loss": 2.0}


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    log = mk.TensorBoard(tmp_path / "tb")
    for row in ROWS:
        log(row)
    log.close()
    log.close()
    (path,) = (tmp_path / "tb").glob("events*")
    found = {}
    data = path.read_bytes()
    while data:  # length (8 bytes), checksum (4), event, checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
        data = data[16 + size :]
    assert found["loss", 2] == 3.0 and found["loss", 4] == 2.0 and found["valid_loss", 2] == 2.5
    assert found["cluster_tokens/qa", 2] == 5.0 and len(found) == 6


def test_wandb_gets_every_number_and_finishes(monkeypatch):
    """Against a module with the interface of wandb.init, Run.log and Run.finish."""
    calls = []

    class Run:
        def log(self, data, step=None):
            calls.append((data, step))

        def finish(self):
            calls.append("finish")

    def init(project=None, **settings):
        calls.append((project, settings))
        return Run()

    module = types.ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    log = mk.WandB("flan", mode="offline")
    assert calls == []  # a run starts with its first row
    for row in ROWS[1:]:
        log(row)
    log.close()
    log.close()
    assert calls == [
        ("flan", {"mode": "offline"}),
        ({"valid_loss": 2.5}, 2),
        ({"loss": 2.0}, 4),
        "finish",
    ]


@pytest.mark.parametrize("library", ["tensorboardX", "wandb"])
def test_a_missing_library_is_named_with_its_command(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(OSError, match=rf"{library} is not installed .*pip install {library}"):
        mk.TensorBoard("tb") if library == "tensorboardX" else mk.WandB("flan")
