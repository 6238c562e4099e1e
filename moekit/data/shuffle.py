"""Random orders that are a function of seed and position, so that a stream can start anywhere."""

import functools
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    import grain

_SMALL = 2**13  # up to this number of examples, their order is kept in memory


def shuffled_index(
    position: int,
    element: object = None,
    *,
    size: int,
    seed: int,
) -> int:
    """The example at a position of an endless stream: each once an epoch, each epoch reordered.

    grain's shuffle needs no memory, but it walks through 2^16 numbers: slow for few examples.

    Args:
      element: ignored; grain passes the element at this position.
      size: number of examples.
    """
    seed_32_bits = seed % 2**32
    if size > _SMALL:
        endless_order = _global_order(seed_32_bits, size)
        return endless_order[position]
    epoch, index = divmod(position, size)
    order = _permutation(seed_32_bits, epoch, size)
    return int(order[index])


@functools.lru_cache(maxsize=4096)
def _permutation(seed: int, epoch: int, size: int) -> Int[np.ndarray, "size"]:
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(size)
    return order.astype(np.int32)


@functools.lru_cache(maxsize=4096)
def _global_order(seed: int, size: int) -> "grain.MapDataset":
    import grain

    indices = grain.MapDataset.range(size)
    return indices.shuffle(seed)


def window_shuffle(
    dataset: "grain.MapDataset",
    *,
    size: int,
    seed: int,
) -> "grain.MapDataset":
    """An endless dataset whose windows of `size` elements are each in random order."""
    import grain

    indices = grain.MapDataset.range(size)
    places = indices.shuffle(seed).repeat()
    element_at = functools.partial(_element_of_window, dataset, size)
    return places.map_with_index(element_at)


def _element_of_window(
    dataset: "grain.MapDataset",
    size: int,
    position: int,
    place: int,
) -> object:
    window_start = position - position % size
    return dataset[window_start + place]
