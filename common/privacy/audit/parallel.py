"""A lower bound on epsilon from the error rates of a threshold: canaries as independent repetitions of one attack."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from scipy.special import betainccinv, betaincinv, ndtri

from fedhead.common.privacy.audit.curves import Curve, FloatArray
from fedhead.common.privacy.audit.findings import LowerBound
from fedhead.common.privacy.audit.search import (
    GAUSSIAN,
    MOST_EPSILON,
    MOST_MU,
    Attack,
    BoolArray,
    IntArray,
    gaussian_epsilon,
    smallest_level,
)

CHOOSING: Final = 0.3  # of the canaries, that choose the threshold of `clopper_pearson` and count for nothing else
THRESHOLDS: Final = 31  # that it chooses from
_SPLIT_SEED: Final = 20_230_501  # any fixed number, so that the split of the canaries can't be picked
_INDEPENDENT: Final = "Takes the canaries' scores to be independent of one another."


def clopper_pearson(attack: Attack, *, claim: Curve, gaussian: bool) -> LowerBound:
    """Binomial intervals of both error rates: sees most, but takes canaries for independent repetitions.

    Some canaries, drawn with a fixed seed, choose the threshold from which a canary is guessed "in": the best of
    `THRESHOLDS` there. The rates come from the others. The coins of the first may be looked at, because nothing else of
    them is used, so a single threshold has to be paid for. The bound and the test of the claim, which are two
    statements, choose their own: the best for (epsilon, delta) lies far out, where a claim is hardly tested.

    Parameters
    ----------
    attack, claim, gaussian
        As for `f_dp`.

    Notes
    -----
    Guarantee: as for `f_dp`, if given the coins the scores are independent of one another. That holds for canaries in
    coordinates that are orthogonal and have their own noise.
    References: Clopper, Pearson (1934); Nasr et al. (2023), arXiv:2302.07956, for the bound among Gaussian curves.
    """
    scores, included, delta = attack.scores, attack.included, attack.delta
    order = np.random.default_rng(_SPLIT_SEED).permutation(scores.size)
    choosing, counting = np.split(order, [round(CHOOSING * scores.size)])
    level = np.array(1 - attack.confidence)
    thresholds = _thresholds(scores[choosing])
    tried = _rates(_counts(scores[choosing], included[choosing], thresholds), level)

    def counts(found: FloatArray) -> IntArray:
        threshold = thresholds[int(np.argmax(found))]
        return _counts(scores[counting], included[counting], np.array([threshold]))

    apart = counts(_separation(*tried))
    if gaussian:
        guessed = apart
        bound = gaussian_epsilon(float(_separation(*_rates(guessed, level))[0]), delta)
    else:
        guessed = counts(_approximate_epsilon(*tried, delta))
        bound = float(_approximate_epsilon(*_rates(guessed, level), delta)[0])

    def refuted(levels: FloatArray) -> BoolArray:
        power, alpha = _rates(apart, levels)
        return claim.cost(power) > alpha

    p_value, right = smallest_level(refuted), int(guessed[0, 0] + guessed[3, 0])
    note = f"{_INDEPENDENT} {GAUSSIAN}" if gaussian else _INDEPENDENT
    title = "Parallel Clopper–Pearson intervals"
    return LowerBound("clopper-pearson", title, bound, delta, attack.confidence, counting.size, right, p_value, note)


def _thresholds(scores: FloatArray) -> FloatArray:
    """At most `THRESHOLDS` of the scores, evenly spaced in rank; infinity where there is none."""
    if not scores.size:
        return np.array([math.inf])
    ranks = np.linspace(0, scores.size - 1, THRESHOLDS + 2)[1:-1].round().astype(np.int64)
    return np.unique(np.sort(scores)[ranks])


def _counts(scores: FloatArray, included: BoolArray, thresholds: FloatArray) -> IntArray:
    """Included canaries guessed "in" and "out", then others guessed "in" and "out"; shape (4, thresholds)."""
    inside = scores >= thresholds[:, None]  # (thresholds, m)
    groups = inside & included, ~inside & included, inside & ~included, ~inside & ~included
    return np.array([group.sum(axis=1) for group in groups], dtype=np.int64)


def _rates(counts: IntArray, level: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Least power and largest false-positive rate, which hold together with probability 1 - level.

    Counts of shape (4, thresholds) and level are broadcast.
    """
    hits, misses, alarms, quiet = counts
    power = np.where(hits > 0, betaincinv(np.maximum(hits, 1), misses + 1, level / 2), 0.0)
    alpha = np.where(quiet > 0, betainccinv(alarms + 1, np.maximum(quiet, 1), level / 2), 1.0)
    return power, alpha


def _separation(power: FloatArray, alpha: FloatArray) -> FloatArray:
    """Least mu of a Gaussian curve that allows these rates; 0 where any does."""
    found: FloatArray = ndtri(np.maximum(power, 1e-300)) - ndtri(np.maximum(alpha, 1e-300))
    return np.clip(found, 0.0, MOST_MU)


def _approximate_epsilon(power: FloatArray, alpha: FloatArray, delta: float) -> FloatArray:
    """Least epsilon whose (epsilon, delta) allows these rates; 0 where any does."""
    least = math.exp(-2 * MOST_EPSILON)
    ratios = np.maximum((power - delta) / np.maximum(alpha, least), (1 - alpha - delta) / np.maximum(1 - power, least))
    return np.clip(np.log(np.maximum(ratios, 1.0)), 0.0, MOST_EPSILON)
