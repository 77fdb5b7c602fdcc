"""Whose record it is: persons as the privacy unit, with all their records at a data holder.

What becomes of a person depends on that person alone: which side of a split they fall on follows a keyed hash of the
person, and which of their records are left out follows keyed hashes of their own records.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import numpy as np

from fedhead.common.data.loaded import text_of
from fedhead.common.data.records import SPLIT_KEY, Records
from fedhead.common.errors import DataError

SURPLUS_KEY: Final = b"fedhead-surplus-records"

log = logging.getLogger("fedhead.client")


@dataclass(frozen=True, eq=False, repr=False)
class Persons:
    """The persons of a holder and their records.

    Attributes
    ----------
    rows : int64 array, shape (R,)
        Records that are used, person after person; persons in the order of their first record.
    offsets : int64 array, shape (P + 1,)
        Person i has the records ``rows[offsets[i]:offsets[i + 1]]``, at least one.
    left_out : int
        Records beyond the most a person. It depends on the data: for the holder's own log only.

    Notes
    -----
    The representation shows the number of persons, never who they are.
    """

    rows: np.ndarray
    offsets: np.ndarray
    left_out: int

    def __repr__(self) -> str:
        return f"Persons({len(self)} persons)"

    def __len__(self) -> int:
        return len(self.offsets) - 1


def check_column(records: Records, column: str, setting: str = "privacy.person") -> None:
    """Refuse a person column that isn't there.

    Raises
    ------
    DataError
        Naming the columns that are.
    """
    if column not in records.columns:
        known = ", ".join(records.columns) or "none"
        raise DataError(f'{setting} is "{column}": the data has no such column. Use one of: {known}.')


def names_of(records: Records, column: str, setting: str = "privacy.person") -> np.ndarray:
    """Each record's person, as text: 3.0 as "3", without spaces around.

    Parameters
    ----------
    records : Records
    column : str
    setting : str
        Name of the setting that names the column, for errors.

    Returns
    -------
    str array, shape (N,)

    Raises
    ------
    DataError
        When there is no such column, when it doesn't hold one value a record, or when a record has no value there:
        who has no name can't be told from others.
    """
    names = _texts(records, column, setting)
    if (names == "").any():
        raise DataError(
            f'{setting} is "{column}": some records have no value there. Fill the column, or drop those records.'
        )
    return names


def named(records: Records, column: str, setting: str = "privacy.person") -> np.ndarray:
    """Which records say whose they are: bool, shape (N,), each from that record alone.

    Raises
    ------
    DataError
        When there is no such column, or it doesn't hold one value a record.
    """
    found: np.ndarray = _texts(records, column, setting) != ""
    return found


def _texts(records: Records, column: str, setting: str) -> np.ndarray:
    """Each record's person as text; "" for none."""
    check_column(records, column, setting)
    values = records.column(column)
    if values.ndim != 1:
        raise DataError(f'{setting} is "{column}": a person must be one value a record. Name another column.')
    if values.dtype.kind in "iuU":
        return np.char.strip(values.astype(str))
    return np.array([_text(value) for value in values.tolist()], dtype=str)


def _text(value: object) -> str:
    return (value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else text_of(value)).strip()


def codes_of(names: Sequence[str] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the persons in the order of their first record.

    Returns
    -------
    codes : int64 array, shape (N,)
        Each record's person, from 0 to P - 1.
    first : int64 array, shape (P,)
        Each person's first record.
    """
    _, first, inverse = np.unique(np.asarray(names), return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[inverse].astype(np.int64), first[order].astype(np.int64)


def group_persons(records: Records, column: str, most: int, setting: str = "privacy.person") -> Persons:
    """Group records by person, with at most so many records each.

    Parameters
    ----------
    records : Records
        Of one holder.
    column : str
    most : int, >= 1
        Records of a person that are used; declared, never derived from the data.
    setting : str

    Returns
    -------
    Persons

    Raises
    ------
    DataError
        See `names_of`.

    Notes
    -----
    Guarantee: which records of a person are used depends on the contents and labels of that person's records and on
    `most`: neither on other persons nor on the order of the records. Records of equal content and label are
    interchangeable.
    """
    codes, first = codes_of(names_of(records, column, setting))
    counts = np.bincount(codes, minlength=len(first))
    rows = np.argsort(codes, kind="stable")
    many = counts > most
    if not many.any():
        return Persons(rows, _offsets(counts), 0)
    digests, keep = records.digests(), np.ones(len(codes), dtype=bool)
    ends = counts.cumsum()
    for person in np.flatnonzero(many):
        mine = rows[ends[person] - counts[person] : ends[person]]
        keys = [_surplus_key(digests[row], int(records.labels[row])) for row in mine]
        keep[mine[np.argsort(np.array(keys, dtype="S16"), kind="stable")[most:]]] = False
    return Persons(rows[keep[rows]], _offsets(np.minimum(counts, most)), int((~keep).sum()))


def _surplus_key(digest: np.ndarray, label: int) -> bytes:
    text = digest.tobytes() + label.to_bytes(8, "little", signed=True)
    return blake2b(text, digest_size=8, key=SURPLUS_KEY).hexdigest().encode()  # hex: numpy strips zero bytes at the end


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], counts.cumsum()]).astype(np.int64)


def tell_left_out(holder: str, persons: Persons, most: int) -> None:
    """Write to the holder's own log how many records are left out; nothing when there are none."""
    if persons.left_out:
        log.info(
            "%s: %d records are left out, of persons with more than %d (privacy.records_per_person)",
            holder, persons.left_out, most,
        )  # fmt: skip


def split_persons(
    records: Records, column: str, fraction: float, key: bytes = SPLIT_KEY, setting: str = "privacy.person"
) -> tuple[np.ndarray, np.ndarray]:
    """Split records into training and test records so that nobody is on both sides.

    Parameters
    ----------
    records : Records
    column : str
    fraction : float, in (0, 1)
        Expected share of test persons; the true share varies, because persons are drawn one by one.
    key : bytes, at most 64
        Another key gives another split.
    setting : str

    Returns
    -------
    train, test : int64 arrays
        Disjoint, sorted, together all indices.

    Raises
    ------
    DataError
        See `names_of`.

    Notes
    -----
    Guarantee: the side of a record depends on its person's name and the key only.
    """
    names = names_of(records, column, setting)
    codes, first = codes_of(names)
    limit = int(fraction * 2**64)
    draws = [blake2b(_bytes(name), digest_size=8, key=key).digest() for name in names[first].tolist()]
    test = np.fromiter((int.from_bytes(draw, "big") < limit for draw in draws), dtype=bool, count=len(draws))[codes]
    return np.flatnonzero(~test), np.flatnonzero(test)


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def majority_labels(codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each person's most frequent label, the first of several.

    Parameters
    ----------
    codes, labels : int64 arrays, shape (N,)

    Returns
    -------
    int64 array, shape (P,)
    """
    persons, classes = int(codes.max(initial=-1)) + 1, int(labels.max(initial=0)) + 1
    counts = np.zeros((persons, classes), dtype=np.int64)
    np.add.at(counts, (codes, labels), 1)
    found: np.ndarray = counts.argmax(1).astype(np.int64)
    return found
