"""What a training step would cost on a TPU slice, from a machine without one.

The real step is compiled ahead of time for a named topology, in a child process (only one at a time
may hold the TPU compiler), and the compiled program is read. Memory and collectives are what would
run. Times are estimates: products by the compiler's own cycles, everything else by its bytes of
memory, collectives by the links that their devices span; the low bound of a step overlaps links
perfectly with the rest, the high one not at all.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moekit.config import REMATS, ModelConfig, TrainConfig, preset
from moekit.errors import unknown
from moekit.model.counting import step_flops
from moekit.planning.chips import CHIPS, Chip, links

GIB = 2**30


@dataclass(frozen=True)
class Request:
    """What to plan. `topology` is chip:slice, as v5p:4x8x8; `mesh` names axis sizes, the rest of
    the chips goes to data."""

    cfg: ModelConfig
    topology: str
    mesh: dict[str, int] = field(default_factory=dict)
    batch: int = 256
    input_length: int = 512
    target_length: int = 128
    optimizer: str = "adafactor"
    remat: str = "full"

    def __post_init__(self):
        self.chip  # noqa: B018  raises for an unknown one
        if self.remat not in REMATS:
            raise unknown("remat", self.remat, REMATS)
        for axis in self.mesh:
            if axis not in ("data", "expert", "model"):
                raise unknown("mesh axis", axis, ("data", "expert", "model"))
        rows = self.axes["data"] * self.axes["expert"]
        if self.batch < 1 or self.batch % rows:
            raise ValueError(
                f"a batch of {self.batch} rows cannot be split over data x expert = {rows} chips: "
                f"use a multiple of {rows}, or fewer chips on data and expert and more on model"
            )

    @property
    def chip(self) -> Chip:
        name, _, shape = self.topology.partition(":")
        if name not in CHIPS:
            raise unknown("chip", name, CHIPS)
        if (
            not re.fullmatch(r"\d+(x\d+)*", shape)
            or len(shape.split("x")) != CHIPS[name].dimensions
        ):
            raise ValueError(
                f"topology {self.topology!r}: write chip:slice, for {name} one of "
                f"{', '.join(CHIPS[name].slices)}"
            )
        return CHIPS[name]

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.topology.partition(":")[2].split("x")))

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of all three mesh axes; ValueError if they do not fill the slice."""
        expert, model = self.mesh.get("expert", 1), self.mesh.get("model", 1)
        data = self.mesh.get("data", self.chips // max(1, expert * model))
        if min(data, expert, model) < 1 or data * expert * model != self.chips:
            raise ValueError(
                f"a mesh of data={self.mesh.get('data', 'rest')}, expert={expert}, model={model} "
                f"does not fill the {self.chips} chips of {self.topology}: choose sizes whose "
                f"product divides {self.chips}"
            )
        return {"data": data, "expert": expert, "model": model}

    @property
    def train(self) -> TrainConfig:
        return TrainConfig(
            batch_tokens=self.batch * (self.input_length + self.target_length),
            input_length=self.input_length,
            target_length=self.target_length,
            optimizer=self.optimizer,
            remat=self.remat,
        )


@dataclass(frozen=True)
class Plan:
    """What the compiler says of a training step on a slice; per chip where nothing else is said."""

    preset: str
    topology: str
    mesh: dict[str, int]
    batch: int
    input_length: int
    target_length: int
    optimizer: str
    remat: str
    parameters: int
    hbm_gib_per_chip: dict[str, float]  # total, arguments, temporaries, output
    hbm_limit_gib: float
    fits: bool
    advice: list[str]
    compile_seconds: float
    host_gib: float
    estimate_kind: str = "none: the compiler stopped where memory ran out"
    step_seconds: list[float] | None = None  # low, high
    split_seconds: dict[str, float] = field(default_factory=dict)  # products, memory, links
    mfu: list[float] | None = None  # low, high
    # share of the compiled FLOPs that the model needs; the rest is computed again, padded, scores
    hardware_flops_share: float | None = None
    flops: dict[str, float] = field(default_factory=dict)  # of the step on all chips
    hbm_bytes: float | None = None
    collectives: list[dict[str, Any]] = field(default_factory=list)  # op, axis, count, bytes
    waits_for: str = "memory"
    heaviest: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """A plan recorded by `moekit plan --json`."""
        return cls(**json.loads(Path(path).read_text()))

    def plot(self):
        """Memory by kind beside the chip's limit, and the step's time by what it is spent on."""
        from moekit.analysis.plots import plot_plan

        return plot_plan(self)

    def __str__(self) -> str:
        return as_text(self)


def plan(
    model: str | ModelConfig,
    topology: str,
    *,
    mesh: dict[str, int] | None = None,
    batch: int = 256,
    input_length: int = 512,
    target_length: int = 128,
    optimizer: str = "adafactor",
    remat: str = "full",
) -> Plan:
    """Compile the training step of a model for a TPU slice and read what it would cost.

    Args:
      topology: chip:slice, for v4, v5e, v5p and v6e, as "v5p:4x8x8"; no TPU is needed.
      mesh: sizes of the axes expert and model; the rest goes to data.
      batch: rows a step, of input_length + target_length tokens each.
      remat: see `TrainConfig`.

    Raises:
      ValueError: unknown names, sizes that do not divide, no TPU compiler (libtpu) installed.
    """
    cfg = preset(model) if isinstance(model, str) else model
    return compile_in_child(
        Request(
            cfg, topology, dict(mesh or {}), batch, input_length, target_length, optimizer, remat
        )
    )


def most_expert_parallel(cfg: ModelConfig, chips: int) -> int:
    """The largest expert axis that divides both experts and chips; 1 for a dense model."""
    return math.gcd(cfg.num_experts, chips) if cfg.num_experts else 1


def compile_in_child(request: Request) -> Plan:
    """One request in a fresh process: the TPU compiler and its memory go with it."""
    values = asdict(request) | {"cfg": request.cfg.to_dict()}
    quiet = {
        "JAX_PLATFORMS": "cpu",  # do not look for a TPU
        "TPU_SKIP_MDS_QUERY": "1",  # nor for a cloud that would describe one
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    what = f"compile {request.cfg.name} for {request.topology} (up to minutes)"
    command = [sys.executable, "-m", "moekit.planning.step_plan"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        tqdm(desc=what, bar_format="{desc} {elapsed}", leave=False, disable=None) as bar,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | quiet,
        ) as child,
    ):
        child.stdin.write(json.dumps(values))
        child.stdin.close()
        while child.poll() is None:
            bar.update(0)
            bar.refresh()
            time.sleep(0.5)
        output = child.stdout.read()
        errors.seek(0)
        complaint = errors.read().strip().splitlines() or ["no output"]
    try:
        answer = json.loads((output.strip().splitlines() or [""])[-1])
    except json.JSONDecodeError:
        raise ValueError(
            f"the TPU compiler ended with code {child.returncode} while planning "
            f"{request.cfg.name} on {request.topology}: {complaint[-1][:300]}"
        ) from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return Plan(**answer)


def as_text(p: Plan) -> str:
    """The table that `moekit plan` prints."""
    axes = ", ".join(f"{n} {s}" for n, s in p.mesh.items())
    total = p.hbm_gib_per_chip["total"]
    parts = ", ".join(f"{k} {v:.2f}" for k, v in p.hbm_gib_per_chip.items() if k != "total")
    parts = parts or "the compiler stopped"
    lines = [
        f"{p.preset} on {p.topology} ({axes}), batch {p.batch} x ({p.input_length} + "
        f"{p.target_length}), {p.optimizer}, remat {p.remat}",
        f"{'parameters':16} {_short(p.parameters)}",
        f"{'memory a chip':16} {total:.2f} of {p.hbm_limit_gib:g} GiB ({parts})",
    ]
    if p.step_seconds:
        low, high = (1e3 * s for s in p.step_seconds)
        split = ", ".join(f"{k} {1e3 * v:.2f}" for k, v in p.split_seconds.items())
        flops = ", ".join(f"{_short(v)} {k}" for k, v in p.flops.items())
        lines += [
            f"{'step time':16} {low:.2f} to {high:.2f} ms ({split})",
            f"{'':16} {p.estimate_kind}",
            f"{'MFU':16} {100 * p.mfu[0]:.1f} to {100 * p.mfu[1]:.1f} %",
            f"{'FLOPs a step':16} {flops}; {100 * p.hardware_flops_share:.0f} % are the model's",
            f"{'memory traffic':16} {_short(p.hbm_bytes)}B a chip",
            f"{'collectives':20} {'axis':14} {'count':>7} {'MB sent a chip':>15} {'ms':>8}",
        ]
        lines += [
            f"  {c['op']:18} {c['axis']:14} {c['count']:7.0f} {c['bytes'] / 1e6:15.1f} "
            f"{1e3 * c['seconds']:8.2f}"
            for c in p.collectives
        ]
    verdict = "fits" if p.fits else "does not fit"
    lines += [
        f"{'compiled in':16} {p.compile_seconds:.1f} s with {p.host_gib:.1f} GiB of host memory",
        f"{'verdict':16} {verdict}; waits for {p.waits_for}",
    ]
    return "\n".join(lines + [f"{'':16} {line}" for line in p.advice])


def _short(value: float | int) -> str:
    """Three digits and the power of a thousand."""
    power = min(5, int(math.log10(max(value, 1)) // 3))
    return f"{value / 1000**power:.4g} {['', 'k', 'M', 'G', 'T', 'P'][power]}"


def _search(chips: int) -> dict[str, str]:
    """Compiler options that end the search for tiles early, to compile in a third to half less.

    A product's ends at a share of its peak: on up to eight chips, which are planned in passing,
    sooner (steps read up to 9 % longer than after a full search) than on more (2 %). Other fusions,
    which are read by their bytes, have none.
    """
    return {
        "xla_jf_convolution_performance_target": "0.95" if chips <= 8 else "0.97",
        "xla_jf_fusion_max_instruction_count_for_window_config": "1",
    }


def _compile(request: Request) -> dict[str, Any]:
    """The child's work: everything that needs the TPU compiler."""
    import resource

    import jax
    from flax import nnx
    from jax.experimental import mesh_utils, topologies
    from jax.sharding import AxisType, Mesh

    from moekit.model.transformer import EncoderDecoder
    from moekit.sharding import MESH_AXES
    from moekit.training.step import abstract_batch, compiled_step

    name = request.topology.partition(":")[0]
    # one device a chip: v4 could also show its two cores
    options = {"chip_config_name": "megacore"} if name == "v4" else {}
    try:
        slice_ = topologies.get_topology_desc(
            platform="tpu", topology_name=request.topology, **options
        )
    except Exception as error:
        if "libtpu" in str(error).lower() or "find" in str(error).lower():
            raise ValueError(
                'planning needs the TPU compiler, which needs no TPU: pip install -e ".[tpu]" '
                f"({str(error).splitlines()[0][:150]})"
            ) from None
        known = ", ".join(CHIPS[name].slices)
        raise ValueError(
            f"no slice {request.topology}: {str(error).splitlines()[0][:150]}; {name} has for "
            f"example {known}"
        ) from None
    sizes = tuple(request.axes.values())
    devices = mesh_utils.create_device_mesh(
        sizes, devices=list(slice_.devices), allow_split_physical_axes=True
    )
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    model = nnx.eval_shape(lambda: EncoderDecoder(request.cfg, mesh=mesh))
    step = compiled_step(model, request.train)
    start = time.perf_counter()
    lowered = step.update.lower(
        step.params, step.rest, step.opt_state, *abstract_batch(request.train, mesh)
    )
    seconds = lambda: round(time.perf_counter() - start, 1)  # noqa: E731
    host = lambda: round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)  # noqa: E731
    try:
        compiled = lowered.compile(compiler_options=_search(request.chips))
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)G", str(error))
        if not used:
            raise ValueError(f"the TPU compiler refused: {str(error)[:300]}") from None
        return _known(request, float(used[1]), {}) | {
            "compile_seconds": seconds(),
            "host_gib": host(),
            "advice": _memory_advice(request),
        }
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    # what is written into the memory of donated arguments is theirs
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    kinds = {
        "arguments": arguments,
        # from the peak, as the compiler's sum of temporaries counts a part of the donated arguments
        # once more; the peak leaves out gaps between buffers
        "temporaries": memory.peak_memory_in_bytes - arguments - output,
        "output": output,
        "program": memory.generated_code_size_in_bytes,
    }
    kinds = {k: round(v / GIB, 3) for k, v in kinds.items()}
    found = _known(request, round(sum(kinds.values()), 3), kinds)
    found["compile_seconds"] = seconds()
    found |= _read(request, compiled, mesh) | {"host_gib": host()}
    if not found["fits"]:
        found["waits_for"], found["advice"] = "memory", _memory_advice(request)
    return found


def _known(request: Request, total: float, kinds: dict[str, float]) -> dict[str, Any]:
    fields = ("topology", "batch", "input_length", "target_length", "optimizer", "remat")
    return {name: getattr(request, name) for name in fields} | {
        "preset": request.cfg.name,
        "mesh": request.axes,
        "parameters": request.cfg.num_parameters().total,
        "hbm_gib_per_chip": {"total": total, **kinds},
        "hbm_limit_gib": float(request.chip.hbm_gib),
        "fits": total <= request.chip.hbm_gib and bool(kinds),
    }


def _memory_advice(request: Request) -> list[str]:
    advice = []
    if request.remat != "full":
        advice.append("use remat full: every unit is computed again from its input")
    if request.optimizer != "adafactor":
        advice.append("use adafactor: it keeps averages of rows and columns, not whole moments")
    rows = request.batch // (request.axes["data"] * request.axes["expert"])
    if rows > 1:
        advice.append(f"a smaller batch: each chip holds the activations of {rows} rows")
    return [*advice, "a larger slice"]


def _read(request: Request, compiled, mesh) -> dict[str, Any]:
    """Times, FLOPs and collectives of a compiled step."""
    from moekit.planning.hlo import Walker
    from moekit.sharding import batch_shards

    try:
        text = compiled.as_text()
    except Exception as error:
        raise ValueError(
            "the compiled program cannot be read, which happens when jax and libtpu do not belong "
            f"together: pip install 'jax[tpu]' ({str(error)[:150]})"
        ) from None
    chip = request.chip
    cost = Walker(text, mesh, chip, links(mesh, chip)).run()
    # no time is shorter than what the memory traffic takes
    compute = max(cost.seconds, cost.hbm_bytes / chip.hbm_bandwidth)
    low, high = max(compute, cost.link_seconds), compute + cost.link_seconds
    encoder, decoder = request.cfg.flops_per_token()
    tokens = encoder * request.input_length + decoder * request.target_length
    rows = (request.batch, request.input_length, request.target_length)
    flops = {
        "model": 3 * request.batch * tokens,
        "analytic": step_flops(request.cfg, *rows, remat=request.remat, shards=batch_shards(mesh)),
        "compiled": cost.flops * mesh.size,
    }
    ideal = flops["model"] / mesh.size / chip.flops
    split = {
        "products": cost.product_seconds,
        "memory": compute - cost.product_seconds,
        "links": cost.link_seconds,
    }
    collectives = [
        {"op": op, "axis": axis, **asdict(traffic)}
        for (op, axis), traffic in sorted(cost.collectives.items(), key=lambda kv: -kv[1].seconds)
    ]
    for each in collectives:
        each["bytes"] = each.pop("nbytes")
    waits_for = max(split, key=split.get)
    return {
        "estimate_kind": "an estimate, never measured: low if links overlap with all else, high if "
        "with nothing",
        "step_seconds": [low, high],
        "split_seconds": split,
        "mfu": [ideal / high, ideal / low],
        "hardware_flops_share": flops["model"] / flops["compiled"],
        "flops": flops,
        "hbm_bytes": cost.hbm_bytes,
        "collectives": collectives,
        "waits_for": waits_for,
        "heaviest": [
            {"seconds": s, "op": op, "source": source} for s, op, source in cost.heaviest[:20]
        ],
        "advice": _time_advice(request, cost, split, waits_for),
    }


def _time_advice(request: Request, cost, split: dict[str, float], waits_for: str) -> list[str]:
    advice = []
    if cost.padded_gathers > 0.1 * sum(t.nbytes for t in cost.collectives.values()):
        advice.append(
            f"{cost.padded_gathers / 1e9:.1f} GB a chip travel in all-reduces of zero-padded "
            "buffers, twice the bytes of the all-gathers they stand for: other mesh sizes may "
            "split weights into whole tiles"
        )
    together = most_expert_parallel(request.cfg, request.chips)
    if request.axes["expert"] == 1 < together:
        advice.append(f"mesh expert={together}: now every chip gathers the weights of all experts")
    if waits_for == "links":
        worst = max(cost.collectives.items(), key=lambda kv: kv[1].seconds)[0]
        advice.append(f"a larger batch or another mesh: {worst[0]} over {worst[1]} weighs most")
    elif request.remat == "full":
        advice.append('with memory left, remat "dots" computes less again')
    if waits_for == "memory":
        advice.append("most time goes to reading and writing memory: more tokens a chip help")
    return advice


def main() -> None:
    """Reads a request as JSON, writes a plan as JSON."""
    values = json.loads(sys.stdin.read())
    try:
        values["cfg"] = ModelConfig.from_dict(values["cfg"])
        answer = _compile(Request(**values))
    except (ValueError, NotImplementedError) as error:
        answer = {"error": " ".join(str(error).split())}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
