"""The manifest of a checkpoint: what is verified when it is read.

It is part of the checkpoint's metadata and holds a digest of every array, the step, the mesh, the
versions that wrote it, and a digest of the metadata's own text. An array of another checkpoint does
not have the digest that is written here, so that items of two checkpoints cannot be mixed.
"""

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, UInt32

from moekit.installed import installed_versions

MANIFEST = "manifest"
WORD_SUMS = "checksums"  # of checkpoints before there was a manifest
# the keys of metadata: another one is a key that was damaged
RUN_KEYS = {"format", "train", "source", "tokenizer", "stream", "data_order"}
KEYS = RUN_KEYS | {"model", MANIFEST, WORD_SUMS}
WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by the bytes of an array's numbers


def add_manifest(metadata: dict[str, Any], step: int, items: dict[str, Any]) -> dict[str, Any]:
    """Metadata with the manifest of named trees of arrays."""
    manifest = {
        "step": step,
        "versions": installed_versions(),
        "mesh": _mesh_axes(items),
        "processes": jax.process_count(),
        "arrays": {name: describe_arrays(tree) for name, tree in items.items()},
    }
    described = without_manifest(metadata) | {MANIFEST: manifest}
    manifest["text_digest"] = text_digest(described)
    return described


def without_manifest(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata that was given to `add_manifest`."""
    return {key: value for key, value in metadata.items() if key not in (MANIFEST, WORD_SUMS)}


def _mesh_axes(items: dict[str, Any]) -> dict[str, int] | None:
    """The sizes of the mesh over which arrays are sharded."""
    for leaf in jax.tree.leaves(items):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return dict(sharding.mesh.shape)
    return None


def text_digest(metadata: dict[str, Any]) -> str:
    """SHA-256 of metadata as JSON, without that digest."""
    manifest = dict(metadata[MANIFEST])
    manifest.pop("text_digest", None)
    text = json.dumps(metadata | {MANIFEST: manifest}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_metadata(metadata: Any, step: int) -> None:
    """Raise ValueError unless metadata is complete, unchanged and of that step."""
    is_whole = isinstance(metadata, dict) and isinstance(metadata.get("model"), dict)
    if not is_whole or not metadata["model"]:
        raise ValueError("its metadata is incomplete")
    unknown = metadata.keys() - KEYS
    if unknown:
        raise ValueError(f"its metadata has the unknown key {min(unknown)!r}")
    if MANIFEST not in metadata:
        return  # written by an earlier version
    manifest = metadata[MANIFEST]
    if not isinstance(manifest, dict) or manifest.get("text_digest") != text_digest(metadata):
        raise ValueError("its metadata was changed")
    if manifest["step"] != step:
        raise ValueError(f"it is checkpoint {manifest['step']} under another name")


def path_name(path: tuple[Any, ...]) -> str:
    """The name of an array in its tree: encoder/blocks/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def describe_arrays(tree: Any) -> dict[str, dict[str, Any]]:
    """Type, shape and digest of every array, by name."""
    described = {}
    # one array at a time: concurrent collectives compete for the threads of a small machine
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        described[path_name(path)] = {
            "type": str(array.dtype),
            "shape": list(array.shape),
            "digest": int(array_digest(array)),
        }
    return described


def different_arrays(metadata: dict[str, Any], item: str, abstract: Any) -> list[str]:
    """How the arrays of a model differ from those that a checkpoint has, in type and shape."""
    if MANIFEST not in metadata:
        return []
    saved = metadata[MANIFEST]["arrays"].get(item, {})
    wanted = {}
    for path, array in jax.tree_util.tree_leaves_with_path(abstract):
        wanted[path_name(path)] = _type_and_shape(str(array.dtype), array.shape)
    differences = []
    for name in sorted(saved.keys() | wanted.keys()):
        there = "missing"
        if name in saved:
            there = _type_and_shape(saved[name]["type"], saved[name]["shape"])
        here = wanted.get(name, "missing")
        if there != here:
            differences.append(f"{name}: {there} there, {here} here")
    return differences


def _type_and_shape(dtype: str, shape: Any) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def check_arrays(metadata: dict[str, Any], item: str, tree: Any) -> None:
    """Raise ValueError unless the arrays of an item are those that were saved."""
    if MANIFEST in metadata:
        saved = metadata[MANIFEST]["arrays"].get(item, {})
        found = describe_arrays(tree)
    elif item in metadata.get(WORD_SUMS, {}):
        saved = {_plain_name(name): words for name, words in metadata[WORD_SUMS][item].items()}
        found = {}
        for path, array in jax.tree_util.tree_leaves_with_path(tree):
            found[_plain_name(jax.tree_util.keystr(path))] = int(word_sum(array))
    else:
        return  # written before there were digests
    names = saved.keys() | found.keys()
    changed = sorted(name for name in names if saved.get(name) != found.get(name))
    if changed:
        raise ValueError(
            f"{len(changed)} of {len(names)} arrays of {item} are not those that were saved, "
            f"the first is {changed[0]}"
        )


def _plain_name(key: str) -> str:
    """A name without quotes: numbers are text after they were saved."""
    return key.replace("'", "")


def _to_words(array: Array) -> UInt32[Array, "..."]:
    """The bits of every number as an unsigned integer."""
    bits = jax.lax.bitcast_convert_type(array, WORDS[array.dtype.itemsize])
    return bits.astype(jnp.uint32)


@jax.jit
def array_digest(array: Array) -> UInt32[Array, ""]:
    """A number that changes with every bit of an array and with the order of its numbers.

    The sum, modulo 2^32, of a hash of every number and its index: it is the same for every
    sharding. The hash (the finalizer of MurmurHash3) is a bijection, so that the change of a single
    number always changes the sum; other changes remain unseen with a probability of 2^-32.
    """
    index = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        along_axis = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        index = index * jnp.uint32(size) + along_axis
    mixed = _to_words(array) ^ (index * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> 16)
    return jnp.sum(mixed, dtype=jnp.uint32)


@jax.jit
def word_sum(array: Array) -> UInt32[Array, ""]:
    """The digest of checkpoints before there was a manifest: the sum of the words."""
    return jnp.sum(_to_words(array), dtype=jnp.uint32)


def count_bytes(items: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(items))
