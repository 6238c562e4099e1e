"""The plan of a training step on a TPU slice: memory, time, collectives, verdict."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moekit.data.paths import require_file
from moekit.table import Table

MAX_BYTES = 16 << 20  # of a recorded plan
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
        """A plan recorded by `moekit plan --json`.

        Raises:
          ValueError: the file is something else; the message names it.
        """
        require_file(Path(path), MAX_BYTES)
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is not a plan of `moekit plan --json` ({reason})") from None

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
        return "\n".join(str(table) for table in plan_tables(self))

    def _repr_html_(self) -> str:
        return "\n".join(table._repr_html_() for table in plan_tables(self))


def _current_name(kind: str) -> str:
    former_names = {"products": "matmuls", "links": "interconnect"}
    return former_names.get(kind, kind)


def plan_tables(plan: Plan) -> list[Table]:
    """What `moekit plan` prints: the estimates, and the collectives if there are any."""
    rows = _setting_rows(plan)
    if plan.step_seconds:
        rows += _time_rows(plan)
    verdict = "fits" if plan.fits else "does not fit"
    compile_time = f"{plan.compile_seconds:.1f} s with {plan.host_gib:.1f} GiB of host memory"
    rows.append(("compiled in", compile_time))
    rows.append(("verdict", f"{verdict}; bottleneck: {plan.bottleneck}"))
    rows += [("", sentence) for sentence in plan.advice]
    axes = ", ".join(f"{name} {size}" for name, size in plan.mesh.items())
    title = (
        f"{plan.preset} on {plan.topology} ({axes}), batch {plan.batch} x ({plan.input_length} + "
        f"{plan.target_length}), {plan.optimizer}, remat {plan.remat}"
    )
    estimates = Table((), rows, title=[title], num_left=2)
    return [estimates, _collectives_table(plan)] if plan.collectives else [estimates]


def _setting_rows(plan: Plan) -> list[tuple[str, str]]:
    memory_kinds = []
    for kind, gib in plan.hbm_gib_per_chip.items():
        if kind != "total":
            memory_kinds.append(f"{kind} {gib:.2f}")
    kinds = ", ".join(memory_kinds) or "the compiler stopped"
    total = plan.hbm_gib_per_chip["total"]
    return [
        ("parameters", with_prefix(plan.parameters)),
        ("memory per chip", f"{total:.2f} of {plan.hbm_limit_gib:g} GiB ({kinds})"),
    ]


def _time_rows(plan: Plan) -> list[tuple[str, str]]:
    low, high = (1e3 * seconds for seconds in plan.step_seconds)
    split = ", ".join(f"{kind} {1e3 * value:.2f}" for kind, value in plan.split_seconds.items())
    flops = ", ".join(f"{with_prefix(value)} {kind}" for kind, value in plan.flops.items())
    low_mfu, high_mfu = (100 * share for share in plan.mfu)
    model_share = 100 * plan.hardware_flops_share
    return [
        ("step time", f"{low:.2f} to {high:.2f} ms ({split})"),
        ("", plan.estimate_kind),
        ("MFU", f"{low_mfu:.1f} to {high_mfu:.1f} %"),
        ("FLOPs per step", f"{flops}; {model_share:.0f} % are the model's"),
        ("memory traffic", f"{with_prefix(plan.hbm_bytes)}B per chip"),
    ]


def _collectives_table(plan: Plan) -> Table:
    rows = []
    for collective in plan.collectives:
        cells = (
            collective["op"],
            collective["axis"],
            f"{collective['count']:.0f}",
            f"{collective['bytes'] / 1e6:.1f}",
            f"{1e3 * collective['seconds']:.2f}",
        )
        rows.append(cells)
    headings = ("collectives", "axis", "count", "MB sent per chip", "ms")
    return Table(headings, rows, num_left=2)


def with_prefix(value: float | int) -> str:
    """A number with its SI prefix, such as "4.936 G"."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    power = int(math.log10(max(value, 1)) // 3)
    power = min(power, len(prefixes) - 1)
    return f"{value / 1000**power:.4g} {prefixes[power]}"
