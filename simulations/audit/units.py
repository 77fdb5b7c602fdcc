"""The privacy units of a simulation, and the same simulation with only some of them.

A unit is a record, or a person with all their records at a holder. Shapes: U units, R rows, N training records.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedhead.common.data.holdout import holdout_rows
from fedhead.common.data.persons import Persons, names_of
from fedhead.simulations.prepared import Prepared

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


class Units:
    """The privacy units of a simulation, holder after holder, and splits of only some of them.

    Attributes
    ----------
    rows : int64 array, shape (R,)
        Rows of the training records, unit after unit.
    unit : int64 array, shape (R,)
        Each row's unit, from 0 to U - 1.
    apart : bool array, shape (U,)
        Units that their holder keeps apart from training, to count right answers on: no head ever sees them.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, split = prepared, prepared.split
        self._lengths = [
            np.ones(len(rows), dtype=np.int64) if split.persons is None else np.diff(split.persons[holder].offsets)
            for holder, rows in enumerate(split.holders)
        ]
        lengths = np.concatenate(self._lengths)
        self.rows = np.concatenate(split.holders)
        self.unit = np.repeat(np.arange(len(lengths)), lengths)
        self.apart = np.zeros(len(lengths), dtype=np.bool_)
        privacy = prepared.config.privacy
        if privacy.metrics is not None:
            whose = None if split.persons is None else names_of(split.train, privacy.person or "")
            kept = holdout_rows(split.train.digests(), privacy.metrics.fraction, whose)
            self.apart[self.unit] = kept[self.rows]

    def __len__(self) -> int:
        return len(self.apart)

    def only(self, chosen: BoolArray) -> Prepared:
        """The same simulation with the chosen units alone, and with the same holders: bool, shape (U,)."""
        split, start = self.prepared.split, 0
        holders: list[np.ndarray] = []
        persons: list[Persons] = []
        for rows, lengths in zip(split.holders, self._lengths, strict=True):
            mine = chosen[start : start + len(lengths)]
            start += len(lengths)
            holders.append(rows[np.repeat(mine, lengths)])
            offsets = np.concatenate([[0], lengths[mine].cumsum()]).astype(np.int64)
            persons.append(Persons(holders[-1], offsets, 0))
        part = replace(split, holders=holders, persons=None if split.persons is None else persons)
        return replace(self.prepared, split=part)

    def means(self, values: FloatArray) -> FloatArray:
        """Mean over each unit's rows, without those that are NaN: (N,) of all training records -> (U,)."""
        found = values[self.rows]
        good = np.isfinite(found)
        total = np.bincount(self.unit[good], found[good], len(self))
        with np.errstate(invalid="ignore"):
            return np.asarray(total / np.bincount(self.unit[good], minlength=len(self)), dtype=np.float64)
