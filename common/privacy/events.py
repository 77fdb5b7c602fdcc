"""Mechanism events: one record of a release, as the ledger stores it and the accountants read it.

    full-batch   GaussianEvent    every record in every step, Gaussian noise on the clipped sum
    poisson      PoissonEvent     each record in a step with probability `sample_rate`, then the same
    count        CountEvent       a number of records, such as correct answers, with Gaussian noise
    none         NoPrivacyEvent   nothing clipped, nothing noised: epsilon is infinite

An event says what was released, never what it cost: accounting.py computes that, over all events together. The
neighbouring relation of every event is adding or removing one privacy unit; the sensitivity is the clipping norm.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, ClassVar, Final

from fedhead.common.errors import InputError

SCHEMA: Final = 1
LARGEST: Final = sys.float_info.max
MOST_STEPS: Final = 2**53  # every smaller whole number is a float, so no accountant rounds it


class _Event:
    """What all events have in common."""

    mechanism: ClassVar[str]

    def __post_init__(self) -> None:
        for name in tuple(vars(self)):
            if name == "steps":
                _steps(self)
            else:
                _number(self, name, *_NUMBERS[name])

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


def short(value: object) -> str:
    """A value as typed, cut off: a whole number that arrives may have more digits than Python agrees to print."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a whole number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


_POSITIVE: Final = ("a finite number more than 0", LARGEST)
_NUMBERS: Final[Mapping[str, tuple[str, float]]] = {
    "noise_multiplier": _POSITIVE,
    "clipping_norm": _POSITIVE,
    "sensitivity": _POSITIVE,
    "sample_rate": ("a probability more than 0 and at most 1", 1.0),
}


def _number(event: Any, name: str, rule: str, most: float) -> None:
    """Turn a field into a finite float in (0, most], or say what is wrong with it."""
    value = getattr(event, name)
    # compared, never converted first: float() of a whole number with 400 digits raises
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most
    if not good:
        raise InputError(
            f"event.{name} is {short(value)}: it must be {rule}. Give such a number, or the mechanism none for a "
            "release without privacy."
        )
    object.__setattr__(event, name, float(value))


def _steps(event: Any) -> None:
    if isinstance(event.steps, bool) or not isinstance(event.steps, int) or not 1 <= event.steps <= MOST_STEPS:
        raise InputError(
            f"event.steps is {short(event.steps)}: it must be a whole number from 1 to 2^53. Leave out empty events."
        )


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


@dataclass(frozen=True)
class CountEvent(_Event):
    """`steps` releases of a count of records, each with Gaussian noise: a noised metric.

    Parameters
    ----------
    noise_multiplier : float, > 0
        Standard deviation of the noise over the sensitivity.
    sensitivity : float, > 0
        Most that one privacy unit changes the count by: 1 where the unit is a record, the declared most records of a
        person where it is a person. The cost in privacy does not depend on it.
    steps : int, >= 1
        Releases of this kind.

    Raises
    ------
    InputError
        A field breaks its rule.

    Notes
    -----
    Guarantee: one step is a Gaussian mechanism with mu = 1 / noise_multiplier, the same as a full-batch step.
    """

    mechanism: ClassVar[str] = "count"
    noise_multiplier: float
    sensitivity: float
    steps: int


@dataclass(frozen=True)
class NoPrivacyEvent(_Event):
    """`steps` releases without any privacy: epsilon is infinite, whatever else was released."""

    mechanism: ClassVar[str] = "none"
    steps: int


Event = GaussianEvent | PoissonEvent | CountEvent | NoPrivacyEvent

# Literal, so that a name found in data never picks a class by itself. A new kind of event is a row here.
EVENTS: Final[Mapping[str, type[Event]]] = {
    "full-batch": GaussianEvent,
    "poisson": PoissonEvent,
    "count": CountEvent,
    "none": NoPrivacyEvent,
}


def event_of(
    mechanism: str, noise_multiplier: float, clipping_norm: float, steps: int, sample_rate: float | None = None
) -> Event:
    """The event that a round of training spends, from the numbers of its request.

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
    raise InputError(f"mechanism is {mechanism!r}: it must be full-batch, poisson or none. Choose one.")


def from_row(row: Mapping[str, Any]) -> Event:
    """An event of result.json that costs what the one of `to_row` does.

    Parameters
    ----------
    row : mapping
        As `to_row` gives it.

    Raises
    ------
    InputError
        A number is missing, or breaks a rule.

    Notes
    -----
    A row of a count has no sensitivity. Guarantee: its noise multiplier is in sensitivities, so that it costs what a
    full-batch step of that noise does, which is what comes back.
    """
    missing = sorted({"mechanism", "steps"} - set(row))
    if missing:
        raise InputError(f"event.{missing[0]} is missing: a result has it of every event. Restore result.json.")
    kind = "full-batch" if row["mechanism"] == CountEvent.mechanism else row["mechanism"]
    noise, norm = (row.get(name) for name in ("noise_multiplier", "clipping_norm"))
    return event_of(kind, 0.0 if noise is None else noise, 1.0 if norm is None else norm, row["steps"],
                    row.get("sample_rate"))  # fmt: skip


def read_object(text: str, what: str) -> dict[str, Any]:
    """The fields of a stored JSON object of this module's schema, which is taken out; InputError for anything else."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise InputError(f"{what} is not valid JSON: it must be what fedhead wrote. Restore the file.") from fault
    if not isinstance(fields, dict):
        raise InputError(f"{what} is a JSON {type(fields).__name__}: it must be an object. Restore the file.")
    schema = fields.pop("schema", None)
    if schema != SCHEMA or isinstance(schema, bool):
        raise InputError(
            f"{what}.schema is {short(schema)}: it must be {SCHEMA}. Read it with the fedhead that wrote it."
        )
    return fields


def check_names(fields: Mapping[str, Any], kind: type[Any], what: str) -> None:
    """Raise InputError unless the fields are those of the dataclass `kind`, all and no other."""
    expected = {field.name for field in dataclass_fields(kind)}
    if set(fields) != expected:
        raise InputError(
            f"{what} has the fields {', '.join(sorted(fields)) or 'none'}: it must have "
            f"{', '.join(sorted(expected))}. Restore the file."
        )


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
    fields = read_object(text, "event")
    mechanism = fields.pop("mechanism", None)
    if not isinstance(mechanism, str) or mechanism not in EVENTS:
        raise InputError(
            f"event.mechanism is {short(mechanism)}: it must be one of {', '.join(EVENTS)}. Restore the file."
        )
    kind = EVENTS[mechanism]
    check_names(fields, kind, "event")
    event: Event = kind(**fields)
    if event.to_json() != text:
        raise InputError("event is not in canonical form: it must be what fedhead wrote. Restore the file.")
    return event
