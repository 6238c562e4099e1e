"""Which checkpoints of a run are kept: the last ones, one every so many steps, the best one."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers

logger = logging.getLogger(__name__)
Scores = Callable[[], dict[int, float]]


class BestCheckpoint:
    """Keep the checkpoint with the best value of a metric (a preservation policy of orbax).

    Args:
      metric: its name; losses are best where they are low, everything else where it is high.
      scores: returns the values of the metric by step.
    """

    def __init__(self, metric: str, scores: Scores):
        self.metric = metric
        self.scores = scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each checkpoint."""
        scores = self.scores()
        if not scores and len(checkpoints) > 1:
            logger.warning("no row of the log has %s, by which checkpoints are kept", self.metric)
        sign = -1 if "loss" in self.metric else 1
        ranks = {}
        for checkpoint in checkpoints:
            score = scores.get(checkpoint.step, math.nan)
            if math.isfinite(score):
                ranks[checkpoint.step] = sign * score
        best = max(ranks, key=ranks.get, default=None)
        return [checkpoint.step == best for checkpoint in checkpoints]


def retention_policy(keep: int, keep_every: int, best: BestCheckpoint | None) -> Any:
    """A preservation policy of orbax: a checkpoint is kept if one of its rules keeps it.

    Args:
      keep: number of newest checkpoints to keep.
      keep_every: checkpoints of multiples of this step are kept for good; 0 for none.
    """
    rules: list[Any] = [checkpoint_managers.LatestN(keep)]
    if keep_every:
        rules.append(checkpoint_managers.EveryNSteps(keep_every))
    if best is not None:
        rules.append(best)
    return checkpoint_managers.AnyPreservationPolicy(rules)
