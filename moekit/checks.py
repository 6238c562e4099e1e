"""Checks of the fields of a configuration; a ValueError names field, value and fix."""

import math
from typing import Any

from moekit.errors import unknown

MAX_INTEGER = 2**31 - 1  # steps and sizes are 32-bit integers on devices


def bad_field(config: Any, owner: str, field: str, fix: str) -> ValueError:
    value = str(getattr(config, field))
    shown = value if len(value) <= 40 else f"{value[:20]}.. ({len(value)} characters)"
    return ValueError(f"{owner}: {field} is {shown}; {fix}")


def check_integers(config: Any, owner: str, minimum: int, fields: tuple[str, ...]) -> None:
    for field in fields:
        if getattr(config, field) < minimum:
            raise bad_field(config, owner, field, f"use {minimum} or more")
        if getattr(config, field) > MAX_INTEGER:
            raise bad_field(config, owner, field, f"use at most {MAX_INTEGER}")


def check_positive(config: Any, owner: str, field: str) -> None:
    value = getattr(config, field)
    if not (value > 0 and math.isfinite(value)):
        raise bad_field(config, owner, field, "use a finite number above 0")


def check_not_negative(config: Any, owner: str, field: str) -> None:
    value = getattr(config, field)
    if not (value >= 0 and math.isfinite(value)):
        raise bad_field(config, owner, field, "use 0 or a finite number above it")


def check_rate(config: Any, owner: str, field: str) -> None:
    if not 0 <= getattr(config, field) < 1:
        raise bad_field(config, owner, field, "use 0 or more and less than 1")


def check_choice(config: Any, field: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, field)
    if value not in choices:
        raise unknown(field, value, choices)
