"""The least noise that keeps a plan within epsilon and delta."""

from __future__ import annotations

import math
from typing import Final, Literal

from fedhead.common.errors import InputError
from fedhead.common.privacy.accounting import EPSILON_ERROR, epsilon_of_rows, pld_epsilon
from fedhead.common.privacy.gaussian import check_delta, gdp_epsilon, mu_for

LEAST_NOISE: Final = 0.2  # less is never planned for sampled steps: there the accountants' grids outgrow any machine
POISSON_EPSILON: Final = (0.01, 100.0)  # between the accountant's own error and the reach of its grids
TOLERANCE: Final = 1e-3  # the plan's epsilon lies within this share below the target


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    mechanism: Literal["full-batch", "poisson"],
    steps: int,
    sample_rate: float | None = None,
) -> float:
    """The smallest noise multiplier with which `steps` private steps cost at most epsilon.

    Parameters
    ----------
    epsilon : float, > 0
        Most that the whole plan may cost; from 0.01 to 100 for "poisson".
    delta : float, in (0, 1)
    mechanism : "full-batch" or "poisson"
    steps : int, >= 1
        Private steps over all rounds.
    sample_rate : float, in (0, 1]
        Probability of each record in a step; poisson only.

    Returns
    -------
    float
        Noise standard deviation over clipping norm.

    Raises
    ------
    InputError
        A value breaks its rule, or no noise reaches epsilon.

    Notes
    -----
    Guarantee: `fedhead.common.privacy.accounting.epsilon` of the plan is at most epsilon, and at least
    epsilon (1 - 1e-3), save where `LEAST_NOISE` costs less already. Full batch: sqrt(steps) / mu. Poisson: root finding
    on the logarithm of the noise with a quick upper bound, then a correction with the accountant that reports.
    """
    check_delta(delta)
    if not 0 < epsilon < math.inf:
        raise InputError(f"epsilon is {epsilon!r}: it must be a finite number more than 0. Try 1 to 8.")
    if steps < 1:
        raise InputError(f"steps is {steps!r}: it must be at least 1. Plan at least one step.")
    if mechanism == "full-batch" or sample_rate == 1:
        return _full_batch(epsilon, delta, steps)
    if sample_rate is None or not 0 < sample_rate < 1:
        raise InputError(f"sample_rate is {sample_rate!r}: poisson needs a probability in (0, 1]. Set it.")
    least, most = POISSON_EPSILON
    if not least <= epsilon <= most:
        raise InputError(
            f"epsilon is {epsilon!r}: for sampled steps it must lie between {least:g} and {most:g}, where the "
            "accountant can certify it. Give another epsilon, or use full-batch steps."
        )
    return _poisson(epsilon, delta, steps, sample_rate)


def _full_batch(epsilon: float, delta: float, steps: int) -> float:
    noise = math.sqrt(steps) / mu_for(epsilon, delta)
    # the square root, the division and the accountant's own sum round: go up by ulps until the promise holds
    while gdp_epsilon(math.sqrt(steps / noise / noise), delta) > epsilon:
        noise *= 1 + 1e-12
    return noise


def _poisson(epsilon: float, delta: float, steps: int, rate: float) -> float:
    def cost(noise: float) -> float:
        return epsilon_of_rows([(noise, rate, steps)], delta).epsilon

    high = _full_batch(epsilon, delta, steps)  # sampling only helps
    # the accountant that reports adds its error to epsilon: aim below it at once, each call may take a second
    aim, noise, found = epsilon * (1 - TOLERANCE / 2) - min(EPSILON_ERROR, epsilon / 2), high, math.inf
    for _ in range(12):
        noise = _quick(aim, delta, steps, rate, high)
        found = cost(noise)
        if epsilon * (1 - TOLERANCE) <= found <= epsilon or (noise == LEAST_NOISE and found <= epsilon):
            return noise
        # the quick bound and the accountant differ by nearly the same amount at nearly the same noise
        aim += epsilon * (1 - TOLERANCE / 2) - found
        if aim <= 0:
            break
    if found > epsilon:
        raise InputError(
            f"epsilon is {epsilon!r}: with sample_rate {rate!r} and {steps} steps the accountant can't certify so "
            "little. Raise epsilon."
        )
    return noise


def _quick(epsilon: float, delta: float, steps: int, rate: float, high: float) -> float:
    """The noise at which the quick bound meets epsilon, by the Illinois method on log noise against log epsilon."""
    # a coarse grid: its excess is nearly constant around the answer, and the caller corrects it
    interval = min(1e-3, 1e-2 * epsilon) if epsilon < 10 else 1e-4 * epsilon

    def gap(log_noise: float) -> float:
        found = pld_epsilon([(math.exp(log_noise), rate, steps)], delta, interval)
        return math.log(max(found, 1e-12) / epsilon)

    right, f_right = math.log(high) + 1, -1.0
    left = right
    for _ in range(60):
        left -= 1
        if left < math.log(LEAST_NOISE):  # so few steps or records that hardly any noise is needed
            if gap(math.log(LEAST_NOISE)) <= 0:
                return LEAST_NOISE
            left = math.log(LEAST_NOISE)
        f_left = gap(left)
        if f_left > 0:
            break
        right, f_right = left, f_left
    middle = left
    for _ in range(40):
        middle = (left * f_right - right * f_left) / (f_right - f_left)
        f = gap(middle)
        if abs(f) < TOLERANCE / 10 or right - left < 1e-9:
            break
        if f > 0:
            left, f_left, f_right = middle, f, f_right / 2
        else:
            right, f_right, f_left = middle, f, f_left / 2
    return math.exp(middle)
