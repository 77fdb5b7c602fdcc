"""One of epsilon, noise and rounds from the two others, for a plan that is fixed before it starts."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final, Literal

from fedhead.common.errors import InputError
from fedhead.common.privacy.accounting import EPSILON_ERROR, Row, Spent, epsilon_of_rows, pld_epsilon
from fedhead.common.privacy.gaussian import check_delta, gdp_epsilon, mu_for

LEAST_NOISE: Final = 0.2  # less is never planned for sampled steps: there the accountants' grids outgrow any machine
POISSON_EPSILON: Final = (0.01, 100.0)  # between the accountant's own error and the reach of its grids
TOLERANCE: Final = 1e-3  # the plan's epsilon lies within this share below the target
MOST_ROUNDS: Final = 100_000  # that a recipe can have

Mechanism = Literal["full-batch", "poisson"]


def cost(
    noise_multiplier: float, delta: float, steps: int, sample_rate: float | None = None, other: float = 0.0
) -> Spent:
    """What a plan costs in all.

    Parameters
    ----------
    noise_multiplier : float, > 0
    delta : float, in (0, 1)
    steps : int, >= 1
    sample_rate : float, in (0, 1], or None
        None: every record in every step.
    other : float, >= 0
        Sum of 1 / noise_multiplier^2 over the plan's other releases, such as noised counts.
    """
    return epsilon_of_rows(_rows(noise_multiplier, steps, sample_rate, other), delta)


def rounds_for(
    epsilon: float, delta: float, noise_multiplier: float, local_steps: int = 1, sample_rate: float | None = None
) -> int:
    """The most rounds that cost at most epsilon, up to `MOST_ROUNDS`.

    Parameters
    ----------
    local_steps : int, >= 1
        Private steps in a round.
    epsilon, delta, noise_multiplier, sample_rate
        As in `noise_multiplier_for` and `cost`.

    Raises
    ------
    InputError
        A value breaks its rule, or not even one round fits.

    Notes
    -----
    Guarantee: `cost` of the rounds found is at most epsilon; of one round more it is above, save at `MOST_ROUNDS`.
    """
    _check(epsilon, delta, local_steps, sample_rate)
    if not 0 < noise_multiplier < math.inf:
        raise InputError(f"noise_multiplier is {noise_multiplier!r}: it must be a finite number more than 0. Try 1.")

    def excess(rounds: int) -> float:
        found = cost(noise_multiplier, delta, rounds * local_steps, sample_rate).epsilon
        return math.log(min(max(found, 1e-300), 1e300) / epsilon)

    low, below = 1, excess(1)
    if below > 0:
        raise InputError(
            f"epsilon is {epsilon!r}: with noise_multiplier {noise_multiplier!r} not even one round fits. "
            "Raise either of them."
        )
    high, above = MOST_ROUNDS + 1, math.inf
    rounds = _guess(epsilon, delta, noise_multiplier, local_steps, sample_rate or 1.0)
    while high - low > 1:
        rounds = min(max(rounds, low + 1), high - 1)
        found = excess(rounds)
        if found <= 0:
            low, below, above = rounds, found, above / 2  # halved: the Illinois method never keeps one end for long
        else:
            high, above, below = rounds, found, below / 2
        if math.isinf(above):  # nothing above yet: epsilon rises at least like the root of the rounds
            rounds = math.ceil(low * math.exp(min(-2 * below, 20)) * 1.01)
        else:
            share = below / (below - above) if below < above else 0.5
            rounds = round(math.exp(math.log(low) + share * math.log(high / low)))
    return low


def _guess(epsilon: float, delta: float, noise: float, local_steps: int, rate: float) -> int:
    """About how many rounds fit: exact for full batch, a limit theorem for sampled steps (arXiv:1911.11607)."""
    one = 1 / noise / noise if rate == 1 else rate * rate * math.expm1(min(1 / noise / noise, 700.0))
    return int(min(MOST_ROUNDS, mu_for(epsilon, delta) ** 2 / one / local_steps))


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    mechanism: Mechanism,
    steps: int,
    sample_rate: float | None = None,
    other: float = 0.0,
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
    other : float, >= 0
        As in `cost`: what other releases of the plan take.

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
    _check(epsilon, delta, steps, None)
    if mechanism == "full-batch" or sample_rate == 1:
        return _full_batch(epsilon, delta, steps, other)
    if sample_rate is None or not 0 < sample_rate < 1:
        raise InputError(f"sample_rate is {sample_rate!r}: poisson needs a probability in (0, 1]. Set it.")
    least, most = POISSON_EPSILON
    if not least <= epsilon <= most:
        raise InputError(
            f"epsilon is {epsilon!r}: for sampled steps it must lie between {least:g} and {most:g}, where the "
            "accountant can certify it. Give another epsilon, or use full-batch steps."
        )
    return _poisson(epsilon, delta, steps, sample_rate, other)


def _check(epsilon: float, delta: float, steps: int, sample_rate: float | None) -> None:
    check_delta(delta)
    if not 0 < epsilon < math.inf:
        raise InputError(f"epsilon is {epsilon!r}: it must be a finite number more than 0. Try 1 to 8.")
    if steps < 1:
        raise InputError(f"steps is {steps!r}: it must be at least 1. Plan at least one step.")
    if sample_rate is not None and not 0 < sample_rate <= 1:
        raise InputError(f"sample_rate is {sample_rate!r}: it must be a probability in (0, 1]. Set it.")


def _rows(noise: float, steps: int, sample_rate: float | None, other: float) -> list[Row]:
    """The plan as the accountants read it: all that is Gaussian without sampling is one row."""
    if sample_rate is None or sample_rate == 1:
        return [(1 / math.sqrt(steps / noise / noise + other), 1.0, 1)]
    return [(noise, sample_rate, steps), *([(1 / math.sqrt(other), 1.0, 1)] if other else [])]


def _full_batch(epsilon: float, delta: float, steps: int, other: float) -> float:
    room = mu_for(epsilon, delta) ** 2 - other
    if room <= 0:
        raise InputError(
            f"epsilon is {epsilon!r}: the noised counts of the run alone cost as much. Raise epsilon, or "
            "privacy.metrics.noise_multiplier, or privacy.metrics.every."
        )
    noise = math.sqrt(steps / room)
    # the square root, the division and the accountant's own sum round: go up by ulps until the promise holds
    while gdp_epsilon(math.sqrt(steps / noise / noise + other), delta) > epsilon:
        noise *= 1 + 1e-12
    return noise


@lru_cache(maxsize=256)
def _poisson(epsilon: float, delta: float, steps: int, rate: float, other: float) -> float:
    # kept: it takes seconds, and whoever plans a run, holds it and audits it asks for the same
    high = _full_batch(epsilon, delta, steps, other)  # sampling only helps
    # the accountant that reports adds its error to epsilon: aim below it at once, each call may take a second
    aim, noise, found = epsilon * (1 - TOLERANCE / 2) - min(EPSILON_ERROR, epsilon / 2), high, math.inf
    for _ in range(12):
        noise = _quick(aim, delta, steps, rate, other, high)
        found = cost(noise, delta, steps, rate, other).epsilon
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


def _quick(epsilon: float, delta: float, steps: int, rate: float, other: float, high: float) -> float:
    """The noise at which the quick bound meets epsilon, by the Illinois method on log noise against log epsilon."""
    # a coarse grid: its excess is nearly constant around the answer, and the caller corrects it
    interval = min(1e-3, 1e-2 * epsilon) if epsilon < 10 else 1e-4 * epsilon

    def gap(log_noise: float) -> float:
        found = pld_epsilon(_rows(math.exp(log_noise), steps, rate, other), delta, interval)
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
