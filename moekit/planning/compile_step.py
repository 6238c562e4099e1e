"""Compile a training step ahead of time for a TPU slice, on a machine without one.

The real step is compiled for a named topology in a child process (only one process at a time may
hold the TPU compiler), and the compiled program is read. Memory and collectives are those of the
program that would run. Times are estimates: matmuls take the compiler's own cycles, other work the
time of its memory traffic, collectives that of the links that their devices span.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from moekit.config import ModelConfig
from moekit.model.counting import step_flops
from moekit.model.transformer import EncoderDecoder
from moekit.planning.chips import CHIPS, link_seconds
from moekit.planning.program_cost import Cost, program_cost
from moekit.planning.request import PlanRequest, largest_expert_axis
from moekit.planning.step_plan import ESTIMATE, Plan
from moekit.presets import preset
from moekit.progress import ProgressBar
from moekit.sharding import MESH_AXES
from moekit.training.step import abstract_batch, compiled_step

GIB = 2**30
SECONDS_BETWEEN_REFRESHES = 0.5
# up to this many chips a plan is compiled with the shorter search: see `_compiler_options`
ONE_HOST = 8
# the child does not look for a TPU, nor for a cloud that describes one
CHILD_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


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
    """Compile the training step of a model for a TPU slice and estimate its memory and time.

    Args:
      model: a preset's name or a configuration.
      topology: chip:slice, for v4, v5e, v5p and v6e, such as "v5p:4x8x8"; no TPU is needed.
      mesh: sizes of the axes expert and model; the remaining chips go to data.
      batch: rows per step, of input_length + target_length tokens each.
      input_length: tokens of the encoder's input.
      target_length: tokens of the decoder's target.
      optimizer: see `TrainConfig`.
      remat: see `TrainConfig`.

    Raises:
      ValueError: unknown names, sizes that do not divide, no TPU compiler (libtpu) installed.
    """
    cfg = preset(model) if isinstance(model, str) else model
    request = PlanRequest(
        cfg=cfg,
        topology=topology,
        mesh=dict(mesh or {}),
        batch=batch,
        input_length=input_length,
        target_length=target_length,
        optimizer=optimizer,
        remat=remat,
    )
    return compile_in_child(request)


def compile_in_child(request: PlanRequest) -> Plan:
    """The plan of one request, compiled in a fresh process that frees the compiler's memory.

    Raises:
      ValueError: the TPU compiler is missing, refused the program or ended early.
    """
    output, complaint, exit_code = _run_child(request)
    lines = output.strip().splitlines()
    try:
        answer = json.loads(lines[-1] if lines else "")
    except json.JSONDecodeError:
        raise ValueError(
            f"the TPU compiler ended with code {exit_code} while planning {request.cfg.name} on "
            f"{request.topology}: {complaint[:300]}"
        ) from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return Plan.from_dict(answer)


def _run_child(request: PlanRequest) -> tuple[str, str, int]:
    """Standard output, the last line of standard error, and the exit code of the child."""
    description = f"compile {request.cfg.name} for {request.topology} (up to minutes)"
    progress = ProgressBar(
        desc=description, bar_format="{desc} {elapsed}", leave=False, disable=None
    )
    with tempfile.TemporaryFile("w+") as errors, progress:
        child = subprocess.Popen(
            [sys.executable, "-m", "moekit.planning.compile_step"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | CHILD_ENVIRONMENT,
        )
        with child:
            child.stdin.write(json.dumps(request.to_dict()))
            child.stdin.close()
            while child.poll() is None:
                progress.refresh()
                time.sleep(SECONDS_BETWEEN_REFRESHES)
            output = child.stdout.read()
        errors.seek(0)
        error_lines = errors.read().strip().splitlines()
    complaint = error_lines[-1] if error_lines else "no output"
    return output, complaint, child.returncode


def _compile(request: PlanRequest) -> Plan:
    """The child's work: everything that needs the TPU compiler."""
    mesh = _slice_mesh(request)
    model = nnx.eval_shape(lambda: EncoderDecoder(request.cfg, mesh=mesh))
    step = compiled_step(model, request.train)
    batch = abstract_batch(request.train, mesh)
    start = time.perf_counter()
    lowered = step.update.lower(step.state, batch)
    try:
        compiled = lowered.compile(compiler_options=_compiler_options(request.num_chips))
    except jax.errors.JaxRuntimeError as error:
        memory_gib = {"total": _memory_needed(error)}
        compile_seconds = time.perf_counter() - start
        return _plan_without_times(request, memory_gib, False, compile_seconds)
    compile_seconds = time.perf_counter() - start
    memory_kinds = _memory_kinds(compiled)
    total_gib = round(sum(memory_kinds.values()), 3)
    memory_gib = {"total": total_gib, **memory_kinds}
    fits = total_gib <= request.chip.hbm_gib
    plan = _plan_without_times(request, memory_gib, fits, compile_seconds)
    return _with_times(plan, request, _read_cost(request, compiled, mesh))


def _slice_mesh(request: PlanRequest) -> Mesh:
    """A mesh of the abstract devices of a slice.

    Raises:
      ValueError: libtpu is not installed, or there is no such slice.
    """
    chip_name = request.topology.partition(":")[0]
    options = {}
    if chip_name == "v4":  # one device per chip instead of one per core
        options["chip_config_name"] = "megacore"
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=request.topology, **options
        )
    except Exception as error:
        reason = str(error).splitlines()[0][:150]
        if "libtpu" in str(error).lower() or "find" in str(error).lower():
            raise ValueError(
                "planning needs the TPU compiler, which needs no TPU: pip install -e '.[tpu]' "
                f"({reason})"
            ) from None
        examples = ", ".join(CHIPS[chip_name].slices)
        raise ValueError(
            f"no slice {request.topology}: {reason}; {chip_name} has for example {examples}"
        ) from None
    devices = mesh_utils.create_device_mesh(
        tuple(request.axes.values()),
        devices=list(topology.devices),
        allow_split_physical_axes=True,
    )
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _compiler_options(num_chips: int) -> dict[str, str]:
    """Options that end the compiler's search for tiles early: compiling takes a third to half less.

    The search for a matmul's tiles ends at a share of its peak: on the chips of one host, which are
    planned interactively, earlier (steps read up to 9 % longer than after a full search) than on
    larger slices (2 %). Other fusions, whose time is estimated by their bytes, have no search.
    """
    target = "0.95" if num_chips <= ONE_HOST else "0.97"
    return {
        "xla_jf_convolution_performance_target": target,
        "xla_jf_fusion_max_instruction_count_for_window_config": "1",
    }


def _memory_needed(error: jax.errors.JaxRuntimeError) -> float:
    """GiB that a program would have needed, from the compiler's message.

    Raises:
      ValueError: the compiler refused the program for another reason.
    """
    used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)G", str(error))
    if not used:
        raise ValueError(f"the TPU compiler refused: {str(error)[:300]}") from None
    return float(used[1])


def _memory_kinds(compiled: jax.stages.Compiled) -> dict[str, float]:
    """GiB of device memory by kind."""
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    # outputs that reuse donated arguments take no memory of their own
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # from the peak: the compiler's sum of temporaries counts a part of the donated arguments twice.
    # The peak leaves out gaps between buffers
    temporaries = memory.peak_memory_in_bytes - arguments - output
    program = memory.generated_code_size_in_bytes
    return {
        "arguments": round(arguments / GIB, 3),
        "temporaries": round(temporaries / GIB, 3),
        "output": round(output / GIB, 3),
        "program": round(program / GIB, 3),
    }


def _read_cost(request: PlanRequest, compiled: jax.stages.Compiled, mesh: Mesh) -> Cost:
    try:
        text = compiled.as_text()
    except Exception as error:
        raise ValueError(
            "the compiled program cannot be read, which happens when jax and libtpu do not belong "
            f"together: pip install 'jax[tpu]' ({str(error)[:150]})"
        ) from None
    return program_cost(text, mesh, request.chip, link_seconds(mesh, request.chip))


def _plan_without_times(
    request: PlanRequest, memory_gib: dict[str, float], fits: bool, compile_seconds: float
) -> Plan:
    """What is known of every program, also of one for which the compiler found no room."""
    return Plan(
        preset=request.cfg.name,
        topology=request.topology,
        mesh=request.axes,
        batch=request.batch,
        input_length=request.input_length,
        target_length=request.target_length,
        optimizer=request.optimizer,
        remat=request.remat,
        parameters=request.cfg.num_parameters().total,
        hbm_gib_per_chip=memory_gib,
        hbm_limit_gib=float(request.chip.hbm_gib),
        fits=fits,
        advice=_memory_advice(request),
        compile_seconds=round(compile_seconds, 1),
        host_gib=_host_gib(),
    )


def _with_times(plan: Plan, request: PlanRequest, cost: Cost) -> Plan:
    """The plan of a compiled program, from its cost."""
    chip = request.chip
    # no time is shorter than that of the memory traffic
    compute_seconds = max(cost.seconds, cost.hbm_bytes / chip.hbm_bandwidth)
    low = max(compute_seconds, cost.interconnect_seconds)
    high = compute_seconds + cost.interconnect_seconds
    flops = _flops(request, cost)
    ideal_seconds = flops["model"] / request.num_chips / chip.flops
    split = {
        "matmuls": cost.matmul_seconds,
        "memory": compute_seconds - cost.matmul_seconds,
        "interconnect": cost.interconnect_seconds,
    }
    if plan.fits:
        bottleneck = max(split, key=split.get)
        plan = replace(plan, bottleneck=bottleneck, advice=time_advice(request, cost, bottleneck))
    return replace(
        plan,
        host_gib=_host_gib(),
        estimate_kind=ESTIMATE,
        step_seconds=[low, high],
        split_seconds=split,
        mfu=[ideal_seconds / high, ideal_seconds / low],
        hardware_flops_share=flops["model"] / flops["compiled"],
        flops=flops,
        hbm_bytes=cost.hbm_bytes,
        collectives=_collective_rows(cost),
        heaviest=_heaviest_rows(cost),
    )


def _flops(request: PlanRequest, cost: Cost) -> dict[str, float]:
    """FLOPs of a step on all chips: the model's, those of all matmuls, those of the program."""
    encoder, decoder = request.cfg.flops_per_token()
    flops_per_row = encoder * request.input_length + decoder * request.target_length
    analytic = step_flops(
        request.cfg,
        request.batch,
        request.input_length,
        request.target_length,
        remat=request.remat,
        shards=request.batch_shards,
    )
    return {
        "model": 3 * request.batch * flops_per_row,
        "analytic": analytic,
        "compiled": cost.flops * request.num_chips,
    }


def _collective_rows(cost: Cost) -> list[dict[str, Any]]:
    """One row per kind and axes, the slowest first."""
    rows = []
    for (kind, axes), traffic in cost.collectives.items():
        rows.append(
            {
                "op": kind,
                "axis": axes,
                "count": traffic.count,
                "seconds": traffic.seconds,
                "bytes": traffic.nbytes,
            }
        )
    return sorted(rows, key=lambda row: -row["seconds"])


def _heaviest_rows(cost: Cost, count: int = 20) -> list[dict[str, Any]]:
    rows = []
    for seconds, name, source in cost.heaviest[:count]:
        rows.append({"seconds": seconds, "op": name, "source": source})
    return rows


def _host_gib() -> float:
    """Peak memory of this process in GiB."""
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kibibytes / 2**20, 2)


def _memory_advice(request: PlanRequest) -> list[str]:
    advice = []
    if request.remat != "full":
        advice.append("use remat full: every layer is recomputed from its input")
    if request.optimizer != "adafactor":
        advice.append("use adafactor: it stores averages of rows and columns, not whole moments")
    rows_per_chip = request.batch // request.batch_shards
    if rows_per_chip > 1:
        advice.append(f"a smaller batch: each chip holds the activations of {rows_per_chip} rows")
    advice.append("a larger slice")
    return advice


def time_advice(request: PlanRequest, cost: Cost, bottleneck: str) -> list[str]:
    """What would make a step that fits faster."""
    advice = []
    bytes_sent = sum(traffic.nbytes for traffic in cost.collectives.values())
    if cost.padded_gather_bytes > 0.1 * bytes_sent:
        advice.append(
            f"{cost.padded_gather_bytes / 1e9:.1f} GB per chip are sent in all-reduces of "
            "zero-padded buffers, twice the bytes of the all-gathers that they replace: other mesh "
            "sizes may split weights into whole tiles"
        )
    expert_axis = largest_expert_axis(request.cfg, request.num_chips)
    if request.axes["expert"] == 1 and expert_axis > 1:
        advice.append(
            f"mesh expert={expert_axis}: now every chip gathers the weights of all experts"
        )
    if bottleneck == "interconnect":
        kind, axes = max(cost.collectives, key=lambda key: cost.collectives[key].seconds)
        advice.append(f"a larger batch or another mesh: {kind} over {axes} takes the longest")
    elif request.remat == "full":
        advice.append('with memory to spare, remat "dots" recomputes less')
    if bottleneck == "memory":
        advice.append("most time is spent on memory traffic: more tokens per chip help")
    return advice


def main() -> None:
    """Read a request as JSON from standard input, write a plan as JSON."""
    try:
        request = PlanRequest.from_dict(json.loads(sys.stdin.read()))
        answer = _compile(request).to_dict()
    except (ValueError, NotImplementedError) as error:
        answer = {"error": " ".join(str(error).split())}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
