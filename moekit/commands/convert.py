"""moekit convert: checkpoints of transformers to ours and back."""

from pathlib import Path
from typing import Annotated

import tyro

from moekit.commands.output import AsJson, print_result

SWITCH_NOTE = (
    "note: the public Switch checkpoints are pretrained only; until they are tuned, they answer "
    "with gibberish"
)


def convert(
    source: Annotated[str, tyro.conf.Positional],
    destination: Annotated[Path, tyro.conf.Positional],
    *,
    json: AsJson = False,
) -> int:
    """Convert a checkpoint of transformers into one of moekit, or one of moekit for transformers.

    Args:
      source: Folder of a checkpoint, or a name on the Hugging Face hub as google/flan-t5-small.
      destination: New folder; it appears when all of it is written.
    """
    import moekit as mk
    from moekit.training.model_files import is_native_folder, save_whole

    if destination.exists():
        raise FileExistsError(f"{destination} exists already: choose another folder, or delete it")
    to_transformers = is_native_folder(Path(source))  # a run also has a config.json
    model = mk.load(source)
    if to_transformers:
        mk.export(destination, model)
    else:
        save_whole(destination, model)
    kind = "transformers" if to_transformers else "moekit"
    total = model.cfg.num_parameters().total
    result = {"destination": str(destination), "format": kind, "parameters": total}
    text = f"{destination}: {model.cfg.name}, {total:,} parameters, in the format of {kind}"
    if not to_transformers and model.cfg.num_experts > 0:
        text += f"\n{SWITCH_NOTE}"
    print_result(result, text, json)
    return 0


COMMAND = convert
