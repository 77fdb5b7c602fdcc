"""What a source's reader is asked for, and what it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

Kind = Literal["text", "image", "vector"]


@dataclass(frozen=True)
class Request:
    """One `data.source`, taken apart.

    Parameters
    ----------
    name : str
        What stands behind the colon.
    base : Path
        Where relative paths start.
    setting, shown : str
        Prefix of settings' names, and the source as typed, for errors.
    split : str
        The part wanted of a source that has several.
    role : "text", "image", "vector" or None
        The input's role, when `columns` gives it.
    """

    name: str
    base: Path
    setting: str
    shown: str
    split: str
    role: Kind | None


@dataclass(frozen=True)
class Loaded:
    """Columns of N records, read when asked for.

    Parameters
    ----------
    count : int
        N.
    columns : mapping of str to array, shape (N, ...)
        Every column by name.
    names : mapping of str to sequence of str
        For columns whose values are numbers with a name each (class labels): the names by number.
    fetch : callable, optional
        (column, rows) -> values of a few rows, without reading the whole column. Default: index `columns`.
    folder : Path
        Where relative paths inside the data start.
    """

    count: int
    columns: Mapping[str, np.ndarray]
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    fetch: Callable[[str, np.ndarray], Sequence[Any]] | None = None
    folder: Path = Path()


def text_of(value: object) -> str:
    """A value of a column as text: 3.0 as "3", as whole numbers in a column with gaps arrive; no value as ""."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def as_column(values: Sequence[Any]) -> np.ndarray:
    """An object array of shape (N,), whatever the values are; lists of one length don't become a table."""
    column = np.empty(len(values), dtype=object)
    for row, value in enumerate(values):
        column[row] = value
    return column


class LazyColumns(Mapping[str, np.ndarray]):
    """Columns that are read on first use.

    Parameters
    ----------
    names : sequence of str
    read : callable
        Name -> array of shape (N, ...).
    """

    def __init__(self, names: Sequence[str], read: Callable[[str], np.ndarray]) -> None:
        self._names, self._read = tuple(names), read
        self._found: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._found:
            self._found[name] = self._read(name)
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names  # the default would read the column

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
