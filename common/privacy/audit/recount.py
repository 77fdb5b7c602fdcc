"""What events cost, counted a second time: exact sums, and accountants that share no code with the filter's.

    units            sums without rounding: whole numbers of 2^-1200
    cost_of          what one event adds to a total, in these units
    gaussian_*       exact Gaussian DP, from logarithms of the normal distribution
    pld_epsilon      dp-accounting's privacy loss distributions, from its own events
    plan_bounds      between which figures a Poisson plan may have been charged

The ledger's own figures come from filters.py, accounting.py and gaussian.py; nothing of these is used here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from scipy.optimize import brentq
from scipy.special import log_ndtr

from fedhead.common.privacy.events import Event, NoPrivacyEvent, PoissonEvent, from_json

Row = tuple[float, float, int]  # noise multiplier, sample rate (1: every record), steps

BITS: Final = 1200  # every float is a whole number of 2^-1074
INFINITE: Final = 1 << 4096  # stands for infinity among whole numbers; no finite total comes near it
LARGEST: Final = (1 << (1024 + BITS)) - 1

AGREE: Final = 0.01  # relative; what two accountants may differ by,
AGREE_BY: Final = 1e-3  # and absolute, on top of that
CLOSE: Final = 1e-6  # relative; the same of two exact formulas
LEAST_DELTA: Final = 1e-12  # below it the Fourier transforms of both accountants of sampling say nothing
GRID: Final = 2e-4  # spacing of the grid of losses, over epsilon
LEAST_EPSILON: Final = 0.05  # what epsilon is taken for at least, when the grid is chosen
COARSE: Final = 5e-3  # spacing at most, as the error grows with the steps; at most a million points lie below epsilon
MOST_LOSS: Final = 1e-5  # spacing over the largest loss of one step, at least: 100,000 points
MOST_GAUSSIANS: Final = 16  # different full-batch rows that are composed one by one


def units(value: float) -> int:
    """A float >= 0 as a whole number of 2^-1200, exactly; infinity is `INFINITE`."""
    if math.isinf(value):
        return INFINITE
    above, below = value.as_integer_ratio()
    return (above << BITS) // below


def total_fits(found: int, exact: int, rows: int) -> bool:
    """Whether a total, in units, is at most so far above the exact sum as upward rounding explains.

    Parameters
    ----------
    found, exact : int
        In units.
    rows : int
        Additions so far: each rounds up by at most one part in 2^52, or by 2^-1074 where numbers are subnormal.
    """
    slack = max(exact // 10**9, exact * rows >> 51) + (rows << (BITS - 1074))
    return found <= exact + slack or (found == INFINITE and exact + slack > LARGEST)


@lru_cache(maxsize=65536)
def event_of(text: str) -> tuple[Event, int]:
    """An event from its canonical JSON, and its cost; see `cost_of`. InputError for any other text."""
    event = from_json(text)
    return event, cost_of(event)


def cost_of(event: Event) -> int:
    """What one event adds to sum steps / noise_multiplier^2, in units.

    Returns
    -------
    int
        Full batch and count: rounded down, by less than one unit. Poisson: 0, it has a total of its own. No privacy:
        `INFINITE`.
    """
    if isinstance(event, NoPrivacyEvent):
        return INFINITE
    if isinstance(event, PoissonEvent):
        return 0
    above, below = event.noise_multiplier.as_integer_ratio()
    return (event.steps * below * below << BITS) // (above * above)


# ------------------------------------------------------------------------------------------------- Gaussian DP, exact


def _log_delta(mu: float, epsilon: float) -> float:
    """log of Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu), for mu > 0."""
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    if mu > 1e4:  # the second term is lost in rounding, and left out: epsilon rises by less than one part in 10^7
        return first
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return first + math.log(-math.expm1(second - first)) if second < first else -math.inf


@lru_cache(maxsize=4096)
def gaussian_epsilon(mu_squared: float, delta: float) -> float:
    """Epsilon of Gaussian releases by exact Gaussian DP.

    Parameters
    ----------
    mu_squared : float, >= 0
        Sum of steps / noise_multiplier^2.
    delta : float, in (0, 1)

    Returns
    -------
    float
        Within one part in 10^6 of the exact value. Reference: Balle, Wang (2018), arXiv:1805.06530, Theorem 8.
    """
    if mu_squared == 0:
        return 0.0
    if math.isinf(mu_squared):
        return math.inf
    mu, target = math.sqrt(mu_squared), math.log(delta)
    if _log_delta(mu, 0.0) <= target:
        return 0.0
    high = max(mu * mu, mu)
    while _log_delta(mu, high) > target:
        high *= 2
        if math.isinf(high):
            return math.inf
    return float(brentq(lambda epsilon: max(_log_delta(mu, epsilon), -1e9) - target, 0.0, high, xtol=high * 1e-14))


@lru_cache(maxsize=1024)
def most_mu_squared(epsilon: float, delta: float) -> float:
    """The largest sum of steps / noise_multiplier^2 whose Gaussian DP is within (epsilon, delta); 0 where none is."""
    if not epsilon > 0 or not delta > 0:
        return 0.0
    target, high = math.log(delta), 1.0
    while _log_delta(high, epsilon) <= target:
        high *= 2
    low = high
    while low > 1e-300 and _log_delta(low, epsilon) > target:
        low /= 2
    return float(brentq(lambda mu: max(_log_delta(mu, epsilon), -1e9) - target, low, high, xtol=low * 1e-13)) ** 2


# ------------------------------------------------------------------------------------------ privacy loss distributions


def rows_of(events: Sequence[Event]) -> tuple[Row, ...]:
    """Events other than those without privacy as sorted rows, equal ones merged."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        assert not isinstance(event, NoPrivacyEvent)
        key = (event.noise_multiplier, event.sample_rate if isinstance(event, PoissonEvent) else 1.0)
        steps[key] = steps.get(key, 0) + event.steps
    return tuple((noise, rate, count) for (noise, rate), count in sorted(steps.items()))


def whole_mu_squared(rows: Sequence[Row], sampled: bool = True) -> float:
    """Sum of steps / noise^2; with `sampled`, of sampled rows too, as if each of their steps took every record."""
    try:
        return math.fsum(steps / noise / noise for noise, rate, steps in rows if sampled or rate == 1)
    except (OverflowError, ZeroDivisionError):
        return math.inf


@lru_cache(maxsize=4096)
def pld_epsilon(rows: tuple[Row, ...], delta: float) -> float | None:
    """Epsilon of rows by dp-accounting's privacy loss distributions, which round upwards; both directions of a change.

    Parameters
    ----------
    rows : tuple of (noise multiplier, sample rate, steps)
        Sorted, so that equal schedules are computed once. More than 16 different full-batch rows are taken as one
        Gaussian.
    delta : float, in (0, 1)

    Returns
    -------
    float or None
        None where no grid holds the losses, or delta is below 1e-12.
    """
    if not rows:
        return 0.0
    whole = gaussian_epsilon(whole_mu_squared(rows), delta)
    if delta < LEAST_DELTA or math.isinf(whole):
        return None
    if sum(rate == 1 for _, rate, _ in rows) > MOST_GAUSSIANS:
        total = whole_mu_squared(rows, sampled=False)
        rows = (*(row for row in rows if row[1] != 1), (1 / math.sqrt(total), 1.0, 1))
    least = max(0.5 / noise / noise + 10 / noise for noise, *_ in rows) * MOST_LOSS
    found, spacing = whole, math.inf
    while True:
        # a first figure may come from a bound that is far too large; the grid must suit what is found
        finer = max(min(max(found, LEAST_EPSILON) * GRID, max(COARSE, found * 1e-6)), least)
        if not finer < spacing / 2:
            return found
        spacing = finer
        try:
            found = _pld(rows, delta, spacing)
        except (ValueError, ArithmeticError, MemoryError):
            return None
        if not math.isfinite(found):
            return None


def _pld(rows: tuple[Row, ...], delta: float, spacing: float) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = PLDAccountant(relation, value_discretization_interval=spacing)
    for noise, rate, steps in rows:
        event = dp_accounting.GaussianDpEvent(noise)
        if rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(rate, event)
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, steps))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=4096)
def plan_bounds(plan: PoissonEvent, delta: float) -> tuple[float, float]:
    """Between which figures a whole Poisson plan may have been charged.

    Returns
    -------
    low, high : float
        From privacy loss distributions with what two accountants may differ by. A charge above them, up to that of a
        plan whose every step takes all records, is dear and safe; where there is no such distribution, it is needed.
    """
    rows = rows_of([plan])
    whole, found = gaussian_epsilon(whole_mu_squared(rows), delta), pld_epsilon(rows, delta)
    if found is None:
        found = whole
    return max(0.0, found * (1 - AGREE) - AGREE_BY), max(found, whole) * (1 + AGREE) + AGREE_BY


def agree(first: float, second: float) -> bool:
    """Whether two accountants say the same."""
    if math.isinf(first) or math.isinf(second):
        return first == second
    return abs(first - second) <= AGREE * max(first, second) + AGREE_BY
