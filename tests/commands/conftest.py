"""A folder with a file of routers."""

from pathlib import Path

import pytest

ROUTERS = """
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moekit import assign


def noisy(logits, mask, *, capacity, limit=None, key=None, **_):
    if key is not None:
        logits = logits + 0.1 * jax.random.normal(key, logits.shape)
    probs = jax.nn.softmax(logits)
    expert = jnp.argmax(logits, -1)[:, None]
    return assign(expert, probs.max(-1)[:, None], probs, mask, capacity=capacity, limit=limit)


noisy.causal = True


@dataclass(frozen=True)
class Sharp:
    scale: float = 2.0
    causal = True

    def __call__(self, logits, mask, **settings):
        return noisy(self.scale * logits, mask, **settings)


sharper = Sharp(scale=4.0)


class NoDefault(Sharp):
    def __init__(self, scale):
        super().__init__(scale)


def broken(logits):
    return logits
"""


@pytest.fixture
def router_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_router.py"
    path.write_text(ROUTERS)
    return path
