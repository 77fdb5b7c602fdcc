"""FeatureSet: the features of N records, all of one shape, or one sequence of vectors a record.

N records, B records of a batch, T tokens, H numbers a token.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_BYTES = 8 * 2**20  # looked at at once


@dataclass(frozen=True, eq=False, repr=False)
class FeatureSet:
    """Features of N records, or of N persons with the records of each.

    Parameters
    ----------
    values : Tensor, float32 or float16
        Shape (N, *shape); or (total, H), the tokens of all records one after the other, or the records of all persons.
        May be mapped from a file: treat it as read-only.
    offsets : Tensor, int64, shape (N + 1,), or None
        Record i has the tokens `offsets[i]` to `offsets[i + 1]`; None when all records have one shape.
    mapped : mmap, or None
        The file that `values` are mapped from, whole and from its first byte. A pass over all records then gives each
        block's memory back to the system once it has been looked at; the file still has it.
    """

    values: Tensor
    offsets: Tensor | None = None
    mapped: mmap.mmap | None = None

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
            if isinstance(index, slice) or index.dtype == torch.bool:
                return self.values[index].float(), None
            return self.values.index_select(0, index).float(), None  # a third of the time of indexing with positions
        starts, lengths = self.offsets[:-1][index], self.offsets.diff()[index]
        longest = int(lengths.max()) if len(lengths) else 0
        places = torch.arange(longest)
        real = places < lengths[:, None]  # (B, T)
        padded = torch.zeros(len(lengths), longest, *self.shape)
        padded[real] = self.values[(starts[:, None] + places)[real]].float()
        return padded, lengths

    def take(self, order: Tensor) -> FeatureSet:
        """A copy of the records at these positions, in this order; not mapped."""
        if self.offsets is None:
            return FeatureSet(self._rows(order))
        places, lengths = self.places(order)
        assert isinstance(places, Tensor)
        return FeatureSet(self._rows(places), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))

    def places(self, index: Tensor | slice) -> tuple[Tensor | slice, Tensor]:
        """Where the tokens of some records lie in the values of a ragged set.

        Parameters
        ----------
        index : int64 or bool Tensor, or slice of step 1

        Returns
        -------
        places : slice, or int64 Tensor, shape (total of the lengths,)
            A slice for a slice: values are then a view.
        lengths : Tensor, int64, shape (B,)
        """
        assert self.offsets is not None
        starts, lengths = self.offsets[:-1][index], self.offsets.diff()[index]
        if isinstance(index, slice):
            first = int(starts[0]) if len(starts) else 0
            return slice(first, first + int(lengths.sum())), lengths
        within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        return starts.repeat_interleave(lengths) + within, lengths

    def slice(self, start: int, stop: int) -> FeatureSet:
        """The records from `start` up to `stop`; values are a view."""
        if self.offsets is None:
            return FeatureSet(self.values[start:stop])
        offsets = self.offsets[start : max(start, stop) + 1]
        return FeatureSet(self.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])

    def finite(self) -> Tensor:
        """Which records have finite features only: bool, shape (N,). A corrupt image's features are all NaN."""
        good = torch.cat([block.isfinite().flatten(1).all(1) for _, block in self._blocks()])
        if self.offsets is None:
            return good
        bad = torch.cat([torch.zeros(1, dtype=torch.int64), (~good).cumsum(0)])
        return bad[self.offsets[1:]] == bad[self.offsets[:-1]]

    def _rows(self, order: Tensor) -> Tensor:
        """A copy of these rows of the values, which are read from the first to the last, whatever the order."""
        if self.mapped is None:
            return self.values[order]
        found = torch.empty((len(order), *self.shape), dtype=self.values.dtype)
        wanted, places = order.sort()
        for start, block in self._blocks():
            first, last = torch.searchsorted(wanted, torch.tensor([start, start + len(block)])).tolist()
            found[places[first:last]] = block[wanted[first:last] - start]
        return found

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The values block by block, each with its first row; at least one, which may be empty."""
        width = max(1, self.values[:1].nbytes)
        rows = max(1, BLOCK_BYTES // width)
        for start in range(0, max(1, len(self.values)), rows):
            yield start, self.values[start : start + rows]
            if self.mapped is not None:
                whole = start * width // mmap.PAGESIZE * mmap.PAGESIZE
                size = min((start + rows) * width, len(self.mapped)) - whole
                self.mapped.madvise(mmap.MADV_DONTNEED, whole, size)
