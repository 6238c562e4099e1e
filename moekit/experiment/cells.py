"""The cells of a study: each is one small JSON file, written when it is finished.

Sittings add up: a cell that has its file is not run again, and files can be committed as they come.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.data.paths import require_file
from moekit.experiment.design import PRETRAINED, Design

FINAL = "final"  # folder of the outcomes on the final held-out tasks
MAX_BYTES = 1 << 20  # of a cell's file
PARTS = ("model", "setup", "seed", "digest")


@dataclass(frozen=True)
class Cell:
    """A model in a setup with a seed."""

    model: str
    setup: str
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.model}--{self.setup}--{self.seed}.json"


class CellFolder:
    """The files of a design's cells in `folder`/<title>."""

    def __init__(self, design: Design, folder: Path):
        self.design = design
        self.path = folder / design.title

    def read(self, cell: Cell, *, final: bool = False) -> dict[str, Any] | None:
        """The record of a cell; None if it has not been run.

        Args:
          final: the record of the final held-out tasks.

        Raises:
          ValueError: the file is damaged, or of another design.
        """
        path = self._file(cell, final)
        if not path.exists():
            return None
        record = read_cell(path)
        if record["digest"] != self.design.digest(cell.model, cell.setup):
            raise ValueError(
                f"{path} was recorded with another design: remove it, or give the changed study "
                "another title"
            )
        return record

    def write(self, cell: Cell, record: dict[str, Any], *, final: bool = False) -> Path:
        """Write the record of a cell; the file appears whole or not at all."""
        described = {
            "kind": "cell",
            "study": self.design.title,
            "model": cell.model,
            "setup": cell.setup,
            "seed": cell.seed,
            "digest": self.design.digest(cell.model, cell.setup),
        }
        path = self._file(cell, final)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(described | record) + "\n")
        partial.replace(path)
        return path

    def _file(self, cell: Cell, final: bool) -> Path:
        return (self.path / FINAL if final else self.path) / cell.file_name

    def records(self, *, final: bool = False) -> dict[Cell, dict[str, Any]]:
        """The records of the cells of the design that have been run, each file read once.

        Args:
          final: the records of the final held-out tasks.

        Raises:
          ValueError: a file is damaged, or of another design.
        """
        found = {}
        for name, model in self.design.models.items():
            for setup in (PRETRAINED, *model.setups):
                for seed in self.design.seeds(name):
                    cell = Cell(name, setup, seed)
                    record = self.read(cell, final=final)
                    if record:
                        found[cell] = record
        return found

    def missing(
        self, *, seeds: int | None = None, only: Sequence[str] = ()
    ) -> list[tuple[str, str, list[int]]]:
        """Groups of cells that have no file yet: model, setup, seeds.

        The first seeds of all models come before further seeds, so that a study that is interrupted
        has comparable models.

        Args:
          seeds: number of seeds of each model; by default all.
          only: names of models and setups; by default all.

        Raises:
          ValueError: an unknown name, or a file of a cell that belongs to another design.
        """
        models, setups = self.design.models, self.design.setups
        self.design.check_names(only)
        chosen_models = [name for name in models if name in only] or list(models)
        chosen_setups = [name for name in (PRETRAINED, *setups) if name in only]
        width = self.design.side_by_side
        most = max(model.seeds for model in models.values())
        groups = []
        for start in range(0, most, width):
            for name in chosen_models:
                group = self.design.seeds(name)[:seeds][start : start + width]
                for setup in (PRETRAINED, *models[name].setups):
                    if chosen_setups and setup not in chosen_setups:
                        continue
                    lacking = [seed for seed in group if not self.read(Cell(name, setup, seed))]
                    if lacking:
                        groups.append((name, setup, lacking))
        return groups


def read_cell(path: Path) -> dict[str, Any]:
    """The record of a cell.

    Raises:
      ValueError: the file is no record of a cell, a damaged one, or larger than 1 MiB.
    """
    require_file(path, MAX_BYTES)
    try:
        record = json.loads(path.read_text("utf-8"))
        if record["kind"] != "cell":
            raise ValueError(f"its kind is {record['kind']!r}")
        for name in PARTS:
            record[name]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a cell of a study, or is damaged ({type(error).__name__}: {error}): "
            "remove it, and run the study again"
        ) from None
    return record
