"""Epsilon of what a ledger charged, by two accountants that share no code, beside the ledger's own figure.

    first     exact Gaussian DP for full-batch steps and counts; Opacus's PRV accountant where a Poisson plan is there
    second    dp-accounting's privacy loss distributions, of the same events
    ledger    the ledger's own, from its running totals

A Poisson plan counts whole, as it was charged, however many of its rounds took place. `first` and `second` describe
the schedule; what holds for a server that chose it along the way is the budget that admitted it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedhead.common.privacy import accounting
from fedhead.common.privacy.accounting import Spent
from fedhead.common.privacy.audit.ledger import Charged, Domain, Reading
from fedhead.common.privacy.audit.recount import (
    AGREE,
    AGREE_BY,
    CLOSE,
    agree,
    gaussian_epsilon,
    pld_epsilon,
    rows_of,
    whole_mu_squared,
)
from fedhead.common.privacy.events import Event, NoPrivacyEvent, PoissonEvent
from fedhead.common.privacy.filters import Totals, least, left, spent
from fedhead.common.privacy.terms import Terms

DELTA = 1e-5  # where neither a budget nor the user names one; each Poisson plan's own comes on top


@dataclass(frozen=True)
class Figures:
    """One (epsilon, delta) by each accountant.

    Attributes
    ----------
    first : Spent
    second : Spent or None
        None where no grid of losses holds the events.
    ledger : Spent or None
        None for a composition over holders, of which no ledger has a total.
    """

    first: Spent
    second: Spent | None
    ledger: Spent | None = None

    @property
    def worst(self) -> float:
        """The larger epsilon of both accountants."""
        return max(self.first.epsilon, self.second.epsilon if self.second is not None else 0.0)

    @property
    def most(self) -> float:
        """The largest epsilon of all, the ledger's own among them: a plan chosen along the way is charged there."""
        return max(self.worst, self.ledger.epsilon if self.ledger is not None else 0.0)

    @property
    def disagree(self) -> str | None:
        """How far the accountants are apart, where it is too far."""
        if self.second is None or agree(self.first.epsilon, self.second.epsilon):
            return None
        return f"{self.first.epsilon:.4f} and {self.second.epsilon:.4f}"

    @property
    def understated(self) -> str | None:
        """The ledger's own figure, where it is below what an accountant finds."""
        if self.ledger is None:
            return None
        exact = self.first.accountant == "gdp"
        least = self.first.epsilon * (1 - CLOSE) if exact else self.first.epsilon * (1 - AGREE) - AGREE_BY
        if self.second is not None and math.isfinite(self.second.epsilon):
            least = max(least, self.second.epsilon * (1 - AGREE) - AGREE_BY)
        return None if self.ledger.epsilon >= least else f"{self.ledger.epsilon:.4f}, not {self.worst:.4f}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: infinity is the text "inf"."""
        return {name: as_json(getattr(self, name)) for name in ("first", "second", "ledger")}


def as_json(found: Spent | None) -> dict[str, Any] | None:
    """An (epsilon, delta) for JSON."""
    if found is None:
        return None
    return {**asdict(found), "epsilon": "inf" if math.isinf(found.epsilon) else found.epsilon}


def events_of(charged: Iterable[Charged]) -> list[Event]:
    """What was charged: full-batch steps and counts as they are, each run's Poisson plan once and whole."""
    events: list[Event] = []
    plans = set()
    for one in charged:
        if one.plan is None:
            events.append(one.event)
        elif (one.row.domain, one.row.run) not in plans:
            plans.add((one.row.domain, one.row.run))
            events.append(one.plan[0])
    return events


def compose(events: Sequence[Event], delta: float, given_away: bool = False) -> Figures:
    """Both accountants on events, at one delta.

    Parameters
    ----------
    events : sequence of Event
    delta : float, in (0, 1)
    given_away : bool
        Whether noise came from a seed that somebody else knows: then epsilon is infinite.
    """
    if given_away or any(isinstance(event, NoPrivacyEvent) for event in events):
        infinite = Spent(math.inf, delta, "none")
        return Figures(infinite, infinite)
    rows = rows_of(events)
    if any(isinstance(event, PoissonEvent) and event.sample_rate < 1 for event in events):
        first = accounting.epsilon(events, delta)
    else:
        first = Spent(gaussian_epsilon(whole_mu_squared(rows), delta), delta, "gdp")
    second = pld_epsilon(rows, delta)
    return Figures(first, None if second is None else Spent(second, delta, "pld"))


def domain_figures(domain: Domain, run: str | None, delta: float | None) -> Figures | None:
    """Figures of a domain, or of one run within it; None where several units have no epsilon in common."""
    if len(domain.units) > 1:
        return None
    charged = [one for one in domain.charged if run is None or one.row.run == run]
    sums = domain.sums if run is None else domain.runs[run]
    terms, totals = terms_of(domain), Totals(*sums.totals)
    at = statement_delta(terms, totals, delta)
    away = given_away(charged)
    own = Spent(math.inf, at, "none") if away else spent(terms, totals, at if terms is None else delta)
    found = compose(events_of(charged), at, away)
    return Figures(found.first, found.second, own)


def set_figures(reading: Reading, name: str, names: Sequence[str], delta: float | None) -> Figures:
    """Figures of a domain with all that overlap it, `names`, at the domain's own terms."""
    domains = [reading.domains[other] for other in names]
    charged = [one for domain in domains for one in domain.charged]
    terms, totals = terms_of(reading.domains[name]), Totals()
    for domain in domains:
        totals = totals.plus(Totals(*domain.sums.totals))
    at, away = statement_delta(terms, totals, delta), given_away(charged)
    found = compose(events_of(charged), at, away)
    return Figures(
        found.first,
        found.second,
        Spent(math.inf, at, "none") if away else spent(terms, totals, at if terms is None else delta),
    )


def statement_delta(terms: Terms | None, totals: Totals, delta: float | None) -> float:
    """The delta to state epsilon at: the one that is asked for, the budget's, or 1e-5 with what the plans take.

    Plans that were charged more than the budget sets aside for them, under other terms, add to the budget's.
    """
    if delta is not None:
        return delta
    return spent(terms, totals, delta).delta if terms is not None else min(DELTA + totals.delta, 0.5)


def given_away(charged: Iterable[Charged]) -> bool:
    """Whether a deployed holder let a seed that arrived draw its noise: the sender can take it off again."""
    return any("seeded" in (one.row.noise or "") and not one.row.seeded for one in charged)


def terms_of(domain: Domain) -> Terms | None:
    """The budget that is in force now."""
    return None if domain.terms is None else Terms(**asdict(domain.terms))


def left_of(reading: Reading, name: str) -> dict[str, float] | None:
    """What a domain's budget leaves, and those of the domains that overlap it, after all that counts against each."""
    if terms_of(reading.domains[name]) is None:
        return None
    budgets = []
    for owner in reading.overlapping(name):
        terms, totals = terms_of(reading.domains[owner]), Totals()
        for other in reading.overlapping(owner):
            totals = totals.plus(Totals(*reading.domains[other].sums.totals))
        if terms is not None:
            budgets.append(left(terms, totals))
    return asdict(least(*budgets))
