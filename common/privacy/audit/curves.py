"""Trade-off curves: how well the best attacker can tell whether one unit was in the data, if a claim is true.

    alpha   false-positive rate: "it was in" although it was not
    power   true-positive rate: "it was in" where it was
    f       f(alpha): least false-negative rate, 1 - power, of any test whose false-positive rate is at most alpha

A claim bounds both directions of adding and removing a unit, so every curve here is symmetric: f is its own inverse,
and f(1 - power) is the least false-positive rate of a test that has this power.

References: Dong, Roth, Su (2022), arXiv:1905.02383, Definition 2.3 and Propositions 2.4, 2.12; Wasserman, Zhou (2010).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from fedhead.common.errors import InputError
from fedhead.common.privacy.accounting import Row
from fedhead.common.privacy.gaussian import gdp_epsilon

__all__ = ["Curve", "approximate_cost", "approximate_curve", "claimed_curve", "gaussian_cost", "gaussian_curve"]

FloatArray = NDArray[np.float64]

LINES: Final = 200  # (epsilon, delta) pairs that carry a claim of sampled steps; more change no digit that is shown
LEAST_DELTA: Final = 1e-10  # of those pairs: beyond it the Fourier transforms of the losses hold mostly rounding
LEAST_SPACING: Final = 3e-4  # of the grid of losses; a finer one moves epsilon by less than 0.001
MOST_EPSILON: Final = 700.0  # exp() is finite up to here


@dataclass(frozen=True)
class Curve:
    """What a claim allows: f(alpha), convex, falling, symmetric, and at most 1 - alpha.

    Attributes
    ----------
    cost : function, FloatArray of any shape to FloatArray
        From a power to the least false-positive rate that it takes: f(1 - power). Given as a function of the power,
        because tests look at small powers, and 1 - power would lose their digits.
    """

    cost: Callable[[FloatArray], FloatArray]

    def __call__(self, alpha: float) -> float:
        """Least false-negative rate of a test whose false-positive rate is at most alpha, in [0, 1].

        Raises
        ------
        InputError
            alpha is not in [0, 1].
        """
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha is {alpha!r}: it must be in [0, 1]. Give a false-positive rate.")
        return float(self.cost(np.array(1.0 - alpha)))


def gaussian_cost(power: FloatArray, mu: FloatArray | float) -> FloatArray:
    """Least false-positive rate for a power, of mu-GDP; the two arrays are broadcast. Finite mu >= 0."""
    found: FloatArray = ndtr(ndtri(power) - mu)
    return found


def approximate_cost(power: FloatArray, epsilon: FloatArray | float, delta: FloatArray | float) -> FloatArray:
    """Least false-positive rate for a power, of (epsilon, delta)-DP; the arrays are broadcast. Finite epsilon >= 0."""
    growth = np.exp(np.minimum(epsilon, MOST_EPSILON))
    found: FloatArray = np.maximum(np.maximum(1 - delta - growth * (1 - power), (power - delta) / growth), 0.0)
    return found


def gaussian_curve(mu: float) -> Curve:
    """Of a Gaussian mechanism: f(alpha) = Phi(Phi^-1(1 - alpha) - mu).

    Parameters
    ----------
    mu : float, >= 0
        Sensitivity over noise standard deviation. 0: perfect privacy; infinity: none.

    Raises
    ------
    InputError
        mu is negative or NaN.

    Notes
    -----
    Reference: Dong, Roth, Su (2022), arXiv:1905.02383, Definition 2.6.
    """
    if not mu >= 0:
        raise InputError(f"mu is {mu!r}: it must be at least 0. Give sensitivity over noise standard deviation.")
    if math.isinf(mu):
        return Curve(np.zeros_like)
    return Curve(lambda power: gaussian_cost(power, mu))


def approximate_curve(epsilon: float, delta: float) -> Curve:
    """Of (epsilon, delta)-DP: f(alpha) = max(0, 1 - delta - e^epsilon alpha, e^-epsilon (1 - delta - alpha)).

    Parameters
    ----------
    epsilon : float, >= 0
        Infinity: no privacy.
    delta : float, in [0, 1)

    Raises
    ------
    InputError
        epsilon is negative or NaN, or delta is not in [0, 1).

    Notes
    -----
    Reference: Dong, Roth, Su (2022), arXiv:1905.02383, Proposition 2.4.
    """
    if not epsilon >= 0:
        raise InputError(f"epsilon is {epsilon!r}: it must be at least 0. Give a positive number.")
    if not 0 <= delta < 1:
        raise InputError(f"delta is {delta!r}: it must be at least 0 and less than 1. Take less than 1 / records.")
    if math.isinf(epsilon):
        return Curve(np.zeros_like)
    return Curve(lambda power: approximate_cost(power, epsilon, delta))


def claimed_curve(rows: Sequence[Row]) -> Curve:
    """What a plan's accounting claims, for every false-positive rate at once.

    Parameters
    ----------
    rows : sequence of (noise multiplier, sample rate, steps)
        As `fedhead.common.privacy.accounting.rows_of` merges them. None at all: perfect privacy.

    Returns
    -------
    Curve
        If every sample rate is 1, the exact Gaussian curve of all steps. Otherwise the largest of `LINES` pairs of
        lines, one pair for each (epsilon, delta) of dp-accounting's privacy loss distribution. Where losses are too
        large for its grid, the Gaussian curve of the same steps at sample rate 1: sampling only helps.

    Raises
    ------
    InputError
        A row has a noise multiplier below 0, a sample rate outside (0, 1], or no step.

    Notes
    -----
    Guarantee: it never lies above what the mechanism keeps if it is right, so a test against it has no more false
    alarms than it says. Its deltas are rounded up, each for the worse of the two directions.
    References: gaussian.py; Doroshenko et al. (2022), arXiv:2207.04380; arXiv:1905.02383, Propositions 2.12, 2.13.
    """
    for row in rows:
        noise, rate, steps = row
        if not (noise >= 0 and 0 < rate <= 1 and steps >= 1):
            raise InputError(
                f"rows has {row!r}: a noise multiplier of at least 0, a sample rate in (0, 1] and at least one step "
                f"are needed. Take them from the ledger or the plan."
            )
    return _claimed(tuple(rows))


@lru_cache(maxsize=64)
def _claimed(rows: tuple[Row, ...]) -> Curve:
    # kept, because composing sampled steps takes up to seconds, and an audit asks several times
    if all(rate == 1 for _, rate, _ in rows):
        return gaussian_curve(_mu(rows))
    try:
        lines = _lines(rows)
    except (ValueError, ArithmeticError, MemoryError):  # noise 0, or numbers beyond its grids
        return gaussian_curve(_mu(rows))
    corners, costs = _envelope(*lines)
    return Curve(lambda power: np.interp(power, corners, costs))


def _mu(rows: Sequence[Row]) -> float:
    """mu of all steps if each took every unit."""
    try:
        return math.sqrt(math.fsum(steps / noise / noise if noise else math.inf for noise, _, steps in rows))
    except OverflowError:
        return math.inf


def _lines(rows: Sequence[Row]) -> tuple[FloatArray, FloatArray]:
    """epsilon and delta, shape (LINES,) each: from 0 up to where delta is `LEAST_DELTA`."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    # spacing of the losses: a small part of epsilon, but so that one step's losses fit in memory
    largest = max(0.5 / noise / noise + 10 / noise for noise, *_ in rows)
    spacing = max(LEAST_SPACING, 1e-4 * _rough_epsilon(rows), 1e-6 * largest)
    if math.isinf(spacing):
        raise ArithmeticError
    total = None
    for noise, rate, steps in rows:
        one = pld.from_gaussian_mechanism(noise, value_discretization_interval=spacing, sampling_prob=rate)
        composed = one.self_compose(steps, tail_mass_truncation=1e-15)
        total = composed if total is None else total.compose(composed, tail_mass_truncation=1e-15)
    assert total is not None
    top = float(total.get_epsilon_for_delta(LEAST_DELTA))
    if not 0 < top <= MOST_EPSILON:
        raise ArithmeticError
    epsilons = np.linspace(0.0, top, LINES)
    deltas = np.clip(np.array(total.get_delta_for_epsilon(list(epsilons)), dtype=np.float64), 0.0, 1.0)
    if not np.isfinite(deltas).all():
        raise ArithmeticError
    return epsilons, deltas


def _rough_epsilon(rows: Sequence[Row]) -> float:
    """Of the central limit, arXiv:1905.02383, Corollary 5.4. Only precision hangs on it."""
    try:
        square = math.fsum(steps * rate * rate * math.expm1(1 / noise / noise) for noise, rate, steps in rows)
    except OverflowError:
        square = math.inf
    return gdp_epsilon(min(math.sqrt(square), _mu(rows)), 1e-6)


def _envelope(epsilons: FloatArray, deltas: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Corners (powers, costs) of the largest of all pairs' curves, of shape (corners,) each.

    Between corners the curve is straight, so that interpolating gives the maximum over all lines itself, at the price
    of a search. Only the half where power + cost <= 1 is built; the other is its mirror image, because near power 1
    the lines' steep slopes would cancel.
    """
    slopes = np.exp(-epsilons)
    falls = deltas * slopes  # a line is slope * power - fall
    kept: list[tuple[float, float]] = [(0.0, 0.0)]  # no attack costs less than nothing
    starts: list[float] = []  # power from which each next line is the largest
    for slope, fall in sorted(zip(slopes.tolist(), falls.tolist(), strict=True)):
        while True:
            meets = (fall - kept[-1][1]) / (slope - kept[-1][0]) if slope > kept[-1][0] else math.inf
            if not starts or meets > starts[-1]:
                break
            kept.pop()
            starts.pop()
        if math.isfinite(meets):
            kept.append((slope, fall))
            starts.append(meets)
    middle = float(np.min((1 + falls) / (1 + slopes)))  # where the curve crosses power + cost = 1
    half = [(start, slope * start - fall) for start, (slope, fall) in zip(starts, kept[1:], strict=True)]
    half = [(power, cost) for power, cost in half if power < middle]
    half.append((middle, 1 - middle))
    half += [(1 - cost, 1 - power) for power, cost in reversed(half)]
    corners, costs = np.array(half).T
    return corners, np.maximum(costs, 0.0)
