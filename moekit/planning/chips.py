"""TPU chips: their published peaks, and how long their links take."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh


@dataclass(frozen=True)
class Chip:
    """Published peaks of a TPU chip, and how much of them work other than products reaches."""

    flops: float  # bf16, a second
    hbm_bandwidth: float  # bytes a second
    link: float  # bytes a second, one link, one way
    dimensions: int  # of the torus
    wraps_from: int  # extent from which a dimension of a slice is a ring
    clock: float
    hbm_gib: int
    slices: tuple[str, ...]
    memory_efficiency: float = 0.8
    kernel_efficiency: float = 0.75


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_PLANES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS = {
    "v4": Chip(275e12, 1.23e12, 45e9, 3, 4, 1.05e9, 32, _CUBES),
    "v5e": Chip(197e12, 0.82e12, 45e9, 2, 16, 1.5e9, 16, _PLANES),
    "v5p": Chip(459e12, 2.77e12, 90e9, 3, 4, 1.75e9, 95, _CUBES),
    "v6e": Chip(918e12, 1.64e12, 90e9, 2, 16, 1.75e9, 32, _PLANES),
}


def links(mesh: Mesh, chip: Chip) -> Callable[[str, float, np.ndarray], float]:
    """seconds(kind, bytes, members): how long a chip's bytes take on the links that the members of
    a collective span.

    Rings over every dimension of the torus that they cover, in both directions; an all-to-all is
    bound by the cut through its longest dimension. One microsecond to start.
    """
    coordinates = np.array([d.coords for d in mesh.devices.flat])
    whole = np.ptp(coordinates, axis=0) + 1

    def seconds(kind: str, nbytes: float, members) -> float:
        extents = [len(set(column)) for column in coordinates[members].T]
        rings = [
            (extent, extent == size and extent >= chip.wraps_from)
            for extent, size in zip(extents, whole, strict=True)
            if extent > 1
        ]
        if kind == "collective-permute" or not rings:
            return 1e-6 + nbytes / chip.link
        if "all-to-all" in kind:
            longest, ring = max(rings)
            return 1e-6 + nbytes * longest / ((8 if ring else 4) * chip.link)
        return 1e-6 + nbytes / (chip.link * sum(2 if ring else 1 for _, ring in rings))

    return seconds
