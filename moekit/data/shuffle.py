"""Random orders that are a function of seed and position, so that a stream can start anywhere."""

import functools

import grain
import numpy as np
from jaxtyping import Int

_SMALL = 2**13  # up to this number of examples, their order is kept in memory


def shuffled_index(position: int, element: object = None, *, size: int, seed: int) -> int:
    """The example at a position of an endless stream: each once an epoch, each epoch reordered.

    grain's shuffle needs no memory, but it walks through 2^16 numbers: slow for few examples.

    Args:
      element: ignored; grain passes the element at this position.
      size: number of examples.
    """
    epoch, index = divmod(position, size)
    if size <= _SMALL:
        return int(_permutation(seed % 2**32, epoch, size)[index])
    return _global_order(seed % 2**32, size)[position]


@functools.lru_cache(maxsize=4096)
def _permutation(seed: int, epoch: int, size: int) -> Int[np.ndarray, "size"]:
    return np.random.default_rng([seed, epoch]).permutation(size).astype(np.int32)


@functools.lru_cache(maxsize=4096)
def _global_order(seed: int, size: int) -> grain.MapDataset:
    return grain.MapDataset.range(size).shuffle(seed)


def window_shuffle(dataset: grain.MapDataset, *, size: int, seed: int) -> grain.MapDataset:
    """An endless dataset whose windows of `size` elements are each in random order."""
    places = grain.MapDataset.range(size).shuffle(seed).repeat()
    return places.map_with_index(functools.partial(_in_window, dataset, size))


def _in_window(dataset: grain.MapDataset, size: int, position: int, place: int) -> object:
    return dataset[position - position % size + place]
