"""Flags that several verbs share: lists, mesh axes, and numbers with a lower bound."""

from collections.abc import Sequence

MESH_AXES = ("data", "expert", "model")
MAX_SEED = 2**32 - 1


def names(text: str) -> tuple[str, ...]:
    """The names in a list that is separated by commas, such as mmlu,bbh."""
    return tuple(name for name in text.split(",") if name)


def one_or_several(words: Sequence[str]) -> str | list[str] | None:
    """The words of a flag that takes a column or several: None, one word, or a list of them."""
    if not words:
        return None
    return words[0] if len(words) == 1 else list(words)


def mesh_axes(text: str) -> dict[str, int]:
    """The axis sizes in a text such as expert=64,model=2.

    Raises:
      ValueError: an unknown axis, or a size that is no positive number.
    """
    axes = {}
    for part in names(text):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh {text!r}: write axes (data, expert, model) as expert=8,model=2")
        axes[axis] = int(size)
    return axes


def require_at_least(minimum: int, **flags: int | float | None) -> None:
    """Check numbers that have a lower bound; None is a flag that was not given.

    Raises:
      ValueError: a number is below the bound.
    """
    for name, value in flags.items():
        if value is not None and not value >= minimum:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {value}; use {minimum} or more")


def require_share(**flags: float | None) -> None:
    """Check shares; None is a flag that was not given.

    Raises:
      ValueError: a number is not above 0 and at most 1.
    """
    for name, value in flags.items():
        if value is not None and not 0 < value <= 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {value}; use a number above 0, at most 1")


def require_seed(seed: int) -> None:
    """Check a seed, which numpy and jax both have to accept.

    Raises:
      ValueError: the seed is negative or has more than 32 bits.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"--seed is {seed}; use a number from 0 to {MAX_SEED}")
