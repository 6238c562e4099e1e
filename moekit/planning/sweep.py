"""Many plans: other meshes and remat policies for a slice, or the smallest slice of a chip."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from tqdm import tqdm

from moekit.config import ModelConfig
from moekit.errors import unknown
from moekit.planning.chips import CHIPS
from moekit.planning.step_plan import GIB, Plan, Request, compile_in_child, most_expert_parallel


def sweep(cfg: ModelConfig, topology: str, *options) -> list[Plan]:
    """Plans of other meshes and remat policies for a slice, or, if only a chip is named, of its
    slices from small to large until the model fits; best first. `options` are the rest of
    `Request`'s fields after mesh.

    Raises:
      ValueError: unknown names; nothing divides the batch.
    """
    if ":" in topology:
        requests = list(_meshes(Request(cfg, topology, {}, *options)))
    else:
        requests = list(_slices(cfg, topology, *options))
    if not requests:
        raise ValueError(
            f"no mesh or slice of {topology} divides a batch of {options[0]} rows and holds "
            f"{cfg.name}: use a batch that is a multiple of the chips"
        )
    plans = []
    for request in tqdm(requests, desc=f"plan {cfg.name}", unit="plan"):
        plans.append(compile_in_child(request))
        if ":" not in topology and plans[-1].fits:
            break
    return sorted(
        plans,
        key=lambda p: (not p.fits, -(p.mfu[1] if p.mfu else 0), p.hbm_gib_per_chip["total"]),
    )


def _meshes(request: Request) -> Iterator[Request]:
    """Meshes that divide everything, with the most expert parallelism first."""
    cfg, chips = request.cfg, request.chips
    common = most_expert_parallel(cfg, chips)
    experts = [n for n in range(common, 0, -1) if common % n == 0][:2]
    sizes = cfg.split_by_model().values()
    models = [m for m in (1, 2, 4) if all(size % m == 0 for size in sizes)]
    for remat, model, expert in itertools.product(("full", "dots"), models, experts):
        if chips % (expert * model) == 0 and request.batch % (chips // model) == 0:
            yield replace(request, mesh={"expert": expert, "model": model}, remat=remat)


def _slices(cfg: ModelConfig, name: str, *options) -> Iterator[Request]:
    """Slices of a chip from the smallest whose memory could hold parameters and gradients."""
    if name not in CHIPS:
        raise unknown("chip", name, CHIPS)
    needed = 8 * cfg.num_parameters().total / GIB  # float32
    for shape in CHIPS[name].slices:
        chips = math.prod(map(int, shape.split("x")))
        if chips * CHIPS[name].hbm_gib > needed and options[0] % chips == 0:
            together = most_expert_parallel(cfg, chips)
            yield Request(cfg, f"{name}:{shape}", {"expert": together}, *options)


def ranking(plans: list[Plan]) -> str:
    """One line a plan."""
    lines = [
        f"{'slice':12} {'data':>5} {'expert':>6} {'model':>5} {'remat':6} {'GiB a chip':>11} fits "
        f"{'step s':>14} {'MFU %':>12}"
    ]
    for p in plans:
        axes = p.mesh
        memory = p.hbm_gib_per_chip["total"]
        step = "{:.2f} to {:.2f}".format(*p.step_seconds) if p.step_seconds else "-"
        mfu = "{:.0f} to {:.0f}".format(*(100 * m for m in p.mfu)) if p.mfu else "-"
        lines.append(
            f"{p.topology:12} {axes['data']:5} {axes['expert']:6} {axes['model']:5} {p.remat:6} "
            f"{memory:11.1f} {'yes' if p.fits else 'no':4} {step:>14} {mfu:>12}"
        )
    return "\n".join(lines)
