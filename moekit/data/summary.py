"""What a training run on a mixture will see, as a table and a picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from moekit.data.mixture import Mixture
from moekit.data.tokenizer import ByteTokenizer, Tokenizer

SAMPLED = 16  # prompts of a task whose tokens are counted


@dataclass(frozen=True)
class Share:
    """A task, a cluster or all of a mixture.

    Tokens are means of a sample of prompts, before any is cut to a length; `repeats` is how often
    each example is seen in the run.
    """

    part: str
    cluster: str
    task: str
    tasks: int
    examples: int
    valid: int
    rate: float
    input_tokens: float
    target_tokens: float
    repeats: float

    @property
    def tokens(self) -> float:
        """Of one prompt, input and target."""
        return self.input_tokens + self.target_tokens


@dataclass(frozen=True)
class Overview:
    """Rows of `describe`; `run_tokens` is the length of the run that `repeats` is about."""

    name: str
    rows: tuple[Share, ...]
    run_tokens: float
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> Share:
        return _sum(self.rows, "all", "")

    @property
    def epoch_tokens(self) -> float:
        """Expected tokens of an epoch: as many prompts, drawn by rate, as there are examples."""
        return self.total.examples * self.total.tokens

    @property
    def clusters(self) -> list[Share]:
        """One row a cluster of a part, in the order of the tasks."""
        groups: dict[tuple[str, str], list[Share]] = {}
        for row in self.rows:
            groups.setdefault((row.part, row.cluster), []).append(row)
        return [_sum(rows, *key) for key, rows in groups.items()]

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready: tasks, clusters, totals."""
        return {
            "name": self.name,
            "tasks": [asdict(row) for row in self.rows],
            "clusters": [asdict(row) for row in self.clusters],
            "total": asdict(self.total),
            "epoch_tokens": self.epoch_tokens,
            "run_tokens": self.run_tokens,
            "dropped": dict(self.dropped),
        }

    def table(self, by: str = "cluster") -> str:
        """One line a cluster, or a "task"."""
        header = f"{'part':10} {by:34} {'tasks':>5} {'examples':>9} {'valid':>7} {'rate':>7}"
        lines = [header + f" {'in':>6} {'out':>5} {'repeats':>8}"]
        for row in [*(self.rows if by == "task" else self.clusters), self.total]:
            name = row.task if by == "task" else row.cluster
            lines.append(
                f"{row.part:10} {name[:34]:34} {row.tasks:5} {row.examples:9,} {row.valid:7,} "
                f"{row.rate:7.2%} {row.input_tokens:6.0f} {row.target_tokens:5.0f} "
                f"{row.repeats:8.2f}"
            )
        lines.append(
            f"expected tokens per epoch: {self.epoch_tokens:,.0f}; repeats are of a run of "
            f"{self.run_tokens:,.0f} tokens; in and out are mean tokens of a prompt"
        )
        if self.dropped:
            lines.append(f"left out because they overlap with suites: {len(self.dropped)} tasks")
            lines += [f"  {name}: {reason}" for name, reason in self.dropped.items()]
        return "\n".join(lines)

    __str__ = table
    __repr__ = table

    def plot(self):
        """Rate of every cluster, shaded by part; the label tells tasks and repeats."""
        import matplotlib.pyplot as plt

        rows = sorted(self.clusters, key=lambda row: row.rate)
        parts = list(dict.fromkeys(row.part for row in self.rows))
        greys = {part: str(0.35 + 0.5 * i / max(1, len(parts))) for i, part in enumerate(parts)}
        fig, ax = plt.subplots(figsize=(7.5, 0.9 + 0.26 * len(rows)), layout="constrained")
        for part in parts:
            own = [i for i, row in enumerate(rows) if row.part == part]
            share = sum(rows[i].rate for i in own)
            rates = [rows[i].rate for i in own]
            label = f"{part} ({share:.1%})"
            ax.barh(own, rates, color=greys[part], edgecolor="0.2", label=label)
        for i, row in enumerate(rows):
            text = f" {row.tasks} tasks, {row.examples:,} examples x {row.repeats:.2g}"
            ax.annotate(text, (row.rate, i), va="center", fontsize=7)
        ax.set_yticks(range(len(rows)), [row.cluster for row in rows], fontsize=8)
        ax.set(xlabel="share of all examples", title=f"What training on {self.name} sees")
        ax.set_xlim(0, 1.45 * rows[-1].rate)
        ax.legend(frameon=False, loc="lower right", fontsize=8)
        return fig


def _sum(rows: Sequence[Share], part: str, cluster: str) -> Share:
    """Many tasks as one row; tokens are means by rate."""
    rates = [row.rate for row in rows]
    examples = sum(row.examples for row in rows)
    tokens = np.average([(r.input_tokens, r.target_tokens) for r in rows], 0, weights=rates)
    repeats = sum(row.repeats * row.examples for row in rows) / examples
    valid = sum(row.valid for row in rows)
    return Share(
        part, cluster, "", len(rows), examples, valid, sum(rates), *map(float, tokens), repeats
    )


def overview(mixture: Mixture, tokenizer: Tokenizer | None = None, tokens: int = 0) -> Overview:
    """Count a mixture: every task's examples, and the tokens of a sample of its prompts."""
    from tqdm import tqdm

    tokenizer = tokenizer or ByteTokenizer()
    rows, rates = [], mixture.rates
    whole = list(zip(mixture.tasks, mixture.formats, mixture.parts, strict=True))
    for task, formats, part in tqdm(whole, desc="describe", unit="task", leave=False):
        alone = replace(mixture, tasks=(task,), weights=(1.0,), formats=(formats,), parts=(part,))
        texts = [(p.input, p.target) for p in alone.sample(SAMPLED)]
        lengths = np.mean([[len(tokenizer.encode(t)) + 1 for t in pair] for pair in texts], 0)
        valid = len(task.examples("valid")) if "valid" in task.splits else 0
        counts = (1, task.train_size, valid, rates[task.name], *map(float, lengths))
        rows.append(Share(part, task.cluster, task.name, *counts, 0.0))
    found = Overview(mixture.name, tuple(rows), 0.0, dict(mixture.dropped))
    run = tokens or found.epoch_tokens
    prompts = run / found.total.tokens
    seen = tuple(replace(row, repeats=prompts * row.rate / row.examples) for row in rows)
    return replace(found, rows=seen, run_tokens=float(run))
