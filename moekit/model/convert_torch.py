"""Tensors in files of torch.save, read without torch and without executing what they contain.

Such a file is a zip archive: `data.pkl` is a pickle of names, shapes and strides, and every storage
(the numbers of one or several tensors) is a file of its own beside it. A pickle may name any
function of any module to be called; here it may only name those that rebuild tensors.
"""

import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Storage:
    """The numbers of one or several tensors."""

    key: str  # its file in the archive
    dtype: np.dtype
    size: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file describes it; offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    def is_inside(self) -> bool:
        """Whether all numbers of the tensor are inside its storage."""
        fits = len(self.shape) == len(self.strides) and self.offset >= 0
        if not fits or min(self.shape, default=1) < 1 or min(self.strides, default=0) < 0:
            return False
        last = self.offset
        for size, stride in zip(self.shape, self.strides, strict=True):
            last += (size - 1) * stride
        return last < self.storage.size


def _rebuild_tensor(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *_: Any,
) -> StoredTensor:
    return StoredTensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: StoredTensor, *_: Any) -> StoredTensor:
    return tensor


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _TensorUnpickler(pickle.Unpickler):
    """Reads a pickle of tensors; everything else in it is refused before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) not in ALLOWED:
            raise ValueError(
                f"its pickle wants to call {module}.{name}, which is not part of a tensor; nothing "
                "was executed"
            )
        return ALLOWED[module, name]

    def persistent_load(self, reference: Any) -> Storage:
        kind, dtype, key, _, size = reference
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ValueError("its pickle refers to something that is not a tensor")
        return Storage(str(key), dtype, int(size))


class TorchFile:
    """The tensors of a file of torch.save.

    Raises:
      ValueError: not a zip archive of tensors by name, or a damaged one.
    """

    def __init__(self, path: Path):
        self.path = path
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} is not a zip archive, which torch.save writes since torch 1.6: it is "
                "truncated or of an older version; load it with torch and save it again, or use "
                "safetensors"
            )
        try:
            with zipfile.ZipFile(path) as archive:
                self.tensors = self._read_index(archive)
                self.starts = self._storage_starts(archive)
        except Exception as error:  # a damaged pickle raises nearly anything
            reason = str(error) or type(error).__name__
            raise ValueError(f"{path} cannot be read as tensors: {reason}") from None

    def _read_index(self, archive: zipfile.ZipFile) -> dict[str, StoredTensor]:
        (pickle_name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        self.folder = pickle_name.removesuffix("data.pkl")
        order = self.folder + "byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        with archive.open(pickle_name) as file:
            tensors = _TensorUnpickler(file).load()
        if not isinstance(tensors, dict):
            raise ValueError("it does not hold tensors by name")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
                raise ValueError(f"its entry {name!r} is not a tensor")
            if not tensor.is_inside():
                raise ValueError(f"its tensor {name} exceeds its storage")
        return dict(tensors)

    def _storage_starts(self, archive: zipfile.ZipFile) -> dict[str, int]:
        """The position in the file of the first byte of each storage."""
        starts = {}
        with self.path.open("rb") as file:
            for tensor in self.tensors.values():
                storage = tensor.storage
                info = archive.getinfo(f"{self.folder}data/{storage.key}")
                num_bytes = storage.size * storage.dtype.itemsize
                is_plain = info.compress_type == zipfile.ZIP_STORED
                if not is_plain or info.file_size < num_bytes:
                    raise ValueError(f"its storage {storage.key} is compressed or truncated")
                # local header: 30 bytes, then a name and extra bytes of the lengths at 26 and 28
                file.seek(info.header_offset + 26)
                lengths = struct.unpack("<HH", file.read(4))
                starts[storage.key] = info.header_offset + 30 + sum(lengths)
        return starts

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor. The file is mapped for as long as this view of it exists."""
        tensor = self.tensors[name]
        storage = tensor.storage
        numbers = np.memmap(
            self.path,
            storage.dtype,
            mode="r",
            offset=self.starts[storage.key],
            shape=(storage.size,),
        )
        strides = [stride * storage.dtype.itemsize for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(
            numbers[tensor.offset :], tensor.shape, strides, writeable=False
        )
        return view[index]
