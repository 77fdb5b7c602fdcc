"""Lower bounds on epsilon, and tests of a claim, from scores of canaries in one training run.

Every canary was included by its own fair coin. An attacker who never saw the coins scored each one: higher means "in".
A mechanism that keeps its claim limits how often such guesses are right, so many right guesses refute it.

    one_run            Steinke, Nasr, Jagielski (2023), arXiv:2305.08846: any mechanism, any dependence
    f_dp               Mahloujifar, Melis, Chaudhuri (2024), arXiv:2410.22235: the same, but with the whole curve
    clopper_pearson    binomial intervals of two error rates: scores independent given the coins (parallel.py)

How many guesses `one_run` and `f_dp` make is fixed by the number of canaries alone (`guess_count`). There is one such
rule and not several, because the best of several must be paid for: at 4,000 canaries and a claim of epsilon 5 with half
its noise, six rules with Bonferroni find p-values around 0.004, this one around 0.0006. Both ends of the scores are
guessed, because that doubles the guesses at the same certainty: without a fault, f_dp's bound is 2.8 instead of 2.1.

Ties fall by position, which the coins don't know.

    m canaries; r guesses, of which v are right; t: level of a test
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from scipy import stats

from fedhead.common.errors import InputError
from fedhead.common.privacy.audit.curves import Curve, FloatArray, approximate_cost, gaussian_cost
from fedhead.common.privacy.audit.findings import LowerBound
from fedhead.common.privacy.audit.parallel import clopper_pearson
from fedhead.common.privacy.audit.search import (
    GAUSSIAN,
    LEAST_P,
    MOST_EPSILON,
    MOST_MU,
    Attack,
    BoolArray,
    gaussian_epsilon,
    limit,
    smallest_level,
)

__all__ = ["Attack", "clopper_pearson", "f_dp", "f_dp_p_value", "guess_count", "one_run", "one_run_p_value"]

SHARE: Final = 0.08  # of the canaries that are guessed "in", and again "out"
FEWEST: Final = 12  # guesses at either end beyond that share, so that few canaries still tell something
MOST: Final = 0.4  # of the canaries that are guessed at either end; the middle fifth says nothing
TRUSTED: Final = 0.5  # largest value of the one-run test's formula that is taken at its word


def guess_count(canaries: int) -> int:
    """Guesses at either end of the sorted scores: `SHARE` of the canaries plus `FEWEST`, but no more than `MOST`.

    Few guesses are surer, many average over more chance. The best number is a share of many canaries, and a larger
    share of few (found by simulation: 60 to 4,000 canaries, epsilon 1 to 8, sound, with half the noise and with none).
    """
    return min(round(SHARE * canaries) + FEWEST, max(1, int(MOST * canaries)), canaries // 2)


def one_run(attack: Attack, *, claimed: tuple[float, float]) -> LowerBound:
    """The one-run test: it rests on nothing but the coins, and uses one (epsilon, delta) alone, so it sees least.

    Parameters
    ----------
    attack : Attack
    claimed : (epsilon, delta)
        What the mechanism claims; epsilon may be infinite.

    Raises
    ------
    InputError
        What is claimed is outside its range.

    Notes
    -----
    Guarantee: with probability `confidence` the bound is at most the true epsilon at this delta; a claim that is kept
    has a p-value of at most t with probability at most t. Both in one run, over the coins and the mechanism, and
    however the canaries disturb one another.
    Reference: arXiv:2305.08846, Theorem 5.2.
    """
    if not (claimed[0] >= 0 and 0 <= claimed[1] < 1):
        raise InputError(f"claimed is {claimed!r}: epsilon of at least 0 and delta in [0, 1) are needed. Give both.")
    canaries, (guesses, right), delta = attack.scores.size, _guess(attack), attack.delta

    def rejects(epsilon: FloatArray) -> BoolArray:
        found = [one_run_p_value(canaries, guesses, right, float(e), delta) for e in epsilon]
        return np.array(found) <= 1 - attack.confidence

    # in two parts each time: an evaluation is dear here, and not done for many points at once
    bound = limit(rejects, MOST_EPSILON, parts=2)
    p_value = max(LEAST_P, one_run_p_value(canaries, guesses, right, *claimed))
    return LowerBound("one-run", "One-run test", bound, delta, attack.confidence, guesses, right, p_value)


def one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Most probable that at least `right` of `guesses` are right, in [0, 1].

    Notes
    -----
    Guarantee: P[at least `right`] is at most this for every (epsilon, delta)-DP mechanism and every attacker. For
    delta 0, randomized response reaches it.
    Reference: arXiv:2305.08846, Theorem 5.2: with W ~ Bin(r, e^epsilon / (1 + e^epsilon)) it is
    P[W >= v] + 2 m delta max over i of P[v - i <= W < v] / i.
    Beyond `TRUSTED`, 1 is given instead if delta > 0: there the formula can be too small. Three canaries, epsilon 0 and
    a mechanism that lets all three guesses be wrong with probability (1 - 7 delta) / 8 have P[one or more right] =
    (7 + 7 delta) / 8, where the formula says (7 + 6 delta) / 8. Linear programs over all mechanisms of up to 24
    canaries find such cases for values above 0.8 only, and none below.
    """
    reached = stats.binom.sf(np.arange(right + 1) - 1, guesses, 1 / (1 + math.exp(-epsilon)))  # P[W >= 0, ..., v]
    if delta == 0:
        return float(reached[-1])
    jumps = (reached[:-1] - reached[-1]) / np.arange(right, 0, -1)
    found = float(reached[-1] + 2 * canaries * delta * jumps.max(initial=0.0))
    return found if found <= TRUSTED else 1.0


def f_dp(attack: Attack, *, claim: Curve, gaussian: bool) -> LowerBound:
    """The f-DP test in one run: like `one_run`, but it uses the claim's whole trade-off curve, and so sees more.

    Parameters
    ----------
    attack : Attack
    claim : Curve
        What the mechanism claims.
    gaussian : bool
        Whether the bound is sought among Gaussian curves, which is much tighter, or among those of (epsilon, delta).

    Notes
    -----
    Guarantee: a claim that is kept has a p-value of at most t with probability at most t, whatever the mechanism. The
    bound is at most the true epsilon with probability `confidence`: with `gaussian` if the mechanism has a Gaussian
    trade-off curve of some size, otherwise always. However the canaries disturb one another.
    Reference: arXiv:2410.22235, Theorem 3.2 and its auditing algorithm.
    """
    canaries, (guesses, right), delta = attack.scores.size, _guess(attack), attack.delta

    def rejects(parameter: FloatArray) -> BoolArray:
        level = np.full(parameter.shape, 1 - attack.confidence)
        if gaussian:
            return _least_mass(canaries, guesses, right, level, lambda power: gaussian_cost(power, parameter)) > 1
        return _least_mass(canaries, guesses, right, level, lambda power: approximate_cost(power, parameter, delta)) > 1

    bound = gaussian_epsilon(limit(rejects, MOST_MU), delta) if gaussian else limit(rejects, MOST_EPSILON)
    p_value = f_dp_p_value(canaries, guesses, right, claim)
    note = GAUSSIAN if gaussian else ""
    return LowerBound("f-dp", "f-DP test in one run", bound, delta, attack.confidence, guesses, right, p_value, note)


def f_dp_p_value(canaries: int, guesses: int, right: int, claim: Curve) -> float:
    """Most probable that at least `right` of `guesses` are right, in [`LEAST_P`, 1].

    Notes
    -----
    Guarantee: P[at least `right`] is at most this for every mechanism that keeps the claim, and every attacker that
    makes exactly so many guesses. It is the smallest level that was found to be refuted; the test is monotone in it.
    Reference: as for `f_dp`.
    """
    return smallest_level(lambda level: _least_mass(canaries, guesses, right, level, claim.cost) > 1)


def _least_mass(
    canaries: int, guesses: int, right: int, level: FloatArray, cost: Callable[[FloatArray], FloatArray]
) -> FloatArray:
    """Least total probability of all counts of right guesses, if that of `right` or more is `level`; shape of level.

    More than 1 is impossible: the claim is refuted at this level. Stops there, so larger values mean nothing more.

    Let p_i be the probability of i right guesses, R_i = sum over j >= i of j p_j / m, and W_i that of (r - j) p_j / m.
    For one canary, "it is guessed right, and i or more are right in all" and "it is guessed wrong, and i - 1 or more
    are right in all" are the same event with the canary's coin turned over. The claim bounds the one by the other, and
    by concavity also their means over canaries and coins: W_(i-1) >= cost(R_i). Going down from i = v, where all of the
    level is put, the least p_(i-1) that satisfies this is taken each time. Nothing less will do: any mass that is moved
    to a smaller count raises W and lowers R in all the bounds that follow.
    """
    rights, wrongs, whole = level * right / canaries, level * (guesses - right) / canaries, guesses / canaries
    for i in range(right, 0, -1):
        grown = np.maximum(cost(np.minimum(rights, 1.0)) - wrongs, 0.0)
        # once a bound is met without more mass, so are all that follow
        if not ((grown > 0) & (rights + wrongs <= whole)).any():
            break
        wrongs = wrongs + grown
        rights = rights + (i - 1) / (guesses - i + 1) * grown
    return (rights + wrongs) / whole if guesses else level


def _guess(attack: Attack) -> tuple[int, int]:
    """Numbers of guesses, and of right ones among them."""
    sorted_coins, canaries = attack.included[np.argsort(attack.scores, kind="stable")], attack.scores.size
    ends = guess_count(canaries)
    return 2 * ends, int(sorted_coins[canaries - ends :].sum() + (~sorted_coins[:ends]).sum())
