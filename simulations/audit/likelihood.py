"""Offline LiRA as arithmetic: from confidences to scores, from scores to rates with intervals.

Shapes: M heads, U units. Scores are NaN where a unit has none, and are then left out everywhere.

Reference: Carlini, Chien, Nasr, Song, Terzis, Tramer (2022), "Membership Inference Attacks From First Principles",
arXiv:2112.03570, Section VI.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

SHADOWS: Final = 8.0
"""Shadow heads that the mean variance over all units counts as, beside a unit's own: few heads say little of one unit,
and a variance that is small by chance would make false positives."""
CONFIDENCE: Final = 0.95
MOST_POINTS: Final = 200


class Interval(NamedTuple):
    """A true-positive rate and its interval."""

    tpr: float
    low: float
    high: float


def attack_scores(confidences: FloatArray, included: BoolArray) -> FloatArray:
    """Each head in turn as the target: how far above the usual is the confidence in each unit.

    Parameters
    ----------
    confidences : float array, shape (M, U)
        Logit-scaled; NaN where a unit has none in every head.
    included : bool array, shape (M, U)
        Which head was trained on which unit.

    Returns
    -------
    scores : float array, shape (M, U)
        Standard deviations above the mean of the other heads that did not see the unit: the larger, the smaller the
        one-sided tail of their Gaussian. NaN where there is no such head.

    Notes
    -----
    Guarantee: a target's scores read its confidences, and of all else only other heads: never its own row of
    `included`. So the scores depend on who was in the target by way of the target alone.
    """
    # variances don't depend on where the origin lies; near the middle nothing cancels in the sums of squares
    centred = confidences - confidences.mean(0)
    outside = np.where(included, 0.0, centred)
    number, total, squares = (~included).sum(0), outside.sum(0), (outside**2).sum(0)
    scores: FloatArray = np.full_like(centred, np.nan)
    for target, mine in enumerate(outside):
        shadows = number - ~included[target]
        usable = (shadows > 0) & np.isfinite(centred[target])
        n = shadows[usable].astype(np.float64)
        mean = (total - mine)[usable] / n
        spread = np.maximum((squares - mine**2)[usable] - n * mean**2, 0.0)
        usual = spread.sum() / max(1.0, (n - 1).sum())
        variance = (SHADOWS * usual + spread) / (SHADOWS + n - 1) * (1 + 1 / n)  # 1/n: the mean is uncertain too
        scores[target, usable] = (centred[target, usable] - mean) / np.sqrt(np.maximum(variance, 1e-300))
    return scores


def rate_at(scores: FloatArray, included: BoolArray, fpr: float) -> Interval:
    """True positives at a rate of false positives, one threshold for all heads, with its interval.

    Parameters
    ----------
    scores : float array, shape (M, U)
    included : bool array, shape (M, U)
    fpr : float, in (0, 1)

    Returns
    -------
    Interval
        Of 95 %. The wider, on each side, of two: the jackknife that leaves out one head after another, threshold
        included, with Student's t of M - 1 degrees of freedom, because units of one head share its noise; and
        Clopper-Pearson over units, because a jackknife of rare hits, or none, is too narrow.
    """
    heads = [_sides(row, chosen) for row, chosen in zip(scores, included, strict=True)]
    members, strangers = (np.concatenate(side) for side in zip(*heads, strict=True))
    hits = _hits(members, strangers, fpr)
    rate = hits / len(members)
    without = []
    for left_out in range(len(heads)):
        others = [head for index, head in enumerate(heads) if index != left_out]
        rest = [np.concatenate(side) for side in zip(*others, strict=True)]
        without.append(_hits(rest[0], rest[1], fpr) / len(rest[0]))
    m, tail = len(heads), (1 - CONFIDENCE) / 2
    half = float(stats.t.ppf(1 - tail, m - 1)) * float(np.std(without)) * (m - 1) ** 0.5
    misses = len(members) - hits
    low = float(stats.beta.ppf(tail, hits, misses + 1)) if hits else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, misses)) if misses else 1.0
    return Interval(rate, max(0.0, min(low, rate - half)), min(1.0, max(high, rate + half)))


def area(scores: FloatArray, included: BoolArray) -> float:
    """Area under the ROC curve of all heads together: the Mann-Whitney statistic, ties at one half.

    Reference: Hanley & McNeil (1982), Radiology 143(1).
    """
    members, strangers = _sides(scores, included)
    ranks = stats.rankdata(np.concatenate([members, strangers]))[: len(members)]
    return float((ranks.sum() / len(members) - (len(members) + 1) / 2) / len(strangers))


def curve_points(scores: FloatArray, included: BoolArray) -> list[list[float]]:
    """The ROC curve as at most 200 points (false-positive rate, true-positive rate), for axes in logarithms.

    From one false positive to all; rising in both.
    """
    members, strangers = (np.sort(side) for side in _sides(scores, included))
    n = len(strangers)
    alarms = np.unique(np.geomspace(1, n, MOST_POINTS).round().astype(np.int64))
    thresholds = strangers[n - alarms]
    thresholds[-1] = -np.inf  # at last everybody
    found = [
        [float(1 - np.searchsorted(side, threshold, "left") / len(side)) for side in (strangers, members)]
        for threshold in thresholds
    ]
    return [point for point, before in zip(found, [[0.0, -1.0], *found], strict=False) if point != before]


def _sides(scores: FloatArray, included: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Scores of members and of others, flat, without those that are NaN."""
    good = np.isfinite(scores)
    return scores[good & included], scores[good & ~included]


def _hits(members: FloatArray, strangers: FloatArray, fpr: float) -> int:
    """Members above the threshold that at most this share of the others is above."""
    n = len(strangers)
    place = n - 1 - int(fpr * n + 1e-9)
    return int((members > np.partition(strangers, place)[place]).sum())
