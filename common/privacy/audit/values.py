"""Questions about single residuals: do they have the size, the mean and the shape of the noise that was claimed?

residuals   float64, shape (T, P): one row a step, one column a trained number; iid N(0, 1) if all is right
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from scipy import special

from fedhead.common.privacy.audit.findings import Question
from fedhead.common.privacy.audit.laws import (
    FloatArray,
    at_least,
    corrected,
    cosine,
    cosine_p,
    count_p,
    share_p,
    spread_p,
    uniform_p,
)

STANDING_OUT: Final = 0.01
"""A coordinate is counted as wrong where its p-value, times the number of coordinates, is at most this."""

_MISSING: Final = 0.02  # of the claimed variance; below it, noise is said to be missing
_TAIL: Final = 3.0
_NEAR: Final = 0.01
_MOST_SORTED: Final = 2**20  # values that the Kolmogorov-Smirnov test looks at


def _fault(variance: float, where: str) -> str:
    """What is wrong, in words, with noise of this share of the claimed variance."""
    if variance < _MISSING:
        return f"No noise was added{where}, or next to none: what was released there isn't protected."
    if variance < 1:
        return (
            f"Less noise was added{where} than the claim says: its variance is {variance:.3g} of what was claimed, "
            "so that more can be learned about a person than epsilon says."
        )
    return (
        f"More was added{where} than the claim says: the variance is {variance:.3g} times what was claimed. Either "
        "the noise is larger, or something else is in the release, such as records that were not clipped as claimed."
    )


def total_variance(residuals: FloatArray) -> Question:
    """Whether there is as much noise as claimed, over all values: chi-square with T P degrees of freedom, exact."""
    total = float(np.vdot(residuals, residuals))
    variance = total / residuals.size
    return Question(
        "total-variance",
        "Size of the noise",
        f"variance {variance:.4g} of 1 over {residuals.size} values",
        float(spread_p(total, residuals.size)),
        "Over all steps and trained numbers there was as much noise as the claim says.",
        _fault(variance, ""),
    )


def group_variance(residuals: FloatArray, groups: Mapping[str, slice]) -> Question:
    """Whether each group of numbers (weights, bias) has its noise, over all steps and in each: chi-square, exact."""
    names = list(groups)
    squares = {name: (residuals[:, groups[name]] ** 2).sum(1) for name in names}  # (T,) each
    sizes = {name: residuals[:, groups[name]].shape[1] for name in names}
    whole = np.array([spread_p(squares[name].sum(), sizes[name] * len(residuals)) for name in names])
    single = np.stack([spread_p(squares[name], sizes[name]) for name in names])  # (G, T)
    if whole.min() <= single.min() * len(residuals):
        name = names[int(whole.argmin())]
        variance, where = float(squares[name].mean()) / sizes[name], f' to "{name}"'
    else:
        place, step = np.unravel_index(int(single.argmin()), single.shape)
        name = names[int(place)]
        variance, where = float(squares[name][step]) / sizes[name], f' to "{name}" in step {step + 1}'
    return Question(
        "group-variance",
        "Noise on every part of the model",
        f"variance {variance:.4g} of 1 on{where.removeprefix(' to')}, the part furthest off",
        _halves(whole, single),
        f"Each part of the model ({', '.join(names)}) got the noise that the claim says.",
        _fault(variance, where),
    )


def _halves(first: FloatArray, second: FloatArray) -> float:
    """Two families of p-values with the same share of false alarms for each."""
    return min(1.0, 2 * min(corrected([first]), corrected([second])))


def coordinate_variance(residuals: FloatArray) -> Question:
    """Whether each trained number has its noise: the worst chi-square over steps, and how all of them are spread.

    Notes
    -----
    P chi-squares with T degrees of freedom, exact, corrected for P; and the Kolmogorov-Smirnov distance of the P
    p-values from uniform ones, which sees many coordinates that are each a little off.
    """
    steps, size = residuals.shape
    squares = (residuals**2).sum(0)  # (P,)
    single = spread_p(squares, steps)
    _, spread = uniform_p(special.chdtr(steps, squares))
    wrong = single * size <= STANDING_OUT
    little, much = int((wrong & (squares < steps)).sum()), int((wrong & (squares > steps)).sum())
    worst = int(single.argmin())
    if little and much:
        bad = (
            f"Noise isn't what the claim says on {little + much} of {size} trained numbers: {little} have too little, "
            f"{much} too much. That is so too if noise isn't drawn anew in each step."
        )
    elif little or much:
        variance = float(squares[wrong].mean()) / steps
        few = f"Noise isn't what the claim says on {little + much} of {size} trained numbers. "
        bad = few + _fault(variance, " to them")
    else:
        bad = (
            f"None of the {size} trained numbers stands out by itself, but taken together the sizes of their noise "
            "are not those of the claimed noise."
        )
    return Question(
        "coordinate-variance",
        "Noise on every single trained number",
        f"{int(wrong.sum())} of {size} stand out; the furthest has variance {squares[worst] / steps:.3g} of 1",
        _halves(single, np.array([spread])),
        "No trained number was left with less noise than the others, or with none.",
        bad,
    )


def step_variance(residuals: FloatArray) -> Question:
    """Whether each step has its noise: the worst of T chi-squares with P degrees of freedom, exact."""
    squares = (residuals**2).sum(1)
    single = spread_p(squares, residuals.shape[1])
    worst = int(single.argmin())
    variance = float(squares[worst]) / residuals.shape[1]
    return Question(
        "step-variance",
        "Noise in every step",
        f"variance {variance:.4g} of 1 in step {worst + 1} of {len(residuals)}, the step furthest off",
        corrected([single]),
        "Every training step got the noise that the claim says.",
        _fault(variance, f" in step {worst + 1}"),
    )


def mean(residuals: FloatArray) -> Question:
    """Whether the noise has mean zero over all values, on any scale: exact."""
    along = cosine(float(residuals.sum()), residuals.size, float(np.vdot(residuals, residuals)))
    return Question(
        "mean",
        "Mean of the noise",
        f"{residuals.mean():+.2e}; chance gives about {1 / math.sqrt(residuals.size):.1e}",
        float(cosine_p(along, residuals.size)),
        "The noise pulls all trained numbers together neither up nor down.",
        "The noise doesn't have mean zero: something else than noise is in the release, or the noise is drawn wrongly.",
    )


def coordinate_mean(residuals: FloatArray) -> Question:
    """Whether each coordinate has mean zero over the steps, on any scale: the worst one, and all squares; both exact.

    Notes
    -----
    The sum of squares is small where the noise of several steps cancels: whoever adds up the releases gets rid of it.
    """
    steps, size = residuals.shape
    sums = residuals.sum(0) / math.sqrt(steps)  # (P,)
    total = float(np.vdot(residuals, residuals))
    unit = math.sqrt(total / residuals.size) if total > 0 else 1.0
    p_single = cosine_p(np.clip(sums / (unit * math.sqrt(residuals.size)), -1, 1), residuals.size)
    share = min(1.0, float(np.vdot(sums, sums)) / total) if total > 0 else 1 / steps
    if share * steps < 1:
        bad = "The noise of different steps cancels out: whoever adds up what was released gets rid of some of it."
    else:
        bad = (
            "What is left after the records are taken out doesn't average to zero over the steps: the noise was not "
            "drawn anew in each step, or the records are not in the release as the claim says (clipping)."
        )
    p_all = share_p(share, size, size * (steps - 1)) if steps > 1 else np.ones(())
    return Question(
        "coordinate-mean",
        "Mean of the noise on every trained number",
        f"variance of the sums over steps {share * steps:.4g} of 1; largest {np.abs(sums).max() / unit:.2f} deviations",
        _halves(p_single, np.atleast_1d(p_all)),
        "Adding up what was released in all steps makes the noise neither vanish nor pile up.",
        bad,
    )


def normality(residuals: FloatArray) -> Question:
    """Whether the values follow the normal law: Kolmogorov-Smirnov, of 2^20 values at most (`uniform_p`)."""
    values = residuals.ravel()
    values = values[:: -(-values.size // _MOST_SORTED)]
    distance, p_value = uniform_p(special.ndtr(values))
    unit = math.sqrt(float(np.vdot(values, values)) / values.size)
    # only for the words: whether the shape is right once the size is taken out
    scaled = p_value <= STANDING_OUT and unit > 0 and uniform_p(special.ndtr(values / unit))[1] > STANDING_OUT
    return Question(
        "normality",
        "Shape of the noise",
        f"distance {distance:.2e} from the bell curve over {values.size} values",
        p_value,
        "The noise follows the bell curve (normal distribution) that the claim was computed for.",
        "The noise isn't the bell curve of the claimed size: its shape is right, its size isn't."
        if scaled
        else "The noise isn't normally distributed: epsilon was computed for another kind of noise than was added.",
    )


def tails(residuals: FloatArray) -> Question:
    """Whether extreme values are as frequent as they should be: the largest, and a count beyond three; both exact."""
    sizes = np.abs(residuals)
    largest, beyond = float(sizes.max()), int((sizes > _TAIL).sum())
    rate = float(2 * special.ndtr(-_TAIL))
    log_below = residuals.size * float(np.log1p(-2 * special.ndtr(-largest))) if largest > 0 else -math.inf
    of_largest = min(1.0, 2 * min(math.exp(log_below), -math.expm1(log_below)))
    of_count = float(count_p(beyond, residuals.size, rate))
    rare = beyond < rate * residuals.size if of_count < of_largest else log_below < math.log(0.5)
    if rare:
        bad = (
            "Large values of the noise are cut off, or too rare for noise of the claimed size: a release outside the "
            "usual range then tells who took part."
        )
    else:
        bad = (
            "There are more, or more extreme, large values than noise of the claimed size has: records may shine "
            "through in places."
        )
    return Question(
        "tails",
        "Largest values of the noise",
        f"largest {largest:.3g}; {beyond} values beyond {_TAIL:g}, {rate * residuals.size:.3g} expected",
        min(1.0, 2 * min(of_largest, of_count)),
        "Large values of the noise are as rare as they should be: none was cut off, none stands out.",
        bad,
    )


def near_zero(residuals: FloatArray) -> Question:
    """Whether there are more values near zero than chance gives: exact (binomial), one-sided."""
    rate = 1 - 2 * float(special.ndtr(-_NEAR))
    found = int((np.abs(residuals) < _NEAR).sum())
    return Question(
        "near-zero",
        "Places without noise",
        f"{found} values within {_NEAR:g} of zero, {rate * residuals.size:.3g} expected",
        float(at_least(found, residuals.size, rate)),
        "No more values are close to zero than chance makes them: noise is missing nowhere.",
        f"Noise is missing in places: {found} values are next to zero where about {rate * residuals.size:.0f} would be "
        "by chance. What was released there isn't protected. (Noise that is too small everywhere shows here too.)",
    )
