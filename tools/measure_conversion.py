"""Measure the memory and the time of conversion on a checkpoint like those of Switch Transformers.

`python tools/measure_conversion.py --megabytes 1000` makes a checkpoint with random weights in a
temporary folder, in files of a quarter of its size. Every row of the table is measured in a process
of its own, on Linux. "beyond the model" is the highest resident memory of the process during the
action, less that before it, less the parameters if the action loads them.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

os.environ["JAX_PLATFORMS"] = "cpu"

MESH = {"expert": 2, "model": 2}  # of 8 devices, the other axis has 2 as well
ACTIONS = ("load", "export", "convert")


def make_checkpoint(folder: Path, megabytes: int) -> None:
    """Write a model of 4 + 4 layers as wide as Switch-Base, with as many experts as fit."""
    import moekit as mk
    from moekit.model import convert_write

    cfg = mk.preset("switch-nano").replace(
        name="measured",
        d_model=768,
        d_ff=3072,
        num_heads=12,
        head_dim=64,
        vocab_size=32128,
        tokenizer=None,
        encoder_layers=4,
        decoder_layers=4,
        encoder_moe_layers=2,
        decoder_moe_layers=2,
        num_experts=2,
        expert_capacity=64,
        activation="relu",
        tied_logits=True,
    )
    smallest = cfg.num_parameters().total
    per_expert = (cfg.replace(num_experts=4).num_parameters().total - smallest) // 2
    more_experts = (megabytes * 10**6 // 4 - smallest) // per_expert
    cfg = cfg.replace(num_experts=2 + max(0, 2 * (more_experts // 2)))
    convert_write.SHARD_BYTES = megabytes * 10**6 // 4
    mk.export(folder, mk.EncoderDecoder(cfg))


def resident_megabytes(key: str) -> float:
    """A line of /proc/self/status: VmRSS, the memory now, or VmHWM, the highest so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("this system does not tell how much memory a process has")


def measured(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result of a function, by how many MB memory rose at most, and the seconds it took."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory is counted anew
    before = resident_megabytes("VmRSS")
    start = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - start
    return result, resident_megabytes("VmHWM") - before, seconds


def run_action(action: str, checkpoint: Path, destination: Path) -> dict[str, float]:
    """Measure one action in this process; modules and threads are there before."""
    import jax
    import orbax.checkpoint  # noqa: F401
    import safetensors  # noqa: F401

    import moekit as mk
    from moekit.commands.convert import convert

    mesh = mk.make_mesh(**MESH) if jax.device_count() > 1 else None
    if action == "convert":
        _, rise, seconds = measured(lambda: convert(str(checkpoint), destination))
        model_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        return {"beyond": rise - model_bytes / 1e6, "seconds": seconds}
    model, rise, seconds = measured(lambda: mk.load(checkpoint, mesh=mesh))
    if action == "load":
        model_bytes = 4 * model.cfg.num_parameters().total
        return {"beyond": rise - model_bytes / 1e6, "seconds": seconds}
    _, rise, seconds = measured(lambda: mk.export(destination, model))
    return {"beyond": rise, "seconds": seconds}


def in_new_process(action: str, devices: int, checkpoint: Path, destination: Path) -> dict:
    """`run_action` on that many virtual devices."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, __file__, "--worker", action, str(checkpoint), str(destination)]
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def measure(megabytes: int = 1000, devices: tuple[int, ...] = (1, 8)) -> None:
    """Print the memory and the time of load, export and convert.

    Args:
      megabytes: Size of the checkpoint, in float32.
      devices: Numbers of virtual devices; `moekit convert` has no mesh.
    """
    from moekit.table import Table

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary) / "checkpoint"
        make_checkpoint(checkpoint, megabytes)
        for number in devices:
            for action in ACTIONS:
                if action == "convert" and number > 1:
                    continue
                destination = Path(temporary) / "destination"
                found = in_new_process(action, number, checkpoint, destination)
                shutil.rmtree(destination, ignore_errors=True)
                cells = (str(number), action, f"{found['beyond']:.0f}", f"{found['seconds']:.1f}")
                rows.append(cells)
    headings = ("devices", "action", "MB beyond the model", "seconds")
    print(Table(headings, rows, num_left=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        name, source, target = sys.argv[2:]
        print(json.dumps(run_action(name, Path(source), Path(target))))
    else:
        tyro.cli(measure)
