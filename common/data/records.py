"""Records: N labelled raw inputs, read and decoded only when they are asked for.

A record's identity is the digest of its input's own bytes. Splits follow that digest, never the record's index, so that
whether a record is a test record depends on nothing but the record itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from fedhead.common.data.inputs import ArrayImages, Inputs, Texts, Vectors
from fedhead.common.data.loaded import Kind
from fedhead.common.errors import DataError

SPLIT_KEY = b"fedhead-test-split"


@dataclass(frozen=True, eq=False, repr=False)
class Records:
    """N labelled records.

    Parameters
    ----------
    kind : "text", "image" or "vector"
        What an input is: a str, an RGB ``PIL.Image``, or a float64 array of shape (D,).
    labels : int64 array, shape (N,)
        Index into ``task.labels``; all -1 when there are no labels (prediction).
    store : Inputs
        The raw inputs; shared by all selections from the same source.
    rows : int64 array, shape (N,)
        Which of the store's inputs each record is.
    columns : mapping of str to array
        Further columns of the whole store, such as a hospital or a person; read by `column`.

    Notes
    -----
    The representation shows the kind and the number of records, never their content.
    """

    kind: Kind
    labels: np.ndarray
    store: Inputs
    rows: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    _digests: list[np.ndarray] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Records(kind={self.kind!r}, {len(self)} records)"

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_memory(
        cls,
        kind: Kind,
        inputs: Sequence[Any] | np.ndarray,
        labels: Sequence[int] | np.ndarray | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Records:
        """Records of objects in memory.

        Parameters
        ----------
        kind : "text", "image" or "vector"
        inputs : sequence of str, or uint8 array (N, H, W) or (N, H, W, 3), or float array (N, D)
        labels : sequence of int, optional
            Default: all -1.
        columns : mapping of str to sequence, optional
        """
        store: Inputs
        if kind == "text":
            store = Texts(list(inputs))
        elif kind == "image":
            store = ArrayImages(np.asarray(inputs))
        else:
            store = Vectors(np.asarray(inputs, dtype=np.float64))
        count = len(store)
        marks = np.full(count, -1) if labels is None else np.asarray(labels)
        further = {name: np.asarray(values) for name, values in (columns or {}).items()}
        return cls(kind, marks.astype(np.int64), store, np.arange(count), further)

    def inputs(self, indices: Sequence[int] | np.ndarray | slice) -> list[Any]:
        """Raw inputs, decoded: str, RGB ``PIL.Image`` or float64 array; None for an image that can't be decoded."""
        return self.store.read(self.rows[_index(indices)])

    def digests(self) -> np.ndarray:
        """Digest of each record's input, without its label.

        Returns
        -------
        uint8 array, shape (N, 16)
            BLAKE2b over the text's UTF-8 bytes, the image file's bytes, or the array's bytes. Computed once.
        """
        if not self._digests:
            self._digests.append(self.store.digests(self.rows))
        return self._digests[0]

    def column(self, name: str) -> np.ndarray:
        """A further column, shape (N,).

        Raises
        ------
        DataError
            When there is no such column.
        """
        if name not in self.columns:
            known = ", ".join(self.columns) or "none"
            raise DataError(f'column is "{name}": the records have no such column. Use one of: {known}.')
        values: np.ndarray = self.columns[name][self.rows]
        return values

    def origin(self, index: int) -> str:
        """Where a record comes from (a file's path, or its row), for the data holder's own log only."""
        return self.store.origin(int(self.rows[index]))

    def select(self, indices: Sequence[int] | np.ndarray | slice) -> Records:
        """The records at these positions, in this order; inputs are shared, not copied."""
        chosen = _index(indices)
        return Records(
            self.kind,
            self.labels[chosen],
            self.store,
            self.rows[chosen],
            self.columns,
            [digests[chosen] for digests in self._digests],
        )


def split_records(records: Records, fraction: float, key: bytes = SPLIT_KEY) -> tuple[np.ndarray, np.ndarray]:
    """Split records into training and test records by a keyed hash of each record's content.

    Parameters
    ----------
    records : Records
    fraction : float, in (0, 1)
        Expected share of test records; the true share varies, because records are drawn one by one.
    key : bytes, at most 64
        Another key gives another split.

    Returns
    -------
    train, test : int64 arrays
        Disjoint, sorted, together all indices.

    Notes
    -----
    Guarantee: on which side a record falls depends on its own content and the key only: not on its index, nor on which
    other records are there. Records with equal inputs fall on the same side.
    """
    limit = int(fraction * 2**64)
    draws = [int.from_bytes(blake2b(row, digest_size=8, key=key).digest(), "big") for row in records.digests()]
    test = np.fromiter((draw < limit for draw in draws), dtype=bool, count=len(draws))
    return np.flatnonzero(~test), np.flatnonzero(test)


def check_classes(records: Records, labels: Sequence[str], setting: str = "task.labels") -> None:
    """Refuse training records in which a declared label never occurs; for a simulation's training records as a whole.

    Raises
    ------
    DataError
        Naming the labels that have no record.
    """
    counts = np.bincount(records.labels[records.labels >= 0], minlength=len(labels))
    empty = [label for label, count in zip(labels, counts, strict=False) if count == 0]
    if empty:
        names = ", ".join(f'"{label}"' for label in empty)
        raise DataError(
            f"{setting} has {names}: no training record has {'that label' if len(empty) == 1 else 'those labels'}. "
            "Remove it from the list, or add records that have it."
        )


def _index(indices: Sequence[int] | np.ndarray | slice) -> slice | np.ndarray:
    if isinstance(indices, slice):
        return indices
    index = np.asarray(indices)
    return index if index.dtype == bool else index.astype(np.int64)
