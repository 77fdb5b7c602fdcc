"""What ledgers say together: over the domains of a holder, and over holders.

Domains of one holder add up, event by event, unless both declare that they share nobody; of disjoint ones the largest
counts. A unit is in some set of domains that overlap pairwise, so the largest figure over "a domain and all that
overlap it" covers every unit. Holders whose units are disjoint compose in parallel: the maximum. The same people at
several holders pay the sum, composed event by event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedhead.common.privacy.audit.ledger import Charged, Reading
from fedhead.common.privacy.audit.recount import rows_of, whole_mu_squared
from fedhead.common.privacy.events import Event, NoPrivacyEvent, PoissonEvent
from fedhead.simulations.audit.ledger_figures import (
    Figures,
    as_json,
    compose,
    events_of,
    given_away,
    set_figures,
)

TRUSTING = "holder"  # the unit whose noise is the server's


@dataclass(frozen=True)
class Together:
    """The dearest set of overlapping domains of one holder, under one unit.

    Attributes
    ----------
    unit : str
    domains : tuple of str
    figures : Figures
    events : tuple of Event
        Of all that one unit of this holder may have paid for, for a composition over holders.
    given_away : bool
    """

    unit: str
    domains: tuple[str, ...]
    figures: Figures
    events: tuple[Event, ...]
    given_away: bool


def together(reading: Reading, delta: float | None) -> dict[str, Together]:
    """What one unit at a holder pays at most, by privacy unit; units that are mixed in a set have none in common."""
    sets: dict[str, dict[tuple[str, ...], Figures]] = {}
    for name in sorted(reading.domains):
        names = tuple(sorted(reading.overlapping(name)))
        units = set().union(*(reading.domains[other].units for other in names))
        if len(units) != 1 or names in sets.get(next(iter(units)), {}):
            continue
        sets.setdefault(next(iter(units)), {})[names] = set_figures(reading, name, names, delta)
    found = {}
    for unit, of_unit in sets.items():
        names, figures = max(of_unit.items(), key=lambda one: one[1].most)
        everything = sorted({name for each in of_unit for name in each})
        all_of = _charged(reading, everything)
        events = events_of(all_of)
        gaussian = not any(isinstance(event, PoissonEvent | NoPrivacyEvent) for event in events)
        if gaussian:  # the sets are ordered by mu alone: the dearest one is the dearest in any company
            names = max(of_unit, key=lambda each: whole_mu_squared(rows_of(events_of(_charged(reading, each)))))
            events = events_of(_charged(reading, names))
        found[unit] = Together(unit, names, figures, tuple(events), given_away(all_of))
    return found


def across(
    holders: Sequence[tuple[set[str], Mapping[str, Together]]], delta: float | None, same_people: bool
) -> tuple[dict[str, Any], Figures | None, list[str]]:
    """Compose over holders.

    Parameters
    ----------
    holders : sequence of (set of str, what `together` gives)
        Of each holder all privacy units in its ledger, and what one of them pays at most.
    delta : float, optional
        For the sum; default: the largest of the holders'.
    same_people : bool
        Whether to compose for somebody who is at all of them.

    Returns
    -------
    dict, Figures or None, list of str
        As JSON; the figures of the sum, for a check; notes.
    """
    notes, units = [], set[str]().union(*(theirs for theirs, _ in holders))
    if len(units) > 1 and TRUSTING in units:
        units = units - {TRUSTING}
        notes.append('what was released under the unit "holder" stands apart: its noise is the server\'s')
    if len(units) != 1:
        if units:
            notes.append(f"the units {' and '.join(sorted(units))} have no epsilon in common: nothing is composed")
        return {"disjoint": None, "same-people": None}, None, notes
    (unit,) = units
    mixed = sum(unit in theirs and unit not in one for theirs, one in holders)
    if mixed:
        notes.append(
            f"{mixed} of {len(holders)} holders have no epsilon for a {unit}, because a domain mixes units: nothing is "
            "composed"
        )
        return {"disjoint": None, "same-people": None}, None, notes
    parts = [one[unit] for _, one in holders if unit in one]
    epsilon = max(one.figures.most for one in parts)
    at = max(one.figures.first.delta for one in parts)
    disjoint = {"epsilon": "inf" if epsilon == float("inf") else epsilon, "delta": at, "unit": unit}
    if not same_people:
        return {"disjoint": disjoint, "same-people": None}, None, notes
    events = [event for one in parts for event in one.events]
    found = compose(events, at if delta is None else delta, any(one.given_away for one in parts))
    shown = as_json(found.first) or {}
    second = as_json(found.second)
    return {"disjoint": disjoint, "same-people": {**shown, "unit": unit, "second": second}}, found, notes


def _charged(reading: Reading, names: Sequence[str]) -> list[Charged]:
    return [one for name in names for one in reading.domains[name].charged]
