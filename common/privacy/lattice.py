"""The lattice that a deployed holder's sums are rounded to before integer noise is added, and what that costs.

Noise in floating point is open to attacks on the low bits of a release: which numbers can come out depends on the sum
(Mironov 2012). On a lattice whose step is fixed by the clipping norm alone, every sum has the same numbers to come out.

    step g    2^(floor(log2 C) - 30), so C / g lies in [2^30, 2^31)
    sum       float64, rounded to the nearest multiple of g (halves to even), as an integer
    noise     integers, standard deviation noise_multiplier * C * (1 + ETA) / g
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fedhead.common.errors import InputError, RunError

ETA: Final = 2.0**-10
"""How much wider than C the sensitivity of a rounded sum is taken: C (1 + ETA).

Let S and S' be the float64 sums of the clipped gradients of two data sets that differ in one record, each of at most
`MOST_RECORDS` records and `MOST_COORDINATES` coordinates, each added up in any order and grouping of its own, and let
u = 2^-53. In shares of C, the rounded sums lie at most 1 + ETA apart (L2), because of

    1         the one record: `clip_factors` aims at 1 - 2^-20, which leaves room for the rounding in its norm, factor
              and products (for 2^32 coordinates a relative error below 2^-21)
    2^-12     additions: a sum of N terms of norm C is off by at most about N u * N C = 2^-13 C, one for S, one for S';
              fused or separate products count as one more rounding a term
    2^-14     the lattice: half a step a coordinate for each sum, sqrt(2^32) * 2^-30 C together
    2^-11     what is left, for records in both sets whose own gradients are computed a little differently because
              their batches differ in shape: together at most 2^-11 C, that is 2^-31 C a record at 2^20 records, and
              more a record where fewer are promised
              (fedhead.common.privacy.conditioning)

The last line is proved for linear heads with cross-entropy on features of length 1, with weights that are no longer
than `conditioning.check_weights` allows. For other heads it is a hope: whoever sends the weights decides how well
conditioned gradients are. Overflow in the sum is impossible: N C < 2^52 g.
"""

MOST_RECORDS: Final = 2**20
MOST_COORDINATES: Final = 2**32

_FINENESS: Final = 30
_LARGEST: Final = 2**52  # in steps: more than MOST_RECORDS * 2^31 sums can reach; also exact in float64
_EXPONENTS: Final = 500  # beyond 2^500 or below 2^-500 squares and steps leave the range of float64


def sensitivity(clipping_norm: float) -> float:
    """How far apart (L2) the rounded sums of neighbouring data sets may lie: C (1 + ETA)."""
    return clipping_norm * (1 + ETA)


def check_sums(records: int, parameters: Sequence[Tensor], most: int | None = None) -> None:
    """Refuse sums that ETA doesn't cover.

    Parameters
    ----------
    records : int
        N, the true count; it is in no message.
    parameters : sequence of Tensor
        What is trained; gradients have the same dtype.
    most : int, optional
        Most records that the holder's file promises, a public number; default and most: `MOST_RECORDS`.

    Raises
    ------
    InputError
        Before any record is read.
    """
    for p in parameters:
        if p.dtype != torch.float64:
            raise InputError(
                f"trainable is {p.dtype}: sums that get noise from the operating system must be torch.float64. Call "
                "trainable.double() before its Trainer is made."
            )
    if sum(p.numel() for p in parameters) > MOST_COORDINATES:
        raise InputError(
            f"model.head trains more than {MOST_COORDINATES} numbers: rounding in such sums is not covered. Train less."
        )
    most = MOST_RECORDS if most is None else min(most, MOST_RECORDS)
    if records > most:
        raise InputError(
            f"data.source counts as more than {most} records: rounding in sums of more is not covered. Use a part, or "
            f"a larger limits.most_records, up to {MOST_RECORDS}."
        )


def lattice_step(clipping_norm: float) -> float:
    """The lattice's step: a power of two that depends on the clipping norm and on nothing else.

    Parameters
    ----------
    clipping_norm : float, in [2^-500, 2^500)

    Raises
    ------
    InputError
        The clipping norm is outside that range.
    """
    mantissa, exponent = math.frexp(clipping_norm)  # mantissa in [0.5, 1)
    if not (0.5 <= mantissa < 1 and abs(exponent - 1) <= _EXPONENTS):
        raise InputError(
            f"clipping_norm is {clipping_norm!r}: it must be from 2^-500 to 2^500. Take a norm near that of a gradient."
        )
    return math.ldexp(1.0, exponent - 1 - _FINENESS)


def to_lattice(total: Tensor, step: float) -> Tensor:
    """Round a sum to the lattice.

    Parameters
    ----------
    total : Tensor, float64
        A sum of clipped gradients.
    step : float
        From `lattice_step`.

    Returns
    -------
    whole : Tensor, int64, same shape
        The nearest multiples of the step, in steps; halves to even.

    Raises
    ------
    RunError
        A coordinate is not finite, or larger than any sum of clipped gradients. The text says no more: whoever calls
        must release nothing of this round.

    Notes
    -----
    Guarantee: each coordinate moves by at most step / 2, and no further error is made: dividing by a power of two is
    exact here.
    """
    assert total.dtype == torch.float64, "float32 sums are off by more than ETA covers"
    scaled = (total / step).round_()
    if not bool((scaled.abs() <= _LARGEST).all()):  # NaN is not <=
        raise RunError("the sum of clipped gradients is out of its range: nothing is released. Report this as a bug.")
    return scaled.to(torch.int64)


def from_lattice(whole: Tensor, step: float) -> Tensor:
    """Multiples of the step as numbers: float64, same shape. Beyond 2^53 steps the last bits are rounded off."""
    return whole.to(torch.float64).mul_(step)
