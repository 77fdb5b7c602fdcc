"""Questions about residuals that should have nothing to do with one another: is every piece of noise drawn anew?

    residuals   float64, shape (T, P): one row a step, one column a trained number; iid N(0, 1) if all is right

Each function gives None where the shape leaves nothing to ask, such as a single step. Shapes are no secret that a
fault could change, so that leaving a question out is fixed beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Final

import numpy as np
from scipy import fft, linalg, special

from fedhead.common.privacy.audit.findings import Question
from fedhead.common.privacy.audit.laws import (
    FloatArray,
    corrected,
    cosine,
    cosine_p,
    following,
    overlap_log_p,
    share_p,
)

_ALL_STEPS: Final = 300  # up to here two steps are compared in all their coordinates
_PRODUCTS: Final = 2 * 10**9  # beyond, in as many as this many products allow,
_FEWEST: Final = 64  # but at least so many of each group
_BLOCK: Final = 512  # rows of cosines at a time
_COMPARED: Final = 64  # steps in which two trained numbers are compared,
_NUMBERS: Final = 8192  # and most numbers that are
_SAME: Final = 0.9  # from this correlation on, noise is called the same
_DIRECTIONS: Final = 100  # steps that `directions` looks at
_SMALLEST: Final = 1e-300  # probabilities below count as this one
_STREAM: Final = 2**20  # values that `stream_overlap` looks at
_LIKELY: Final = 100  # distances that it computes the bound for; leaving some out can only make the p-value larger


def step_correlation(residuals: FloatArray) -> Question | None:
    """Whether consecutive steps have to do with one another: exact (`following`)."""
    if len(residuals) < 2:
        return None
    p_value, correlation = following(residuals, 1)
    return Question(
        "step-correlation",
        "Noise of consecutive steps",
        f"correlation {correlation:+.4f}, 0 expected",
        p_value,
        "The noise of a step says nothing about that of the next.",
        f"The noise of consecutive steps is related (correlation {correlation:+.2f}): it was used again, or comes from "
        "the same random numbers, so that whoever compares steps can take some of it out.",
    )


def round_correlation(residuals: FloatArray, steps_per_round: int) -> Question | None:
    """Whether a step has to do with the same step of the next round: exact (`following`)."""
    if steps_per_round < 2 or len(residuals) <= steps_per_round:
        return None
    p_value, correlation = following(residuals, steps_per_round)
    return Question(
        "round-correlation",
        "Noise of consecutive rounds",
        f"correlation {correlation:+.4f}, 0 expected",
        p_value,
        "The noise of a round says nothing about that of the next.",
        f"The noise of a step comes back at the same step of the next round (correlation {correlation:+.2f}): rounds "
        "share their random numbers, so that whoever compares rounds can take some of it out.",
    )


def repeated_steps(residuals: FloatArray, groups: Mapping[str, slice]) -> Question | None:
    """The largest correlation between any two steps, in all coordinates and in each group: exact, corrected.

    Notes
    -----
    All pairs of steps are compared. With more than 300 steps they are compared in fewer coordinates, evenly spread and
    fixed by the shape alone: noise that is used again shows in any of them.
    """
    steps, size = residuals.shape
    if steps < 2 or size < 2:
        return None
    parts = {"": slice(0, size)} | {name: part for name, part in groups.items() if part != slice(0, size)}
    budget = size if steps <= _ALL_STEPS else max(_FEWEST, _PRODUCTS // steps**2)
    p_value, pair, largest, where, families, compared = 1.0, (0, 1), 0.0, "", 0, size
    for name, part in parts.items():
        columns = residuals[:, part]
        if columns.shape[1] < 2:
            continue
        families += 1
        if columns.shape[1] > budget:
            columns = columns[:, np.linspace(0, columns.shape[1] - 1, budget).astype(np.int64)]
        place, closest = _closest(columns)
        found = float(cosine_p(closest, columns.shape[1]))
        if families == 1 or found < p_value:
            p_value, pair, largest, where, compared = found, place, closest, name, columns.shape[1]
    first, second = pair
    suffix = f' in "{where}"' if where else ""
    if abs(largest) > _SAME:
        turned = "" if largest > 0 else ", with its sign turned"
        bad = (
            f"The same noise was used more than once: that of step {first + 1} came back in step {second + 1}{suffix}"
            f"{turned}. Putting both releases together shows what the noise should hide."
        )
    else:
        bad = (
            f"The noise of steps {first + 1} and {second + 1} is related{suffix} (correlation {largest:+.2f}): part of "
            "it was used again, or it doesn't point into all directions."
        )
    return Question(
        "repeated-steps",
        "Noise of any two steps",
        f"furthest off: {largest:+.3f} between steps {first + 1} and {second + 1}{suffix}, over {compared} numbers",
        min(1.0, p_value * families * math.comb(steps, 2)),
        "No two steps share their noise.",
        bad,
    )


def _closest(rows: FloatArray) -> tuple[tuple[int, int], float]:
    """The pair of rows with the largest cosine in size, and that cosine; rows of zeros have cosine 0."""
    norms = np.sqrt((rows**2).sum(1))
    unit = rows / np.where(norms > 0, norms, 1.0)[:, None]
    best, pair, largest = -1.0, (0, 1), 0.0
    for start in range(0, len(rows), _BLOCK):
        block = unit[start : start + _BLOCK]
        products = block @ unit[start:].T  # row i of the block against all from the block's start
        products[np.tri(len(block), products.shape[1], dtype=bool)] = 0.0  # itself and pairs that were seen
        at = int(np.abs(products).argmax())
        i, j = divmod(at, products.shape[1])
        if abs(products[i, j]) > best and i < j:
            largest = float(products[i, j])
            best, pair = abs(largest), (start + i, start + j)
    return pair, max(-1.0, min(1.0, largest))


def directions(residuals: FloatArray) -> Question | None:
    """Whether noise points into all directions: how much of each step lies along the steps before it; exact.

    Notes
    -----
    Bartlett's decomposition: divide each step's vector by its norm and split it along the span of the t steps before
    it. The squared part inside follows Beta(t / 2, (P - t) / 2), independently for each step and whatever the norms.
    The steps' tail probabilities are combined to a chi-square (Fisher's method). The parts inside are large where noise
    lies in few directions, or where some numbers share theirs, wherever these stand.
    """
    count = min(len(residuals), residuals.shape[1] - 1, _DIRECTIONS)
    if count < 2:
        return None
    norms = np.sqrt((residuals[:count] ** 2).sum(1))
    rows = residuals[:count][norms > 0] / norms[norms > 0, None]  # a step without any noise has no direction
    count = max(1, len(rows))
    factor = linalg.qr(rows.T, mode="r", check_finite=False)[0][:count] if len(rows) else np.ones((1, 1))
    inside = np.minimum(1.0, (np.triu(factor, 1) ** 2).sum(0)[1:])  # (count - 1,)
    before = np.arange(1, count)
    low = special.betainc(before / 2, (residuals.shape[1] - before) / 2, inside)
    high = special.betaincc(before / 2, (residuals.shape[1] - before) / 2, inside)
    fisher = [-2 * float(np.log(np.maximum(tail, _SMALLEST)).sum()) for tail in (low, high)]
    p_values = special.chdtrc(2 * (count - 1), fisher) if count > 1 else np.ones(2)
    expected = float((before / residuals.shape[1]).sum())
    if p_values[1] <= p_values[0]:
        bad = (
            "The noise lies in fewer directions than there are trained numbers, or numbers or steps share their noise: "
            "in the other directions the release isn't protected."
        )
    else:
        bad = "The noise of different steps is more unlike than chance makes it: it isn't drawn independently."
    return Question(
        "directions",
        "Directions of the noise",
        f"{float(inside.sum()):.4g} of the noise along that of earlier steps, {expected:.4g} expected",
        min(1.0, 2 * float(p_values.min())),
        "The noise points into all directions alike.",
        bad,
    )


def shared_noise(residuals: FloatArray) -> Question | None:
    """Whether trained numbers share noise within a step: neighbours, and sums over all; both exact."""
    steps, size = residuals.shape
    if size < 2:
        return None
    p_value, correlation = following(residuals.T, 1)
    sums = residuals.sum(1) / math.sqrt(size)  # (T,)
    total = float(np.vdot(residuals, residuals))
    share = min(1.0, float(np.vdot(sums, sums)) / total) if total > 0 else 1 / size
    ratio, p_sums = share * size, float(share_p(share, steps, steps * (size - 1)))
    if p_sums < p_value and ratio < 1:
        bad = "The noise of a step adds up to nearly nothing: whoever adds up all trained numbers gets rid of it."
    else:
        bad = (
            f"Trained numbers share noise (correlation of neighbours {correlation:+.2f}): a number that is noised like "
            "another can be compared with it, and noise taken out."
        )
    return Question(
        "shared-noise",
        "Noise of different trained numbers",
        f"correlation of neighbours {correlation:+.4f}; variance of the sums in a step {ratio:.3g} of 1",
        min(1.0, 2 * min(p_value, p_sums)),
        "Each trained number has noise of its own in every step.",
        bad,
    )


def repeated_numbers(residuals: FloatArray) -> Question | None:
    """The largest correlation over steps between any two trained numbers: exact, corrected for all pairs.

    Notes
    -----
    `directions` sees when many numbers share noise, and `stream_overlap` when all do at one distance; this sees a
    single pair, wherever it is. The first 64 steps are compared, and at most 8,192 numbers, evenly spread and fixed by
    the shape alone. Few steps can't tell a pair from chance: with fewer than four nothing is asked.
    """
    rows = residuals[:_COMPARED].T
    if len(rows) > _NUMBERS:
        rows = rows[np.linspace(0, len(rows) - 1, _NUMBERS).astype(np.int64)]
    size, steps = rows.shape
    if size < 2 or steps < 4:
        return None
    _, closest = _closest(np.ascontiguousarray(rows))
    return Question(
        "repeated-numbers",
        "Noise of any two trained numbers",
        f"furthest off: {closest:+.3f} over {steps} steps, of {math.comb(size, 2)} pairs",
        min(1.0, float(cosine_p(closest, steps)) * math.comb(size, 2)),
        "No two trained numbers share their noise over the steps.",
        f"Two trained numbers are given related noise in every step (correlation {closest:+.2f}): comparing them takes "
        "noise out.",
    )


def group_correlation(residuals: FloatArray, groups: Mapping[str, slice]) -> Question | None:
    """Whether two groups begin with the same noise, as a stream that starts again gives: exact, corrected."""
    names = [name for name in groups if residuals[:, groups[name]].shape[1]]
    if len(names) < 2:
        return None
    found = []
    for first, second in combinations(names, 2):
        one, other = residuals[:, groups[first]], residuals[:, groups[second]]
        length = min(one.shape[1], other.shape[1])
        one, other = one[:, :length], other[:, :length]
        if one.size < 2:
            found.append((1.0, 0.0, first, second))
            continue
        alike = cosine(float(np.vdot(one, other)), float(np.vdot(one, one)), float(np.vdot(other, other)))
        found.append((float(cosine_p(alike, one.size)), alike, first, second))
    _, largest, first, second = min(found)
    kind = "the same noise" if abs(largest) > _SAME else "related noise"
    return Question(
        "group-correlation",
        "Noise of different parts of the model",
        f'largest correlation {largest:+.4f}, between "{first}" and "{second}"',
        corrected([one[0] for one in found]),
        "No two parts of the model share their noise.",
        f'"{first}" and "{second}" were given {kind} (correlation {largest:+.2f}): their random numbers are shared '
        "instead of drawn anew, so that comparing the parts takes noise out.",
    )


def stream_overlap(residuals: FloatArray) -> Question | None:
    """The largest correlation of all values, in the order they were drawn, with those a fixed distance later.

    Notes
    -----
    Every distance is looked at (one Fourier transform), in up to 2^20 values. The p-value is an upper bound (Chernoff,
    `overlap_log_p`), corrected for the number of distances. It finds noise whose random numbers overlap without whole
    steps being equal, such as a counter that moves on by less than was used.
    """
    values = residuals.ravel()[:_STREAM]
    if values.size < 2:
        return None
    length = fft.next_fast_len(2 * values.size, real=True)
    spectrum = fft.rfft(values, length)
    total = float(np.vdot(values, values)) or 1.0
    shares = fft.irfft(spectrum.real**2 + spectrum.imag**2, length)[1 : values.size] / total
    pairs = np.arange(values.size - 1, 0, -1, dtype=np.float64)
    likely = np.argpartition(-(shares**2) / pairs, min(_LIKELY, shares.size) - 1)[:_LIKELY]
    log_p = overlap_log_p(shares[likely], pairs[likely], values.size)
    worst = int(likely[log_p.argmin()])
    correlation, lag = float(shares[worst] * values.size / pairs[worst]), worst + 1
    return Question(
        "stream-overlap",
        "Random numbers that come back",
        f"largest correlation {correlation:+.4f}, {lag} numbers apart, of {values.size - 1} distances",
        math.exp(min(0.0, float(log_p.min()) + math.log(values.size - 1))),
        "Nowhere does the sequence of noise repeat or overlap with itself.",
        f"The random numbers of the noise come back {lag} numbers later (correlation {correlation:+.2f}): whoever "
        "compares the two places can take some of the noise out.",
    )
