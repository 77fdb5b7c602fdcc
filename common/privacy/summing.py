"""How many records a sum of clipped gradients counts as, by what rounds in it; without torch, so that `check` has it.

`lattice.ETA` covers the rounding of sums over as many records of one unit each as a holder has promised
(limits.most_records). Where persons are the unit, each one's records are added up first, which rounds more.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

AT_ONCE: Final = 4096
"""Units whose gradients a deployed holder adds up at once: its own, because another number could be read off a sum."""

CANCEL: Final = 2.0**-5
"""A person's norm counts as at least this share of the sum of their records' norms. Below it the records cancel each
other almost fully, and what rounding leaves of each of them would no longer be small beside the clipping norm. The same
share of its positions' norms is the least that a record with several positions counts with in a linear layer."""


def rounding_records(lengths: NDArray[np.int64], at_once: int = AT_ONCE) -> int:
    """How many records of one unit each would round as much as these persons: what `lattice.check_sums` asks for.

    Parameters
    ----------
    lengths : ndarray, int64, shape (P,)
        Records of each person.
    at_once : int
        Most persons whose records are added up before the next ones.

    Notes
    -----
    A sum of n terms of total size S is off by at most n 2^-53 S: for N records of one unit each N^2. A person's records
    have a total size of at most 1 / `CANCEL` clipping norms, and sums over parts are added up one after the other.
    Never less than their records: each may move a little with its batch (fedhead.common.privacy.conditioning).
    """
    if not len(lengths):
        return 0
    records, persons, longest = int(lengths.sum()), len(lengths), int(lengths.max())
    additions = min(records, at_once * longest) + (persons if persons > at_once else 0)
    size = int((lengths <= 1).sum()) + int((lengths > 1).sum()) / CANCEL
    return max(records, math.ceil(math.sqrt(additions * size)))
