"""How evenly experts are used: load, entropy, violation, drops, confidence. All per layer.

Y MoE layers, N tokens, K choices per token, E experts. A choice is what the router wanted; whether
it found a slot is counted as dropped or not.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from moekit.analysis.trace import RouterTrace


def expert_load(trace: RouterTrace, stack: str = "encoder") -> Float[np.ndarray, "Y E"]:
    """Share of all choices that fall on each expert; 1 / E at balance."""
    expert = trace.stack(stack).expert
    flat = expert.reshape(len(expert), -1)
    counts = np.stack([np.bincount(e[e >= 0], minlength=trace.num_experts) for e in flat])
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def load_entropy(load: Float[np.ndarray, "Y E"]) -> Float[np.ndarray, "Y"]:
    """Entropy of the load in nats; log E at balance, 0 when one expert takes all."""
    logs = np.log(np.where(load > 0, load, 1))
    return -(load * logs).sum(-1)


def effective_experts(load: Float[np.ndarray, "Y E"]) -> Float[np.ndarray, "Y"]:
    """exp of the load entropy: E at balance, 1 when one expert takes all."""
    return np.exp(load_entropy(load))


def coefficient_of_variation(load: Float[np.ndarray, "Y E"]) -> Float[np.ndarray, "Y"]:
    """Standard deviation of the load over its mean; 0 at balance."""
    return load.std(-1) / load.mean(-1)


def max_violation(load: Float[np.ndarray, "Y E"]) -> Float[np.ndarray, "Y"]:
    """(largest - mean) / mean load (Wang 2024); 0 at balance, E - 1 when one expert takes all."""
    return load.max(-1) / load.mean(-1) - 1


def dropped_tokens(trace: RouterTrace, stack: str = "encoder") -> Float[np.ndarray, "Y"]:
    """Share of tokens that no expert processed at all."""
    return 1 - trace.stack(stack).kept.any(-1).mean(-1)


def dropped_assignments(trace: RouterTrace, stack: str = "encoder") -> Float[np.ndarray, "Y"]:
    """Share of choices that found no slot."""
    s = trace.stack(stack)
    chosen = (s.expert >= 0).sum((1, 2))
    return 1 - s.kept.sum((1, 2)) / np.maximum(chosen, 1)


def router_entropy(trace: RouterTrace, stack: str = "encoder") -> Float[np.ndarray, "Y"]:
    """Mean entropy of the router's probabilities, nats; log E when it has no preference."""
    return trace.stack(stack).entropy.mean(-1)


def router_confidence(trace: RouterTrace, stack: str = "encoder") -> Float[np.ndarray, "Y"]:
    """Mean of the largest combine weight of each token that an expert processed."""
    s = trace.stack(stack)
    best, processed = s.weight.max(-1), s.kept.any(-1)
    return (best * processed).sum(-1) / np.maximum(processed.sum(-1), 1)


@dataclass(frozen=True)
class BalanceTable:
    """One row per stack and layer; prints as aligned text, shows as a table in a notebook."""

    model: str
    num_experts: int
    rows: tuple[dict, ...]

    _HEADS = (
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

    def _cells(self) -> list[list[str]]:
        heads = [head for _, head, _ in self._HEADS]
        body = [[form.format(row[key]) for key, _, form in self._HEADS] for row in self.rows]
        return [heads, *body]

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in cells
        ]
        note = f"{self.model}, {self.num_experts} experts; balance is entropy {self._limit():.3f}"
        return "\n".join([note, *lines])

    def _limit(self) -> float:
        return float(np.log(self.num_experts))

    def _repr_html_(self) -> str:
        head, *body = self._cells()
        columns = "".join(f"<th>{cell}</th>" for cell in head)
        lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
        note = f"<caption>{self.model}: balance is entropy {self._limit():.3f} nats</caption>"
        return f"<table>{note}<tr>{columns}</tr>{''.join(lines)}</table>"


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
