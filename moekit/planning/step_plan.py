"""The plan of a training step on a TPU slice: memory, time, collectives, verdict."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NO_ESTIMATE = "none: the compiler stopped where memory ran out"
ESTIMATE = (
    "an estimate, not a measurement: the low bound assumes that communication fully overlaps with "
    "computation, the high one that nothing overlaps"
)


@dataclass(frozen=True)
class Plan:
    """Compile-time estimate of a training step on a TPU slice; per chip unless stated otherwise."""

    preset: str
    topology: str
    mesh: dict[str, int]
    batch: int
    input_length: int
    target_length: int
    optimizer: str
    remat: str
    parameters: int
    hbm_gib_per_chip: dict[str, float]  # total, arguments, temporaries, output, program
    hbm_limit_gib: float
    fits: bool
    advice: list[str]
    compile_seconds: float
    host_gib: float
    estimate_kind: str = NO_ESTIMATE
    step_seconds: list[float] | None = None  # low, high
    split_seconds: dict[str, float] = field(default_factory=dict)  # matmuls, memory, interconnect
    mfu: list[float] | None = None  # low, high
    # the model's FLOPs over the compiled ones; the rest is rematerialization, padding, attention
    hardware_flops_share: float | None = None
    flops: dict[str, float] = field(default_factory=dict)  # of the step on all chips
    hbm_bytes: float | None = None
    collectives: list[dict[str, Any]] = field(default_factory=list)  # op, axis, count, bytes
    bottleneck: str = "memory"
    heaviest: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """A plan from its JSON form; the names of earlier versions are read as well."""
        values = dict(values)
        if "waits_for" in values:
            values["bottleneck"] = _current_name(values.pop("waits_for"))
            split = values.get("split_seconds", {})
            values["split_seconds"] = {_current_name(key): split[key] for key in split}
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """A plan recorded by `moekit plan --json`."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def plot(self) -> Any:
        """Memory by kind beside the chip's limit, step time by kind, bytes sent by collective."""
        # matplotlib takes a second to load, and every compiling child process loads this module
        from moekit.analysis.plots import plot_plan

        memory = {kind: gib for kind, gib in self.hbm_gib_per_chip.items() if kind != "total"}
        return plot_plan(
            title=f"{self.preset} on {self.topology}, remat {self.remat}",
            memory_gib=memory or {"requested": self.hbm_gib_per_chip["total"]},
            memory_limit_gib=self.hbm_limit_gib,
            seconds=self.split_seconds,
            step_seconds=self.step_seconds or (),
            collectives=self.collectives,
        )

    def __str__(self) -> str:
        return plan_table(self)


def _current_name(kind: str) -> str:
    former_names = {"products": "matmuls", "links": "interconnect"}
    return former_names.get(kind, kind)


def plan_table(plan: Plan) -> str:
    """The table that `moekit plan` prints."""
    lines = _setting_lines(plan)
    if plan.step_seconds:
        lines += _time_lines(plan)
        lines += _collective_lines(plan)
    verdict = "fits" if plan.fits else "does not fit"
    compile_time = f"{plan.compile_seconds:.1f} s with {plan.host_gib:.1f} GiB of host memory"
    lines.append(_line("compiled in", compile_time))
    lines.append(_line("verdict", f"{verdict}; bottleneck: {plan.bottleneck}"))
    for sentence in plan.advice:
        lines.append(_line("", sentence))
    return "\n".join(lines)


def _line(label: str, text: str) -> str:
    return f"{label:16} {text}"


def _setting_lines(plan: Plan) -> list[str]:
    axes = ", ".join(f"{name} {size}" for name, size in plan.mesh.items())
    memory_kinds = []
    for kind, gib in plan.hbm_gib_per_chip.items():
        if kind != "total":
            memory_kinds.append(f"{kind} {gib:.2f}")
    kinds = ", ".join(memory_kinds) or "the compiler stopped"
    total = plan.hbm_gib_per_chip["total"]
    return [
        f"{plan.preset} on {plan.topology} ({axes}), batch {plan.batch} x ({plan.input_length} + "
        f"{plan.target_length}), {plan.optimizer}, remat {plan.remat}",
        _line("parameters", with_prefix(plan.parameters)),
        _line("memory per chip", f"{total:.2f} of {plan.hbm_limit_gib:g} GiB ({kinds})"),
    ]


def _time_lines(plan: Plan) -> list[str]:
    low, high = (1e3 * seconds for seconds in plan.step_seconds)
    split = ", ".join(f"{kind} {1e3 * value:.2f}" for kind, value in plan.split_seconds.items())
    flops = ", ".join(f"{with_prefix(value)} {kind}" for kind, value in plan.flops.items())
    low_mfu, high_mfu = (100 * share for share in plan.mfu)
    model_share = 100 * plan.hardware_flops_share
    return [
        _line("step time", f"{low:.2f} to {high:.2f} ms ({split})"),
        _line("", plan.estimate_kind),
        _line("MFU", f"{low_mfu:.1f} to {high_mfu:.1f} %"),
        _line("FLOPs per step", f"{flops}; {model_share:.0f} % are the model's"),
        _line("memory traffic", f"{with_prefix(plan.hbm_bytes)}B per chip"),
    ]


def _collective_lines(plan: Plan) -> list[str]:
    lines = [f"{'collectives':20} {'axis':14} {'count':>7} {'MB sent per chip':>16} {'ms':>8}"]
    for collective in plan.collectives:
        megabytes = collective["bytes"] / 1e6
        milliseconds = 1e3 * collective["seconds"]
        lines.append(
            f"  {collective['op']:18} {collective['axis']:14} {collective['count']:7.0f} "
            f"{megabytes:16.1f} {milliseconds:8.2f}"
        )
    return lines


def with_prefix(value: float | int) -> str:
    """A number with its SI prefix, such as "4.936 G"."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    power = int(math.log10(max(value, 1)) // 3)
    power = min(power, len(prefixes) - 1)
    return f"{value / 1000**power:.4g} {prefixes[power]}"
