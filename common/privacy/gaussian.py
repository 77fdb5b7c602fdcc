"""Exact Gaussian differential privacy: the trade-off between epsilon and delta of a Gaussian mechanism.

mu is the sensitivity over the noise standard deviation. Releases compose exactly: mu = sqrt(sum of mu_i^2).
References: Dong, Roth, Su (2022), arXiv:1905.02383, Corollary 2.13; Balle, Wang (2018), arXiv:1805.06530, Theorem 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from scipy.special import erfcx, ndtr

from fedhead.common.errors import InputError

# Relative error allowed to `gdp_delta` (checked against 60-digit arithmetic); solvers aim below delta by as much, so
# that what they return holds for the true curve.
SLACK: Final = 1e-9
LEAST_DELTA: Final = 1e-290  # below it floats have too few digits left to hold SLACK
_ROOT_2: Final = math.sqrt(2.0)
_NODES: Final = np.array([-math.sqrt(0.6), 0.0, math.sqrt(0.6)])  # Gauss-Legendre with three points
_WEIGHTS: Final = np.array([5 / 9, 8 / 9, 5 / 9])
_NARROW: Final = 0.01  # mu below which the difference of two nearly equal numbers is integrated instead


def check_delta(delta: float) -> None:
    """Raise InputError unless 0 < delta < 1."""
    if not 0 < delta < 1:
        raise InputError(f"delta is {delta!r}: it must be more than 0 and less than 1. Take less than 1 / records.")


def gdp_delta(mu: float, epsilon: float) -> float:
    """The smallest delta that goes with epsilon for a mu-GDP mechanism.

    Parameters
    ----------
    mu : float, >= 0
        Sensitivity over noise standard deviation; 0 gives 0, infinity gives 1.
    epsilon : float, >= 0

    Returns
    -------
    float
        Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu), in [0, 1].

    Notes
    -----
    Written with the scaled complementary error function, because exp(epsilon) overflows and the difference cancels:
    with u = epsilon/mu - mu/2 and v = epsilon/mu + mu/2, v^2 - u^2 = 2 epsilon, so the second term is
    exp(-u^2/2) erfcx(v/sqrt 2) / 2. Relative error below `SLACK` wherever the result is above `LEAST_DELTA`.
    """
    if mu == 0:
        return 0.0
    if math.isinf(epsilon):
        return 0.0
    if math.isinf(mu):
        return 1.0
    u, v = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    scale = math.exp(-u * u / 2) / 2
    if scale == 0:
        return 0.0 if u > 0 else 1.0
    if mu < _NARROW:
        return scale * _fall_of_erfcx(u / _ROOT_2, mu / _ROOT_2)
    if u > 0:
        return float(max(0.0, scale * (erfcx(u / _ROOT_2) - erfcx(v / _ROOT_2))))
    return float(min(1.0, max(0.0, ndtr(-u) - scale * erfcx(v / _ROOT_2))))


def _fall_of_erfcx(start: float, width: float) -> float:
    """erfcx(start) - erfcx(start + width) for a small width, by the integral of the slope: nothing cancels."""
    at = start + width / 2 * (1 + _NODES)
    return float(width * np.dot(_WEIGHTS, 1 / math.sqrt(math.pi) - at * erfcx(at)))


def gdp_epsilon(mu: float, delta: float) -> float:
    """The smallest epsilon that goes with delta for a mu-GDP mechanism, rounded up.

    Parameters
    ----------
    mu : float, >= 0
    delta : float, in (0, 1)

    Returns
    -------
    float
        An upper bound, within 1e-6 relative (1e-12 absolute) of the exact value. 0 when delta alone covers the
        mechanism, infinity when mu is infinite or delta is below `LEAST_DELTA`.

    Raises
    ------
    InputError
        delta is not in (0, 1), or mu is negative or NaN.
    """
    check_delta(delta)
    if not mu >= 0:
        raise InputError(f"mu is {mu!r}: it must be at least 0. Give sensitivity over noise standard deviation.")
    if mu == 0:
        return 0.0
    if math.isinf(mu) or delta < LEAST_DELTA:
        return math.inf
    target = delta * (1 - SLACK)
    if gdp_delta(mu, 0.0) <= target:
        return 0.0
    low, high = 0.0, max(mu * mu, mu, 1e-12)
    while gdp_delta(mu, high) > target:
        low, high = high, 2 * high
        if math.isinf(high):
            return math.inf
    return _bisect(low, high, lambda epsilon: gdp_delta(mu, epsilon) <= target)


def mu_for(epsilon: float, delta: float, slack: float = 2 * SLACK) -> float:
    """The largest mu whose (epsilon, delta) stays within the given pair, rounded down.

    Parameters
    ----------
    epsilon : float, >= 0
        Infinity gives infinity.
    delta : float, in (0, 1)
    slack : float, >= SLACK
        How far below delta to stay, relative. By default twice what `gdp_epsilon` allows for: the noise of a plan at
        this mu then still fits into a budget of the same (epsilon, delta) after the sum over its rounds was rounded up.

    Returns
    -------
    float
        ``gdp_delta(mu, epsilon) <= delta``; full-batch steps fit while sum 1/noise_multiplier^2 <= mu^2. 0 for a delta
        below `LEAST_DELTA`.

    Raises
    ------
    InputError
        delta is not in (0, 1), or epsilon is negative or NaN.
    """
    check_delta(delta)
    if not epsilon >= 0:
        raise InputError(f"epsilon is {epsilon!r}: it must be at least 0. Give a positive number.")
    if math.isinf(epsilon):
        return math.inf
    if delta < LEAST_DELTA:
        return 0.0
    target = delta * (1 - slack)
    low, high = 0.0, 1.0
    while gdp_delta(high, epsilon) <= target:
        low, high = high, 2 * high
    # searched as a fall from high, so that the end which is returned is the one inside the promise
    return -_bisect(-high, -low, lambda negative: gdp_delta(-negative, epsilon) <= target)


def _bisect(low: float, high: float, holds: Callable[[float], bool]) -> float:
    """The upper end of the last bracket, where `holds` is true; false at low, true at high, monotone in between."""
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
