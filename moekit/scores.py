"""Scores of answers, their confidence intervals, tables and pictures."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from jaxtyping import Float

BOOTSTRAP = 1000  # resamples of a 95 % interval


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and extra spaces (SQuAD's exact match); a text of
    nothing else stays as it is."""
    lowered = text.lower()
    bare = "".join(c for c in lowered if c not in string.punctuation)
    bare = " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
    return bare or " ".join(lowered.split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference, both normalised."""
    return float(normalise(answer) in {normalise(reference) for reference in references})


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Best ROUGE-L F-measure against the references."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)


def bootstrap(
    groups: Sequence[Float[np.ndarray, "..."]], seed: int = 0, resamples: int = BOOTSTRAP
) -> tuple[float, float]:
    """95 % interval of the mean over groups of their means, resampling examples in each group."""
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for values in groups:
        picks = rng.integers(0, len(values), (resamples, len(values)))
        means += values[picks].mean(1) / len(groups)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class TaskScore:
    """A task's score in [0, 1] with its 95 % interval and baselines."""

    task: str
    cluster: str
    metric: str
    score: float
    low: float
    high: float
    n: int
    chance: float  # picking options at random; 0 for free answers
    majority: float  # always the commonest answer
    values: Float[np.ndarray, "n"] = field(repr=False)

    @classmethod
    def of(cls, task, cluster, metric, values, chance, majority) -> "TaskScore":
        values = np.asarray(values, np.float64)
        low, high = bootstrap([values])
        mean = float(values.mean())
        return cls(task, cluster, metric, mean, low, high, len(values), chance, majority, values)


@dataclass(frozen=True)
class Scores:
    """A model's scores on a suite; `dropped_shots` exemplars did not fit into the inputs."""

    name: str
    rows: tuple[TaskScore, ...]
    shots: int = 0
    dropped_shots: int = 0

    @property
    def mean(self) -> TaskScore:
        """The mean over tasks, each counted alike; the interval resamples examples in each."""
        groups = [row.values for row in self.rows]
        low, high = bootstrap(groups)
        each = {k: [getattr(r, k) for r in self.rows] for k in ("score", "chance", "majority")}
        score, chance, majority = (float(np.mean(v)) for v in each.values())
        metrics = {row.metric for row in self.rows}
        metric = metrics.pop() if len(metrics) == 1 else "mixed"
        n = sum(row.n for row in self.rows)
        return TaskScore(
            "mean", "", metric, score, low, high, n, chance, majority, np.concatenate(groups)
        )

    def table(self) -> str:
        """Percentages by task, with 95 % intervals and baselines."""
        width = max(len(row.task) for row in self.rows)
        head = f"{'task':{width}}  metric       score    95 % interval    n  chance  majority"
        lines = [f"{self.name}, {self.shots} shots", head]
        for r in (*self.rows, self.mean):
            lines.append(
                f"{r.task:{width}}  {r.metric:11} {r.score:6.1%}  {r.low:6.1%} - {r.high:6.1%} "
                f"{r.n:5} {r.chance:7.1%} {r.majority:8.1%}"
            )
        if self.dropped_shots:
            lines.append(f"{self.dropped_shots} exemplars did not fit and were left out")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """JSON-ready, without the single examples."""

        def plain(row: TaskScore) -> dict:
            return {k: v for k, v in asdict(row).items() if k != "values"}

        return {
            "name": self.name,
            "shots": self.shots,
            "dropped_shots": self.dropped_shots,
            "mean": plain(self.mean),
            "tasks": [plain(row) for row in self.rows],
        }

    def plot(self):
        """Bars with intervals; a dot for chance, a line for the majority answer."""
        import matplotlib.pyplot as plt

        rows = (*self.rows, self.mean)
        fig, ax = plt.subplots(figsize=(7, 0.6 + 0.28 * len(rows)), layout="constrained")
        y = np.arange(len(rows))[::-1]
        scores = np.array([r.score for r in rows])
        errors = np.abs([[r.score - r.low for r in rows], [r.high - r.score for r in rows]])
        ax.barh(y, scores, xerr=errors, color="0.75", edgecolor="0.3", height=0.7, capsize=2)
        ax.plot([r.chance for r in rows], y, "o", color="black", ms=4, label="chance")
        ax.plot([r.majority for r in rows], y, "|", color="black", ms=10, label="majority")
        ax.set_yticks(y, [r.task for r in rows], fontsize=8)
        ax.set(xlabel="score (share right, 95 % interval)", xlim=(0, 1), title=self.name)
        ax.legend(frameon=False, loc="lower right")
        return fig


@dataclass(frozen=True)
class Difference:
    """A mean difference of two models on the same examples, with its 95 % interval."""

    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.difference:+.1%} (95 % interval {self.low:+.1%} to {self.high:+.1%})"


def compare(before: Scores, after: Scores) -> Difference:
    """after - before, paired by example and averaged over tasks.

    Raises:
      ValueError: the two were not asked the same questions.
    """
    shape = [[(row.task, row.n) for row in scores.rows] for scores in (before, after)]
    if shape[0] != shape[1]:
        raise ValueError(f"{before.name} and {after.name} are scores of different examples")
    pairs = zip(before.rows, after.rows, strict=True)
    differences = [b.values - a.values for a, b in pairs]
    low, high = bootstrap(differences)
    return Difference(float(np.mean([d.mean() for d in differences])), low, high)


def commonest(answers: Sequence[str]) -> str:
    """The most frequent answer, the first of equals."""
    return Counter(answers).most_common(1)[0][0]
