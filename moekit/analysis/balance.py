"""How evenly experts are used: load, entropy, violation, drops, confidence; all per layer.

Y MoE layers, N tokens, K choices per token, E experts. A choice is an expert that the router
selected for a token, whether or not the expert had a free slot.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from moekit.analysis.trace import RouterTrace


def expert_load(trace: RouterTrace, stack: str = "encoder") -> Float[ndarray, "Y E"]:
    """Share of all choices that select each expert; 1 / E when balanced."""
    expert = trace.stack(stack).expert
    counts = np.zeros((len(expert), trace.num_experts))
    for layer, choices in enumerate(expert):
        counts[layer] = np.bincount(choices[choices >= 0], minlength=trace.num_experts)
    total = counts.sum(1, keepdims=True)
    return counts / np.maximum(total, 1)


def load_entropy(load: Float[ndarray, "Y E"]) -> Float[ndarray, "Y"]:
    """Entropy of the load in nats; log E when balanced, 0 when one expert has all."""
    logs = np.log(np.where(load > 0, load, 1))
    return -(load * logs).sum(-1)


def effective_experts(load: Float[ndarray, "Y E"]) -> Float[ndarray, "Y"]:
    """exp of the load entropy: E when balanced, 1 when one expert has all."""
    return np.exp(load_entropy(load))


def coefficient_of_variation(load: Float[ndarray, "Y E"]) -> Float[ndarray, "Y"]:
    """Standard deviation of the load over its mean; 0 when balanced."""
    return load.std(-1) / load.mean(-1)


def max_violation(load: Float[ndarray, "Y E"]) -> Float[ndarray, "Y"]:
    """(largest - mean) / mean load (Wang 2024); 0 when balanced, E - 1 when one expert has all."""
    return load.max(-1) / load.mean(-1) - 1


def dropped_tokens(trace: RouterTrace, stack: str = "encoder") -> Float[ndarray, "Y"]:
    """Share of tokens that no expert processed."""
    processed = trace.stack(stack).kept.any(-1)
    return 1 - processed.mean(-1)


def dropped_assignments(trace: RouterTrace, stack: str = "encoder") -> Float[ndarray, "Y"]:
    """Share of choices that found no free slot."""
    routing = trace.stack(stack)
    choices = (routing.expert >= 0).sum((1, 2))
    kept = routing.kept.sum((1, 2))
    return 1 - kept / np.maximum(choices, 1)


def router_entropy(trace: RouterTrace, stack: str = "encoder") -> Float[ndarray, "Y"]:
    """Mean entropy of the router's probabilities in nats; log E without any preference."""
    return trace.stack(stack).entropy.mean(-1)


def router_confidence(trace: RouterTrace, stack: str = "encoder") -> Float[ndarray, "Y"]:
    """Mean of the largest combine weight of each token that an expert processed."""
    routing = trace.stack(stack)
    largest = routing.weight.max(-1)
    processed = routing.kept.any(-1)
    return (largest * processed).sum(-1) / np.maximum(processed.sum(-1), 1)


# key in a row, head of the column, format of a cell
_COLUMNS = (
    ("stack", "stack", "{}"),
    ("layer", "layer", "{}"),
    ("load_entropy", "load entropy", "{:.3f}"),
    ("effective_experts", "effective experts", "{:.2f}"),
    ("cv", "CV of load", "{:.3f}"),
    ("max_violation", "max violation", "{:.3f}"),
    ("dropped_tokens", "dropped tokens", "{:.1%}"),
    ("dropped_assignments", "dropped assignments", "{:.1%}"),
    ("confidence", "confidence", "{:.3f}"),
    ("router_entropy", "router entropy", "{:.3f}"),
)


@dataclass(frozen=True)
class BalanceTable:
    """One row for each stack and layer; aligned text in print, a table in a notebook."""

    model: str
    num_experts: int
    rows: tuple[dict[str, Any], ...]

    @property
    def _balanced_entropy(self) -> float:
        return float(np.log(self.num_experts))

    def _cells(self) -> list[list[str]]:
        """The table as text, heads first."""
        cells = [[head for _, head, _ in _COLUMNS]]
        for row in self.rows:
            cells.append([form.format(row[key]) for key, _, form in _COLUMNS])
        return cells

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        experts = f"{self.model}, {self.num_experts} experts"
        lines = [f"{experts}; the entropy when balanced is {self._balanced_entropy:.3f}"]
        for row in cells:
            padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(padded))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        heads, *rows = self._cells()
        entropy = f"{self._balanced_entropy:.3f} nats"
        caption = f"<caption>{self.model}: the entropy when balanced is {entropy}</caption>"
        lines = ["".join(f"<th>{head}</th>" for head in heads)]
        for row in rows:
            lines.append("".join(f"<td>{cell}</td>" for cell in row))
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table>{caption}{body}</table>"


def balance_table(trace: RouterTrace) -> BalanceTable:
    """All measures of balance for every stack and layer of a trace."""
    rows = []
    for stack in trace.stacks:
        load = expert_load(trace, stack)
        columns = {
            "load_entropy": load_entropy(load),
            "effective_experts": effective_experts(load),
            "cv": coefficient_of_variation(load),
            "max_violation": max_violation(load),
            "dropped_tokens": dropped_tokens(trace, stack),
            "dropped_assignments": dropped_assignments(trace, stack),
            "confidence": router_confidence(trace, stack),
            "router_entropy": router_entropy(trace, stack),
        }
        for layer in range(len(load)):
            values = {key: float(column[layer]) for key, column in columns.items()}
            rows.append({"stack": stack, "layer": layer, **values})
    return BalanceTable(trace.model, trace.num_experts, tuple(rows))
