"""Checkpoints of transformers in and out: T5, T5 v1.1, Flan-T5 and Switch Transformers.

Both directions read one table of names (`convert_names.py`). Tensors are read and written one at a
time, straight into, and out of, sharded arrays.

The public Switch checkpoints are pretrained only: until they are tuned they restore masked spans
and answer questions with gibberish.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  numpy learns bfloat16
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from moekit.config import ModelConfig
from moekit.distributed import is_first
from moekit.model.convert_config import (
    SWITCH,
    config_from_transformers,
    config_to_transformers,
    generation_to_transformers,
)
from moekit.model.convert_files import CheckpointFiles, read_json, shorten
from moekit.model.convert_names import COPIES, UNUSED, Layout, Names, Shape, layouts
from moekit.model.convert_tokenizer import (
    check_tokenizer,
    copy_tokenizer,
    tokenizer_of,
    with_byte_pieces,
    write_byte_pieces,
)
from moekit.model.convert_write import SafetensorsWriter, new_folder
from moekit.model.transformer import EncoderDecoder
from moekit.progress import ProgressBar
from moekit.sharding import variable_sharding

ALIGNMENT = 64  # bytes; jax for CPU uses such a numpy array without a copy
GENERATION = "generation_config.json"


def is_transformers_folder(folder: Path) -> bool:
    """Whether a folder holds a model of transformers."""
    return (folder / "config.json").is_file()


def load_transformers(folder: Path, mesh: Mesh | None = None) -> EncoderDecoder:
    """The model in a folder of transformers, in float32.

    Every device gets its own shards, read from the files tensor by tensor: besides the model, host
    memory holds one of its parameters at most, and no device holds more than its shards.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a damaged file, another model family, or tensors that are missing, have other
        shapes than config.json says, or have no place in our model.
    """
    values = read_json(folder / "config.json")
    config_from_transformers(values, folder, tied=True)  # another family is reported first
    files = _open_files(folder, values)
    cfg = _config(folder, values, files)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: EncoderDecoder(cfg, mesh=mesh)))
    variables = dict(nnx.to_flat_state(state))
    parts = layouts({names: variable.shape for names, variable in variables.items()}, cfg)
    _check_tensors(files, parts)
    num_tensors = sum(len(part.names) for part in parts.values())
    with ProgressBar(total=num_tensors, desc="load", unit="tensor", leave=False) as progress:
        for names, variable in variables.items():
            sharding = variable_sharding(variable, mesh)
            array = _read_array(files, parts[names], sharding, progress)
            variables[names] = variable.replace(array)
    return nnx.merge(graphdef, nnx.from_flat_state(variables))


def _open_files(folder: Path, values: dict[str, Any]) -> CheckpointFiles:
    """The tensors of a folder, those that are stored as a copy only under their proper name."""
    files = CheckpointFiles(folder)
    for copy, name in COPIES.items():
        if copy == "lm_head.weight" and values.get("tie_word_embeddings") is False:
            continue
        if name not in files.infos and copy in files.infos:
            files.rename(copy, name)
    return files


def _config(folder: Path, values: dict[str, Any], files: CheckpointFiles) -> ModelConfig:
    generation = None
    if (folder / GENERATION).is_file():
        generation = read_json(folder / GENERATION)
    return config_from_transformers(
        values,
        folder,
        tied=_is_tied(values, files),
        tokenizer=tokenizer_of(folder),
        generation=generation,
    )


def _is_tied(values: dict[str, Any], files: CheckpointFiles) -> bool:
    """Whether the output logits use the embedding: their own matrix is missing, or equal to it."""
    if "lm_head.weight" not in files.infos:
        return True
    if values.get("tie_word_embeddings") is False or "shared.weight" not in files.infos:
        return False  # a missing embedding is reported with all that is missing
    return files.equal("lm_head.weight", "shared.weight")


def _check_tensors(files: CheckpointFiles, parts: dict[Names, Layout]) -> None:
    """Check the tensors of a folder against those of a model.

    Raises:
      ValueError: tensors are missing, unknown, or of another shape or, as copies, value.
    """
    shapes: dict[str, Shape] = {}
    for part in parts.values():
        for name in part.names.values():
            shapes[name] = part.tensor_shape
    missing = [name for name in shapes if name not in files.infos]
    unknown = []
    wrong = []
    for name, info in files.infos.items():
        if name in shapes:
            if info.shape != shapes[name]:
                wrong.append(f"{name} has shape {info.shape} instead of {shapes[name]}")
        elif name in COPIES:
            if not files.equal(name, COPIES[name]):
                wrong.append(f"{name} differs from {COPIES[name]}")
        elif name not in UNUSED:
            unknown.append(name)
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing ({shorten(missing)})")
    if unknown:
        problems.append(f"{len(unknown)} have no place in the model ({shorten(unknown)})")
    if wrong:
        problems.append(shorten(wrong))
    if problems:
        raise ValueError(
            f"{files.folder} does not hold the model that its config.json describes: "
            f"{'; '.join(problems)}"
        )


def _read_array(
    files: CheckpointFiles,
    part: Layout,
    sharding: Sharding,
    progress: ProgressBar,
) -> jax.Array:
    """An array whose shards are read one after the other."""
    num_shards = len(sharding.addressable_devices)

    def read_shard(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [axis.indices(size)[:2] for axis, size in zip(index, part.shape, strict=True)]
        shard = aligned_empty(tuple(stop - start for start, stop in bounds))
        leading = bounds[: part.num_leading]
        piece = tuple(slice(start, stop) for start, stop in bounds[part.num_leading :])
        tensor_index = part.tensor_index(piece)
        for position in np.ndindex(shard.shape[: part.num_leading]):
            place = tuple(
                start + offset for (start, _), offset in zip(leading, position, strict=True)
            )
            tensor = files.read(part.names[place], tensor_index)
            if part.transposed:
                tensor = tensor.T
            shard[position].reshape(tensor.shape)[...] = tensor
            progress.update(1 / num_shards)
        return shard

    return jax.make_array_from_callback(part.shape, sharding, read_shard)


def aligned_empty(shape: Shape) -> np.ndarray:
    """An uninitialised float32 array that starts at a multiple of 64 bytes."""
    num_bytes = 4 * math.prod(shape)
    memory = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes].view(np.float32).reshape(shape)


def export(path: str | Path, model: EncoderDecoder) -> None:
    """Write a model as a folder that transformers loads with `from_pretrained`.

    The folder gets config.json, generation_config.json, model.safetensors (or shards of 5 GB) in
    float32, and the tokenizer of the model's configuration. It appears when all of it is written.

    Args:
      path: a folder that does not exist yet.

    Raises:
      FileExistsError: the folder exists.
      FileNotFoundError: the model's tokenizer is missing.
      ValueError: transformers cannot express the model or its tokenizer; the message lists the
        fields.
      OSError: the disk is full or not writable.
    """
    path = Path(path)
    cfg = model.cfg
    values = config_to_transformers(cfg)
    variables = dict(nnx.to_flat_state(nnx.state(model)))
    parts = layouts({names: variable.shape for names, variable in variables.items()}, cfg)
    check_tokenizer(cfg.tokenizer)
    byte_pieces = with_byte_pieces(cfg.tokenizer)
    shapes: dict[str, Shape] = {}
    for part in parts.values():
        for _, name in _tensors_to_write(part, values):
            shapes[name] = part.tensor_shape
    num_bytes = sum(4 * math.prod(shape) for shape in shapes.values())
    with new_folder(path, num_bytes) as folder:
        writer = SafetensorsWriter(folder, shapes) if is_first() else None
        with ProgressBar(total=len(shapes), desc="export", unit="tensor", leave=False) as progress:
            for names, part in parts.items():
                for place, name in _tensors_to_write(part, values):
                    tensor = _tensor(variables[names][...], place, part)
                    if writer is not None:
                        writer.write(name, tensor)
                    progress.update(1)
        if writer is not None:
            writer.close()
            copy_tokenizer(cfg.tokenizer, folder)
            if byte_pieces is not None:
                write_byte_pieces(byte_pieces, folder)
            _write_json(folder / "config.json", values)
            _write_json(folder / GENERATION, generation_to_transformers(cfg.generation))


def _tensors_to_write(part: Layout, values: dict[str, Any]) -> list[tuple[tuple[int, ...], str]]:
    """Place and name of the tensors of an array. An untied Switch has three embeddings, which are
    equal here; elsewhere transformers ties them."""
    tensors = list(part.names.items())
    has_copies = values["model_type"] == SWITCH and not values["tie_word_embeddings"]
    if has_copies and part.names.get(()) == "shared.weight":
        for stack in ("encoder", "decoder"):
            tensors.append(((), f"{stack}.embed_tokens.weight"))
    return tensors


def _tensor(array: jax.Array, place: tuple[int, ...], part: Layout) -> np.ndarray:
    """A tensor of transformers out of an array of ours, on every process."""
    if array.is_fully_addressable:
        numbers = _from_shards(array, place, part.piece_shape)
    else:
        numbers = _from_processes(array, place)
    if not part.transposed:
        return numbers
    num_outputs, num_inputs = part.tensor_shape
    return numbers.reshape(num_inputs, num_outputs).T


def _from_shards(array: jax.Array, place: tuple[int, ...], shape: Shape) -> np.ndarray:
    """array[place], copied from the devices that hold it: no device gets more than it has."""
    piece = np.empty(shape, array.dtype)
    for shard in array.addressable_shards:
        starts = [axis.start or 0 for axis in shard.index[: len(place)]]
        local = tuple(index - start for index, start in zip(place, starts, strict=True))
        sizes = shard.data.shape[: len(place)]
        is_inside = all(0 <= index < size for index, size in zip(local, sizes, strict=True))
        if is_inside and shard.replica_id == 0:
            piece[shard.index[len(place) :]] = _to_host(shard.data, local)
    return piece


def _to_host(shard: jax.Array, place: tuple[int, ...]) -> np.ndarray:
    """shard[place]: on a CPU a view, elsewhere only that part is copied from the device."""
    if next(iter(shard.devices())).platform == "cpu":
        return np.asarray(shard)[place]
    return np.asarray(_piece(shard, place))


def _from_processes(array: jax.Array, place: tuple[int, ...]) -> np.ndarray:
    """array[place], which other processes have parts of, through the devices."""
    piece = _piece(array, place)
    everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
    return np.asarray(jax.device_put(piece, everywhere).addressable_data(0))


def _piece(array: jax.Array, place: tuple[int, ...]) -> jax.Array:
    """array[place], on its devices."""
    return _index(array, np.array(place, np.int32)) if place else array


@jax.jit
def _index(array: jax.Array, place: jax.Array) -> jax.Array:
    """array[place]; the indices are arguments, so that one program serves all of them."""
    for index in place:
        array = jax.lax.dynamic_index_in_dim(array, index, keepdims=False)
    return array


def _write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
