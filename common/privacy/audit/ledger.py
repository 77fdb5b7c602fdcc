"""A second reading of one holder's chain: its rows alone, with exact arithmetic, and none of the ledger's own rules.

What is derived anew for every row, in order, until the first that is wrong:

    chain      sequence, previous hash, and SHA-256 over the row's columns
    form       the columns that its kind has, and JSON as fedhead writes it
    totals     of the domain and of the run: never smaller than before, never below the exact sum of all that was
               charged, above it only by rounding; a row that charges nothing changes none
    rounds     what is released or given up was reserved before, once; rounds only go forward; a count follows its
               round; Poisson rounds stay within the plan that was charged whole
    budget     totals are within every budget that the domain may share a unit with, by the terms of that moment

Guarantee: a chain without a fault charges each reserve at least its exact cost, counts every reserve whatever became of
it, and never went beyond its declared terms. The chain can't show what left the holder without a row, that its end was
cut off, or that it was written anew as a whole: stored bytes, and marks that somebody else keeps, do.

This module must not import state.py, admission.py, filters.py or terms.py: the same mistake would be made twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final, Literal

from fedhead.common.errors import InputError
from fedhead.common.privacy.audit.recount import INFINITE, event_of, plan_bounds
from fedhead.common.privacy.audit.rows import Fault, check_form, check_link, totals_of
from fedhead.common.privacy.audit.running import Sums, check_grown, check_unchanged
from fedhead.common.privacy.audit.terms import Declared, beyond, declared_of
from fedhead.common.privacy.events import CountEvent, Event, PoissonEvent
from fedhead.common.privacy.ledger.chain import Entry

Status = Literal["reserved", "released", "abandoned"]


@dataclass(frozen=True)
class Bad:
    """A row that is wrong.

    Attributes
    ----------
    sequence : int
    what : str
        One sentence that names the fault, to follow "row N".
    topic : str
        Which of the module's checks it fails.
    """

    sequence: int
    what: str
    topic: str


@dataclass
class Charged:
    """A reserve: one event that was charged, and what became of it.

    Attributes
    ----------
    row : Entry
    event : Event
    plan : (PoissonEvent, float) or None
        The whole plan of a Poisson event, and the delta at which it is charged.
    of : Charged or None
        For a count, the round that it belongs to; its fate is that round's.
    status : str
    ended : Entry or None
        The last row that released it or gave it up.
    """

    row: Entry
    event: Event
    plan: tuple[PoissonEvent, float] | None = None
    of: Charged | None = None
    own_status: Status = "reserved"
    ended: Entry | None = None
    count: Charged | None = None

    @property
    def status(self) -> Status:
        """What became of it."""
        return self.own_status if self.of is None else self.of.own_status


@dataclass
class Domain:
    """A budget domain, as its rows show it."""

    terms: Declared | None = None
    disjoint_from: tuple[str, ...] = ()
    sums: Sums = field(default_factory=Sums)
    runs: dict[str, Sums] = field(default_factory=dict)
    plans: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Of each run: its plan as written, and the steps of it that are used up."""
    charged: list[Charged] = field(default_factory=list)
    units: set[str] = field(default_factory=set)


@dataclass
class Reading:
    """What a chain says.

    Attributes
    ----------
    holder : str
    rows : int
        Rows that were read, the first bad one included.
    hashes : list of str
        Of the good rows, in order.
    domains : dict of str to Domain
    charged : dict of int to Charged
        By sequence, counts included.
    first_bad : Bad or None
        Everything else is what stood before it.
    """

    holder: str
    rows: int = 0
    hashes: list[str] = field(default_factory=list)
    domains: dict[str, Domain] = field(default_factory=dict)
    charged: dict[int, Charged] = field(default_factory=dict)
    first_bad: Bad | None = None
    latest: dict[str, Charged] = field(default_factory=dict)
    """Of each run: its latest round."""
    payloads: dict[int, str] = field(default_factory=dict)
    """Of each reserve: the digest that its last release has."""

    def overlapping(self, name: str, unit: str | None = None) -> list[str]:
        """The domains that count against a budget of `name`, itself first.

        All of a holder's, save those that declare one another disjoint, and what was released under the unit "holder"
        only, whose noise is the server's.
        """
        own = self.domains.get(name)
        if "holder" in (own.units if own is not None and own.units else {unit}):
            return [name]
        found = [name]
        for other, domain in self.domains.items():
            apart = own is not None and other in own.disjoint_from and name in domain.disjoint_from
            if other != name and not apart and domain.units != {"holder"}:
                found.append(other)
        return found


def read(holder: str, rows: Iterable[Entry]) -> Reading:
    """Read a holder's chain from its first row, up to its end or to the first row that is wrong.

    Parameters
    ----------
    holder : str
    rows : iterable of Entry
        In the order of their sequence.

    Returns
    -------
    Reading
        See the module for what is checked.
    """
    found = Reading(holder)
    for row in rows:
        found.rows += 1
        try:
            check_link(row, found.holder, found.hashes)
            check_form(row)
            _READERS[row.kind](found, row)
        except Fault as fault:
            found.first_bad = Bad(len(found.hashes) + 1, fault.what, fault.topic)
            return found
        except (InputError, TypeError, ValueError, KeyError, AttributeError, RecursionError):
            found.first_bad = Bad(len(found.hashes) + 1, "is not in the form that fedhead writes", "form")
            return found
        found.hashes.append(row.hash)
    return found


# ------------------------------------------------------------------------------------------------------ kinds of rows


def _read_terms(found: Reading, row: Entry) -> None:
    domain = found.domains.setdefault(row.domain, Domain())
    _unchanged(domain, row)
    domain.terms = None if row.terms is None else declared_of(row.terms)
    disjoint = json.loads(row.disjoint_from or "")
    if not isinstance(disjoint, list) or not all(isinstance(name, str) for name in disjoint):
        raise Fault("form", "does not say which domains are disjoint from its own")
    domain.disjoint_from = tuple(disjoint)


def _read_reserve(found: Reading, row: Entry) -> None:
    assert row.run is not None
    assert row.event is not None
    event, cost = event_of(row.event)
    one = Charged(row, event)
    if row.of is not None:
        _check_count(found, one)
    else:
        _check_order(found, row)
    domain = found.domains.setdefault(row.domain, Domain())
    run = domain.runs.setdefault(row.run, Sums())
    delta, low, high = 0.0, 0.0, 0.0
    if isinstance(event, PoissonEvent):
        one.plan, first = _check_plan(domain, row, event)
        if first:
            (low, high), delta = plan_bounds(*one.plan), one.plan[1]
    elif row.plan is not None:
        raise Fault("rounds", "has a Poisson plan, and its event is none")
    if cost == INFINITE:
        low = high = math.inf
    check_grown("domain", domain.sums, totals_of(row)[:3], cost, delta, (low, high))
    check_grown("run", run, totals_of(row)[3:], cost, delta, (low, high))
    _check_budget(found, row, row.run)
    domain.units.add(row.unit or "")
    domain.charged.append(one)
    found.charged[row.sequence] = one
    if one.of is None:
        found.latest[row.run] = one
    else:
        one.of.count = one


def _check_count(found: Reading, one: Charged) -> None:
    row = one.row
    main = found.charged.get(row.of or 0)
    if main is None or main.of is not None or row.of != row.sequence - 1:
        raise Fault("rounds", "is a noised count that does not follow its round")
    same = ("domain", "run", "round", "digest", "unit", "fingerprint", "noise", "seeded")
    if not isinstance(one.event, CountEvent) or any(getattr(row, name) != getattr(main.row, name) for name in same):
        raise Fault("rounds", "is a noised count of another round than the one that it follows")
    one.of = main


def _check_order(found: Reading, row: Entry) -> None:
    if row.seeded not in (0, 1):
        raise Fault("form", "does not say whether its noise comes from a seed")
    before = found.latest.get(row.run or "")
    if before is None or before.row.round is None or row.round is None or row.round > before.row.round:
        return
    if row.round < before.row.round:
        raise Fault("rounds", f"goes back to round {row.round}, after round {before.row.round} of the same run")
    if row.digest != before.row.digest:
        raise Fault("rounds", f"reserves round {row.round} once more for another request")
    if before.own_status == "reserved":
        raise Fault("rounds", f"reserves round {row.round} once more without giving up row {before.row.sequence}")


def _check_plan(domain: Domain, row: Entry, event: PoissonEvent) -> tuple[tuple[PoissonEvent, float], bool]:
    """The plan of a Poisson round, and whether it is the first: then the plan is charged, whole."""
    assert row.run is not None
    if row.plan is None:
        raise Fault("rounds", "is a Poisson round without the plan that it belongs to")
    plan, delta = _plan_of(row.plan)
    if replace(plan, steps=event.steps) != event:
        raise Fault("rounds", "is a Poisson round with other noise or another rate than its plan was charged for")
    known, used = domain.plans.get(row.run, (row.plan, 0))
    if known != row.plan:
        raise Fault("rounds", "belongs to another Poisson plan than the one that its run was charged for")
    if used + event.steps > plan.steps:
        raise Fault("rounds", f"takes more Poisson steps than the {plan.steps} that were charged for its run")
    first = row.run not in domain.plans
    domain.plans[row.run] = row.plan, used + event.steps
    return (plan, delta), first


@lru_cache(maxsize=4096)
def _plan_of(text: str) -> tuple[PoissonEvent, float]:
    fields: dict[str, Any] = json.loads(text)
    event, _ = event_of(fields["event"])
    delta = fields["delta"]
    if set(fields) != {"event", "delta"} or json.dumps(fields, sort_keys=True, separators=(",", ":")) != text:
        raise Fault("form", "has a plan that is not in the form that fedhead writes")
    if not isinstance(event, PoissonEvent) or type(delta) is not float or not 0 < delta < 1:
        raise Fault("form", "has a plan that is no Poisson plan with a delta")
    return event, delta


def _read_end(found: Reading, row: Entry) -> None:
    """A release, or the giving up of a reserve."""
    one, releases = found.charged.get(row.of or 0), row.kind == "release"
    if one is None or one.of is not None:
        raise Fault("rounds", f"{'releases' if releases else 'gives up'} what was never reserved")
    if any(getattr(row, name) != getattr(one.row, name) for name in ("domain", "run", "round", "digest")):
        raise Fault("rounds", f"speaks of another round than row {row.of}, which it refers to")
    again = f"although row {row.of} was {one.own_status} before"
    if releases and one.own_status != "reserved":
        if not one.row.seeded:
            raise Fault("rounds", f"releases a round a second time under one charge, {again}: fresh noise was free")
        known = found.payloads.get(one.row.sequence)
        if known is not None and row.payload_digest is not None and row.payload_digest != known:
            raise Fault("rounds", f"releases other bytes, {again}: the same noise hides both")
    if not releases and one.own_status != "reserved":
        raise Fault("rounds", f"gives up a round {again}")
    _unchanged(found.domains[row.domain], row)
    one.own_status, one.ended = ("released" if releases else "abandoned"), row
    if row.payload_digest is not None:
        found.payloads[one.row.sequence] = row.payload_digest


_READERS: Final = {"terms": _read_terms, "reserve": _read_reserve, "release": _read_end, "abandon": _read_end}


def _check_budget(found: Reading, row: Entry, run: str) -> None:
    """Every budget that this row's domain may share a unit with, with the terms of this moment."""
    reached = found.overlapping(row.domain, row.unit)
    limits = [(name, terms) for name in reached if (terms := found.domains[name].terms) is not None]
    if not limits:
        return
    if len({row.unit}.union(*(found.domains[name].units for name in reached))) > 1:
        raise Fault("budget", "brings a second privacy unit under one budget")
    for name, terms in limits:
        counted = {row.domain, *found.overlapping(name)}
        all_of = [found.domains[other].sums.totals for other in counted]
        of_run = [
            found.domains[other].runs[run].totals for other in counted if run in found.domains[other].runs
        ]  # this row's domain has it, with this row's totals
        broken = beyond(terms, all_of, of_run)
        if broken is not None:
            raise Fault("budget", f"goes beyond {broken} of the domain {name}")


def _unchanged(domain: Domain, row: Entry) -> None:
    check_unchanged(row, domain.sums, domain.runs.get(row.run, Sums()) if row.run is not None else Sums())
