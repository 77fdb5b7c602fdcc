"""P-values that are exact, or proved to be no smaller than they ought to be.

    spread_p, count_p               two-sided, for sums of squares, and for counts of successes
    at_most, at_least               one-sided, for counts of successes
    uniform_p                       of the distance from uniform numbers (Kolmogorov-Smirnov)
    cosine_p                        of the cosine between two independent vectors
    share_p                         of the share that some directions have of all squares
    following                       of neighbours in a sequence, given every second one
    overlap_log_p                   one sequence against itself at a distance: Chernoff's bound
    dispersion_p                    whether counts scatter as binomial ones do: Chernoff's bound
    corrected                       the smallest of several p-values, as one p-value (Bonferroni)

Valid means: if all is right, a p-value is at most t with probability at most t, for every t and every size of the
data. None of them rests on a limit for large samples, so false alarms are as rare in a small audit as in a large one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from scipy.optimize import minimize_scalar

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_SPREAD = 12.0  # standard deviations that `dispersion_p` sums over, plus
_MARGIN = 60  # whole numbers, for laws that are narrow or lopsided
_SCALES = (-12.0, 12.0)  # of the exponent in Chernoff's bound, as natural logarithms


def corrected(p_values: Iterable[Any]) -> float:
    """One p-value for all of them: the smallest times their number, at most 1 (Bonferroni)."""
    found = np.concatenate([np.atleast_1d(np.asarray(p, dtype=np.float64)).ravel() for p in p_values])
    return min(1.0, float(found.min()) * found.size)


def spread_p(total: Any, degrees: int) -> FloatArray:
    """Two-sided, of sums of squares of `degrees` independent standard normal numbers: exact (chi-square)."""
    return np.asarray(np.minimum(1.0, 2 * np.minimum(special.chdtr(degrees, total), special.chdtrc(degrees, total))))


def share_p(share: Any, inside: int, outside: int) -> FloatArray:
    """Two-sided, of the share that some directions have of a sum of squares of iid normal numbers: exact (beta).

    Parameters
    ----------
    share : array, in [0, 1]
        Sum of squares along `inside` fixed orthogonal directions, of the sum of squares along all.
    inside, outside : int, >= 1
        Directions in the share, and the others.
    """
    low, high = special.betainc(inside / 2, outside / 2, share), special.betaincc(inside / 2, outside / 2, share)
    return np.asarray(np.minimum(1.0, 2 * np.minimum(low, high)))


def count_p(successes: Any, trials: Any, rate: float) -> FloatArray:
    """Two-sided, of counts of successes in independent trials: twice the smaller exact tail, at most 1."""
    return np.asarray(
        np.minimum(1.0, 2 * np.minimum(at_most(successes, trials, rate), at_least(successes, trials, rate)))
    )


def at_most(successes: Any, trials: Any, rate: float) -> FloatArray:
    """Probability of so few successes or fewer: exact (binomial), also far out in the tail."""
    rest = np.subtract(trials, successes)
    inside = special.betaincc(np.maximum(np.add(successes, 1), 1), np.maximum(rest, 1), rate)
    return np.asarray(np.where(np.less(successes, 0), 0.0, np.where(rest <= 0, 1.0, inside)))


def at_least(successes: Any, trials: Any, rate: float) -> FloatArray:
    """Probability of so many successes or more: exact (binomial), also far out in the tail."""
    rest = np.subtract(trials, successes)
    inside = special.betainc(np.maximum(successes, 1), np.maximum(rest, 0) + 1, rate)
    return np.asarray(np.where(np.less_equal(successes, 0), 1.0, np.where(rest < 0, 0.0, inside)))


def uniform_p(values: FloatArray) -> tuple[float, float]:
    """How far the values are from uniform ones on [0, 1].

    Returns
    -------
    distance : float
        Kolmogorov-Smirnov: the largest between the shares of values found and expected below any number.
    p_value : float
        2 exp(-2 n distance^2), at most 1: no smaller than the exact one for any n (Dvoretzky, Kiefer, Wolfowitz, with
        the constant of Massart 1990), and equal to it in the limit for small p-values.
    """
    found, steps = np.sort(values), np.arange(values.size + 1) / values.size
    distance = float(max((steps[1:] - found).max(), (found - steps[:-1]).max()))
    return distance, min(1.0, 2 * math.exp(-2 * values.size * distance**2))


def cosine_p(value: Any, length: int) -> FloatArray:
    """Two-sided, of the cosine between a vector of iid normal numbers and any vector independent of it: exact.

    Parameters
    ----------
    value : array, in [-1, 1]
    length : int, >= 1
        Numbers in each vector; a single one has no direction, and p-value 1.

    Notes
    -----
    The squared cosine follows Beta(1/2, (length - 1) / 2), whatever the scale. So noise that is used again on another
    scale is found too, and noise of a wrong size alone isn't taken for noise that is used again.
    """
    if length < 2:
        return np.ones(np.shape(value))
    rest = np.clip((1.0 - np.abs(value)) * (1.0 + np.abs(value)), 0.0, 1.0)
    return np.asarray(special.betainc((length - 1) / 2, 0.5, rest))


def following(rows: FloatArray, lag: int) -> tuple[float, float]:
    """How the rows of a sequence go along with those `lag` places later.

    Parameters
    ----------
    rows : array, shape (T, P), T >= 2, P >= 2
        iid normal with mean zero if all is right, on any scale.
    lag : int, in [1, T - 1]

    Returns
    -------
    p_value : float
        Two-sided, exact; 1 for rows of zeros.
    correlation : float
        Of all rows with those `lag` places later.

    Notes
    -----
    Rows a multiple of `lag` apart form chains. In a chain each product of neighbours has exactly one member in an odd
    place. Given the members in even places, the sum of all products is the inner product of the odd ones with known
    weights (the sums of both neighbours), and its cosine has the law of `cosine_p`, whatever the even ones are.
    """
    total = weight = size = 0.0
    odd = 0
    for start in range(lag):
        chain = rows[start::lag]
        ones, after = chain[1::2], chain[2::2]
        weights = chain[::2][: len(ones)].copy()
        weights[: len(after)] += after
        total += float(np.vdot(ones, weights))
        weight += float(np.vdot(weights, weights))
        size += float(np.vdot(ones, ones))
        odd += ones.size
    p_value = float(cosine_p(cosine(total, weight, size), odd))
    return p_value, cosine(total, float(np.vdot(rows[:-lag], rows[:-lag])), float(np.vdot(rows[lag:], rows[lag:])))


def cosine(product: float, first: float, second: float) -> float:
    """From an inner product and both sums of squares; 0 where one of them is 0."""
    norm = math.sqrt(first) * math.sqrt(second)
    return max(-1.0, min(1.0, product / norm)) if norm > 0 else 0.0


def overlap_log_p(shares: FloatArray, pairs: FloatArray, size: int) -> FloatArray:
    """Logarithms of two-sided p-values of sums of products z[i] z[i + lag], as shares of the sum of squares; bounds.

    Parameters
    ----------
    shares : array, shape (lags,), in (-1, 1)
        Sum over i of z[i] z[i + lag], over the sum of all z[i]^2, where z are iid normal if all is right, on any scale.
    pairs : array, shape (lags,), >= 1
        Products in each sum.
    size : int
        Numbers z.

    Returns
    -------
    log_p : array, shape (lags,), <= log 2

    Notes
    -----
    Proof. P[sum >= c squares] <= E exp(a (sum - c squares)) for any a > 0 (Chernoff). z falls into chains of m numbers
    each; a chain's factor is the determinant of a tridiagonal matrix, 1 + 2 a c beside -a, to the power -1/2. Choose
    0 < r < 1 and a = b / (1 - 2 b c) with b = r / (1 + r^2), so that 1 + 2 a c = 1 / (1 - 2 b c). The determinant is
    then (1 - r^(2m + 2)) / ((1 - r^2) (1 + r^2)^m), which is at least (1 + r^2)^(1 - m), over (1 - 2 b c)^m. Together
    log p <= size log(1 - 2 b c) / 2 + pairs log(1 + r^2) / 2 for any r, fixed by c; the one taken here is within
    rounding of the best for small c. A sum and its negative have the same law.
    """
    mean = np.maximum(np.abs(shares) * size / pairs, 1e-12)
    r = 2 * mean / (1 + np.sqrt(1 + 4 * mean**2))
    square = 1 + r**2
    bound = size * np.log1p(-2 * r / square * np.abs(shares)) + pairs * np.log(square)
    return np.asarray(math.log(2) + np.minimum(0.0, bound / 2))


def dispersion_p(counts: IntArray, trials: int, rate: float) -> float:
    """Two-sided p-value of how much independent counts scatter around their mean; a bound.

    Parameters
    ----------
    counts : array of int, shape (n,)
        Independent and Binomial(trials, rate) if all is right.
    trials : int, >= 1
    rate : float, in (0, 1)

    Notes
    -----
    Chernoff's bound on the sum S of (count - mean)^2 / variance: P[S <= s] <= E[exp(a (s - S))] for any a > 0, and
    P[S >= s] <= E[exp(a (S - s))]. The expectation is summed exactly over the whole numbers near the mean. What is
    left out is added: its probability (the factor is at most 1) for small s, n times its probability for large s. Near
    the middle the bound is some ten times the exact value; where counts don't scatter at all it is exact.
    """
    mean, variance = trials * rate, trials * rate * (1 - rate)
    width = _SPREAD * math.sqrt(variance) + _MARGIN
    first, last = max(0, math.floor(mean - width)), min(trials, math.ceil(mean + width))
    support = np.arange(first, last + 1)
    log_mass = stats.binom.logpmf(support, trials, rate)
    squares = (support - mean) ** 2 / variance
    outside = float(at_most(first - 1, trials, rate) + at_least(last + 1, trials, rate))
    found = float((((counts - mean) ** 2) / variance).sum())
    sign = -1.0 if found < len(counts) else 1.0
    log_outside = math.log(outside) if outside > 0 and sign < 0 else -math.inf

    def log_bound(scale: float) -> float:
        a = sign * math.exp(scale)
        terms = log_mass + a * squares
        top = max(float(terms.max()), log_outside)
        one = top + math.log(float(np.exp(terms - top).sum()) + math.exp(log_outside - top))
        return len(counts) * one - a * found

    best = minimize_scalar(log_bound, bounds=_SCALES, method="bounded")
    bound = math.exp(min(0.0, float(best.fun))) + (len(counts) * outside if sign > 0 else 0.0)
    return min(1.0, 2 * bound)
