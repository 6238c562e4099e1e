"""Traces on disk: compressed .npz files of plain arrays and a JSON header, checked when read.

Y MoE layers of a stack, N tokens, K choices per token.
"""

import json
import math
import zipfile
from collections.abc import Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray
from numpy.typing import DTypeLike

from moekit.data.paths import require_file

FORMAT = 1
MAX_BYTES = 400_000_000  # of all arrays, uncompressed: about 2.5 million tokens in 12 layers
STACKS = ("encoder", "decoder")


class ArrayField(NamedTuple):
    """Dimensions of an array of a stack, its type in a file and in memory."""

    dimensions: str
    stored: DTypeLike
    loaded: DTypeLike


FIELDS = {
    "token": ArrayField("N", np.int32, np.int32),
    "example": ArrayField("N", np.int32, np.int32),
    "position": ArrayField("N", np.int16, np.int32),
    "expert": ArrayField("YNK", np.int16, np.int32),
    "weight": ArrayField("YNK", np.float16, np.float32),
    "kept": ArrayField("YNK", np.bool_, np.bool_),
    "entropy": ArrayField("YN", np.float16, np.float32),
}
Arrays = Mapping[str, ndarray]  # of one stack, by field


def write_trace(path: str | Path, header: Mapping[str, Any], stacks: Mapping[str, Arrays]) -> None:
    """Write a header and the arrays of each stack, in place of the file at that path.

    Raises:
      ValueError: the arrays are larger than what `read_trace` accepts.
    """
    path = Path(path)
    arrays = _stored_arrays(header, stacks)
    size = sum(array.nbytes for array in arrays.values())
    if size > MAX_BYTES:
        raise ValueError(f"{path}: a trace of {_megabytes(size)}: trace fewer prompts")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    try:
        np.savez_compressed(partial, **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _stored_arrays(header: Mapping[str, Any], stacks: Mapping[str, Arrays]) -> dict[str, ndarray]:
    """The arrays of a file by name: "header" and "<stack>.<field>"."""
    text = json.dumps({"format": FORMAT, **header})
    stored = {"header": np.array(text)}
    for stack, arrays in stacks.items():
        for name, field in FIELDS.items():
            stored[f"{stack}.{name}"] = arrays[name].astype(field.stored)
    return stored


def read_trace(path: str | Path) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """The header and the arrays of each stack, as `write_trace` wrote them.

    The header has "model", "num_experts", "truncated" and "labels" (tasks, clusters and domains
    of the examples).

    Raises:
      ValueError: the file is something else, is damaged, has another format, or its arrays would
        take more than `MAX_BYTES` of memory (their sizes are read first).
    """
    require_file(Path(path))
    try:
        size = _uncompressed_size(path)
        if size > MAX_BYTES:
            raise ValueError(f"its arrays take {_megabytes(size)}")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
        _check_header(header)
        stacks = _split_by_stack(arrays)
        for stack, own in stacks.items():
            _check_arrays(stack, own, header["num_experts"], len(header["labels"][0]))
        return header, stacks
    except OSError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything in zipfile, zlib and numpy
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a routing trace, or damaged ({reason})") from None


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB, more than the {MAX_BYTES / 1e6:.0f} MB allowed"


def _uncompressed_size(path: str | Path) -> int:
    """Bytes of all arrays of an .npz file, from their headers."""
    total = 0
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                total += _array_size(member)
    return total


def _array_size(file: BufferedIOBase) -> int:
    """Bytes of the array of an .npy file, from its header."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"npy version {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if min(shape, default=0) < 0 or dtype.hasobject:
        raise ValueError(f"an array of shape {shape} and type {dtype}")
    return math.prod(shape) * dtype.itemsize


def _check_header(header: Any) -> None:
    """The types of what a header has."""
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"its trace format is {header.get('format')!r}, this version reads {FORMAT}: trace the "
            "prompts again"
        )
    if not isinstance(header.get("model"), str):
        raise ValueError("model is not a string")
    for name, smallest in (("num_experts", 1), ("truncated", 0)):
        value = header.get(name)
        if type(value) is not int or value < smallest:
            raise ValueError(f"{name} is {str(value)[:40]}, not a whole number from {smallest} on")
    labels = header.get("labels")
    if not isinstance(labels, list) or len(labels) != 3:
        raise ValueError("labels are not tasks, clusters and domains")
    for names in labels:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("labels are not lists of strings")
    if len({len(names) for names in labels}) > 1:
        raise ValueError("labels are not of the same examples")


def _split_by_stack(arrays: Arrays) -> dict[str, Arrays]:
    """The arrays "<stack>.<field>" by stack; all fields of at least one stack."""
    stacks = {}
    known = set()
    for stack in STACKS:
        keys = {f"{stack}.{name}": name for name in FIELDS}
        if keys.keys() & arrays.keys():
            stacks[stack] = {name: arrays[key] for key, name in keys.items()}
            known |= keys.keys()
    unknown = sorted(arrays.keys() - known)
    if unknown or not stacks:
        raise ValueError(f"unknown arrays {unknown}" if unknown else "no stacks")
    return stacks


def _check_arrays(stack: str, arrays: dict[str, ndarray], experts: int, examples: int) -> None:
    """Check shapes, types and ranges of the arrays of one stack; convert them for use."""
    shape = arrays["expert"].shape
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"{stack}.expert has shape {shape}, not [layers, tokens, choices]")
    sizes = dict(zip("YNK", shape, strict=True))
    for name, field in FIELDS.items():
        array = arrays[name]
        expected = tuple(sizes[dimension] for dimension in field.dimensions)
        if array.shape != expected:
            raise ValueError(f"{stack}.{name} has shape {array.shape}, not {expected}")
        if array.dtype.kind != np.dtype(field.stored).kind:
            raise ValueError(f"{stack}.{name} has type {array.dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{stack}.{name} is not finite")
        arrays[name] = array.astype(field.loaded)
    smallest = {"token": 0, "example": 0, "position": 0, "expert": -1}
    for name, least in smallest.items():
        if arrays[name].min() < least:
            raise ValueError(f"{stack}.{name} has a value below {least}")
    if arrays["expert"].max() >= experts:
        raise ValueError(f"{stack}.expert has expert {arrays['expert'].max()} of {experts}")
    if arrays["example"].max() >= examples:
        raise ValueError(f"{stack}.example has example {arrays['example'].max()} of {examples}")
