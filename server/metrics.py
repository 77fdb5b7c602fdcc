"""Noised metrics, at the server: from the holders' noised counts and public numbers to an estimate of accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedhead.common.errors import InputError

LARGEST: Final = 2.0**53
"""No holder has so many units: a count beyond it, or one that is no number, is left out as if it had not come."""


@dataclass(frozen=True)
class NoisedAccuracy:
    """An estimate of accuracy on records that the holders keep apart from training.

    Attributes
    ----------
    value : float
        Right answers over the number of units that the declared numbers lead to expect. Not clamped: noise carries it
        below 0 and above 1, and a mean over rounds is right only if it may.
    standard_error : float, > 0
        Of the noise alone. How many units the holders really keep apart is not known and not in it.
    holders : int, >= 1
        Counts that it is made from.
    """

    value: float
    standard_error: float
    holders: int

    def to_row(self) -> dict[str, float | int]:
        """The entry `noised` of a round in result.json."""
        return {"accuracy": self.value, "standard_error": self.standard_error, "holders": self.holders}


def estimate(
    counts: Sequence[float], declared_records: int | Sequence[int], fraction: float, noise_multiplier: float
) -> NoisedAccuracy | None:
    """Estimate accuracy from a round's noised counts.

    Parameters
    ----------
    counts : sequence of float
        One a holder that released one, as it arrived.
    declared_records : int, >= 1, or sequence of int
        Units that a holder declares; one for all, or one a count.
    fraction : float, in (0, 1)
        Share of its units that a holder keeps apart, as the recipe says.
    noise_multiplier : float, > 0
        Standard deviation of the noise on each count, in units.

    Returns
    -------
    NoisedAccuracy or None
        None when there is no count that can be used.

    Raises
    ------
    InputError
        A public number breaks its rule.

    Notes
    -----
    The estimate is the sum of the counts over (holders * declared_records * fraction): larger holders weigh more, as
    in a count over all records. Its denominator is declared, not measured, because the true one would be a further
    release. So the estimate is off by the ratio of true to declared units, and by how much the hashes of the units
    happened to keep apart: for n units apart in all, about sqrt((1 - fraction) / n) of its value.
    It is post-processing of noised counts and costs no privacy.
    """
    declared = [declared_records] * len(counts) if isinstance(declared_records, int) else list(declared_records)
    if len(declared) != len(counts):
        raise InputError("declared_records differ in number from counts: each count must have one. Give one, or all.")
    for setting, value, good, rule in (
        ("declared_records", min(declared, default=1), min(declared, default=1) >= 1, "at least 1"),
        ("privacy.metrics.fraction", fraction, 0 < fraction < 1, "more than 0 and less than 1"),
        ("privacy.metrics.noise_multiplier", noise_multiplier, 0 < noise_multiplier < math.inf, "finite, more than 0"),
    ):
        if not good:
            raise InputError(f"{setting} is {value!r}: it must be {rule}. Give such a number.")
    usable = [(count, units) for count, units in zip(counts, declared, strict=True) if abs(count) <= LARGEST]
    if not usable:
        return None
    expected = math.fsum(units * fraction for _, units in usable)
    return NoisedAccuracy(
        value=math.fsum(count for count, _ in usable) / expected,
        standard_error=math.sqrt(len(usable)) * noise_multiplier / expected,
        holders=len(usable),
    )
