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
from moekit.table import Table


def expert_load(trace: RouterTrace, stack: str = "encoder") -> Float[ndarray, "Y E"]:
    """Share of all choices that select each expert; 1 / E when balanced."""
    expert = trace.stack(stack).expert
    num_layers = len(expert)
    counts = np.zeros((num_layers, trace.num_experts))
    for layer, choices in enumerate(expert):
        chosen = choices[choices >= 0]
        counts[layer] = np.bincount(chosen, minlength=trace.num_experts)
    total = counts.sum(1, keepdims=True)
    return counts / np.maximum(total, 1)


def load_entropy(load: Float[ndarray, "Y E"]) -> Float[ndarray, "Y"]:
    """Entropy of the load in nats; log E when balanced, 0 when one expert gets all choices."""
    positive_load = np.where(load > 0, load, 1)
    terms = load * np.log(positive_load)
    return -terms.sum(-1)


def effective_experts(load: Float[ndarray, "Y E"]) -> Float[ndarray, "Y"]:
    """exp of the load entropy: E when balanced, 1 when one expert gets all choices."""
    entropy = load_entropy(load)
    return np.exp(entropy)


def coefficient_of_variation(load: Float[ndarray, "Y E"]) -> Float[ndarray, "Y"]:
    """Standard deviation of the load over its mean; 0 when balanced."""
    standard_deviation = load.std(-1)
    mean = load.mean(-1)
    return standard_deviation / mean


def max_violation(load: Float[ndarray, "Y E"]) -> Float[ndarray, "Y"]:
    """(largest - mean) / mean load (Wang 2024).

    0 when balanced, E - 1 when one expert gets all choices.
    """
    largest = load.max(-1)
    mean = load.mean(-1)
    return largest / mean - 1


def dropped_tokens(trace: RouterTrace, stack: str = "encoder") -> Float[ndarray, "Y"]:
    """Share of tokens that no expert processed."""
    routing = trace.stack(stack)
    processed = routing.kept.any(-1)
    return 1 - processed.mean(-1)


def dropped_assignments(trace: RouterTrace, stack: str = "encoder") -> Float[ndarray, "Y"]:
    """Share of choices that found no free slot."""
    routing = trace.stack(stack)
    is_choice = routing.expert >= 0
    num_choices = is_choice.sum((1, 2))
    num_kept = routing.kept.sum((1, 2))
    share_kept = num_kept / np.maximum(num_choices, 1)
    return 1 - share_kept


def router_entropy(trace: RouterTrace, stack: str = "encoder") -> Float[ndarray, "Y"]:
    """Mean entropy of the router's probabilities in nats; log E without any preference."""
    routing = trace.stack(stack)
    return routing.entropy.mean(-1)


def router_confidence(trace: RouterTrace, stack: str = "encoder") -> Float[ndarray, "Y"]:
    """Mean of the largest combine weight of each token that an expert processed."""
    routing = trace.stack(stack)
    largest = routing.weight.max(-1)
    processed = routing.kept.any(-1)
    counted = largest * processed
    total = counted.sum(-1)
    num_processed = processed.sum(-1)
    return total / np.maximum(num_processed, 1)


# key in a row, heading of the column, format of a cell
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
    """One row for each stack and layer; printed as aligned text, shown as a table in a notebook."""

    model: str
    num_experts: int
    rows: tuple[dict[str, Any], ...]

    @property
    def _balanced_entropy(self) -> float:
        entropy = np.log(self.num_experts)
        return float(entropy)

    def table(self) -> Table:
        """One row for each stack and layer, with headings."""
        cells = []
        for row in self.rows:
            texts = []
            for key, _, cell_format in _COLUMNS:
                texts.append(cell_format.format(row[key]))
            cells.append(texts)
        entropy = f"{self._balanced_entropy:.3f} nats"
        title = f"{self.model}, {self.num_experts} experts; the entropy when balanced is {entropy}"
        headings = [heading for _, heading, _ in _COLUMNS]
        return Table(headings, cells, title=[title])

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


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
            row: dict[str, Any] = {"stack": stack, "layer": layer}
            for key, column in columns.items():
                row[key] = float(column[layer])
            rows.append(row)
    return BalanceTable(trace.model, trace.num_experts, tuple(rows))
