"""TPU chips: their published peaks, and the time of a collective on their interconnect."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

LATENCY_SECONDS = 1e-6  # of any collective


@dataclass(frozen=True)
class Chip:
    """Published peaks of a TPU chip, and the share of them that work other than matmuls reaches."""

    flops: float  # bfloat16, per second
    hbm_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second of one link in one direction
    torus_dimensions: int
    min_ring_size: int  # a dimension of a slice is a ring from this size on
    clock: float  # cycles per second
    hbm_gib: int
    slices: tuple[str, ...]
    memory_efficiency: float = 0.8
    kernel_efficiency: float = 0.75


CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
PLANES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS = {
    "v4": Chip(
        flops=275e12,
        hbm_bandwidth=1.23e12,
        link_bandwidth=45e9,
        torus_dimensions=3,
        min_ring_size=4,
        clock=1.05e9,
        hbm_gib=32,
        slices=CUBES,
    ),
    "v5e": Chip(
        flops=197e12,
        hbm_bandwidth=0.82e12,
        link_bandwidth=45e9,
        torus_dimensions=2,
        min_ring_size=16,
        clock=1.5e9,
        hbm_gib=16,
        slices=PLANES,
    ),
    "v5p": Chip(
        flops=459e12,
        hbm_bandwidth=2.77e12,
        link_bandwidth=90e9,
        torus_dimensions=3,
        min_ring_size=4,
        clock=1.75e9,
        hbm_gib=95,
        slices=CUBES,
    ),
    "v6e": Chip(
        flops=918e12,
        hbm_bandwidth=1.64e12,
        link_bandwidth=90e9,
        torus_dimensions=2,
        min_ring_size=16,
        clock=1.75e9,
        hbm_gib=32,
        slices=PLANES,
    ),
}


def link_seconds(
    mesh: Mesh, chip: Chip
) -> Callable[[str, float, Int[np.ndarray, "members"]], float]:
    """A function (kind, bytes, members) -> seconds that a collective takes on the links it spans.

    A collective runs as rings over every dimension of the torus that its members cover, in both
    directions where the dimension is a ring. An all-to-all is bound by the bisection of its longest
    dimension.
    """
    coordinates = np.array([device.coords for device in mesh.devices.flat])
    slice_shape = np.ptp(coordinates, axis=0) + 1

    def seconds(kind: str, nbytes: float, members: Int[np.ndarray, "members"]) -> float:
        dimensions = _spanned_dimensions(coordinates[members], slice_shape, chip)
        if kind == "collective-permute" or not dimensions:
            return LATENCY_SECONDS + nbytes / chip.link_bandwidth
        if "all-to-all" in kind:
            longest, is_ring = max(dimensions)
            bisection_links = 8 if is_ring else 4
            return LATENCY_SECONDS + nbytes * longest / (bisection_links * chip.link_bandwidth)
        directions = sum(2 if is_ring else 1 for _, is_ring in dimensions)
        return LATENCY_SECONDS + nbytes / (chip.link_bandwidth * directions)

    return seconds


def _spanned_dimensions(
    coordinates: Int[np.ndarray, "members dimensions"],
    slice_shape: Int[np.ndarray, "dimensions"],
    chip: Chip,
) -> list[tuple[int, bool]]:
    """(extent, whether it is a ring) of each torus dimension along which the members differ."""
    spanned = []
    for column, size in zip(coordinates.T, slice_shape, strict=True):
        extent = len(set(column))
        if extent > 1:
            is_ring = extent == size and extent >= chip.min_ring_size
            spanned.append((extent, bool(is_ring)))
    return spanned
