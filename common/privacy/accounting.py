"""What a list of mechanism events costs: epsilon at a given delta, composed over all of them.

    full-batch steps and counts    "gdp"   exact Gaussian differential privacy (gaussian.py)
    any Poisson step               "prv"   Opacus's accountant by privacy loss random variables
    the same, where that fails     "pld"   dp-accounting's privacy loss distributions
    the same, where no grid helps  "gdp"   as if every step were full batch: sampling only helps
    any release without privacy    "none"  infinite

Every figure is an upper bound, for the relation of adding or removing one privacy unit. It holds for a plan that was
fixed before it started. Recomputing it along a path that depends on earlier results is sound for "gdp" only
(arXiv:2210.17520, arXiv:2602.06756).
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

import numpy as np

from fedhead.common.errors import InputError
from fedhead.common.privacy.events import Event, NoPrivacyEvent, PoissonEvent
from fedhead.common.privacy.gaussian import check_delta, gdp_delta, gdp_epsilon, mu_for

__all__ = ["Accountant", "Row", "Spent", "epsilon", "epsilon_of_rows", "gdp_delta", "gdp_epsilon", "mu_for", "rows_of"]

Accountant = Literal["gdp", "prv", "pld", "sum", "none"]
Row = tuple[float, float, int]  # noise multiplier, sample rate, steps

EPSILON_ERROR: Final = 0.001  # most that the PRV accountant may err by; it adds as much to what it reports
EPSILON_SHARE: Final = 0.003  # of a small epsilon, that it may err by instead
MOST_POINTS: Final = 1_500_000  # of the PRV accountant's grid: half a second, 100 MB; beyond it PLD is far quicker
MOST_ROWS: Final = 16  # PRV costs about 0.1 s a row, PLD far less
PLD_INTERVAL: Final = 1e-4  # of dp-accounting's grid; its rounding is upwards
# Opacus's upper and lower errors are proved for delta_error < delta; below this delta its float sums say nothing.
LEAST_PRV_DELTA: Final = 1e-10
LEAST_FFT_DELTA: Final = 1e-12  # below it the rounding of both accountants' Fourier transforms is no longer small


@dataclass(frozen=True)
class Spent:
    """What was spent.

    Attributes
    ----------
    epsilon : float, >= 0
        An upper bound; infinity for a release without privacy.
    delta : float, in (0, 1)
    accountant : str
        Which one computed it: gdp, prv, pld, none; sum where a filter added up the charges of whole plans.
    """

    epsilon: float
    delta: float
    accountant: Accountant


class _Unfit(Exception):
    """The PRV accountant can't answer this question."""


def epsilon(events: Iterable[Event], delta: float) -> Spent:
    """Epsilon of all events together.

    Parameters
    ----------
    events : iterable of Event
        Every release that one privacy unit's data went into, over all rounds and runs. Order does not matter.
    delta : float, in (0, 1)

    Returns
    -------
    Spent
        No event: 0. Any NoPrivacyEvent: infinity.

    Raises
    ------
    InputError
        delta is not in (0, 1).

    Notes
    -----
    Guarantee: the releases are (epsilon, delta)-differentially private under adding or removing one unit.
    References: gaussian.py; Gopi, Lee, Wutschitz (2021), arXiv:2106.02848; Koskela et al. (2020), arXiv:1906.03049;
    Doroshenko et al. (2022), arXiv:2207.04380.
    """
    check_delta(delta)
    events = list(events)
    if any(isinstance(event, NoPrivacyEvent) for event in events):
        return Spent(math.inf, delta, "none")
    return epsilon_of_rows(rows_of(events), delta)


def rows_of(events: Iterable[Event]) -> list[Row]:
    """Events as (noise multiplier, sample rate, steps), equal ones merged; sample rate 1 is full batch, as one row.

    All full-batch steps and counts together are exactly one Gaussian: mu = sqrt(sum steps / noise_multiplier^2).
    """
    squares: list[float] = []
    steps: defaultdict[tuple[float, float], int] = defaultdict(int)
    for event in events:
        if isinstance(event, NoPrivacyEvent):
            raise InputError("events have a release without privacy: no row describes it. Ask for their epsilon.")
        if not isinstance(event, PoissonEvent) or event.sample_rate == 1:
            squares.append(event.steps / event.noise_multiplier / event.noise_multiplier)
        else:
            steps[event.noise_multiplier, event.sample_rate] += event.steps
    rows = [(noise, rate, count) for (noise, rate), count in sorted(steps.items())]
    total = _sum(squares)
    return [*rows, (1 / math.sqrt(total), 1.0, 1)] if total else rows


def epsilon_of_rows(rows: Sequence[Row], delta: float) -> Spent:
    """Epsilon of merged rows; see `epsilon`."""
    return _cost(tuple(rows), delta)


@lru_cache(maxsize=256)
def _cost(rows: tuple[Row, ...], delta: float) -> Spent:
    # kept, because the holders of a round have mostly spent the same, and one Poisson figure takes up to a second
    if not rows:
        return Spent(0.0, delta, "gdp")
    if all(rate == 1 for _, rate, _ in rows) or delta < LEAST_FFT_DELTA:
        return Spent(gdp_epsilon(_full_batch_mu(rows), delta), delta, "gdp")
    whole = gdp_epsilon(_full_batch_mu(rows), delta)
    if whole == 0 or math.isinf(whole):  # as cheap or as dear as can be, and no grid would hold it
        return Spent(whole, delta, "gdp")
    try:
        return Spent(_prv(rows, delta), delta, "prv")
    except _Unfit:
        return Spent(pld_epsilon(rows, delta), delta, "pld")


def _full_batch_mu(rows: Sequence[Row]) -> float:
    """mu of the rows if every step took every record; an upper bound for sampled steps, by joint convexity."""
    # noise 0 stands for noise so small that the sum of squares overflowed
    return math.sqrt(_sum([steps / noise / noise if noise else math.inf for noise, _, steps in rows]))


def _sum(squares: Sequence[float]) -> float:
    try:
        return math.fsum(squares)
    except OverflowError:
        return math.inf


def _prv(rows: Sequence[Row], delta: float) -> float:
    """Opacus's PRV accountant on rows, or _Unfit. Its traps: an empty history, tiny delta, grids of any size."""
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV, compute_safe_domain_size

    if delta < LEAST_PRV_DELTA or len(rows) > MOST_ROWS:
        raise _Unfit
    delta_error, epsilon_error = delta / 1000, _prv_error(rows, delta)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            half = compute_safe_domain_size(
                [PoissonSubsampledGaussianPRV(rate, noise) for noise, rate, _ in rows],
                [steps for *_, steps in rows],
                epsilon_error,
                delta_error,
            )
            mesh = epsilon_error / math.sqrt(sum(steps for *_, steps in rows) * math.log(12 / delta_error) / 2)
            if not 2 * half / mesh <= MOST_POINTS:
                raise _Unfit
            accountant = PRVAccountant()
            accountant.history = list(rows)
            found = float(accountant.get_epsilon(delta, eps_error=epsilon_error, delta_error=delta_error))
    except (ValueError, RuntimeError, ArithmeticError, MemoryError) as fault:
        raise _Unfit from fault
    # its grid reaches to `half`: an epsilon near the rim would be cut off rather than computed
    if not math.isfinite(found) or not 0 <= found < half:
        raise _Unfit
    return found


def _prv_error(rows: Sequence[Row], delta: float) -> float:
    """The error to ask of PRV, from a rough epsilon: the central limit's, Dong, Roth, Su (2022), Corollary 5.4.

    It follows the noise without a jump, so that a plan's noise can be searched for. Only precision hangs on it.
    """
    try:
        square = math.fsum(steps * rate * rate * math.expm1(1 / noise / noise) for noise, rate, steps in rows)
    except OverflowError:
        return EPSILON_ERROR
    error = min(EPSILON_ERROR, EPSILON_SHARE * gdp_epsilon(math.sqrt(square), delta))
    if error == 0:
        raise _Unfit
    return error


def pld_epsilon(rows: Sequence[Row], delta: float, interval: float = PLD_INTERVAL) -> float:
    """Epsilon of rows by dp-accounting's privacy loss distributions, discretized upwards, both directions.

    Parameters
    ----------
    rows : sequence of (noise multiplier, sample rate, steps)
    delta : float, in (0, 1)
    interval : float, > 0
        Spacing of the grid of losses; coarser is faster and never below the true value. Made coarser by itself
        where losses are so large that the grid would not fit in memory, or the rows so many that it would take long.
    """
    if not rows:
        return 0.0
    found = gdp_epsilon(_full_batch_mu(rows), delta)  # holds whatever the grid; often far too much
    # at most a million points for one step's losses
    least = max(max(0.5 / noise / noise + 10 / noise for noise, *_ in rows) * 1e-6, 1e-3 if len(rows) > 4 else 0.0)
    spacing = max(interval, least, found * 1e-5)
    while True:
        try:
            found = min(found, _pld(rows, delta, spacing))
        except (ValueError, ArithmeticError, MemoryError):  # numbers beyond its grids
            return found
        finer = max(interval, least, found * 1e-5)
        if not finer < spacing / 2:
            return found
        spacing = finer


def _pld(rows: Sequence[Row], delta: float, spacing: float) -> float:
    from dp_accounting.pld import privacy_loss_distribution as pld

    tail = min(1e-15, delta / 1e3)
    total = None
    for noise, rate, steps in rows:
        one = pld.from_gaussian_mechanism(noise, value_discretization_interval=spacing, sampling_prob=rate)
        composed = one.self_compose(steps, tail_mass_truncation=tail)
        total = composed if total is None else total.compose(composed, tail_mass_truncation=tail)
    assert total is not None
    return float(total.get_epsilon_for_delta(delta))
