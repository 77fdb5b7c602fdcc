"""What a holder's chain says: its end, totals, runs and reserves, replayed row by row.

The state is never stored. It is rebuilt from the chain, and every row is checked before it counts; the rows that the
ledger itself writes go through the same `apply`, so what is in memory is what a replay would give.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from fedhead.common.errors import InputError
from fedhead.common.privacy.events import Event, PoissonEvent, from_json
from fedhead.common.privacy.filters import Totals, charge_of
from fedhead.common.privacy.ledger.chain import GENESIS, KINDS, Entry, Mark, hash_of
from fedhead.common.privacy.terms import Terms

Status = Literal["reserved", "released", "abandoned"]

TRUSTING = "holder"  # the unit whose noise is the server's
NEAR = 1e-9  # relative; what totals may differ by from ours when another version added them up
EXACT = 1e-15  # relative; one rounding


class Plan(NamedTuple):
    """The whole Poisson plan of a run, charged at once when its first round is reserved.

    Attributes
    ----------
    event : PoissonEvent
        With all steps of the run.
    delta : float, in (0, 1)
        At which it is charged.
    """

    event: PoissonEvent
    delta: float

    def to_json(self) -> str:
        """Canonical JSON, as an event's."""
        return json.dumps({"delta": self.delta, "event": event_text(self.event)}, sort_keys=True, separators=(",", ":"))


@lru_cache(maxsize=1024)
def event_text(event: Event) -> str:
    """An event's canonical JSON, kept: all holders of a round mostly spend the same."""
    return event.to_json()


_event_of = lru_cache(maxsize=4096)(from_json)


@lru_cache(maxsize=1024)
def plan_of(text: str) -> Plan:
    """A plan from its JSON; InputError where it is not one."""
    try:
        fields = json.loads(text)
        event, delta = _event_of(fields["event"]), fields["delta"]
    except (ValueError, KeyError, TypeError) as fault:
        raise InputError("plan is not valid JSON: it must be what fedhead wrote. Restore the file.") from fault
    if not isinstance(event, PoissonEvent) or not isinstance(delta, float) or not 0 < delta < 1:
        raise InputError("plan is not a Poisson plan with a delta: it must be. Restore the file.")
    return Plan(event, delta)


@dataclass(slots=True)
class Reserve:
    """One charged round: its row, what makes it the same round again, and how far it has come."""

    sequence: int
    domain: str
    run: str
    round: int
    digest: str
    seeded: bool
    release: tuple[Any, ...]
    """Domain, unit, fingerprint, noise, event and plan: with the same seed they give the same bytes."""
    metrics: str | None = None
    status: Status = "reserved"
    payload_digest: str | None = None


@dataclass(slots=True)
class Share:
    """What one run has spent of one domain; `steps` of its Poisson plan are used up."""

    totals: Totals = field(default_factory=Totals)
    plan: str | None = None
    steps: int = 0


@dataclass(slots=True)
class Run:
    """A run: its latest round, its seeded rounds, which reserve has its bytes stored, its share of each domain."""

    latest: Reserve | None = None
    seeded: dict[int, Reserve] = field(default_factory=dict)
    stored: int | None = None
    shares: dict[str, Share] = field(default_factory=dict)


@dataclass(slots=True)
class Domain:
    """A budget domain: its terms, whom it declares disjoint, its totals, and what was seen in it."""

    terms: Terms | None = None
    disjoint_from: tuple[str, ...] = ()
    totals: Totals = field(default_factory=Totals)
    units: set[str] = field(default_factory=set)
    noises: set[str] = field(default_factory=set)
    seeded: bool = False


class State:
    """One holder's chain, replayed.

    Parameters
    ----------
    holder : str
    """

    def __init__(self, holder: str) -> None:
        self.holder = holder
        self.sequence = 0
        self.hash = GENESIS
        self.domains: dict[str, Domain] = {}
        self.runs: dict[str, Run] = {}
        self.reserves: dict[int, Reserve] = {}

    @property
    def mark(self) -> Mark:
        """The end of the chain."""
        return Mark(self.sequence, self.hash)

    def overlapping(self, name: str, unit: str | None = None) -> list[str]:
        """The domains that may share a unit with `name`: itself, and all but those that declare it both ways.

        What was released under the unit "holder" only, or is about to be (`unit`), counts in no other domain: its noise
        is the server's, and units are never mixed in one figure.
        """
        known = self.domains.get(name)
        units = (known.units if known is not None else set()) | ({unit} if unit is not None else set())
        if units == {TRUSTING}:
            return [name]
        mine = known.disjoint_from if known is not None else ()
        others = [
            other
            for other, domain in self.domains.items()
            if other != name and domain.units != {TRUSTING} and not (other in mine and name in domain.disjoint_from)
        ]
        return [name, *others]

    def units_with(self, name: str, unit: str) -> set[str]:
        """The units of all releases that a budget of `name` covers, with one more."""
        found = [self.domains[other].units for other in self.overlapping(name, unit) if other in self.domains]
        return {unit}.union(*found)

    def totals(self, domain: str, run: str | None) -> tuple[Totals, Totals]:
        """Totals of a domain, and of a run within it."""
        found, share = self.domains.get(domain), self.share(domain, run)
        return found.totals if found else Totals(), share.totals if share else Totals()

    def share(self, domain: str, run: str | None) -> Share | None:
        """What a run has spent of a domain, None before its first round there."""
        found = self.runs.get(run) if run is not None else None
        return found.shares.get(domain) if found is not None else None

    def fault(self, entry: Entry) -> str | None:
        """What is wrong with the next row of the chain, or None."""
        if entry.sequence != self.sequence + 1:
            return f"follows entry {self.sequence}: rows are missing or out of order"
        try:
            good = entry.previous == self.hash and entry.hash == hash_of(entry[:-1])
        except (TypeError, ValueError):
            good = False
        if not good:
            return "has a hash that does not fit: the row was changed"
        try:
            return self._rule(entry)
        except (InputError, TypeError, AttributeError):
            return "is not in the form that fedhead writes"

    def _rule(self, entry: Entry) -> str | None:
        """What a row with a sound hash breaks all the same: written by something else than this module's rules."""
        if entry.kind not in KINDS:
            return "is of an unknown kind"
        before, run_before = self.totals(entry.domain, entry.run)
        after, run_after = _totals(entry)
        if entry.kind == "reserve":
            if entry.run is None or entry.event is None or entry.round is None or entry.digest is None:
                return "is a reserve without its run, round, digest or event"
            first = entry.of is None
            if not first and (entry.of != self.sequence or entry.of not in self.reserves):
                return "is a noised metric that does not follow its reserve"
            event, share = _event_of(entry.event), self.share(entry.domain, entry.run)
            if not _charged(before, after, event, entry.plan, share):
                return "has a total below what was charged"
            if not _charged(run_before, run_after, event, entry.plan, share):
                return "has a total of the run below what was charged"
            return None
        if after != before or run_after != (run_before if entry.run is not None else Totals()):
            return "changes a total without charging an event"
        if entry.kind == "terms":
            if entry.terms is not None:
                Terms.from_json(entry.terms)
            return None
        if entry.of not in self.reserves:
            return "speaks of a reserve that is not there"
        return None

    def apply(self, entry: Entry, after: tuple[Totals, Totals] | None = None) -> None:
        """Take in the next row, which has no fault; `after`: its totals, where they are at hand."""
        if entry.kind == "reserve":
            self._apply_reserve(entry, *(after or _totals(entry)))
        elif entry.kind == "terms":
            domain = self.domains.setdefault(entry.domain, Domain())
            domain.terms = Terms.from_json(entry.terms) if entry.terms is not None else None
            domain.disjoint_from = tuple(json.loads(entry.disjoint_from or "[]"))
        else:
            assert entry.of is not None
            reserve = self.reserves[entry.of]
            reserve.status = "released" if entry.kind == "release" else "abandoned"
            if entry.payload_digest is not None:
                reserve.payload_digest = entry.payload_digest
                run = self.runs[reserve.run]
                if run.latest is reserve:
                    run.stored = reserve.sequence
        self.sequence, self.hash = entry.sequence, entry.hash

    def _apply_reserve(self, entry: Entry, after: Totals, run_after: Totals) -> None:
        assert entry.run is not None
        assert entry.round is not None
        assert entry.digest is not None
        assert entry.event is not None
        domain = self.domains.get(entry.domain)
        if domain is None:
            domain = self.domains[entry.domain] = Domain()
        run = self.runs.get(entry.run)
        if run is None:
            run = self.runs[entry.run] = Run()
        share = run.shares.get(entry.domain)
        if share is None:
            share = run.shares[entry.domain] = Share()
        domain.totals, share.totals = after, run_after
        if entry.of is not None:
            self.reserves[entry.of].metrics = entry.event
            return
        domain.units.add(entry.unit or "")
        domain.noises.add(entry.noise or "")
        domain.seeded |= bool(entry.seeded)
        if entry.plan is not None:
            share.plan = entry.plan
            share.steps += _event_of(entry.event).steps
        run.latest = self.reserves[entry.sequence] = Reserve(
            entry.sequence, entry.domain, entry.run, entry.round, entry.digest, bool(entry.seeded),
            (entry.domain, entry.unit, entry.fingerprint, entry.noise, entry.event, entry.plan),
        )  # fmt: skip
        if entry.seeded:
            run.seeded[entry.round] = run.latest


def _totals(entry: Entry) -> tuple[Totals, Totals]:
    return (
        Totals(entry.domain_mu_squared, entry.domain_epsilon, entry.domain_delta),
        Totals(entry.run_mu_squared, entry.run_epsilon, entry.run_delta),
    )


def _charged(before: Totals, after: Totals, event: Event, plan: str | None, share: Share | None) -> bool:
    """Whether totals grew by what the event costs, within the rounding of another version.

    A Poisson plan's epsilon is not computed again: it takes an accountant, and the next version's may be tighter.
    """
    if isinstance(event, PoissonEvent):
        if plan is None:
            return False
        first = share is None or share.plan is None
        delta = before.delta + plan_of(plan).delta if first else before.delta
        return (
            after.mu_squared == before.mu_squared
            and (after.epsilon >= before.epsilon if first else after.epsilon == before.epsilon)
            and _near(after.delta, delta)
        )
    wanted = before.plus(charge_of(event))
    return (
        _near(after.mu_squared, wanted.mu_squared)
        and _near(after.epsilon, wanted.epsilon)
        and after.delta == wanted.delta
    )


def _near(after: float, wanted: float) -> bool:
    if math.isinf(wanted):
        return after == wanted
    return wanted * (1 - EXACT) <= after <= wanted * (1 + NEAR)
