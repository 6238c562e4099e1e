"""What every step is checked for: NaN and infinity, loss spikes, routers that collapsed.

A step computes its `health` on the device. The host reads it while the next step is computed, so
that a fault is found one step late and no step waits for it.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from moekit.config import ModelConfig
from moekit.moe.stats import LayerStats

SPIKE_WINDOW = 100  # steps whose noise a loss is compared with
LEVEL_WINDOW = 20  # steps whose level it is compared with; fewer are no level
SPIKE_CHANGES = 10.0  # above the level, in median changes from step to step
MIN_SPIKE = 0.2  # above the level, as a share of it
MAX_CONCENTRATION = 0.9
MAX_DROPPED = 0.5
MAX_SKIPPED = 10  # steps in a row
MAX_ROLLBACKS = 3  # of one call of train
STACKS = ("encoder", "decoder")

NOT_FINITE = "not finite"
SPIKE = "loss spike"
COLLAPSE = "router collapse"


class TrainingFault(ValueError):
    """A guard stopped the run."""


class NonFiniteLoss(TrainingFault):
    """The loss, a gradient or the parameters became NaN or infinite."""


class BatchId(NamedTuple):
    """What determines a batch, with the data and the configuration.

    Args:
      number: of the batch in its order, from 1.
      seed: of the run.
      order: of the data: 0, or the number of returns to an earlier checkpoint so far.
      position: state of the data stream after the batch, by shard.
    """

    number: int
    seed: int
    order: int
    position: Mapping[str, str]

    def __str__(self) -> str:
        order = f", data order {self.order}" if self.order else ""
        ends = [json.loads(state)[0] for state in self.position.values() if state]
        examples = f", examples up to {max(ends)}" if ends else ""
        return f"batch {self.number} of seed {self.seed}{order}{examples}"


class Fault(NamedTuple):
    """Something that a guard found.

    Args:
      kind: "not finite", "loss spike" or "router collapse".
      step: number of the step, from 1.
      what: the finding, with the layer where it is known.
      batch: the one that the step trained on.
    """

    kind: str
    step: int
    what: str
    batch: BatchId

    def __str__(self) -> str:
        return f"{self.what} at step {self.step} ({self.batch})"

    def error(self, advice: str) -> TrainingFault:
        kind = NonFiniteLoss if self.kind == NOT_FINITE else TrainingFault
        return kind(f"{self}: {advice}")


def health(
    loss: Float[Array, ""], grad_norm: Float[Array, ""], stats: Mapping[str, LayerStats]
) -> Float[Array, "numbers"]:
    """What `Guard` reads of a step: one array, which is one transfer to the host.

    Loss, gradient norm, then the `concentration` of all MoE layers and their shares of dropped
    tokens, the encoder's first. A layer whose router's logits are not finite has NaN for both.
    """
    concentrations = []
    shares_dropped = []
    for stack_name in STACKS:
        if stack_name not in stats:
            continue
        of_stack = stats[stack_name]
        is_finite = jnp.isfinite(of_stack.z_sum)
        dropped = of_stack.dropped_tokens / jnp.maximum(of_stack.tokens, 1)
        concentrations.append(jnp.where(is_finite, concentration(of_stack), jnp.nan))
        shares_dropped.append(jnp.where(is_finite, dropped, jnp.nan))
    return jnp.concatenate([jnp.stack([loss, grad_norm]), *concentrations, *shares_dropped])


def concentration(stats: LayerStats) -> Float[Array, "layers"]:
    """How concentrated a layer's load is on its busiest expert.

    0: all experts have the same load; 1: every token chose the busiest one.
    """
    tokens = jnp.maximum(stats.tokens, 1)
    busiest = stats.load.max(-1) / tokens
    mean = stats.load.mean(-1) / tokens
    possible = 1 - mean
    return jnp.where(possible > 1e-3, (busiest - mean) / jnp.maximum(possible, 1e-3), 0.0)


def moe_layer_names(cfg: ModelConfig) -> list[str]:
    """The MoE layers in the order of `health`, numbered in each stack from 0."""
    names = []
    for stack in STACKS:
        for index in range(cfg.moe_layers(stack)):
            names.append(f"{stack} MoE layer {index}")
    return names


class _Reading(NamedTuple):
    """The health of a step, still on the device, and the batch that the step trained on."""

    step: int
    batch: BatchId
    values: Array


class Guard:
    """Reads the health of every step and finds faults.

    A fault that lasts is found once: again only after a step without it.

    Args:
      cfg: of the model, for the names of its layers.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        self._layers = moe_layer_names(cfg)
        self._readings: deque[_Reading] = deque()
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._present: set[str] = set()  # kinds of faults of the step before
        self.num_skipped = 0  # steps in a row that were not finite

    def add(self, step: int, batch: BatchId, values: Float[Array, "numbers"]) -> None:
        """Begin to read the health of a step; does not wait for the device."""
        values.copy_to_host_async()
        self._readings.append(_Reading(step, batch, values))

    def find(self, num_unread: int = 0) -> list[Fault]:
        """The faults of all steps but the newest `num_unread`, for which it waits."""
        faults = []
        while len(self._readings) > num_unread:
            reading = self._readings.popleft()
            values = np.asarray(reading.values)
            found = self._check(values)
            for kind, what in found.items():
                # every step that is not finite counts; of the others the first one
                if kind == NOT_FINITE or kind not in self._present:
                    faults.append(Fault(kind, reading.step, what, reading.batch))
            self._present = set(found)
        return faults

    def forget(self) -> None:
        """Start anew, after a return to an earlier step."""
        self._readings.clear()
        self._losses.clear()
        self._present.clear()
        self.num_skipped = 0

    def _check(self, values: Float[np.ndarray, "numbers"]) -> dict[str, str]:
        """The faults of one step: what was found, by kind."""
        loss, grad_norm, *of_layers = values.tolist()
        num_layers = len(of_layers) // 2
        concentrations = of_layers[:num_layers]
        shares_dropped = of_layers[num_layers:]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.num_skipped += 1
            return {NOT_FINITE: self._describe_nonfinite(loss, grad_norm, concentrations)}
        self.num_skipped = 0
        found = {}
        spike = describe_spike(loss, self._losses)
        if spike:
            found[SPIKE] = spike
        self._losses.append(loss)
        collapse = self._describe_collapse(concentrations, shares_dropped)
        if collapse:
            found[COLLAPSE] = collapse
        return found

    def _describe_nonfinite(
        self, loss: float, grad_norm: float, concentrations: Sequence[float]
    ) -> str:
        what = f"loss is {loss}"
        if math.isfinite(loss):
            what = f"gradient norm is {grad_norm} (loss {loss:.4g})"
        for name, value in zip(self._layers, concentrations, strict=True):
            if math.isnan(value):
                return f"{what}, router logits are not finite from {name} on,"
        return what

    def _describe_collapse(
        self, concentrations: Sequence[float], shares_dropped: Sequence[float]
    ) -> str:
        found = []
        for name, concentrated, dropped in zip(
            self._layers, concentrations, shares_dropped, strict=True
        ):
            if concentrated > MAX_CONCENTRATION:
                found.append(
                    f"{name} sends nearly all tokens to one expert ({dropped:.0%} dropped)"
                )
            elif dropped > MAX_DROPPED:
                found.append(f"{name} drops {dropped:.0%} of its tokens")
        return "; ".join(found)


def describe_spike(loss: float, former_losses: Sequence[float]) -> str:
    """Text about a loss that is far above the former ones; empty if it is not.

    Far is a fifth above the median of the last 20 losses and 10 times the median change from one
    step to the next, which is 9.5 standard deviations of normal noise.
    """
    if len(former_losses) < LEVEL_WINDOW:
        return ""
    losses = list(former_losses)
    level = statistics.median(losses[-LEVEL_WINDOW:])
    if loss <= level + MIN_SPIKE * abs(level):
        return ""  # as after nearly every step: the rest takes longer
    change = float(np.median(np.abs(np.diff(losses))))
    if loss <= level + SPIKE_CHANGES * change:
        return ""
    return f"loss spike: {loss:.4g} after a median of {level:.4g} in {LEVEL_WINDOW} steps,"


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no floating-point array of a tree holds a NaN or an infinity."""
    finite = jnp.array(True)
    for array in jax.tree.leaves(tree):
        if jnp.issubdtype(array.dtype, jnp.floating):
            finite &= jnp.isfinite(array).all()
    return finite


def describe_kept(folder: Path | None, steps: Sequence[int]) -> str:
    """What is left of a run that was stopped by a fault, and how to continue from it."""
    if folder is None:
        return "nothing was saved, because there is no workdir"
    if not steps:
        return "no checkpoint was written yet, the same workdir can be used again"
    newest = steps[-1]
    how_to_go_back = f"delete {folder} to start again"
    if len(steps) > 1:
        how_to_go_back = f"delete {folder / str(newest)} to resume from step {steps[-2]}"
    return (
        f"the checkpoint of step {newest} is kept and the same workdir resumes from it with the "
        f"new settings; if it diverges again, {how_to_go_back}"
    )
