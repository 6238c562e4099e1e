"""Synthetic traces with known answers."""

from collections.abc import Sequence

import numpy as np
import pytest

from moekit.analysis.trace import RouterTrace, StackTrace


def _trace(
    expert: Sequence | np.ndarray,
    *,
    kept: Sequence | np.ndarray | None = None,
    weight: Sequence | None = None,
    domains: Sequence[str] = ("a", "b"),
    token: Sequence[int] | np.ndarray | None = None,
    experts: int = 4,
    example: Sequence[int] | np.ndarray | None = None,
) -> RouterTrace:
    """A trace from choices [Y, N, K]; by default two examples of N / 2 tokens."""
    expert = np.asarray(expert)
    layers, tokens, _ = expert.shape
    kept = expert >= 0 if kept is None else np.asarray(kept)
    weight = np.where(kept, 0.5, 0.0) if weight is None else np.asarray(weight, float)
    example = np.arange(tokens) * 2 // tokens if example is None else np.asarray(example)
    stack = StackTrace(
        token=np.arange(tokens) if token is None else np.asarray(token),
        example=example,
        position=np.concatenate([np.arange(count) for count in np.bincount(example)]),
        expert=expert,
        weight=weight,
        kept=kept,
        entropy=np.full((layers, tokens), 0.25),
    )
    names = tuple(f"task{index}" for index in range(len(domains)))
    return RouterTrace("m", experts, {"encoder": stack}, names, names, tuple(domains))


def _one_choice(choices: Sequence[int] | np.ndarray, **kwargs) -> RouterTrace:
    """A trace of one layer from one choice a token."""
    return _trace(np.array(choices)[None, :, None], **kwargs)


@pytest.fixture
def synthetic():
    return _trace


@pytest.fixture
def one_choice():
    return _one_choice
