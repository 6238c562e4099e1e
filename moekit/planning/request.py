"""What to plan: a model, a TPU slice, a mesh and a batch."""

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from moekit.config import ModelConfig
from moekit.errors import unknown
from moekit.planning.chips import CHIPS, Chip
from moekit.sharding import MESH_AXES
from moekit.train_config import REMATS, TrainConfig


@dataclass(frozen=True)
class PlanRequest:
    """A training step to plan.

    Args:
      topology: chip:slice, such as v5p:4x8x8.
      mesh: sizes of mesh axes; the remaining chips go to data.
      batch: rows of the global batch.

    Raises:
      ValueError: an unknown chip, slice, mesh axis or remat policy; a mesh that does not fill the
        slice; a batch that the mesh does not divide.
    """

    cfg: ModelConfig
    topology: str
    mesh: dict[str, int] = field(default_factory=dict)
    batch: int = 256
    input_length: int = 512
    target_length: int = 128
    optimizer: str = "adafactor"
    remat: str = "full"

    def __post_init__(self) -> None:
        _check_topology(self.topology)
        if self.remat not in REMATS:
            raise unknown("remat", self.remat, REMATS)
        for axis in self.mesh:
            if axis not in MESH_AXES:
                raise unknown("mesh axis", axis, MESH_AXES)
        shards = self.batch_shards
        if self.batch < 1 or self.batch % shards:
            raise ValueError(
                f"a batch of {self.batch} rows cannot be split over data x expert = {shards} "
                f"chips: use a multiple of {shards}, or fewer chips on data and expert and more on "
                "model"
            )

    @property
    def chip(self) -> Chip:
        return CHIPS[self.topology.partition(":")[0]]

    @property
    def num_chips(self) -> int:
        return count_chips(self.topology.partition(":")[2])

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of all three mesh axes; ValueError if they do not fill the slice."""
        expert = self.mesh.get("expert", 1)
        model = self.mesh.get("model", 1)
        data = self.mesh.get("data", self.num_chips // max(1, expert * model))
        if min(data, expert, model) < 1 or data * expert * model != self.num_chips:
            raise ValueError(
                f"a mesh of data={self.mesh.get('data', 'rest')}, expert={expert}, model={model} "
                f"does not fill the {self.num_chips} chips of {self.topology}: choose sizes whose "
                f"product divides {self.num_chips}"
            )
        return {"data": data, "expert": expert, "model": model}

    @property
    def batch_shards(self) -> int:
        """Number of parts into which the rows of a batch are split."""
        axes = self.axes
        return axes["data"] * axes["expert"]

    @property
    def train(self) -> TrainConfig:
        return TrainConfig(
            batch_tokens=self.batch * (self.input_length + self.target_length),
            input_length=self.input_length,
            target_length=self.target_length,
            optimizer=self.optimizer,
            remat=self.remat,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"cfg": self.cfg.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PlanRequest":
        return cls(**(values | {"cfg": ModelConfig.from_dict(values["cfg"])}))


def count_chips(slice_shape: str) -> int:
    """The number of chips of a slice, such as 256 of "4x8x8"."""
    return math.prod(int(size) for size in slice_shape.split("x"))


def largest_expert_axis(cfg: ModelConfig, num_chips: int) -> int:
    """The largest expert axis that divides both experts and chips; 1 for a dense model."""
    if not cfg.num_experts:
        return 1
    return math.gcd(cfg.num_experts, num_chips)


def _check_topology(topology: str) -> None:
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise unknown("chip", name, CHIPS)
    is_shape = re.fullmatch(r"\d+(x\d+)*", shape) is not None
    if not is_shape or len(shape.split("x")) != CHIPS[name].torus_dimensions:
        examples = ", ".join(CHIPS[name].slices)
        raise ValueError(f"topology {topology!r}: write chip:slice, for {name} one of {examples}")
