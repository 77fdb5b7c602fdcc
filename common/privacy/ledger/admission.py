"""Whether a holder's state admits a reservation: repeats, order, plans and budgets, without a look at a file.

the run's latest round, same digest, bytes stored       the same bytes again, nothing spent
the same, both seeded with everything else equal        the same reserve again, nothing spent
the same, otherwise                                     a new release: spent anew
the run's latest round, another digest                  "changed"
an older round of the run                               "stale"; seeded and the same in all: the same reserve again
a Poisson round outside of its run's plan               "plan"
another unit than what its budget covers already        "unit"
beyond a budget that it shares a unit with              "budget", or "run" for the limit of one run; at the first
                                                        round of a run with all that the run foresees
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

from fedhead.common.errors import InputError
from fedhead.common.privacy.events import CountEvent, Event, PoissonEvent
from fedhead.common.privacy.filters import Charge, Totals, admits, charge_of
from fedhead.common.privacy.ledger.chain import Mark
from fedhead.common.privacy.ledger.state import Plan, Reserve, Share, State, event_text

Reason = Literal["budget", "run", "plan", "changed", "stale", "unit"]

_FREE: Final = Charge(0.0, 0.0, 0.0)
_TEXTS: Final = ("holder", "domain", "run", "digest", "unit", "fingerprint", "noise")
MOST: Final = 2**63 - 1  # SQLite's largest whole number


def check_text(name: str, value: object) -> None:
    """Raise InputError unless a value is a text that SQLite can store."""
    if type(value) is str and value:
        try:
            value.isascii() or value.encode()
            return
        except UnicodeEncodeError:
            pass
    raise InputError(f"{name} is {ascii(value)[:60]}: it must be a text that is not empty. Give one.")


@dataclass(frozen=True)
class Reservation:
    """A round that a holder wants to train.

    Parameters
    ----------
    holder, domain, run : str
        Not empty. The budget domain is the holder's own choice, the run's name the server's.
    round : int, >= 0
    digest : str
        Of the whole request: a retry has the same.
    event : Event
        What this round releases, all its local steps at once.
    unit : str
        Privacy unit: record, person or holder.
    fingerprint : str
        Of the data. Evidence only: a budget does not depend on it.
    noise : str
        Source of the noise.
    plan : Plan, optional
        Needed for a Poisson event: the plan of the whole run.
    seeded : bool
        Whether a retry draws the same noise from the same seed. Simulation only.
    metrics : CountEvent, optional
        A noised count of the same round, charged with it.
    foreseen : sequence of Event
        What the rest of the run will ask for, by its request. Not charged: a run that can't be finished is denied at
        its first round, before it has used up what is left for others.
    """

    holder: str
    domain: str
    run: str
    round: int
    digest: str
    event: Event
    unit: str
    fingerprint: str
    noise: str
    plan: Plan | None = None
    seeded: bool = False
    metrics: CountEvent | None = None
    foreseen: tuple[Event, ...] = ()

    def check(self) -> None:
        """Raise InputError where a field could not be written down."""
        texts = (self.holder, self.domain, self.run, self.digest, self.unit, self.fingerprint, self.noise)
        if set(map(type, texts)) != {str} or not all(texts) or not "".join(texts).isascii():
            for name, value in zip(_TEXTS, texts, strict=True):
                check_text(f"reservation.{name}", value)
        if type(self.round) is not int or not 0 <= self.round <= MOST:
            raise InputError(f"reservation.round is {self.round!r:.60}: it must be a whole number from 0. Give one.")
        if isinstance(self.event, PoissonEvent) != (self.plan is not None):
            raise InputError(
                f"reservation.plan is {'missing' if self.plan is None else 'given'}: it must be given for a poisson "
                "event, and for no other. Take it from the run's request."
            )
        if self.plan is not None and not (type(self.plan.delta) is float and 0 < self.plan.delta < 1):
            raise InputError(
                f"reservation.plan.delta is {self.plan.delta!r:.60}: it must be more than 0 and less than 1. "
                "Take less than 1 / records."
            )


@dataclass(frozen=True, slots=True)
class Granted:
    """Charged and durable: noise may be drawn. `mark` is the end of the chain with it."""

    sequence: int
    mark: Mark


@dataclass(frozen=True, slots=True)
class Repeated:
    """Released before: send these bytes. Nothing was spent."""

    sequence: int
    payload: bytes
    mark: Mark


@dataclass(frozen=True, slots=True)
class Denied:
    """Not admitted; nothing was spent."""

    reason: Reason


class Spend(NamedTuple):
    """An admitted reservation: totals of the domain and of the run after the event, and after its metrics."""

    after: tuple[Totals, Totals]
    after_metrics: tuple[Totals, Totals] | None


def repeated(state: State, wanted: Reservation) -> Reserve | Reason | None:
    """The reserve that has this very round, why there is none that may be repeated, or None for a round to come."""
    run = state.runs.get(wanted.run)
    if run is None or run.latest is None or wanted.round > run.latest.round:
        return None
    if wanted.round < run.latest.round:
        # a simulation that goes on from a checkpoint does several rounds again
        older = run.seeded.get(wanted.round)
        same = older is not None and older.digest == wanted.digest and same_release(older, wanted)
        return older if same else "stale"
    return run.latest if run.latest.digest == wanted.digest else "changed"


def same_release(reserve: Reserve, wanted: Reservation) -> bool:
    """Whether a retry draws the same noise for the same sum over the same data, which is one release, not two."""
    return (
        reserve.seeded
        and wanted.seeded
        and reserve.metrics == (event_text(wanted.metrics) if wanted.metrics is not None else None)
        and reserve.release
        == (
            wanted.domain, wanted.unit, wanted.fingerprint, wanted.noise, event_text(wanted.event),
            wanted.plan.to_json() if wanted.plan is not None else None,
        )
    )  # fmt: skip


def spend(state: State, wanted: Reservation) -> Spend | Reason:
    """Charge a new release, or say which limit does not admit it."""
    share = state.share(wanted.domain, wanted.run)
    charge = _charge(wanted, share)
    if isinstance(charge, str):
        return charge
    domain, of_run = state.totals(wanted.domain, wanted.run)
    after = domain.plus(charge), of_run.plus(charge)
    metrics = None
    if wanted.metrics is not None:
        counted = charge_of(wanted.metrics)
        metrics = after[0].plus(counted), after[1].plus(counted)
    asked, asked_of_run = metrics or after
    if share is None:
        for event in wanted.foreseen:
            further = charge_of(event)
            asked, asked_of_run = asked.plus(further), asked_of_run.plus(further)
    denied = _denied(state, wanted, asked, asked_of_run)
    return denied if denied is not None else Spend(after, metrics)


def _charge(wanted: Reservation, share: Share | None) -> Charge | Literal["plan"]:
    event, plan = wanted.event, wanted.plan
    if not isinstance(event, PoissonEvent) or plan is None:
        return charge_of(event)
    used = share.steps if share is not None and share.plan is not None else 0
    if replace(plan.event, steps=event.steps) != event or used + event.steps > plan.event.steps:
        return "plan"
    if share is None or share.plan is None:
        return charge_of(plan.event, plan.delta)
    return _FREE if share.plan == plan.to_json() else "plan"


def _denied(state: State, wanted: Reservation, domain_after: Totals, run_after: Totals) -> Reason | None:
    """The limit that totals break, over every budget that this domain may share a privacy unit with."""
    reached = state.overlapping(wanted.domain, wanted.unit)
    limited = any(state.domains[name].terms is not None for name in reached if name in state.domains)
    if limited and len(state.units_with(wanted.domain, wanted.unit)) > 1:
        return "unit"
    if len(reached) == 1:
        found = state.domains.get(wanted.domain)
        return None if found is None or found.terms is None else admits(found.terms, domain_after, run_after)
    for name in reached:
        terms = state.domains[name].terms if name in state.domains else None
        if terms is None:
            continue
        total, of_run = domain_after, run_after
        for other in state.overlapping(name):
            if other != wanted.domain:
                spent, spent_by_run = state.totals(other, wanted.run)
                total, of_run = total.plus(spent), of_run.plus(spent_by_run)
        denied = admits(terms, total, of_run)
        if denied is not None:
            return denied
    return None
