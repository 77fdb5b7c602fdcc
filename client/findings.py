"""One line of what `fedhead check` found, and how its numbers are written."""

from __future__ import annotations

import math
import stat
from dataclasses import dataclass
from decimal import ROUND_DOWN, Context
from pathlib import Path
from typing import Final, Literal

from fedhead.common.errors import FedheadError

State = Literal["ok", "warning", "remedy", "unknown"]
NO_RECORDS: Final = "not looked at: there are no records"


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it stands, and what to do about it."""

    name: str
    state: State
    text: str
    remedy: str = ""


def apart(error: FedheadError) -> tuple[str, str]:
    """A one-line fault as text and remedy: the remedy is its last sentence."""
    text, point, remedy = str(error).rpartition(". ")
    return (text, remedy) if point else (str(error), "")


def count(number: int, name: str) -> str:
    """A number of things, `1 record` or `1,200 records`."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def open_to_others(path: Path) -> bool:
    """Whether anybody but the owner may read, write or enter."""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def spent_as(value: float) -> str:
    """An epsilon that was spent, rounded up: never shown less than it is."""
    return "infinite" if math.isinf(value) else f"{math.ceil(round(value * 1000, 6)) / 1000:.3f}"


def left_as(value: float) -> str:
    """An epsilon that is left, rounded down: never shown more than it is."""
    return f"{math.floor(value * 1000) / 1000:.3f}"


def delta_as(value: float) -> str:
    """A delta as it is typed: 1e-6."""
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def delta_left_as(value: float) -> str:
    """A delta that is left, rounded down: as typed, it still fits."""
    return delta_as(float(Context(prec=3, rounding=ROUND_DOWN).create_decimal(value)))


def span(seconds: float) -> str:
    """A time as it is said: 3 s, 5 min, 2 h 10 min, 3 days."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h" + (f" {rest} min" if rest else "")
    return count(round(hours / 24), "day")
