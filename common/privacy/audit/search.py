"""What the audit's bounds share: an attack, checked, and searches for the last parameter that a test refutes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedhead.common.errors import InputError
from fedhead.common.privacy.audit.curves import FloatArray
from fedhead.common.privacy.gaussian import check_delta, gdp_epsilon

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
Test = Callable[[FloatArray], BoolArray]  # parameters, shape (points,), to whether each is refuted

MOST_EPSILON: Final = 50.0  # bounds are cut off here; it would take 1e15 canaries to get there
MOST_MU: Final = 12.0  # likewise: epsilon 120 at delta 1e-5
LEAST_P: Final = 1e-13  # smaller p-values are given as this
POINTS: Final = 64  # looked at together when a limit is searched for
GAUSSIAN: Final = "Takes the trade-off curve to be a Gaussian one, of unknown size."


@dataclass(frozen=True, eq=False)
class Attack:
    """What an attacker said of canaries in one training run, and what is to be concluded from it.

    Parameters
    ----------
    scores : FloatArray, shape (m,)
        Higher: rather "in". May be infinite.
    included : BoolArray, shape (m,)
        Each by its own fair coin, which nothing that made the scores has seen.
    delta : float, in (0, 1)
        Of the bound.
    confidence : float, in (0, 1)
        Of the bound.

    Raises
    ------
    InputError
        No canary, lengths that differ, NaN scores, or a number outside its range.
    """

    scores: FloatArray
    included: BoolArray
    delta: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        scores, included = self.scores, self.included
        if scores.ndim != 1 or scores.size == 0 or scores.shape != included.shape:
            raise InputError(
                f"scores is of shape {scores.shape}, included of {included.shape}: one number and one coin for each of "
                "at least one canary are needed. Audit with more canaries."
            )
        if included.dtype != np.bool_:
            raise InputError(
                f"included is of {included.dtype}: true or false for each canary is needed. Give booleans."
            )
        lost = int(np.isnan(scores).sum())
        if lost:
            raise InputError(f"scores is NaN for {lost} canaries: numbers are needed. Look where training diverged.")
        check_delta(self.delta)
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence is {self.confidence!r}: it must be more than 0 and less than 1. Take 0.95.")


def smallest_level(refuted: Test) -> float:
    """The smallest level found to be refuted, at least `LEAST_P`, given that larger ones are as well; 1 if none is.

    Guarantee: a valid p-value, if the test that is given has at most its level of false alarms at each level.
    """
    return math.exp(-limit(lambda fall: refuted(np.exp(-fall)), -math.log(LEAST_P)))


def limit(rejects: Test, most: float, parts: int = POINTS) -> float:
    """Up to where a test rejects, to 1e-7 of `most`: a parameter in [0, most] that it rejects, or 0 if none.

    Given that it rejects up to some parameter, and not beyond.
    """
    low, high = 0.0, most
    while high - low > 1e-7 * most:
        points = np.linspace(low, high, parts + 1)
        rejected = np.minimum.accumulate(rejects(points[1:]))
        last = int(rejected.sum())
        if last == parts:
            return high
        low, high = float(points[last]), float(points[last + 1])
    return low


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian curve, rounded down by as much as `gdp_epsilon` may have rounded it up."""
    return max(0.0, gdp_epsilon(mu, delta) * (1 - 1e-6) - 1e-12)
