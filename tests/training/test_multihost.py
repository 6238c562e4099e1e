"""Two processes of four virtual devices train as one process of eight does."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import moekit as mk
from moekit import distributed
from moekit.data.text import Corpus, Document
from moekit.sharding import MESH_AXES
from moekit.training.checkpoint import Checkpoints

TEXT = Corpus(
    "text", lambda split: [Document(f"{split} {i} is followed by {i + 1}. " * 3) for i in range(90)]
)
CONFIG = mk.TrainConfig(
    steps=4,
    batch_tokens=16 * 80,
    input_length=64,
    target_length=16,
    learning_rate=1e-2,
    save_every=2,
    eval_every=3,
    log_every=1,
)


def build():
    cfg = mk.preset("st-nano").replace(
        d_model=16,
        d_ff=32,
        encoder_layers=1,
        decoder_layers=1,
    )
    return mk.EncoderDecoder(cfg, mesh=mk.make_mesh(data=2, expert=4))


def one_of_two(folder, coordinator, number):
    """What each of the two processes does; it reports as JSON."""
    number = int(number)
    distributed.start(coordinator, 2, number)
    found = {"devices": [jax.local_device_count(), jax.device_count()]}
    found["share"] = distributed.process_shard(mk.make_mesh(expert=8))
    found["joined"] = distributed.process_shard(mk.make_mesh(model=8))
    found["gathered"] = distributed.allgather_objects("é" * (number + 1))
    apart = np.array(jax.devices())[[0, 1, 2, 4, 3, 5, 6, 7]].reshape(4, 1, 2)
    try:
        distributed.process_shard(jax.sharding.Mesh(apart, MESH_AXES))
    except ValueError as error:
        found["uneven"] = str(error)
    model = build()
    mk.train(model, TEXT, CONFIG, workdir=f"{folder}/two", eval_source=TEXT)
    mk.train(model, TEXT, CONFIG, workdir=f"{folder}/resumed_by_two", eval_source=TEXT)

    def preempt(step, model):
        if step == 1 and number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    config = CONFIG.replace(steps=1000, save_every=0, eval_every=1)
    try:
        mk.train(model, TEXT, config, workdir=f"{folder}/stopped", callbacks=[preempt])
    except KeyboardInterrupt as stop:
        found["stopped"] = str(stop)
    print(json.dumps(found))


def python(*arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def rows(workdir, *keys):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [[row[key] for key in keys if key in row] for row in map(json.loads, lines)]


def parameters(workdir, step, model):
    like = {"model": nnx.to_pure_dict(nnx.state(model))}
    return Checkpoints(workdir / "checkpoints").restore(step, like)["model"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of one process and of two; the first half of `resumed_by_..` is the other's."""
    folder = tmp_path_factory.mktemp("runs")
    model = build()
    mk.train(model, TEXT, CONFIG, workdir=folder / "one", eval_source=TEXT)
    first_half = shutil.ignore_patterns("4")
    shutil.copytree(folder / "one", folder / "resumed_by_two", ignore=first_half)
    port = free_port()
    two = [python(__file__, folder, f"localhost:{port}", number) for number in range(2)]
    try:
        out = [process.communicate(timeout=400) for process in two]
    finally:  # one that waits for the other
        for process in two:
            process.kill()
            process.communicate()
    assert [process.returncode for process in two] == [0, 0], out[0][1] + out[1][1]
    shutil.copytree(folder / "two", folder / "resumed_by_one", ignore=first_half)
    mk.train(model, TEXT, CONFIG, workdir=folder / "resumed_by_one", eval_source=TEXT)
    return folder, [json.loads(o.splitlines()[-1]) for o, _ in out], model


@pytest.mark.parametrize("kind", ["two", "resumed_by_two", "resumed_by_one"])
def test_two_processes_equal_one(runs, kind):
    folder, _, model = runs
    keys = ("step", "loss", "grad_norm", "valid_loss", "encoder_dropped", "decoder_dropped")
    for found, expected in zip(
        rows(folder / kind, *keys), rows(folder / "one", *keys), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for step in (2, 4):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            parameters(folder / kind, step, model),
            parameters(folder / "one", step, model),
        )


def test_each_holds_half_and_one_logs(runs):
    _, found, _ = runs
    for number, process in enumerate(found):
        assert process["devices"] == [4, 8]
        assert process["share"] == [number, 2] and process["joined"] == [0, 1]
        assert process["gathered"] == ["é", "éé"]
        assert "2 processes cannot share data=4 times expert=1 evenly" in process["uneven"]


def test_a_signal_to_one_stops_both_after_the_same_step(runs):
    folder, found, _ = runs
    (steps,) = {process["stopped"] for process in found}
    step = int(steps.removeprefix("saved at step "))
    assert [int(p.name) for p in (folder / "stopped/checkpoints").iterdir()] == [step]


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_is_alone_says_so(number):
    arguments = (f"localhost:{free_port()}", 2, number)
    process = python(
        "-c", f"from moekit import distributed; distributed.start(*{arguments}, timeout=2)"
    )
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 1
    assert "TimeoutError: waited 2 s for the other processes of this run at localhost" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost", 2, 0), "give the host:port of process 0"),
        (("", 2, 0), "give the host:port of process 0"),
        (("localhost:1", 2, 2), "as process 2 of 2"),
        (("localhost:1", None, None), "give coordinator, processes and process_id"),
    ],
)
def test_arguments_that_make_no_run(arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.start(*arguments)


if __name__ == "__main__":
    one_of_two(*sys.argv[1:])
