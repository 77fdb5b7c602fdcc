"""FeatureSet: the features of N records, all of one shape, or one sequence of vectors a record.

N records, B records of a batch, T tokens, H numbers a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 65_536  # rows looked at at once


@dataclass(frozen=True, eq=False, repr=False)
class FeatureSet:
    """Features of N records.

    Parameters
    ----------
    values : Tensor, float32 or float16
        Shape (N, *shape); or (total, H), the tokens of all records one after the other. May be mapped from a file:
        treat it as read-only.
    offsets : Tensor, int64, shape (N + 1,), or None
        Record i has the tokens `offsets[i]` to `offsets[i + 1]`; None when all records have one shape.
    """

    values: Tensor
    offsets: Tensor | None = None

    def __repr__(self) -> str:
        return f"FeatureSet({len(self)} records, shape={self.shape}, ragged={self.offsets is not None})"

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one record's features, or of one token's when ragged."""
        return tuple(self.values.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes that values and offsets take."""
        return self.values.nbytes + (0 if self.offsets is None else self.offsets.nbytes)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """Features of some records, ready for the head.

        Parameters
        ----------
        index : int64 or bool Tensor, or slice
            A slice of float32 features of one shape is a view, without a copy.

        Returns
        -------
        values : Tensor, float32, shape (B, *shape) or (B, T, H)
            Ragged features are padded with zeros to the longest of the batch.
        lengths : Tensor, int64, shape (B,), or None
            Tokens of each record; None when all records have one shape.
        """
        if self.offsets is None:
            return self.values[index].float(), None
        starts, lengths = self.offsets[:-1][index], self.offsets.diff()[index]
        longest = int(lengths.max()) if len(lengths) else 0
        places = torch.arange(longest)
        real = places < lengths[:, None]  # (B, T)
        padded = torch.zeros(len(lengths), longest, *self.shape)
        padded[real] = self.values[(starts[:, None] + places)[real]].float()
        return padded, lengths

    def take(self, order: Tensor) -> FeatureSet:
        """A copy of the records at these positions, in this order."""
        if self.offsets is None:
            return FeatureSet(self.values[order])
        starts, lengths = self.offsets[:-1][order], self.offsets.diff()[order]
        ends = lengths.cumsum(0)
        within = torch.arange(int(lengths.sum())) - (ends - lengths).repeat_interleave(lengths)
        return FeatureSet(
            self.values[starts.repeat_interleave(lengths) + within],
            torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
        )

    def slice(self, start: int, stop: int) -> FeatureSet:
        """The records from `start` up to `stop`; values are a view."""
        if self.offsets is None:
            return FeatureSet(self.values[start:stop])
        offsets = self.offsets[start : max(start, stop) + 1]
        return FeatureSet(self.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])

    def finite(self) -> Tensor:
        """Which records have finite features only: bool, shape (N,). A corrupt image's features are all NaN."""
        blocks = [self.values[start : start + BLOCK] for start in range(0, max(1, len(self.values)), BLOCK)]
        good = torch.cat([block.isfinite().flatten(1).all(1) for block in blocks])
        if self.offsets is None:
            return good
        bad = torch.cat([torch.zeros(1, dtype=torch.int64), (~good).cumsum(0)])
        return bad[self.offsets[1:]] == bad[self.offsets[:-1]]
