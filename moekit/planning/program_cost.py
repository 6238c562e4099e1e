"""The cost of a compiled XLA program: FLOPs, bytes, collectives and an estimate of its time.

XLA's own cost analysis counts the body of a loop once, counts a ragged product as if every group
were full, and does not model the interconnect. Here the optimized program is walked from its entry:
loop bodies are multiplied by their trip counts, ragged products are divided by their groups, and
collectives are recorded with the mesh axes that they cross. Instructions other than matmuls are
charged for the bytes of device memory that they read and write.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from moekit.planning.chips import Chip
from moekit.planning.hlo_program import (
    Computation,
    Instruction,
    first_replica_group,
    fusion_traffic,
    matmul_flops,
    parse_program,
    root_of,
    trip_count,
)

COLLECTIVES = (
    "all-to-all",
    "ragged-all-to-all",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
)
# instructions that take no time
FREE = (
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "iota",
    "partition-id",
    "replica-id",
    "optimization-barrier",
    "custom-call-start",
)
FREE_CUSTOM_CALLS = (
    "AllocateBuffer",
    "Sharding",
    "AssumeGatherIndicesInBound",
    "SPMDFullToShardShape",
)
LinkSeconds = Callable[[str, float, Int[np.ndarray, "members"]], float]


def crossed_axes(members: Int[np.ndarray, "members"], mesh: Mesh) -> str:
    """The mesh axes along which devices differ, as "data+expert"; "none" for one device."""
    coordinates = np.unravel_index(members, mesh.devices.shape)
    crossed = []
    for axis_name, positions in zip(mesh.axis_names, coordinates, strict=True):
        if np.ptp(positions):
            crossed.append(axis_name)
    return "+".join(crossed) or "none"


@dataclass
class Traffic:
    """All collectives of one kind over the same axes; bytes are those that one device sends."""

    count: int = 0
    nbytes: float = 0.0
    seconds: float = 0.0


@dataclass
class Cost:
    """The cost of one run of a program for one device."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    seconds: float = 0.0  # of computation and memory traffic, one after the other
    matmul_seconds: float = 0.0  # the part of `seconds` that is spent in matmuls
    collectives: dict[tuple[str, str], Traffic] = field(default_factory=dict)  # (kind, axes)
    padded_gather_bytes: float = 0.0  # of all-reduces that do the work of an all-gather
    heaviest: list[tuple[float, str, str]] = field(default_factory=list)  # seconds, name, source

    @property
    def interconnect_seconds(self) -> float:
        return sum((traffic.seconds for traffic in self.collectives.values()), 0.0)


def program_cost(text: str, mesh: Mesh, chip: Chip, link_seconds: LinkSeconds) -> Cost:
    """The cost of an optimized HLO module.

    Args:
      text: the module as `compiled.as_text()` prints it.
      mesh: the mesh that it was compiled for.
      chip: peak FLOP/s, memory bandwidth and clock.
      link_seconds: (kind, bytes, members of the first group) -> seconds of a collective.

    Raises:
      ValueError: the text is no HLO module.
    """
    walker = _ProgramWalker(text, mesh, chip, link_seconds)
    walker.visit_computation(walker.entry, 1)
    walker.cost.heaviest.sort(reverse=True)
    return walker.cost


class _ProgramWalker:
    """Adds up the cost of a program, computation by computation."""

    def __init__(self, text: str, mesh: Mesh, chip: Chip, link_seconds: LinkSeconds):
        self.computations, self.entry = parse_program(text)
        self.mesh = mesh
        self.chip = chip
        self.link_seconds = link_seconds
        self.cost = Cost()
        self.starting_fusions = self._starting_fusions()

    def _starting_fusions(self) -> dict[str, set[str]]:
        """The fusions that start each asynchronous collective, by its channel.

        Such a collective appears in several fusions (its start, matmuls beside it, its end); only
        its start is counted.
        """
        fusions = defaultdict(set)
        for name, computation in self.computations.items():
            instructions = computation.values()
            if any("AsyncCollectiveStart" in each.attributes for each in instructions):
                for instruction in instructions:
                    if instruction.channel is not None:
                        fusions[instruction.channel].add(name)
        return fusions

    def visit_computation(self, name: str, repeats: int) -> None:
        computation = self.computations[name]
        for instruction in computation.values():
            self.visit_instruction(instruction, computation, repeats)

    def visit_instruction(
        self, instruction: Instruction, computation: Computation, repeats: int
    ) -> None:
        opcode = instruction.opcode
        kind = opcode.removesuffix("-start")
        if opcode in FREE or opcode.endswith(("-done", "-update")):
            return
        if opcode == "while":
            trips = trip_count(instruction, computation, self.computations)
            self.visit_computation(instruction.called("body"), repeats * trips)
        elif opcode == "conditional":
            for branch in instruction.branches():
                self.visit_computation(branch, repeats)
        elif opcode in ("call", "async-start"):
            called = instruction.called("to_apply") or instruction.called()
            self.visit_computation(called, repeats)
        elif kind in COLLECTIVES:
            self.add_collective(instruction, kind, computation, repeats)
        elif opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            # asynchronous: its bytes count, its time is hidden behind other work
            self.cost.hbm_bytes += instruction.nbytes / 2 * repeats
        else:
            self.add_computation(instruction, computation, repeats)

    def add_collective(
        self, instruction: Instruction, kind: str, computation: Computation, repeats: int
    ) -> None:
        members = first_replica_group(instruction.attributes, self.mesh.size)
        axes = crossed_axes(members, self.mesh)
        if axes == "none":
            return
        nbytes = self._bytes_sent(instruction, kind, computation, axes)
        traffic = self.cost.collectives.setdefault((kind, axes), Traffic())
        traffic.count += repeats
        traffic.nbytes += nbytes * repeats
        traffic.seconds += self.link_seconds(kind, nbytes, members) * repeats
        if kind == "all-reduce" and self._is_padded_gather(instruction, computation):
            self.cost.padded_gather_bytes += nbytes * repeats

    def _bytes_sent(
        self, instruction: Instruction, kind: str, computation: Computation, axes: str
    ) -> float:
        """Bytes that one device sends in a collective."""
        operands = instruction.operands
        if kind == "ragged-all-to-all":
            operands = operands[:1]  # the others are offsets and sizes
        operand_bytes = 0.0
        for operand in operands:
            if operand in computation:
                operand_bytes += computation[operand].nbytes
        result_bytes = instruction.nbytes
        if instruction.opcode.endswith("-start"):
            result_bytes -= operand_bytes  # its result holds the operands as well
        group_size = math.prod(self.mesh.shape[axis] for axis in axes.split("+"))
        share_of_others = (group_size - 1) / group_size
        if kind == "collective-permute":
            return operand_bytes
        if kind == "all-gather":
            return result_bytes * share_of_others
        if kind == "all-reduce":
            return 2 * operand_bytes * share_of_others
        return operand_bytes * share_of_others

    def _is_padded_gather(self, instruction: Instruction, computation: Computation) -> bool:
        """Whether an operand of an all-reduce is one device's part in a buffer of zeros."""
        for name in instruction.operands:
            operand = computation.get(name)
            if operand is not None and operand.opcode == "fusion":
                operand = root_of(self.computations[operand.called()])
            if operand is not None and operand.opcode in ("dynamic-update-slice", "pad"):
                return True
        return False

    def add_computation(
        self, instruction: Instruction, computation: Computation, repeats: int
    ) -> None:
        """Add an instruction that computes, reads or writes."""
        if _is_free_custom_call(instruction):
            return
        flops, is_ragged = self._flops(instruction, computation, repeats)
        if is_ragged:
            # the compiler counts every group as if it held all rows
            flops /= _num_groups(instruction, computation)
        nbytes = self._hbm_bytes(instruction, computation)
        seconds = self._seconds(instruction, flops, nbytes, is_ragged)
        self.cost.flops += flops * repeats
        self.cost.hbm_bytes += nbytes * repeats
        self.cost.seconds += seconds * repeats
        if flops:
            self.cost.matmul_seconds += seconds * repeats
        source = re.search(r'op_name="([^"]*)"', instruction.attributes)
        source_name = source[1] if source else ""
        self.cost.heaviest.append((seconds * repeats, instruction.name, source_name))

    def _flops(
        self, instruction: Instruction, computation: Computation, repeats: int
    ) -> tuple[float, bool]:
        """FLOPs of an instruction, and whether they are those of a ragged product."""
        is_ragged = instruction.is_ragged_dot
        if instruction.opcode == "fusion":
            flops, has_ragged = self._visit_fusion(instruction.called(), repeats)
            return flops, is_ragged or has_ragged
        if instruction.opcode in ("convolution", "dot"):
            return matmul_flops(instruction, computation), is_ragged
        if instruction.opcode == "custom-call":
            noted = re.search(r'\\?"flops\\?":\\?"?([\d.e+]+)', instruction.attributes)
            return float(noted[1]) if noted else 0.0, is_ragged
        return 0.0, is_ragged

    def _visit_fusion(self, name: str, repeats: int) -> tuple[float, bool]:
        """FLOPs of a fusion's matmuls and whether one is ragged; adds its collectives."""
        flops = 0.0
        is_ragged = False
        computation = self.computations[name]
        for instruction in computation.values():
            if instruction.opcode in ("convolution", "dot"):
                flops += matmul_flops(instruction, computation)
                is_ragged = is_ragged or instruction.is_ragged_dot
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES and self._is_counted_in(name, instruction):
                self.add_collective(instruction, kind, computation, repeats)
            inner = instruction.called()
            if inner:
                inner_flops, inner_is_ragged = self._visit_fusion(inner, repeats)
                flops += inner_flops
                is_ragged = is_ragged or inner_is_ragged
        return flops, is_ragged

    def _is_counted_in(self, fusion: str, collective: Instruction) -> bool:
        starting = self.starting_fusions.get(collective.channel)
        return starting is None or fusion in starting

    def _hbm_bytes(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes of device memory that an instruction reads and writes."""
        opcode = instruction.opcode
        written = instruction.hbm_bytes
        read_bounds: dict[int, float] = {}  # by operand; no bound: all of it
        if opcode == "fusion":
            read_bounds, written_bound = fusion_traffic(self.computations, instruction.called())
            written = min(written, written_bound)
        elif opcode in ("slice", "dynamic-slice", "gather"):
            read_bounds = {0: instruction.nbytes}
        elif opcode == "dynamic-update-slice":
            read_bounds = {0: 0.0}
            written = min(written, computation[instruction.operands[1]].nbytes)
        total = written
        for position, name in enumerate(instruction.operands):
            if name in computation:
                bound = read_bounds.get(position, math.inf)
                total += min(computation[name].hbm_bytes, bound)
        return total

    def _seconds(
        self, instruction: Instruction, flops: float, nbytes: float, is_ragged: bool
    ) -> float:
        """Matmuls by the compiler's own cycles, other work by its bytes, kernels by a roofline."""
        chip = self.chip
        compute_seconds = flops / chip.flops
        memory_seconds = nbytes / chip.hbm_bandwidth
        if is_ragged or instruction.opcode == "custom-call":
            return max(compute_seconds, memory_seconds) / chip.kernel_efficiency
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        if flops and cycles:
            return int(cycles[1]) / chip.clock
        return max(compute_seconds, memory_seconds / chip.memory_efficiency)


def _is_free_custom_call(instruction: Instruction) -> bool:
    if instruction.opcode != "custom-call":
        return False
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return target is not None and target[1] in FREE_CUSTOM_CALLS


def _num_groups(instruction: Instruction, computation: Computation) -> int:
    """The number of groups of a ragged product: the largest leading size of its operands."""
    num_groups = 1
    for operand in instruction.operands:
        for array in computation[operand].arrays:
            if array.shape:
                num_groups = max(num_groups, array.shape[0])
    return num_groups
