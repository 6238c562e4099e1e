"""Answers read out of texts, their scores, confidence intervals, tables and pictures."""

import functools
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from jaxtyping import Float

BOOTSTRAP = 1000  # resamples of a 95 % interval
_NUMBER = re.compile(r"(?<![\w.])-?[$£€]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?", re.I)
_MARK = re.compile(r"(?:\banswer\s*(?:is|:|=)|####)\s*:?", re.I)


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and extra spaces (SQuAD's exact match); a text of
    nothing else stays as it is."""
    lowered = text.lower()
    bare = "".join(c for c in lowered if c not in string.punctuation)
    bare = " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
    return bare or " ".join(lowered.split())


def number(text: str) -> float | None:
    """The number that a text is ("$1,200.50", "-3", "40%"), or None."""
    bare = text.strip().rstrip(".%").strip()
    if not _NUMBER.fullmatch(bare):
        return None
    return float(re.sub(r"[^\d.e+-]", "", bare.lower()))


def extract_answer(text: str, like: str = "", options: Sequence[str] = ()) -> str:
    """What a chain of thought arrives at: it follows the last "answer is" (or "####"), else it is
    looked for in the whole text.

    Args:
      like: the expected answer; if it is a number, so is what is read: the first after the last
        "=" of the marked sentence, or the last of an unmarked text.
      options: the answer is one of these, given by its letter or in its words.
    """
    *before, said = _MARK.split(text)
    said, marked = said.strip(), bool(before)
    if options:
        return _option(said, options, marked)
    sentence = re.split(r"\.(?:\s|$)", said)[0].strip() if marked else said
    if number(like) is not None:
        found = _NUMBER.findall(sentence.split("=")[-1] if marked else said)
        return found[0 if marked else -1].strip() if found else sentence
    return sentence


def _option(said: str, options: Sequence[str], marked: bool) -> str:
    """The option that a text names by letter, else in words: the first after a mark, the last of
    an unmarked text; the text itself if there is none."""
    if marked:
        letters = re.findall(r"^\W*([A-Z])(?:[).:,]|\s*$)", said)
    else:
        letters = re.findall(r"\(([A-Z])\)", said)[-1:]
    if letters and ord(letters[0]) - ord("A") < len(options):
        return options[ord(letters[0]) - ord("A")]
    words = f" {normalise(said)} "
    find = words.find if marked else words.rfind
    places = {option: find(f" {normalise(option)} ") for option in options}
    places = {option: place for option, place in places.items() if place >= 0}
    nearest = min if marked else max
    # of options at one place the longest is meant
    sign = -1 if marked else 1
    return nearest(places, key=lambda o: (places[o], sign * len(o))) if places else said


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference: as numbers to six digits where both are numbers, else as
    normalised texts."""

    def key(text: str) -> str:
        value = number(text)
        return normalise(text) if value is None else f"{value:.6g}"

    return float(key(answer) in {key(reference) for reference in references})


@functools.cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Best ROUGE-L F-measure against the references."""
    return max(_rouge().score(reference, answer)["rougeL"].fmeasure for reference in references)


def bootstrap(
    groups: Sequence[Float[np.ndarray, "..."]],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    resamples: int = BOOTSTRAP,
) -> tuple[float, float]:
    """95 % interval of the weighted sum of the groups' means (default their mean), resampling
    examples in each group."""
    rng = np.random.default_rng(seed)
    sums = np.zeros(resamples)
    for values, weight in zip(groups, weights or [1 / len(groups)] * len(groups), strict=True):
        picks = rng.integers(0, len(values), (resamples, len(values)))
        sums += weight * values[picks].mean(1)
    low, high = np.quantile(sums, [0.025, 0.975])
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
    """A model's scores on a suite; `dropped_shots` exemplars did not fit into the inputs, and
    `missing` tasks of the suite were not to be had."""

    name: str
    rows: tuple[TaskScore, ...]
    shots: int = 0
    dropped_shots: int = 0
    missing: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        return self.name.partition(" on ")[0]

    @property
    def suite(self) -> str:
        return self.name.partition(" on ")[2] or self.name

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
        if self.missing:
            lines.append(f"not evaluated, for want of data: {', '.join(self.missing)}")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """JSON-ready, without the single examples."""

        def plain(row: TaskScore) -> dict:
            return {k: v for k, v in asdict(row).items() if k != "values"}

        return {
            "name": self.name,
            "shots": self.shots,
            "dropped_shots": self.dropped_shots,
            "missing": list(self.missing),
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
class NormalisedAverage:
    """One number for a model: the mean over suites of each one's normalised score, with its 95 %
    interval. 0 is chance, 1 all right; below chance it is negative."""

    score: float
    low: float
    high: float
    suites: dict[str, float]

    def __str__(self) -> str:
        each = ", ".join(f"{name} {score:.1%}" for name, score in self.suites.items())
        return (
            f"normalised average {self.score:.1%} "
            f"(95 % interval {self.low:.1%} to {self.high:.1%}): {each}"
        )


def normalised_average(results: Sequence[Scores]) -> NormalisedAverage:
    """The paper's single figure: every task's score is scaled between chance and 1, averaged over
    the tasks of a suite, then over suites (the "normalized average" of Chung 2022, section 2.3
    and footnote 5, after BIG-bench's normalized preferred metric). The paper takes the suites
    "mmlu", "bbh", "reasoning" and "qa".

    Raises:
      ValueError: no suites, or one twice.
    """
    names = [scores.suite for scores in results]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"an average needs different suites, not {names}")
    suites, groups, weights = {}, [], []
    for scores in results:
        scaled = [(row.values - row.chance) / (1 - row.chance) for row in scores.rows]
        suites[scores.suite] = float(np.mean([values.mean() for values in scaled]))
        groups += scaled
        weights += [1 / (len(results) * len(scaled))] * len(scaled)
    low, high = bootstrap(groups, weights)
    return NormalisedAverage(float(np.mean(list(suites.values()))), low, high, suites)


def report(results: Sequence[Scores]) -> dict:
    """A JSON-ready record of one model on several suites, which `moekit figures` draws."""
    return {
        "kind": "evaluation",
        "model": results[0].model,
        "suites": [scores.to_dict() for scores in results],
        "normalised_average": asdict(normalised_average(results)),
    }


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
