"""Declared budgets, read a second time: whether totals are within them, by formulas that filters.py does not use."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final

from fedhead.common.privacy.audit.recount import CLOSE, most_mu_squared, units

_FIELDS: Final = {"schema", "epsilon", "delta", "poisson_share", "run_epsilon", "run_delta"}
Figures = tuple[float, float, float]  # mu_squared, epsilon, delta


@dataclass(frozen=True)
class Declared:
    """A budget as a row declares it; see `fedhead.common.privacy.terms.Terms` for what its numbers mean."""

    epsilon: float
    delta: float
    poisson_share: float
    run_epsilon: float | None
    run_delta: float | None


@dataclass(frozen=True)
class _Caps:
    """What each sum may come to, in units."""

    mu_squared: int
    epsilon: int
    delta: int


@lru_cache(maxsize=1024)
def declared_of(text: str) -> Declared:
    """A budget from its canonical JSON; ValueError, TypeError or KeyError where it is none."""
    fields: dict[str, Any] = json.loads(text)
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    if set(fields) != _FIELDS or fields["schema"] != 1 or canonical != text:
        raise ValueError("not terms")
    share = fields["poisson_share"]
    pairs = [(fields["epsilon"], fields["delta"])]
    if fields["run_epsilon"] is not None:
        pairs.append((fields["run_epsilon"], fields["run_delta"] if fields["run_delta"] is not None else pairs[0][1]))
    numbers = [share, *(number for pair in pairs for number in pair)]
    good = all(type(number) is float and math.isfinite(number) for number in numbers)
    if not good or not 0 <= share <= 1 or not all(epsilon > 0 and 0 < delta < 1 for epsilon, delta in pairs):
        raise ValueError("not terms")
    if any(part > whole for part, whole in zip(pairs[-1], pairs[0], strict=True)):  # a run's limit above the budget
        raise ValueError("not terms")
    if fields["run_epsilon"] is None and fields["run_delta"] is not None:
        raise ValueError("not terms")
    return Declared(fields["epsilon"], fields["delta"], share, fields["run_epsilon"], fields["run_delta"])


def beyond(terms: Declared, domains: Sequence[Figures], runs: Sequence[Figures]) -> str | None:
    """The limit that totals break, in words, or None.

    Parameters
    ----------
    terms : Declared
    domains : sequence of (mu_squared, epsilon, delta)
        Totals of all domains that count against this budget.
    runs : sequence of (mu_squared, epsilon, delta)
        The same of one run.
    """
    broken = _beyond(_caps(terms.epsilon, terms.delta, terms.poisson_share), domains)
    if broken is not None:
        return f"the budget ({broken})"
    if terms.run_epsilon is None:
        return None
    delta = terms.delta if terms.run_delta is None else terms.run_delta
    broken = _beyond(_caps(terms.run_epsilon, delta, terms.poisson_share), runs)
    return None if broken is None else f"the limit of one run ({broken})"


@lru_cache(maxsize=1024)
def _caps(epsilon: float, delta: float, share: float) -> _Caps:
    part = 1 - Fraction(share)
    most = most_mu_squared(float(part * Fraction(epsilon)), float(part * Fraction(delta)))
    exact = [Fraction(share) * Fraction(number) for number in (epsilon, delta)]
    sampled = [(number.numerator << 1200) // number.denominator for number in exact]
    return _Caps(units(most * (1 + CLOSE)), *sampled)


def _beyond(caps: _Caps, totals: Sequence[Figures]) -> str | None:
    squared, epsilon, delta = (sum(map(units, column)) for column in zip(*totals, strict=True))
    if squared > caps.mu_squared:
        return "of full-batch steps and counts"
    if epsilon > caps.epsilon:
        return "of Poisson plans, epsilon"
    if delta > caps.delta:
        return "of Poisson plans, delta"
    return None
