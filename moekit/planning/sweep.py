"""Many plans: other meshes and remat policies for a slice, or the smallest slice of a chip."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from moekit.config import ModelConfig
from moekit.errors import unknown
from moekit.planning.chips import CHIPS
from moekit.planning.compile_step import GIB, compile_in_child
from moekit.planning.request import PlanRequest, count_chips, largest_expert_axis
from moekit.planning.step_plan import Plan
from moekit.progress import ProgressBar

BYTES_PER_PARAMETER = 8  # a float32 parameter and its gradient


def sweep(
    cfg: ModelConfig,
    topology: str,
    *,
    batch: int = 256,
    input_length: int = 512,
    target_length: int = 128,
    optimizer: str = "adafactor",
    remat: str = "full",
) -> list[Plan]:
    """Plans of several meshes or slices, the best first.

    With a slice ("v5p:4x8x8") its meshes and remat policies are tried. With a chip alone ("v5p")
    its slices are tried from small to large until the model fits.

    Raises:
      ValueError: unknown names; nothing divides the batch.
    """

    def request_for(slice_topology: str, mesh: dict[str, int]) -> PlanRequest:
        return PlanRequest(
            cfg=cfg,
            topology=slice_topology,
            mesh=mesh,
            batch=batch,
            input_length=input_length,
            target_length=target_length,
            optimizer=optimizer,
            remat=remat,
        )

    names_a_slice = ":" in topology
    if names_a_slice:
        requests = list(mesh_requests(request_for(topology, {})))
    else:
        requests = []
        for slice_topology in _slices_with_room(cfg, topology, batch):
            expert_axis = largest_expert_axis(cfg, _num_chips(slice_topology))
            requests.append(request_for(slice_topology, {"expert": expert_axis}))
    if not requests:
        raise ValueError(
            f"no mesh or slice of {topology} divides a batch of {batch} rows and holds "
            f"{cfg.name}: use a batch that is a multiple of the chips"
        )
    plans = []
    for request in ProgressBar(requests, desc=f"plan {cfg.name}", unit="plan"):
        plans.append(compile_in_child(request))
        if not names_a_slice and plans[-1].fits:
            break
    return sorted(plans, key=_rank)


def _rank(plan: Plan) -> tuple[bool, float, float]:
    """Plans that fit first, then by MFU, then by memory."""
    high_mfu = plan.mfu[1] if plan.mfu else 0.0
    return (not plan.fits, -high_mfu, plan.hbm_gib_per_chip["total"])


def mesh_requests(request: PlanRequest) -> Iterator[PlanRequest]:
    """A request with every mesh and remat policy that divides all sizes, most experts first."""
    cfg, num_chips = request.cfg, request.num_chips
    largest = largest_expert_axis(cfg, num_chips)
    divisors = [size for size in range(largest, 0, -1) if largest % size == 0]
    expert_sizes = divisors[:2]
    split_sizes = cfg.split_by_model().values()
    model_sizes = [axis for axis in (1, 2, 4) if all(size % axis == 0 for size in split_sizes)]
    for remat, model, expert in itertools.product(("full", "dots"), model_sizes, expert_sizes):
        fills_slice = num_chips % (expert * model) == 0
        divides_batch = request.batch % (num_chips // model) == 0
        if fills_slice and divides_batch:
            yield replace(request, mesh={"expert": expert, "model": model}, remat=remat)


def _slices_with_room(cfg: ModelConfig, chip_name: str, batch: int) -> Iterator[str]:
    """Slices of a chip, small to large, that could hold parameters and gradients."""
    if chip_name not in CHIPS:
        raise unknown("chip", chip_name, CHIPS)
    chip = CHIPS[chip_name]
    gib_needed = BYTES_PER_PARAMETER * cfg.num_parameters().total / GIB
    for shape in chip.slices:
        num_chips = count_chips(shape)
        if num_chips * chip.hbm_gib > gib_needed and batch % num_chips == 0:
            yield f"{chip_name}:{shape}"


def _num_chips(topology: str) -> int:
    return count_chips(topology.partition(":")[2])


def ranking(plans: list[Plan]) -> str:
    """A table with one line per plan."""
    lines = [
        f"{'slice':12} {'data':>5} {'expert':>6} {'model':>5} {'remat':6} {'GiB per chip':>12} "
        f"fits {'step s':>14} {'MFU %':>12}"
    ]
    for plan in plans:
        memory = plan.hbm_gib_per_chip["total"]
        fits = "yes" if plan.fits else "no"
        step = mfu = "-"
        if plan.step_seconds:
            low, high = plan.step_seconds
            step = f"{low:.2f} to {high:.2f}"
        if plan.mfu:
            low, high = plan.mfu
            mfu = f"{100 * low:.0f} to {100 * high:.0f}"
        axes = plan.mesh
        lines.append(
            f"{plan.topology:12} {axes['data']:5} {axes['expert']:6} {axes['model']:5} "
            f"{plan.remat:6} {memory:12.1f} {fits:4} {step:>14} {mfu:>12}"
        )
    return "\n".join(lines)
