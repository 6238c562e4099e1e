"""The text of a compiled XLA program as data: computations, instructions, FLOPs, trip counts.

An optimized HLO module is a set of named computations, one of which is the entry. Instructions
refer to other computations: the body of a loop, the inside of a fusion.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int

BYTES_PER_ELEMENT = {
    "pred": 1.0,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1.0,
    "u8": 1.0,
    "f8e4m3fn": 1.0,
    "f8e5m2": 1.0,
    "s16": 2.0,
    "u16": 2.0,
    "bf16": 2.0,
    "f16": 2.0,
    "s32": 4.0,
    "u32": 4.0,
    "f32": 4.0,
    "s64": 8.0,
    "u64": 8.0,
    "f64": 8.0,
    "c64": 8.0,
}

ARRAY_TYPE = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
COMPUTATION_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{\s*$")
INSTRUCTION_HEAD = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
OPERAND_NAME = re.compile(r"%([\w.\-]+)")
# a layout's memory space: 0 (or none) is HBM, others are on the chip
ON_CHIP_MEMORY = re.compile(r"S\([1-9]")
NATIVE_RAGGED_DOT = '"is_ragged_dot":true'


@dataclass(frozen=True)
class ArrayType:
    """Element type, shape and memory space of one array."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def nbytes(self) -> float:
        return BYTES_PER_ELEMENT[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    result_type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # the operands as written, or a constant's value
    attributes: str
    is_root: bool

    @cached_property
    def arrays(self) -> list[ArrayType]:
        """The arrays of the result: several for a tuple."""
        arrays = []
        for dtype, sizes, layout in ARRAY_TYPE.findall(self.result_type):
            if dtype not in BYTES_PER_ELEMENT:
                continue
            shape = tuple(int(size) for size in sizes.replace("<=", "").split(",") if size)
            in_hbm = ON_CHIP_MEMORY.search(layout) is None
            arrays.append(ArrayType(dtype, shape, in_hbm))
        return arrays

    @property
    def nbytes(self) -> float:
        return sum((array.nbytes for array in self.arrays), 0.0)

    @property
    def hbm_bytes(self) -> float:
        return sum((array.nbytes for array in self.arrays if array.in_hbm), 0.0)

    @property
    def is_ragged_dot(self) -> bool:
        return NATIVE_RAGGED_DOT in self.attributes

    @property
    def channel(self) -> str | None:
        """The channel of a collective, which all of its parts share."""
        match = re.search(r"channel_id=\d+", self.attributes)
        return match[0] if match else None

    def called(self, attribute: str = "calls") -> str | None:
        """The computation that an attribute names."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    def branches(self) -> list[str]:
        """The computations of a conditional."""
        match = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if match:
            return OPERAND_NAME.findall(match[1])
        names = [self.called("true_computation"), self.called("false_computation")]
        return [name for name in names if name is not None]


Computation = dict[str, Instruction]


def parse_program(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of an optimized HLO module and the name of its entry.

    Raises:
      ValueError: the text holds no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in text.splitlines():
        head = COMPUTATION_HEAD.match(line)
        if head:
            current = computations[head[2]] = {}
            if head[1]:
                entry = head[2]
            continue
        instruction_head = INSTRUCTION_HEAD.match(line)
        if instruction_head and current is not None:
            instruction = _parse_instruction(
                name=instruction_head[2],
                is_root=instruction_head[1] is not None,
                definition=line[instruction_head.end() :],
            )
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the compiled program has no readable text")
    return computations, entry


def _parse_instruction(name: str, is_root: bool, definition: str) -> Instruction:
    """An instruction from what follows its name: `type opcode(arguments), attributes`."""
    is_tuple = definition[0] == "("
    type_end = _closing_bracket(definition, 0) if is_tuple else definition.index(" ")
    result_type = definition[:type_end]
    call = definition[type_end:].lstrip()
    arguments_start = call.index("(")
    arguments_end = _closing_bracket(call, arguments_start)
    arguments = call[arguments_start + 1 : arguments_end - 1]
    return Instruction(
        name=name,
        result_type=result_type,
        opcode=call[:arguments_start],
        operands=tuple(OPERAND_NAME.findall(arguments)),
        arguments=arguments,
        attributes=call[arguments_end:],
        is_root=is_root,
    )


def _closing_bracket(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth -= 1
        if depth == 0:
            return index + 1
    raise ValueError(f"unbalanced brackets in a compiled program: {text[start : start + 80]}")


def root_of(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def matmul_flops(instruction: Instruction, computation: Computation) -> float:
    """2 x multiplications of a dot or of a convolution, which is how a TPU runs every matmul."""
    result_size = math.prod(instruction.arrays[0].shape)
    left_shape = computation[instruction.operands[0]].arrays[0].shape
    if instruction.opcode == "dot":
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        contracted = [left_shape[int(axis)] for axis in match[1].split(",") if axis]
        return 2.0 * result_size * math.prod(contracted)
    right_shape = computation[instruction.operands[1]].arrays[0].shape
    return _convolution_flops(instruction, left_shape, right_shape)


def _convolution_flops(
    instruction: Instruction, left_shape: tuple[int, ...], right_shape: tuple[int, ...]
) -> float:
    """Multiplications with padding are not counted."""
    result_shape = instruction.arrays[0].shape
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    input_labels, kernel_labels, output_labels = labels.groups()
    window_match = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = {}
    if window_match:
        window = dict(re.findall(r"(\w+)=([\dx_\-]+)", window_match[1]))
    num_spatial = sum(label.isdigit() for label in input_labels)

    def option(name: str, default: str) -> list[int]:
        values = window[name].split("x") if name in window else [default] * num_spatial
        return [int(value.split("_")[0]) for value in values]

    size, stride, padding = option("size", "1"), option("stride", "1"), option("pad", "0")
    input_dilation, kernel_dilation = option("lhs_dilate", "1"), option("rhs_dilate", "1")
    num_pairs, num_positions = 1, 1
    for axis in range(num_spatial):
        input_size = left_shape[input_labels.index(str(axis))]
        output_size = result_shape[output_labels.index(str(axis))]
        first = np.arange(output_size)[:, None] * stride[axis] - padding[axis]
        position = first + np.arange(size[axis])[None] * kernel_dilation[axis]
        last_position = (input_size - 1) * input_dilation[axis]
        in_bounds = (position >= 0) & (position <= last_position)
        on_grid = position % input_dilation[axis] == 0
        num_pairs *= int((in_bounds & on_grid).sum())
        num_positions *= output_size
    other_outputs = math.prod(result_shape) // max(1, num_positions)
    input_features = right_shape[kernel_labels.index("i")]
    return 2.0 * other_outputs * num_pairs * input_features


def trip_count(
    loop: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int:
    """How often a while loop runs: as XLA noted it, or its counter's limit; 1 if unknown."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if noted:
        return int(noted[1])
    condition = computations[loop.called("condition")]
    compares = [each for each in condition.values() if "direction=L" in each.attributes]
    if len(compares) != 1:
        return 1
    limit = condition.get(compares[0].operands[1])
    if limit is not None and limit.opcode == "get-tuple-element":
        limit = _initial_value(loop, limit, computation)
    while limit is not None and limit.opcode in ("copy", "bitcast", "convert"):
        source = limit.operands[0]
        limit = condition.get(source) or computation.get(source)
    if limit is None or limit.opcode != "constant" or not limit.arguments.isdigit():
        return 1
    return int(limit.arguments)


def _initial_value(
    loop: Instruction, element: Instruction, computation: Computation
) -> Instruction | None:
    """What an element of a loop's state holds before the first iteration."""
    start = computation.get(loop.operands[0])
    if start is None or start.opcode != "tuple":
        return None
    index = int(re.search(r"index=(\d+)", element.attributes)[1])
    return computation.get(start.operands[index])


def first_replica_group(attributes: str, num_devices: int) -> Int[np.ndarray, "members"]:
    """The first group of devices that take part in a collective, in any of XLA's notations."""
    named_axes = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if named_axes:
        return _group_over_named_axes(named_axes[1], named_axes[2])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](T\(([\d,]+)\))?", attributes)
    if iota:
        group_shape = _integers(iota[1])
        source_shape = _integers(iota[2])
        devices = np.arange(math.prod(source_shape)).reshape(source_shape)
        if iota[4]:
            devices = devices.transpose(_integers(iota[4]))
        return devices.reshape(group_shape)[0]
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return np.array(_integers(listed[1]))
    pairs_text = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    if pairs_text:
        pairs = re.findall(r"\{?(\d+),(\d+)", pairs_text[1])
        crossing = [pair for pair in pairs if pair[0] != pair[1]]
        first_pair = crossing[0] if crossing else (0, 0)
        return np.array(first_pair, int)
    return np.arange(num_devices)


def _group_over_named_axes(mesh_text: str, axes_text: str) -> Int[np.ndarray, "members"]:
    """The first group of `mesh['data'=2,'expert'=4] {'expert'}`.

    `'expert':(2)2` names a part of an axis: of size 2, after a part of size 2.
    """
    axis_sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh_text)}
    devices = np.arange(math.prod(axis_sizes.values())).reshape(tuple(axis_sizes.values()))
    selection: list[int | slice] = [0] * len(axis_sizes)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes_text):
        axis = list(axis_sizes).index(name)
        if size:
            step = axis_sizes[name] // (int(before) * int(size))
            selection[axis] = slice(0, int(size) * step, step)
        else:
            selection[axis] = slice(None)
    return devices[tuple(selection)].reshape(-1)


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def fusion_traffic(
    computations: dict[str, Computation], name: str
) -> tuple[dict[int, float], float]:
    """Upper bounds of the bytes that a fusion reads of each operand, and of those that it writes.

    A scan's body takes one layer's slice of the stacked parameters and puts one slice of results
    back: neither touches the rest. Without such slices the bound is infinite.
    """
    computation = computations[name]
    read_bounds: dict[int, float] = {}
    for instruction in computation.values():
        if instruction.opcode == "parameter":
            bound = _bytes_read(computations, computation, instruction)
            read_bounds[int(instruction.arguments)] = bound
    root = computation[_through_bitcasts(computation, root_of(computation).name)]
    written = math.inf
    if root.opcode == "dynamic-update-slice":
        written = computation[root.operands[1]].nbytes
    return read_bounds, written


def _bytes_read(
    computations: dict[str, Computation], computation: Computation, parameter: Instruction
) -> float:
    """Bytes of a fusion's parameter that its users read; infinite where one reads all of it."""
    total = 0.0
    for user in _users(computation, parameter.name):
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += user.nbytes
        elif user.opcode == "fusion":
            inner_bounds, _ = fusion_traffic(computations, user.called())
            for position, operand in enumerate(user.operands):
                if _through_bitcasts(computation, operand) == parameter.name:
                    total += inner_bounds.get(position, math.inf)
        elif user.opcode == "dynamic-update-slice":
            # the buffer that is updated in place is not read; an update is
            if _through_bitcasts(computation, user.operands[0]) != parameter.name:
                return math.inf
        else:
            return math.inf
    return total


def _users(computation: Computation, name: str) -> list[Instruction]:
    """The instructions that use a result, looking through bitcasts."""
    users = []
    for instruction in computation.values():
        if name not in instruction.operands:
            continue
        if instruction.opcode == "bitcast":
            users += _users(computation, instruction.name)
        else:
            users.append(instruction)
    return users


def _through_bitcasts(computation: Computation, name: str) -> str:
    """The instruction whose result a chain of bitcasts only relabels."""
    while computation[name].opcode == "bitcast":
        name = computation[name].operands[0]
    return name
