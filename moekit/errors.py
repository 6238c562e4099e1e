"""Errors that several modules raise."""

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """A ValueError that names the unknown thing, the nearest known ones, and all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    shown = ", ".join(known[:60]) + (f" and {len(known) - 60} more" if len(known) > 60 else "")
    return ValueError(f"unknown {kind} {name!r}: {hint}known: {shown}")


def not_finite(model: str, parameter: str = "") -> ValueError:
    """A ValueError for a model with NaN or infinity in a parameter, or else in its outputs."""
    what = ", or too large to compute with"
    if parameter:
        what = f"; the first such parameter is {parameter}"
    return ValueError(
        f"the parameters of {model} are not finite (NaN or infinity){what}: load an earlier "
        "checkpoint, or train again with a lower learning_rate"
    )
