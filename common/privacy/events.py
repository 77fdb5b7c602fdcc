"""Mechanism events: one record of a release, as the ledger stores it and the accountants read it.

    full-batch   GaussianEvent    every record in every step, Gaussian noise on the clipped sum
    poisson      PoissonEvent     each record in a step with probability `sample_rate`, then the same
    none         NoPrivacyEvent   nothing clipped, nothing noised: epsilon is infinite

An event says what was released, never what it cost: accounting.py computes that, over all events together. The
neighbouring relation of every event is adding or removing one privacy unit; the sensitivity is the clipping norm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, ClassVar, Final

from fedhead.common.errors import InputError

SCHEMA: Final = 1


class _Event:
    """What all events have in common."""

    mechanism: ClassVar[str]

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, shortest exact floats; equal events give equal text."""
        fields = {"schema": SCHEMA, "mechanism": self.mechanism, **asdict(self)}  # type: ignore[call-overload]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)

    def to_row(self, round: int) -> dict[str, Any]:
        """A row of result.json; what the mechanism does not have is None."""
        return {
            "mechanism": self.mechanism,
            "noise_multiplier": getattr(self, "noise_multiplier", None),
            "sample_rate": getattr(self, "sample_rate", None),
            "steps": getattr(self, "steps", None),
            "clipping_norm": getattr(self, "clipping_norm", None),
            "round": round,
        }


def _number(event: Any, name: str, rule: str, most: float = math.inf) -> None:
    """Turn a field into a finite float in (0, most], or say what is wrong with it."""
    value = getattr(event, name)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not 0 < value <= most:
        raise InputError(
            f"event.{name} is {value!r}: it must be {rule}. Give such a number, or the mechanism none for a release "
            "without privacy."
        )
    object.__setattr__(event, name, float(value))


def _steps(event: Any) -> None:
    if isinstance(event.steps, bool) or not isinstance(event.steps, int) or event.steps < 1:
        raise InputError(f"event.steps is {event.steps!r}: it must be a whole number from 1. Leave out empty events.")


@dataclass(frozen=True)
class GaussianEvent(_Event):
    """`steps` releases of the clipped sum over all records, each with Gaussian noise.

    Parameters
    ----------
    noise_multiplier : float, > 0
        Standard deviation of the noise over the clipping norm.
    clipping_norm : float, > 0
        Sensitivity of the sum, in gradient units. The cost in privacy does not depend on it.
    steps : int, >= 1
        Releases of this kind.

    Raises
    ------
    InputError
        A field breaks its rule.
    """

    mechanism: ClassVar[str] = "full-batch"
    noise_multiplier: float
    clipping_norm: float
    steps: int

    def __post_init__(self) -> None:
        _number(self, "noise_multiplier", "a finite number more than 0")
        _number(self, "clipping_norm", "a finite number more than 0")
        _steps(self)


@dataclass(frozen=True)
class PoissonEvent(_Event):
    """`steps` releases of the clipped sum over a Poisson sample of the records, each with Gaussian noise.

    Parameters
    ----------
    noise_multiplier, clipping_norm, steps
        As in GaussianEvent.
    sample_rate : float, in (0, 1]
        Probability of each record in each step, independent of all others.

    Raises
    ------
    InputError
        A field breaks its rule.
    """

    mechanism: ClassVar[str] = "poisson"
    noise_multiplier: float
    clipping_norm: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        _number(self, "noise_multiplier", "a finite number more than 0")
        _number(self, "clipping_norm", "a finite number more than 0")
        _number(self, "sample_rate", "a probability more than 0 and at most 1", most=1.0)
        _steps(self)


@dataclass(frozen=True)
class NoPrivacyEvent(_Event):
    """`steps` releases without any privacy: epsilon is infinite, whatever else was released."""

    mechanism: ClassVar[str] = "none"
    steps: int

    def __post_init__(self) -> None:
        _steps(self)


Event = GaussianEvent | PoissonEvent | NoPrivacyEvent

# Literal, so that a name found in data never picks a class by itself. A new kind of event is a row here.
EVENTS: Final[Mapping[str, type[Event]]] = {
    "full-batch": GaussianEvent,
    "poisson": PoissonEvent,
    "none": NoPrivacyEvent,
}


def event_of(
    mechanism: str, noise_multiplier: float, clipping_norm: float, steps: int, sample_rate: float | None = None
) -> Event:
    """The event that a round spends, from the numbers of its request.

    Raises
    ------
    InputError
        A number breaks its rule, or the mechanism is unknown.
    """
    if mechanism == "full-batch":
        return GaussianEvent(noise_multiplier, clipping_norm, steps)
    if mechanism == "poisson":
        if sample_rate is None:
            raise InputError("sample_rate is missing: poisson needs a probability. Set it, or use full-batch.")
        return PoissonEvent(noise_multiplier, clipping_norm, sample_rate, steps)
    if mechanism == "none":
        return NoPrivacyEvent(steps)
    raise InputError(f"mechanism is {mechanism!r}: it must be one of {', '.join(EVENTS)}. Choose one.")


def from_json(text: str) -> Event:
    """Read an event back.

    Parameters
    ----------
    text : str
        What ``event.to_json()`` wrote; anything else is refused: one event has one text, and one hash in a ledger.

    Returns
    -------
    Event
        ``from_json(event.to_json()) == event``, bit for bit in every float.

    Raises
    ------
    InputError
        Not JSON, another schema, an unknown mechanism, a field that is missing, unknown or out of range, or a text
        that is not the canonical one.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise InputError("event is not valid JSON: it must be what fedhead wrote. Restore the file.") from fault
    if not isinstance(fields, dict):
        raise InputError(f"event is a JSON {type(fields).__name__}: it must be an object. Restore the file.")
    schema, mechanism = fields.pop("schema", None), fields.pop("mechanism", None)
    if schema != SCHEMA or isinstance(schema, bool):
        raise InputError(f"event.schema is {schema!r}: it must be {SCHEMA}. Read it with the fedhead that wrote it.")
    if not isinstance(mechanism, str) or mechanism not in EVENTS:
        raise InputError(f"event.mechanism is {mechanism!r}: it must be one of {', '.join(EVENTS)}. Restore the file.")
    kind = EVENTS[mechanism]
    expected = {field.name for field in dataclass_fields(kind)}
    if set(fields) != expected:
        raise InputError(
            f"event has the fields {', '.join(sorted(fields)) or 'none'}: {mechanism} has "
            f"{', '.join(sorted(expected))}. Restore the file."
        )
    event: Event = kind(**fields)
    if event.to_json() != text:
        raise InputError("event is not in canonical form: it must be what fedhead wrote. Restore the file.")
    return event
