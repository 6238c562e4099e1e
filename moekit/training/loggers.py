"""Functions for `train(on_log=..)` that send the log to TensorBoard or Weights & Biases.

Both libraries are optional.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a log row; those of nested mappings are named "key/nested key"."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            for name, number in scalars(value).items():
                found[f"{key}/{name}"] = number
        elif isinstance(value, int | float):
            found[key] = float(value)
    return found


def import_library(name: str) -> ModuleType:
    """An optional library.

    Raises:
      OSError: it is not installed; with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise OSError(f"{name} is not installed ({error}): pip install {name}") from None


class TensorBoard:
    """Writes every number of the log to a folder that `tensorboard --logdir` reads.

    Raises:
      OSError: tensorboardX is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._library = import_library("tensorboardX")
        self._writer: Any = None

    def __call__(self, row: dict[str, Any]) -> None:
        if self._writer is None:
            self._writer = self._library.SummaryWriter(str(self.folder))
        numbers = scalars(row)
        step = int(numbers.pop("step"))
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file; another row starts a new one in the same folder."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB:
    """Sends every number of the log to a run of Weights & Biases.

    Args:
      project: project of the run.
      settings: further arguments of `wandb.init`, such as name, entity or config.

    Raises:
      OSError: wandb is not installed.
    """

    def __init__(self, project: str, **settings: Any) -> None:
        self.project = project
        self.settings = settings
        self._library = import_library("wandb")
        self._run: Any = None

    def __call__(self, row: dict[str, Any]) -> None:
        if self._run is None:
            self._run = self._library.init(project=self.project, **self.settings)
        numbers = scalars(row)
        step = int(numbers.pop("step"))
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """Finish the run; another row starts a new one."""
        if self._run is not None:
            self._run.finish()
            self._run = None
