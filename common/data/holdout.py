"""Which records a holder keeps apart from training, to count right answers on: a keyed hash of each privacy unit.

Under the unit `record` the hash is of the record's digest, under the unit `person` of the person's identity, so that a
person is kept apart with all their records or not at all.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, Final

import numpy as np

from fedhead.common.errors import InputError

HOLDOUT_KEY: Final = b"fedhead-holdout"
"""Other than the key of the test split: among the records that one of them chose, the other still has its share."""


def holdout_rows(
    digests: np.ndarray, fraction: float, persons: np.ndarray | None = None, key: bytes = HOLDOUT_KEY
) -> np.ndarray:
    """Choose the records that are kept apart from training.

    Parameters
    ----------
    digests : uint8 array, shape (N, 16)
        Of each record's input, from ``Records.digests()``.
    fraction : float, in (0, 1)
        Expected share of units kept apart; the true share varies, because units are drawn one by one.
    persons : array, shape (N,), optional
        Whose record it is, text or numbers. Given under the unit `person`; the digests are then not read.
    key : bytes, at most 64
        Another key gives another choice.

    Returns
    -------
    apart : bool array, shape (N,)
        The others are for training, so the two never share a unit.

    Raises
    ------
    InputError
        The fraction is not in (0, 1), or persons differ in number from records.

    Notes
    -----
    Guarantee: on which side a unit falls depends on that unit and the key only: not on its index, nor on which other
    units are there. Adding or removing one unit moves no other one from side to side. Records of equal inputs (of one
    person) fall on the same side. Numbers count by value, because a column of whole numbers turns into one of floats
    as soon as another record has none.
    """
    if not 0 < fraction < 1:
        raise InputError(
            f"privacy.metrics.fraction is {fraction!r}: it must be more than 0 and less than 1. Give a share such "
            "as 0.1."
        )
    if persons is None:
        names = [row.tobytes() for row in np.ascontiguousarray(digests)]
    elif len(persons) != len(digests):
        raise InputError("persons differ in number from records: each record must have one. Read the column again.")
    else:
        names = [_identity(person) for person in persons.tolist()]
    limit = int(fraction * 2**64)
    sides = {name: int.from_bytes(blake2b(name, digest_size=8, key=key).digest(), "big") < limit for name in set(names)}
    return np.fromiter((sides[name] for name in names), dtype=bool, count=len(names))


def _identity(person: Any) -> bytes:
    """A person as bytes, the same whatever column type it was read as."""
    if isinstance(person, float) and person.is_integer():
        person = int(person)
    return str(person).encode("utf-8", "surrogatepass")
