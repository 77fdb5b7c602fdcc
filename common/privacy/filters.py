"""Privacy filters: whether the next release still fits into a budget that was fixed before anything was spent.

    Charge     what one event takes from a budget, whose `Terms` are in terms.py
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

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from fedhead.common.errors import InputError
from fedhead.common.privacy.accounting import Accountant, Spent, epsilon
from fedhead.common.privacy.events import Event, NoPrivacyEvent, PoissonEvent
from fedhead.common.privacy.gaussian import check_delta, gdp_epsilon
from fedhead.common.privacy.rounding import above, difference_below, root_above, sum_above
from fedhead.common.privacy.terms import Parts, Terms, parts_of, run_parts_of

__all__ = ["Charge", "Left", "Limit", "Totals", "admits", "charge_of", "least", "left", "spent"]

Limit = Literal["budget", "run"]


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
    if not _within(parts_of(terms), domain_after):
        return "budget"
    run = run_parts_of(terms)
    return "run" if run is not None and not _within(run, run_after) else None


def spent(terms: Terms | None, totals: Totals, delta: float | None = None) -> Spent:
    """Totals as one (epsilon, delta), rounded up.

    Parameters
    ----------
    terms : Terms or None
        Needed where delta is None: then the mu part is stated at its own share of delta, and the whole at terms.delta.
        Plans that were charged more delta than these terms set aside, under other terms, add to the delta stated.
    totals : Totals
    delta : float, in (0, 1), or None
        The delta of the statement. The mu part takes what the Poisson plans have left of it.

    Returns
    -------
    Spent
        accountant "gdp": full batch and counts alone; "sum": with Poisson plans, each charged whole; "none":
        infinite. Infinity also where the Poisson plans have used up the delta. Its delta covers all that is added up.

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
        delta, share = _stated(terms, totals)
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


def _stated(terms: Terms, totals: Totals) -> tuple[float, float]:
    """The delta to state totals at by the terms, and how much of it is the mu part's."""
    parts = parts_of(terms)
    if totals.delta <= parts.poisson_delta:
        return terms.delta, parts.delta
    # charged under other terms: what the mu part is stated at comes on top of all of it
    delta = max(terms.delta, sum_above(parts.delta, totals.delta) if totals.mu_squared else totals.delta)
    return (delta, parts.delta) if delta < 1 else (terms.delta, 0.0)


def left(terms: Terms, totals: Totals) -> Left:
    """What the terms leave beyond the totals; nothing is ever less than 0.

    Totals that one part doesn't hold, charged under other terms, leave nothing of the other: nothing is admitted then.
    """
    parts = parts_of(terms)
    if not _within(parts, totals):
        return Left(mu_squared=0.0, epsilon=0.0, delta=parts.delta, poisson_epsilon=0.0, poisson_delta=0.0)
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


def _within(parts: Parts, totals: Totals) -> bool:
    return (
        0 <= totals.mu_squared <= parts.mu_squared
        and 0 <= totals.epsilon <= parts.poisson_epsilon
        and 0 <= totals.delta <= parts.poisson_delta
    )
