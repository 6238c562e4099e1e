"""Reading a compiled XLA program: its FLOPs, bytes, collectives and an estimate of its time.

XLA's own cost analysis counts the body of a loop once and a ragged product as if every group were
full, and knows no links between chips. Here the optimized program is walked from its entry: loops
count as often as they run, ragged products are divided by their groups, collectives are booked with
the mesh axes that they cross. What is not a product is charged its bytes of device memory.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jax.sharding import Mesh

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "s4": 0.5, "u4": 0.5}
BYTES |= {"f8e4m3fn": 1, "f8e5m2": 1}
COLLECTIVES = (
    "all-to-all",
    "ragged-all-to-all",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
)
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota")
FREE += ("partition-id", "replica-id", "optimization-barrier", "custom-call-start")
# custom calls that stand for no work
NO_WORK = ("AllocateBuffer", "Sharding", "AssumeGatherIndicesInBound", "SPMDFullToShardShape")


@dataclass(frozen=True)
class Array:
    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def nbytes(self) -> float:
        return float(BYTES[self.dtype] * math.prod(self.shape))


@dataclass(frozen=True)
class Op:
    """One instruction."""

    name: str
    type: str
    code: str
    operands: tuple[str, ...]
    arguments: str  # the operands as written, or a constant's value
    attributes: str
    root: bool

    @cached_property
    def arrays(self) -> list[Array]:
        found = re.finditer(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?", self.type)
        return [
            Array(
                m[1],
                tuple(int(n) for n in m[2].replace("<=", "").split(",") if n),
                not re.search(r"S\([1-9]", m[3] or ""),  # other spaces lie on the chip itself
            )
            for m in found
            if m[1] in BYTES
        ]

    @property
    def nbytes(self) -> float:
        return float(sum(a.nbytes for a in self.arrays))

    @property
    def hbm_bytes(self) -> float:
        return float(sum(a.nbytes for a in self.arrays if a.in_hbm))

    def called(self, key: str = "calls") -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


Computation = dict[str, Op]


def _closing(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced brackets in a compiled program: {text[start : start + 80]}")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of an optimized HLO module and the name of its entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{\s*$", line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif current is not None and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
            rest = line[found.end() :]
            end = _closing(rest, 0) if rest[0] == "(" else rest.index(" ")
            kind, rest = rest[:end], rest[end:].lstrip()
            start = rest.index("(")
            end = _closing(rest, start)
            arguments = rest[start + 1 : end - 1]
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            op = Op(found[2], kind, rest[:start], operands, arguments, rest[end:], bool(found[1]))
            current[op.name] = op
    if not entry:
        raise ValueError("the compiled program has no readable text")
    return computations, entry


def product_flops(op: Op, computation: Computation) -> float:
    """2 x multiplications of a dot or convolution (what TPUs make of every product)."""
    out = math.prod(op.arrays[0].shape)
    left = computation[op.operands[0]].arrays[0].shape
    if op.code == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)[1]
        return 2.0 * out * math.prod(left[int(i)] for i in contracted.split(",") if i)
    right = computation[op.operands[1]].arrays[0].shape
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    inputs, kernel, output = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", op.attributes)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", window[1])) if window else {}
    spatial = sum(c.isdigit() for c in inputs)

    def option(name, default):
        values = window[name].split("x") if name in window else [default] * spatial
        return [int(v.split("_")[0]) for v in values]

    size, stride, pad = option("size", "1"), option("stride", "1"), option("pad", "0")
    left_dilation, right_dilation = option("lhs_dilate", "1"), option("rhs_dilate", "1")
    pairs, positions = 1, 1
    for d in range(spatial):
        n, m = left[inputs.index(str(d))], op.arrays[0].shape[output.index(str(d))]
        at = np.arange(m)[:, None] * stride[d] - pad[d]
        at = at + np.arange(size[d])[None] * right_dilation[d]
        inside = (at >= 0) & (at <= (n - 1) * left_dilation[d]) & (at % left_dilation[d] == 0)
        pairs, positions = pairs * int(inside.sum()), positions * m
    return 2.0 * (out // max(1, positions)) * pairs * right[kernel.index("i")]


def trip_count(op: Op, computation: Computation, computations: dict[str, Computation]) -> int:
    """How often a while loop runs: as XLA noted it, or its counter's limit; 1 if unknown."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.attributes):
        return int(noted[1])
    condition = computations[op.called("condition")]
    compares = [o for o in condition.values() if "direction=L" in o.attributes]
    if len(compares) != 1:
        return 1
    limit = condition.get(compares[0].operands[1])
    if limit is not None and limit.code == "get-tuple-element":
        start = computation.get(op.operands[0])
        index = int(re.search(r"index=(\d+)", limit.attributes)[1])
        limit = start and computation.get(start.operands[index]) if start.code == "tuple" else None
    while limit is not None and limit.code in ("copy", "bitcast", "convert"):
        limit = condition.get(limit.operands[0]) or computation.get(limit.operands[0])
    constant = limit is not None and limit.code == "constant"
    return int(limit.arguments) if constant and limit.arguments.isdigit() else 1


def _channel(op: Op) -> str | None:
    return (found := re.search(r"channel_id=\d+", op.attributes)) and found[0]


def _members(attributes: str, devices: int) -> np.ndarray:
    """The first group of devices that take part in a collective."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        axes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", found[1])}
        ids = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        index = [0] * len(axes)
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[2]):
            i = list(axes).index(name)
            step = axes[name] // (int(before) * int(size)) if size else 1
            index[i] = slice(0, int(size) * step if size else None, step)
        return ids[tuple(index)].reshape(-1)
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](T\(([\d,]+)\))?", attributes):
        shape, source = ([int(n) for n in found[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(source)).reshape(source)
        if found[4]:
            ids = ids.transpose([int(n) for n in found[4].split(",")])
        return ids.reshape(shape)[0]
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return np.array([int(n) for n in found[1].split(",") if n])
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        pairs = re.findall(r"\{?(\d+),(\d+)", found[1])
        return np.array(next((p for p in pairs if p[0] != p[1]), (0, 0)), int)
    return np.arange(devices)


def crossed_axes(members: np.ndarray, mesh: Mesh) -> str:
    """The mesh axes along which devices differ, as "data+expert"; "none" for one device."""
    places = np.unravel_index(members, mesh.devices.shape)
    crossed = [name for name, where in zip(mesh.axis_names, places, strict=True) if np.ptp(where)]
    return "+".join(crossed) or "none"


@dataclass
class Traffic:
    """All collectives of one kind over the same axes; bytes are those that a device sends."""

    count: int = 0
    nbytes: float = 0.0
    seconds: float = 0.0


@dataclass
class Cost:
    """What one run of a program costs one device."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    seconds: float = 0.0  # of computing and memory, one after the other
    product_seconds: float = 0.0  # of these, products
    collectives: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    padded_gathers: float = 0.0  # bytes of all-reduces that do the work of an all-gather
    heaviest: list[tuple[float, str, str]] = field(default_factory=list)  # seconds, op, its source

    @property
    def link_seconds(self) -> float:
        return float(sum(t.seconds for t in self.collectives.values()))


class Walker:
    """Adds up a program.

    Args:
      chip: peak FLOP/s, bytes/s of memory, clock, and what share work other than products reaches.
      link_seconds: (kind, bytes, members of the first group) -> seconds of a collective.
    """

    def __init__(self, text: str, mesh: Mesh, chip, link_seconds: Callable):
        self.computations, self.entry = parse(text)
        self.mesh, self.chip, self.link_seconds = mesh, chip, link_seconds
        self.cost = Cost()
        # a collective beside products stands in each of their fusions, too: its start counts
        self.starts = defaultdict(set)
        for name, ops in self.computations.items():
            if any("AsyncCollectiveStart" in op.attributes for op in ops.values()):
                for channel in filter(None, map(_channel, ops.values())):
                    self.starts[channel].add(name)

    def run(self) -> Cost:
        self.walk(self.entry, 1)
        self.cost.heaviest.sort(reverse=True)
        return self.cost

    def walk(self, name: str, times: int) -> None:
        computation = self.computations[name]
        for op in computation.values():
            base = op.code.removesuffix("-start")
            if op.code in FREE or op.code.endswith(("-done", "-update")):
                continue
            if op.code == "while":
                trips = trip_count(op, computation, self.computations)
                self.walk(op.called("body"), times * trips)
            elif op.code == "conditional":
                for branch in _branches(op):
                    self.walk(branch, times)
            elif op.code in ("call", "async-start"):
                self.walk(op.called("to_apply") or op.called(), times)
            elif base in COLLECTIVES:
                self.collective(op, base, computation, times)
            elif op.code in ("copy-start", "slice-start", "dynamic-slice-start"):
                self.cost.hbm_bytes += op.nbytes / 2 * times  # beside other work
            else:
                self.compute(op, computation, times)

    def collective(self, op: Op, kind: str, computation: Computation, times: int) -> None:
        members = _members(op.attributes, self.mesh.size)
        axis = crossed_axes(members, self.mesh)
        if axis == "none":
            return
        devices = math.prod(self.mesh.shape[name] for name in axis.split("+"))
        operands = op.operands[:1] if kind == "ragged-all-to-all" else op.operands
        sent = sum(computation[o].nbytes for o in operands if o in computation)
        received = op.nbytes - (sent if op.code.endswith("-start") else 0)
        share = (devices - 1) / devices
        wire = {"all-gather": received * share, "all-reduce": 2 * sent * share}
        nbytes = wire.get(kind, sent if kind == "collective-permute" else sent * share)
        traffic = self.cost.collectives.setdefault((kind, axis), Traffic())
        traffic.count += times
        traffic.nbytes += nbytes * times
        traffic.seconds += self.link_seconds(kind, nbytes, members) * times
        if kind == "all-reduce" and any(self._padded(computation, o) for o in op.operands):
            self.cost.padded_gathers += nbytes * times

    def _padded(self, computation: Computation, name: str) -> bool:
        """Whether an array is one device's part in a buffer of zeros."""
        op = computation.get(name)
        if op is not None and op.code == "fusion":
            op = next((o for o in self.computations[op.called()].values() if o.root), None)
        return op is not None and op.code in ("dynamic-update-slice", "pad")

    def _inside(self, name: str, times: int) -> tuple[float, bool]:
        """FLOPs of a fusion's products and whether one is ragged; its collectives are booked."""
        flops, ragged = 0.0, False
        for op in self.computations[name].values():
            if op.code in ("convolution", "dot"):
                flops += product_flops(op, self.computations[name])
                ragged |= '"is_ragged_dot":true' in op.attributes
            base = op.code.removesuffix("-start")
            if base in COLLECTIVES and name in self.starts.get(_channel(op), {name}):
                self.collective(op, base, self.computations[name], times)
            if inner := op.called():
                more, also = self._inside(inner, times)
                flops, ragged = flops + more, ragged or also
        return flops, ragged

    def compute(self, op: Op, computation: Computation, times: int) -> None:
        chip, flops = self.chip, 0.0
        ragged = '"is_ragged_dot":true' in op.attributes
        reads, written = {}, op.hbm_bytes
        if op.code == "fusion":
            flops, inner_ragged = self._inside(op.called(), times)
            ragged |= inner_ragged
            reads, update = sliced_bytes(self.computations, op.called())
            written = min(written, update)
        elif op.code in ("convolution", "dot"):
            flops = product_flops(op, computation)
        elif op.code in ("slice", "dynamic-slice", "gather"):
            reads = {0: op.nbytes}
        elif op.code == "dynamic-update-slice":
            reads, written = {0: 0.0}, min(written, computation[op.operands[1]].nbytes)
        nbytes = written + sum(
            min(computation[o].hbm_bytes, reads.get(i, math.inf))
            for i, o in enumerate(op.operands)
            if o in computation
        )
        kernel = op.code == "custom-call"
        if kernel:
            target = re.search(r'custom_call_target="([^"]*)"', op.attributes)
            if target and target[1] in NO_WORK:
                return
            noted = re.search(r'\\?"flops\\?":\\?"?([\d.e+]+)', op.attributes)
            flops = float(noted[1]) if noted else flops
        if ragged:
            # every group is counted as if it held all rows
            groups = [a.shape[0] for o in op.operands for a in computation[o].arrays]
            flops /= max([1, *(g for g, o in zip(groups, op.operands, strict=False))])
        cycles = re.search(r'"estimated_cycles":"(\d+)"', op.attributes)
        roofline = max(flops / chip.flops, nbytes / chip.hbm_bandwidth)
        if kernel or ragged:
            seconds = roofline / chip.kernel_efficiency
        elif flops and cycles:
            seconds = int(cycles[1]) / chip.clock
        else:
            seconds = max(flops / chip.flops, nbytes / chip.hbm_bandwidth / chip.memory_efficiency)
        self.cost.flops += flops * times
        self.cost.hbm_bytes += nbytes * times
        self.cost.seconds += seconds * times
        self.cost.product_seconds += seconds * times if flops else 0
        source = re.search(r'op_name="([^"]*)"', op.attributes)
        self.cost.heaviest.append((seconds * times, op.name, source[1] if source else ""))


def _branches(op: Op) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", op.attributes):
        return re.findall(r"%([\w.\-]+)", found[1])
    return [op.called("true_computation"), op.called("false_computation")]


def sliced_bytes(computations: dict[str, Computation], name: str) -> tuple[dict[int, float], float]:
    """Bytes that a fusion really reads of each operand it only takes slices of, and writes.

    A scan's body takes one layer's slice of the stacked parameters and puts one slice of results
    back: neither touches the rest.
    """
    computation = computations[name]
    users = defaultdict(list)
    for op in computation.values():
        for operand in op.operands:
            users[operand].append(op)

    def through_bitcasts(name):
        for user in users[name]:
            if user.code == "bitcast":
                yield from through_bitcasts(user.name)
            else:
                yield user

    def origin(name):
        while computation[name].code == "bitcast":
            name = computation[name].operands[0]
        return name

    reads = {}
    for op in computation.values():
        if op.code != "parameter":
            continue
        total = 0.0
        for user in through_bitcasts(op.name):
            if user.code in ("dynamic-slice", "slice", "gather"):
                total += user.nbytes
            elif user.code == "fusion":
                inner, _ = sliced_bytes(computations, user.called())
                places = [i for i, o in enumerate(user.operands) if origin(o) == op.name]
                total += sum(inner.get(i, math.inf) for i in places)
            elif user.code != "dynamic-update-slice" or origin(user.operands[0]) != op.name:
                total = math.inf
        reads[int(op.arguments)] = total
    root = next(op for op in computation.values() if op.root)
    root = computation[origin(root.name)]
    update = root.code == "dynamic-update-slice"
    return reads, computation[root.operands[1]].nbytes if update else math.inf
