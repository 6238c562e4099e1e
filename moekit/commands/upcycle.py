"""moekit upcycle: an MoE checkpoint from a dense one."""

from pathlib import Path
from typing import Annotated

import tyro

from moekit.commands.environment import keep_compiled_programs
from moekit.commands.flags import mesh_axes, require_seed
from moekit.commands.model_flags import SetFlag, read_settings
from moekit.commands.output import AsJson, print_result
from moekit.commands.routers import find_router


def upcycle(
    dense: Annotated[str, tyro.conf.Positional],
    destination: Annotated[Path, tyro.conf.Positional],
    *,
    settings: SetFlag = (),
    router: str = "",
    optimizer: bool = False,
    seed: int = 0,
    mesh: str = "",
    json: AsJson = False,
) -> int:
    """Make an MoE model from a dense one: experts are copies of its FFNs, routers are new.

    The sparse layers are set by --set num_experts=8 --set encoder_moe_layers=6 --set
    decoder_moe_layers=6; dispatch="dropless" drops no token at first, when the load is uneven.

    Args:
      dense: The dense model: a checkpoint, a run's workdir, or what else mk.load reads.
      destination: New folder for the MoE model.
      router: switch, top2, gshard, expert-choice, loss-free, hash, random, or one of your own as
        FILE.py:NAME; by default top-2 with weights that add up to 1, so that the outputs are at
        first the dense model's.
      optimizer: The dense model is a run: write a run that continues it at the same step, with its
        optimizer state. `moekit train --workdir DESTINATION` with its data and settings resumes it.
      seed: Seed of the routers.
      mesh: Shard over all devices: axis sizes such as expert=8.
    """
    require_seed(seed)
    axes = mesh_axes(mesh)
    changes = read_settings(settings)
    if destination.exists():
        raise ValueError(f"{destination} exists: name a new folder for the MoE model")
    keep_compiled_programs()
    import moekit as mk
    from moekit.commands.devices import device_mesh

    devices = device_mesh(axes) if axes else None
    changes.setdefault("router", mk.TopK(k=2, normalise=True))
    if router:
        changes["router"] = find_router(router)
    dense_model = mk.load(dense, mesh=devices)
    cfg = dense_model.cfg.replace(**changes)
    if optimizer:
        del dense_model  # the run is read with its parameters
        model = mk.upcycle(dense, cfg, seed=seed, mesh=devices, workdir=destination)
    else:
        model = mk.upcycle(dense_model, cfg, seed=seed)
        mk.save(destination, model)
    parameters = model.cfg.num_parameters()
    result = {"destination": str(destination), **parameters._asdict()}
    text = (
        f"{parameters.total / 1e6:,.1f} M parameters, {parameters.active / 1e6:,.1f} M active; "
        f"written to {destination}"
    )
    print_result(result, text, json)
    return 0


COMMAND = upcycle
