"""moekit plan: a training step compiled for a TPU slice that need not be there."""

from typing import Annotated

import tyro

from moekit.commands.flags import mesh_axes, require_at_least
from moekit.commands.model_flags import SetFlag, model_config
from moekit.commands.output import AsJson, print_result


def plan(
    preset: Annotated[str, tyro.conf.Positional] = "st-base",
    *,
    settings: SetFlag = (),
    topology: str = "v5e:2x4",
    mesh: str = "",
    batch: int = 256,
    input_length: int = 512,
    target_length: int = 128,
    optimizer: str = "adafactor",
    remat: str = "full",
    sweep: bool = False,
    json: AsJson = False,
) -> int:
    """Compile a training step for a TPU slice: memory, time, collectives, verdict. No TPU needed.

    Args:
      preset: Model to plan, one of `moekit doctor --presets`.
      topology: chip:slice, for v4, v5e, v5p and v6e; with --sweep, a chip alone finds its smallest
        slice that holds the model.
      mesh: Axis sizes such as expert=64,model=2; the rest of the chips goes to data.
      batch: Rows per step.
      input_length: Tokens of an encoder row.
      target_length: Tokens of a decoder row.
      optimizer: adafactor or adamw.
      remat: What the backward pass recomputes: none, dots or full.
      sweep: Try meshes and remat policies, or slices, and rank them.
    """
    import moekit as mk
    from moekit.planning.sweep import ranking, sweep as rank_plans

    require_at_least(1, batch=batch, input_length=input_length, target_length=target_length)
    axes = mesh_axes(mesh)
    cfg = model_config(preset, settings)
    if sweep:
        plans = rank_plans(
            cfg,
            topology,
            batch=batch,
            input_length=input_length,
            target_length=target_length,
            optimizer=optimizer,
            remat=remat,
        )
        print_result([each.to_dict() for each in plans], ranking(plans), json)
    else:
        found = mk.plan(
            cfg,
            topology,
            mesh=axes,
            batch=batch,
            input_length=input_length,
            target_length=target_length,
            optimizer=optimizer,
            remat=remat,
        )
        print_result(found.to_dict(), str(found), json)
    return 0


COMMAND = plan
