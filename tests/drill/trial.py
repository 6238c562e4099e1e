"""What the drill records: trials of a fault, and the table of all faults."""

from collections.abc import Sequence
from dataclasses import dataclass

from moekit.table import Table

HEADINGS = ("fault", "times", "as designed", "outcome", "steps lost", "curve equal", "seconds")


@dataclass(frozen=True)
class Trial:
    """One occurrence of a fault.

    Args:
      outcome: recovered, refused, or unharmed.
      lost: steps that were computed and had to be computed again.
      equal: whether log and final parameters equal those of an uninterrupted run; None where there
        is nothing to compare.
      problem: what was not as designed; empty if everything was.
    """

    outcome: str
    lost: int = 0
    equal: bool | None = None
    problem: str = ""


@dataclass(frozen=True)
class Record:
    """All trials of one fault.

    Args:
      skipped: why there are none.
    """

    fault: str
    trials: Sequence[Trial]
    seconds: float
    skipped: str = ""

    def problems(self) -> list[str]:
        found = []
        for trial in self.trials:
            problem = trial.problem
            if trial.equal is False:
                problem = problem or "the run differs from an uninterrupted one"
            if problem:
                found.append(f"{self.fault}: {problem}")
        return found

    def row(self) -> list[str]:
        if self.skipped:
            return [self.fault, "0", "", f"skipped: {self.skipped}", "", "", ""]
        good = len(self.trials) - len(self.problems())
        outcomes = sorted({trial.outcome for trial in self.trials})
        counts = []
        for outcome in outcomes:
            count = sum(trial.outcome == outcome for trial in self.trials)
            counts.append(f"{count} {outcome}")
        lost = [trial.lost for trial in self.trials]
        most = str(max(lost, default=0))
        if len(set(lost)) > 1:
            most = f"{min(lost)} to {most}"
        compared = {trial.equal for trial in self.trials} - {None}
        equal = "-"
        if compared:
            equal = "yes" if compared == {True} else "NO"
        return [
            self.fault,
            str(len(self.trials)),
            str(good),
            ", ".join(counts),
            most,
            equal,
            f"{self.seconds:.0f}",
        ]


def table(records: Sequence[Record]) -> Table:
    """One row for each fault."""
    rows = [record.row() for record in records]
    return Table(HEADINGS, rows, num_left=1)
