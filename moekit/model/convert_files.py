"""The tensors of a checkpoint folder of transformers: one file or shards, read piece by piece."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from moekit.data.paths import require_file
from moekit.model.convert_torch import TorchFile

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # names in safetensors
MAX_JSON = 64 << 20  # bytes
COMPARED_BYTES = 2**24  # of each of two tensors at once
SHOWN = 8  # names in an error message


class TensorInfo(NamedTuple):
    """Shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


class TensorFile(Protocol):
    """One file of tensors."""

    path: Path

    def infos(self) -> dict[str, TensorInfo]:
        """Shape and type of every tensor."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor. The file is mapped, and its pages count as memory of the process, for
        as long as this view of it exists."""


class SafetensorsFile:
    """A file of safetensors.

    Raises:
      ValueError: it is damaged.
    """

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, "numpy"):
                pass  # the library checks types, shapes and positions
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or not a safetensors file ({error}): copy or download it again"
            ) from None
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            self._header = json.loads(file.read(header_bytes))
        self._header.pop("__metadata__", None)
        self._first_byte = 8 + header_bytes

    def infos(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(tuple(entry["shape"]), entry["dtype"])
            for name, entry in self._header.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        entry = self._header[name]
        dtype = np.dtype(DTYPES[entry["dtype"]]).newbyteorder("<")
        first_byte = self._first_byte + entry["data_offsets"][0]
        shape = tuple(entry["shape"])
        return np.memmap(self.path, dtype, mode="r", offset=first_byte, shape=shape)[index]


class TorchTensors(TorchFile):
    """A file of torch.save, with the types named as in safetensors."""

    def infos(self) -> dict[str, TensorInfo]:
        names = {dtype: name for name, dtype in DTYPES.items()}
        found = {}
        for name, tensor in self.tensors.items():
            dtype = names.get(tensor.dtype.name, tensor.dtype.name)
            found[name] = TensorInfo(tensor.shape, dtype)
        return found


class CheckpointFiles:
    """All tensors of a folder.

    Raises:
      FileNotFoundError: there are no weights, or a shard is missing.
      ValueError: a file is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, TensorFile] = {}
        self._stored_name: dict[str, str] = {}  # of renamed tensors
        for path in weight_files(folder):
            is_torch = path.suffix == ".bin"
            file = TorchTensors(path) if is_torch else SafetensorsFile(path)
            for name, info in file.infos().items():
                self.infos[name] = info
                self._file_of[name] = file
        self._check_types()

    def _check_types(self) -> None:
        wrong = [
            f"{name} ({info.dtype})"
            for name, info in self.infos.items()
            if info.dtype not in DTYPES
        ]
        if wrong:
            raise ValueError(
                f"{self.folder} has tensors that are not of the types {', '.join(DTYPES)}: "
                f"{shorten(wrong)}; save them again as float32"
            )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, in the type in which it is stored.

        Raises:
          ValueError: the file has become unreadable.
        """
        file = self._file_of[name]
        try:
            return file.read(self._stored_name.get(name, name), index)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{file.path}: {name} cannot be read ({error})") from None

    def rename(self, old: str, new: str) -> None:
        """Give a tensor another name."""
        self.infos[new] = self.infos.pop(old)
        self._file_of[new] = self._file_of.pop(old)
        self._stored_name[new] = old

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors are equal, compared some rows at a time."""
        shape = self.infos[first].shape
        if shape != self.infos[second].shape:
            return False
        row_numbers = max(1, int(np.prod(shape[1:])))
        step = max(1, COMPARED_BYTES // (4 * row_numbers))
        for start in range(0, shape[0], step):
            rows = (slice(start, min(start + step, shape[0])),)
            if not np.array_equal(self.read(first, rows), self.read(second, rows)):
                return False
        return True


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: safetensors before torch, one file before shards.

    Raises:
      FileNotFoundError: there are none, or shards are missing.
    """
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder, folder / index)
    expected = ", ".join(SINGLE_FILES + INDEX_FILES)
    raise FileNotFoundError(f"{folder} has no weights: expected one of {expected}")


def _shards(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ValueError(f"{index} lists no files (weight_map): copy or download it again")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index} names files outside of its folder: {shorten(outside)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(names)} files that {index.name} lists: "
            f"{shorten(missing)}; copy or download them as well"
        )
    return [folder / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if it holds none or has more than 64 MiB."""
    require_file(path, MAX_JSON)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a JSON file ({error}): copy or download it again"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a JSON object: copy or download it again")
    return values


def shorten(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
