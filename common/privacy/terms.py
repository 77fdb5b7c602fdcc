"""Terms: a privacy budget, fixed before anything is spent from it, and its split into two parts that never borrow.

What the parts are for, and what holds for what they admit, is said in filters.py. Every part is rounded down, so that
the split never gives more than the declared budget.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from fedhead.common.errors import InputError
from fedhead.common.privacy.events import SCHEMA, check_names, read_object, short
from fedhead.common.privacy.gaussian import SLACK, gdp_epsilon, mu_for
from fedhead.common.privacy.rounding import below

__all__ = ["Parts", "Terms", "parts_of", "run_parts_of"]


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
        return parts_of(self).mu_squared

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


class Parts(NamedTuple):
    """Terms, split: (epsilon, delta) of the mu part with its mu_squared, and those of the Poisson part."""

    mu_squared: float
    epsilon: float
    delta: float
    poisson_epsilon: float
    poisson_delta: float


@lru_cache(maxsize=256)
def parts_of(terms: Terms) -> Parts:
    """The two parts of a budget, each rounded down."""
    # kept, because a search for mu costs more than a whole transaction of the ledger should
    share = Fraction(terms.poisson_share)
    epsilon, delta = Fraction(terms.epsilon), Fraction(terms.delta)
    epsilon_0, delta_0 = below((1 - share) * epsilon), below((1 - share) * delta)
    return Parts(_mu_squared(epsilon_0, delta_0), epsilon_0, delta_0, below(share * epsilon), below(share * delta))


@lru_cache(maxsize=256)
def run_parts_of(terms: Terms) -> Parts | None:
    """The two parts of the budget of each single run; None where the terms set none."""
    return None if terms.run is None else parts_of(terms.run)


def _mu_squared(epsilon_0: float, delta_0: float) -> float:
    if not epsilon_0 or not delta_0:
        return 0.0
    squared = mu_for(epsilon_0, delta_0, SLACK) ** 2
    # the square and its root round: go down by ulps until the promise holds
    while squared and gdp_epsilon(math.sqrt(squared), delta_0) > epsilon_0:
        squared *= 1 - 1e-15
    return squared


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
