"""What is wrong with a sum: how much each unit counts in it, against how much it may.

Read where a sum has failed already; a sound audit never comes here.

Shapes: U units, P trained numbers.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

TELLING: Final = 2e-3
"""Relative differences of factors above this are told: rounding and the noise of exactness are far below."""
_INDEPENDENT: Final = 1e-4  # smallest singular value of unit rows: factors are then right to a few digits
_SHORT: Final = 1e-6  # clipping norms: gradients so short say nothing


def fault_of(total: FloatArray, gradients: FloatArray, clipping_norm: float, unit: str) -> str:
    """The fault of a sum in one sentence.

    Parameters
    ----------
    total : float64 array, shape (P,)
        The sum that was released, with noise next to nothing.
    gradients : float64 array, shape (U, P)
        Of the units that it should be of, not clipped; zeros for one that counts for nothing.
    clipping_norm : float, > 0
        C.
    unit : "record" or "person"

    Notes
    -----
    The sum should be that of f_i g_i with f_i = min(1, C / |g_i|). Where gradients are linearly independent, the
    factors that it was made with follow by least squares, and from them what was done.
    """
    if not np.isfinite(total).all():
        return f"A sum is not a number, or was refused: one {unit} is enough to show."
    lengths = np.linalg.norm(gradients, axis=1)
    used = lengths > _SHORT * clipping_norm
    if not used.any():
        return f"A sum over no {unit} with a gradient is not zero."
    rows = gradients[used] / lengths[used, None]
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    if len(values) < len(rows) or values[-1] < _INDEPENDENT:
        return (
            f"It isn't that of the {unit}s as drawn, each clipped by itself. Which of them are wrong can't be told: "
            "there are too many for so few numbers."
        )
    spans = left @ ((right @ total) / values)  # f_i |g_i|
    apart = float(np.linalg.norm(total - spans @ rows)) / clipping_norm
    if apart > TELLING:
        return f"A sum holds {apart:.2g} clipping norms of something that is no gradient of its {unit}s."
    return _of_factors(spans / lengths[used], lengths[used], clipping_norm, unit)


def _of_factors(factors: FloatArray, lengths: FloatArray, clipping_norm: float, unit: str) -> str:
    """The same, from the factor of each unit."""
    right = np.minimum(1, clipping_norm / lengths)
    counts = factors / right
    wrong, number = np.abs(counts - 1) > TELLING, len(counts)
    if number > 1 and _same(factors) and not _same(right):
        return (
            f"All {number} {unit}s of a batch have the same factor, long gradients and short ones: the batch is "
            f"clipped as one, not each {unit} by itself."
        )
    if not wrong.any():
        return f"A sum is off by a little of every {unit}."
    some = f"All {number} {unit}s count" if wrong.all() else f"{wrong.sum()} of {number} {unit}s count"
    low, high = float(counts[wrong].min()), float(counts[wrong].max())
    if high < TELLING:
        return f"{wrong.sum()} of {number} {unit}s are left out of a sum that they belong to."
    if low > 1:
        times = f"{high:.3g}" if _same(counts[wrong]) else f"{low:.3g} to {high:.3g}"
        twice = _same(counts[wrong]) and abs(high - round(high)) < TELLING
        meaning = "counted more than once" if twice else "clipped too little"
        return f"{some} {times} times what the clipping norm allows: {meaning}."
    if high < 1:
        return f"{some} for less than they should, down to {low:.3g} of it: clipped too much, because of others."
    return (
        f"{some} for other shares than their own, from {low:.3g} to {high:.3g} times what the clipping norm allows: "
        f"what one {unit} counts depends on the others."
    )


def _same(values: FloatArray) -> bool:
    return float(values.max() - values.min()) <= TELLING * float(np.abs(values).max())
