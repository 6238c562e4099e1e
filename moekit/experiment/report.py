"""A study from its file to its findings, and what they look like as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moekit.experiment.cells import CellFolder
from moekit.experiment.design import Design, read_design
from moekit.experiment.findings import Finding, final_findings, findings, findings_table
from moekit.experiment.runner import StudyRunner
from moekit.experiment.study_data import StudyData, pack_study
from moekit.experiment.study_figures import draw_findings
from moekit.table import Table

RECORDED = Path("assets/results")  # where the published cells are


@dataclass(frozen=True)
class StudyReport:
    """What a sitting of a study did, and what is known after it.

    Args:
      title: of the study.
      written: files of the cells that this sitting ran.
      missing: number of cells that the design has and no sitting has run.
      findings: on the reporting tasks.
      final: on the final tasks, once they have been opened.
      rerun: cells of this sitting beside those that are published, if there are any.
    """

    title: str
    written: tuple[Path, ...]
    missing: int
    findings: tuple[Finding, ...]
    final: tuple[Finding, ...]
    rerun: tuple["Rerun", ...]

    def __str__(self) -> str:
        lines = [f"{self.title}: {len(self.written)} cells were run, {self.missing} are missing"]
        if self.findings:
            lines += ["", str(findings_table(self.findings))]
        else:
            lines.append("No comparison has two seeds yet, so there are no findings.")
        if self.final:
            lines += ["", "Final held-out tasks:", str(findings_table(self.final))]
        if self.rerun:
            lines += ["", str(rerun_table(self.rerun))]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        tables = [findings_table(self.findings), findings_table(self.final)]
        return "\n".join(table._repr_html_() for table in tables if table.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "title": self.title,
            "written": [str(path) for path in self.written],
            "missing": self.missing,
            "findings": [finding.to_dict() for finding in self.findings],
            "final": [finding.to_dict() for finding in self.final],
            "rerun": [each.__dict__ | {"within": each.within} for each in self.rerun],
        }


@dataclass(frozen=True)
class Rerun:
    """A cell that was run again, beside the published ones of its model and setup.

    Args:
      loss: mean over the tasks that the cell was measured on, in nats a token.
      low: lower end of the interval in which 95 % of all seeds lie, by the published ones.
      high: its upper end.
      seeds: number of published seeds.
    """

    model: str
    setup: str
    seed: int
    loss: float
    low: float
    high: float
    seeds: int

    @property
    def within(self) -> bool:
        return self.low <= self.loss <= self.high


def study(
    path: str | Path,
    *,
    out: str | Path = "runs/studies",
    workdir: str | Path = "runs/study-models",
    seeds: int | None = None,
    only: Sequence[str] = (),
    minutes: float | None = None,
    final: bool = False,
    packed: str | Path | None = None,
) -> StudyReport:
    """Run what is missing of the study that a file describes.

    A study that was interrupted goes on where it was: every finished cell (a model in a setup with
    a seed) has a file of its own in out/<title>.

    Args:
      path: of the design, a TOML file such as assets/studies/nano.toml.
      out: folder for the cells.
      workdir: folder for the tokenizer and the models that further setups start from.
      seeds: number of seeds of each model; by default all.
      only: names of models and setups; by default all.
      minutes: stop before cells that would not be finished within this time.
      final: evaluate the finished models on the final held-out tasks, once, at the end.
      packed: file with the study's data, made by `pack`; by default they are read where they are.

    Raises:
      FileNotFoundError: no such file; source "local" without a data folder; with `final`, a model
        that is no longer in the workdir.
      ValueError: a mistake in the file, or cells that belong to another design.
    """
    design = read_design(path)
    design.check_names(only)
    packed = Path(packed) if packed else None
    runner = StudyRunner(design, Path(out), Path(workdir), minutes=minutes, packed=packed)
    written = runner.run(seeds=seeds, only=only)
    if final:
        written += runner.run_final()
    recorded = CellFolder(design, RECORDED)
    is_recorded = recorded.path.absolute() == runner.cells.path.absolute()
    return StudyReport(
        title=design.title,
        written=tuple(written),
        missing=sum(len(group) for _, _, group in runner.cells.missing()),
        findings=tuple(findings(runner.cells, pilot_cells(design, Path(path)))),
        final=tuple(final_findings(runner.cells)),
        rerun=() if is_recorded else tuple(_reruns(runner.cells, recorded)),
    )


def pack(
    path: str | Path, file: str | Path, *, workdir: str | Path, max_rows: int = 100_000
) -> int:
    """Write the data of the study that `path` describes to a .npz file; returns its bytes.

    `study` reads it with `packed`, on a machine that has no such data.

    Args:
      workdir: folder for the tokenizer.
      max_rows: rows of each training, at most; a longer training reads them again.

    Raises:
      FileNotFoundError: no such file; source "local" without a data folder.
      ValueError: a mistake in the file.
    """
    design = read_design(path)
    data = StudyData(design, Path(workdir) / design.title)
    pack_study(design, data, Path(file), max_rows)
    return Path(file).stat().st_size


def draw_studies(designs: Path, results: Path, out: Path) -> list[Path]:
    """Draw the figures of every study that has a design file and recorded findings."""
    paths: list[Path] = []
    for path in sorted(designs.glob("*.toml")):
        design = read_design(path)
        cells = CellFolder(design, results)
        if findings(cells):
            paths += draw_findings(cells, pilot_cells(design, path), out)
    return paths


def pilot_cells(design: Design, path: Path) -> CellFolder | None:
    """The published cells of the design's pilot; None where it has none."""
    if not design.pilot:
        return None
    pilot = read_design(path.with_name(f"{design.pilot}.toml"))
    return CellFolder(pilot, RECORDED)


def _reruns(cells: CellFolder, recorded: CellFolder) -> list[Rerun]:
    """The cells of a folder for whose model and setup two seeds or more are published."""
    published: dict[tuple[str, str], list[float]] = {}
    for cell, record in recorded.records().items():
        published.setdefault((cell.model, cell.setup), []).append(_mean_loss(record))
    found = []
    for cell, record in cells.records().items():
        losses = published.get((cell.model, cell.setup), [])
        if len(losses) < 2:
            continue
        # the interval of a new value from the same normal distribution
        mean, sd = np.mean(losses), np.std(losses, ddof=1)
        width = 1.96 * sd * np.sqrt(1 + 1 / len(losses))
        found.append(
            Rerun(
                cell.model,
                cell.setup,
                cell.seed,
                loss=_mean_loss(record),
                low=float(mean - width),
                high=float(mean + width),
                seeds=len(losses),
            )
        )
    return found


def _mean_loss(record: dict[str, Any]) -> float:
    """The mean loss over the tasks that a cell was measured on (zero-shot, reporting tasks)."""
    if "tasks" in record:
        outcomes = record["tasks"]
    else:
        by_shots = record["held_out"]["reporting"]
        outcomes = next(iter(by_shots.values()))
    return float(np.mean([outcome["loss"] for outcome in outcomes.values()]))


def rerun_table(reruns: Sequence[Rerun]) -> Table:
    """One row for each cell that was run again."""
    rows = []
    for each in reruns:
        rows.append(
            (
                each.model,
                each.setup,
                str(each.seed),
                f"{each.loss:.3f}",
                f"{each.low:.3f} to {each.high:.3f}",
                "within" if each.within else "outside",
            )
        )
    headings = ("model", "setup", "seed", "loss", "95 % of the published seeds", "")
    return Table(headings, rows, num_left=2)
