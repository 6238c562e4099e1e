"""Writing a folder that appears as a whole, and safetensors files tensor by tensor.

The library safetensors writes tensors that are all in memory. The format is small: the length of
the header (8 bytes), a JSON header with type, shape and place of every tensor, and their numbers.
"""

import contextlib
import json
import math
import shutil
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moekit.distributed import is_first, run_on_first

SHARD_BYTES = 5 * 10**9  # largest file
BLOCK_BYTES = 2**24  # of a tensor that is transposed and written at once
Shape = tuple[int, ...]


@contextlib.contextmanager
def new_folder(path: Path, num_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `path`, which becomes `path` at the end and is deleted on errors.

    Args:
      num_bytes: what will be written, for which the disk must have room.

    Raises:
      FileExistsError: `path` exists.
      OSError: the disk is full or not writable.
    """
    path = path.absolute()
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"

    def create() -> None:
        if path.exists():
            raise FileExistsError(f"{path} exists already: choose another folder, or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < num_bytes:
            raise OSError(
                f"{path.parent} has {free / 1e6:,.1f} MB free, {path.name} needs "
                f"{num_bytes / 1e6:,.1f} MB: make room or choose another folder"
            )
        temporary.mkdir()

    try:
        run_on_first(create)
        yield temporary
        run_on_first(lambda: temporary.rename(path))
    except FileExistsError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"could not write {path}: {reason}; nothing is left of it") from None
    finally:
        if is_first():
            shutil.rmtree(temporary, ignore_errors=True)


class SafetensorsWriter:
    """Float32 tensors in one file or several, in an order that is known before.

    Args:
      shapes: of all tensors, in the order in which they are written.
    """

    def __init__(self, folder: Path, shapes: dict[str, Shape]):
        self.folder = folder
        self.shards = _divide(shapes)
        self._file: BinaryIO | None = None
        self._first_of = {next(iter(shard)): number for number, shard in enumerate(self.shards)}

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Write the next tensor."""
        if name in self._first_of:
            self._start(self._first_of[name])
        if tensor.ndim < 2:
            self._file.write(np.ascontiguousarray(tensor, "<f4").data)
            return
        rows = max(1, BLOCK_BYTES // (4 * math.prod(tensor.shape[1:])))
        for start in range(0, len(tensor), rows):
            block = np.ascontiguousarray(tensor[start : start + rows], "<f4")
            self._file.write(block.data)

    def _start(self, number: int) -> None:
        self.close_file()
        self._file = (self.folder / self._file_name(number)).open("wb")
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in self.shards[number].items():
            start = end
            end += 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)

    def _file_name(self, number: int) -> str:
        if len(self.shards) == 1:
            return "model.safetensors"
        return f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"

    def close_file(self) -> None:
        """Close the file that is being written."""
        if self._file is not None:
            self._file.close()

    def close(self) -> None:
        """Close the last file and write the index of the shards."""
        self.close_file()
        if len(self.shards) == 1:
            return
        weight_map = {}
        num_bytes = 0
        for number, shard in enumerate(self.shards):
            for name, shape in shard.items():
                weight_map[name] = self._file_name(number)
                num_bytes += 4 * math.prod(shape)
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        path = self.folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _divide(shapes: dict[str, Shape]) -> list[dict[str, Shape]]:
    """The tensors of each file."""
    shards: list[dict[str, Shape]] = []
    num_bytes = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        if not shards or num_bytes + size > SHARD_BYTES:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = shape
        num_bytes += size
    return shards
