"""Privacy filters: whether the next release still fits into a budget that was fixed before anything was spent.

    Terms      the budget: (epsilon, delta), and which share of both is set aside for Poisson plans
    Charge     what one event takes from it
    Totals     all charges so far
    admits     the filter: None, or the limit that the next totals would break

A budget is split once, beforehand, into two parts that never borrow from each other:

    mu part         full-batch steps and counts: sum of steps / noise_multiplier^2 <= mu^2, the largest mu with
                    epsilon_GDP(mu, delta_0) <= epsilon_0, where (epsilon_0, delta_0) = (1 - share) (epsilon, delta)
    Poisson part    each plan of a run, charged whole when it starts as one (epsilon_i, delta_i):
                    sum epsilon_i <= share epsilon and sum delta_i <= share delta

Guarantee: let rounds, runs, noise, rates and plans be chosen in any way, each after all earlier results were seen. If
every release was admitted before its noise was drawn and nothing was ever taken off the totals, then all releases
together are (epsilon, delta)-differentially private under adding or removing one privacy unit. The mu part is a
Gaussian filter, exact and free: Smith, Thakurta (2022), arXiv:2210.17520. The Poisson part is the filter of basic
composition: Rogers, Roth, Ullman, Vadhan (2016), arXiv:1605.08294. A plan is itself an interactive mechanism whose
steps may alternate with those of other runs; parts that were fixed beforehand compose concurrently as they do one
after the other: Vadhan, Zhang (2023), arXiv:2207.08335. What is *not* covered: a total that was never compared with a
budget. The figures of `spent` describe a schedule; what holds for an adaptive adversary is the budget in `Terms`.

Every comparison is made on floats that were rounded to the safe side: totals upwards, budgets downwards.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

from fedhead.common.errors import InputError
from fedhead.common.privacy.accounting import Accountant, Spent, epsilon
from fedhead.common.privacy.events import SCHEMA, Event, NoPrivacyEvent, PoissonEvent, check_names, read_object, short
from fedhead.common.privacy.gaussian import SLACK, check_delta, gdp_epsilon, mu_for
from fedhead.common.privacy.rounding import above, below, difference_below, root_above, sum_above

__all__ = ["Charge", "Left", "Limit", "Terms", "Totals", "admits", "charge_of", "left", "spent"]

Limit = Literal["budget", "run"]


@dataclass(frozen=True)
class Terms:
    """A budget, fixed before anything is spent from it.

    Parameters
    ----------
    epsilon : float, > 0, finite
    delta : float, in (0, 1)
        Most that all releases together may cost.
    poisson_share : float, in [0, 1]
        Share of epsilon and of delta that is set aside for Poisson plans. With 0 every Poisson plan is refused, with 1
        every full-batch step and count.
    run_epsilon : float, > 0, at most epsilon, or None
        Most that one run may spend; None: as much as is left.
    run_delta : float, in (0, delta], or None
        Delta that goes with run_epsilon; None: delta.

    Raises
    ------
    InputError
        A value breaks its rule.

    Notes
    -----
    A run's limit is split by the same share and is a filter of its own: each run is (run_epsilon, run_delta)-private.
    A limit on the sum epsilon_GDP(mu) + sum epsilon_i would not do: after a first Gaussian release one may go on with
    what its outcome makes worse, a plan or more Gaussian steps, and delta nearly doubles (shown by a test).
    """

    epsilon: float
    delta: float
    poisson_share: float = 0.0
    run_epsilon: float | None = None
    run_delta: float | None = None

    def __post_init__(self) -> None:
        _check(self, "epsilon", 0 < _real(self.epsilon) < math.inf, "a finite number more than 0", "Try 1 to 8.")
        small = "Take less than 1 / records."
        _check(self, "delta", 0 < _real(self.delta) < 1, "more than 0 and less than 1", small)
        _check(self, "poisson_share", 0 <= _real(self.poisson_share) <= 1, "from 0 to 1", "Give 0 for full batch only.")
        if self.run_epsilon is not None:
            rule = f"more than 0 and at most epsilon, {self.epsilon!r}"
            _check(self, "run_epsilon", 0 < _real(self.run_epsilon) <= self.epsilon, rule, "Lower it, or leave it out.")
        if self.run_delta is not None:
            rule = f"more than 0 and at most delta, {self.delta!r}"
            _check(self, "run_delta", 0 < _real(self.run_delta) <= self.delta, rule, "Lower it, or leave it out.")
            _check(self, "run_delta", self.run_epsilon is not None, "left out without run_epsilon", "Set run_epsilon.")

    @property
    def mu_squared(self) -> float:
        """Most that steps / noise_multiplier^2 of full-batch steps and counts may sum up to, rounded down.

        ``gdp_epsilon(sqrt(mu_squared), delta_0) <= epsilon_0`` holds in floats; 0 where nothing is set aside.
        """
        return _parts(self).mu_squared

    @property
    def run(self) -> Terms | None:
        """The budget of each single run, None where the terms set none."""
        if self.run_epsilon is None:
            return None
        return Terms(self.run_epsilon, self.delta if self.run_delta is None else self.run_delta, self.poisson_share)

    def to_json(self) -> str:
        """Canonical JSON, as an event's: equal terms give equal text."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Terms:
        """Read terms back; InputError for anything that `to_json` does not write."""
        fields = read_object(text, "terms")
        check_names(fields, cls, "terms")
        terms = cls(**fields)
        if terms.to_json() != text:
            raise InputError("terms are not in canonical form: they must be what fedhead wrote. Restore the file.")
        return terms


@dataclass(frozen=True)
class Charge:
    """What one event takes from a budget; see `charge_of`.

    Attributes
    ----------
    mu_squared : float, >= 0
        Of full-batch steps and counts: steps / noise_multiplier^2, rounded up. Infinity: a release without privacy.
    epsilon, delta : float, >= 0
        Of a Poisson plan.
    """

    mu_squared: float
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Totals:
    """All charges so far, of a domain or of a run: the sums of what `Charge` has, infinities included."""

    mu_squared: float = 0.0
    epsilon: float = 0.0
    delta: float = 0.0

    def plus(self, charge: Charge | Totals) -> Totals:
        """These totals and one charge (or the totals of another domain) more.

        Every sum that is no float is rounded upwards, so that totals never lie below the exact sum, in any order.
        """
        squared = sum_above(self.mu_squared, charge.mu_squared)
        return Totals(squared, sum_above(self.epsilon, charge.epsilon), sum_above(self.delta, charge.delta))


@dataclass(frozen=True)
class Left:
    """What is left of a budget, rounded down.

    Attributes
    ----------
    mu_squared : float, >= 0
        Of the mu part: what steps / noise_multiplier^2 may still sum up to.
    epsilon, delta : float, >= 0
        The same as a pair: what full-batch steps could still cost by themselves. Such pairs don't add up.
    poisson_epsilon, poisson_delta : float, >= 0
        Of the Poisson part.
    """

    mu_squared: float
    epsilon: float
    delta: float
    poisson_epsilon: float
    poisson_delta: float


@lru_cache(maxsize=1024)
def charge_of(event: Event, plan_delta: float | None = None) -> Charge:
    """What an event takes from a budget.

    Parameters
    ----------
    event : Event
        A Poisson event has the steps of the whole plan of its run.
    plan_delta : float, in (0, 1), or None
        The delta at which a Poisson plan is charged; of no meaning for other events.

    Returns
    -------
    Charge
        Full batch and count: mu_squared, rounded up. Poisson: (epsilon of the plan at plan_delta, plan_delta).
        No privacy: infinite, which no terms admit.

    Raises
    ------
    InputError
        A Poisson plan without plan_delta, or with one outside of (0, 1).
    """
    if isinstance(event, NoPrivacyEvent):
        return Charge(math.inf, math.inf, 0.0)
    if isinstance(event, PoissonEvent):
        if plan_delta is None:
            raise InputError("plan_delta is missing: a poisson plan is charged at a delta of its own. Set it.")
        return Charge(0.0, epsilon([event], plan_delta).epsilon, plan_delta)
    return Charge(above(Fraction(event.steps) / Fraction(event.noise_multiplier) ** 2), 0.0, 0.0)


def admits(terms: Terms, domain_after: Totals, run_after: Totals) -> Limit | None:
    """Whether totals are within the terms.

    Parameters
    ----------
    terms : Terms
    domain_after : Totals
        Of all runs, stopped, failed and other domains' included, with the next charge added.
    run_after : Totals
        Of the run that the next charge belongs to, with it added.

    Returns
    -------
    None, "budget" or "run"
        None: admitted. "budget": the domain's budget does not allow it; "run": the limit of one run does not.

    Notes
    -----
    Guarantee: see the module. Totals must hold every charge that was ever admitted: taking one back, because its plan
    was stopped or its process died, voids the guarantee, and so does counting the current run only.
    """
    if not _within(_parts(terms), domain_after):
        return "budget"
    run = _run_parts(terms)
    return "run" if run is not None and not _within(run, run_after) else None


def spent(terms: Terms | None, totals: Totals, delta: float | None = None) -> Spent:
    """Totals as one (epsilon, delta), rounded up.

    Parameters
    ----------
    terms : Terms or None
        Needed where delta is None: then the mu part is stated at its own share of delta, and the whole at terms.delta.
    totals : Totals
    delta : float, in (0, 1), or None
        The delta of the statement. The mu part takes what the Poisson plans have left of it.

    Returns
    -------
    Spent
        accountant "gdp": full batch and counts alone; "sum": with Poisson plans, each charged whole; "none":
        infinite. Infinity also where the Poisson plans have used up the delta.

    Raises
    ------
    InputError
        Neither terms nor delta, or a delta outside of (0, 1).

    Notes
    -----
    Guarantee: for a schedule that did not depend on results, all releases are (epsilon, delta)-private. For one that
    did, the guarantee is the budget that admitted it.
    """
    if delta is None:
        if terms is None:
            raise InputError("delta is missing: without a budget there is none to state epsilon at. Set it.")
        delta, share = terms.delta, _parts(terms).delta
    else:
        check_delta(delta)
        share = difference_below(delta, totals.delta)
    if math.isinf(totals.mu_squared):
        return Spent(math.inf, delta, "none")
    accountant: Accountant = "sum" if totals.epsilon or totals.delta else "gdp"
    if totals.delta > delta or (totals.mu_squared and not share):
        return Spent(math.inf, delta, accountant)
    gaussian = gdp_epsilon(root_above(totals.mu_squared), share) if totals.mu_squared else 0.0
    return Spent(sum_above(gaussian, totals.epsilon), delta, accountant)


def left(terms: Terms, totals: Totals) -> Left:
    """What the terms leave beyond the totals; nothing is ever less than 0."""
    parts = _parts(terms)
    squared = difference_below(parts.mu_squared, totals.mu_squared)
    return Left(
        mu_squared=squared,
        epsilon=min(parts.epsilon, gdp_epsilon(math.sqrt(squared), parts.delta)) if squared else 0.0,
        delta=parts.delta,
        poisson_epsilon=difference_below(parts.poisson_epsilon, totals.epsilon),
        poisson_delta=difference_below(parts.poisson_delta, totals.delta),
    )


def least(*found: Left) -> Left:
    """What every one of several budgets leaves: the smallest of each number."""
    return Left(**{field.name: min(getattr(one, field.name) for one in found) for field in fields(Left)})


class _Parts(NamedTuple):
    """Terms, split: (epsilon, delta) of the mu part with its mu_squared, and those of the Poisson part."""

    mu_squared: float
    epsilon: float
    delta: float
    poisson_epsilon: float
    poisson_delta: float


@lru_cache(maxsize=256)
def _parts(terms: Terms) -> _Parts:
    # kept, because a search for mu costs more than a whole transaction of the ledger should
    share = Fraction(terms.poisson_share)
    epsilon, delta = Fraction(terms.epsilon), Fraction(terms.delta)
    epsilon_0, delta_0 = below((1 - share) * epsilon), below((1 - share) * delta)
    return _Parts(_mu_squared(epsilon_0, delta_0), epsilon_0, delta_0, below(share * epsilon), below(share * delta))


@lru_cache(maxsize=256)
def _run_parts(terms: Terms) -> _Parts | None:
    return None if terms.run is None else _parts(terms.run)


def _mu_squared(epsilon_0: float, delta_0: float) -> float:
    if not epsilon_0 or not delta_0:
        return 0.0
    squared = mu_for(epsilon_0, delta_0, SLACK) ** 2
    # the square and its root round: go down by ulps until the promise holds
    while squared and gdp_epsilon(math.sqrt(squared), delta_0) > epsilon_0:
        squared *= 1 - 1e-15
    return squared


def _within(parts: _Parts, totals: Totals) -> bool:
    return (
        0 <= totals.mu_squared <= parts.mu_squared
        and 0 <= totals.epsilon <= parts.poisson_epsilon
        and 0 <= totals.delta <= parts.poisson_delta
    )


def _real(value: object) -> float:
    """A number as a float; NaN, which no rule admits, for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check(terms: Terms, name: str, good: bool, rule: str, remedy: str) -> None:
    value = getattr(terms, name)
    if not good:
        raise InputError(f"{name} is {short(value)}: it must be {rule}. {remedy}")
    object.__setattr__(terms, name, float(value))
