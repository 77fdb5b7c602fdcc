"""Sums that are rounded to the safe side: what was spent upwards, what may be spent downwards.

Floats round to the nearest number, so a plain sum of what was spent may lie below the exact one.
"""

from __future__ import annotations

import math
from fractions import Fraction


def below(exact: Fraction) -> float:
    """The largest float that is at most `exact`, which must lie within the floats."""
    near = float(exact)
    return math.nextafter(near, -math.inf) if Fraction(near) > exact else near


def above(exact: Fraction) -> float:
    """The smallest float that is at least `exact`; infinity beyond the floats."""
    try:
        near = float(exact)
    except OverflowError:
        return math.inf
    return math.nextafter(near, math.inf) if Fraction(near) < exact else near


def sum_above(a: float, b: float) -> float:
    """The smallest float that is at least the exact a + b.

    The error of a float sum is a float itself, and is found without rounding: Knuth, The Art of Computer Programming,
    volume 2, section 4.2.2, theorem B. Quicker than rational numbers, because every charge goes through here.
    """
    total = a + b
    other = total - a
    error = (a - (total - other)) + (b - other)
    return math.nextafter(total, math.inf) if error > 0 else total


def difference_below(a: float, b: float) -> float:
    """max(0, a - b), rounded down; 0 for an infinite b."""
    return 0.0 if b >= a else -sum_above(-a, b)


def root_above(square: float) -> float:
    """The smallest float whose square is at least `square`, which must be finite and at least 0."""
    root = math.sqrt(square)
    return math.nextafter(root, math.inf) if Fraction(root) ** 2 < Fraction(square) else root
