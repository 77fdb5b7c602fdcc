"""Reader of JSON files: every value is read as its own record gives it.

A table reader finds one type for a column from all of its values: one record with a word among dates, or a fraction
among whole numbers, would change the text of all others, and with it their features, their person and their split. Here
nothing of a record depends on another one, as the privacy of records needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedhead.common.data.loaded import Loaded, Request, as_column, text_of
from fedhead.common.data.paths import file_of
from fedhead.common.errors import DataError


def load_json(request: Request) -> Loaded:
    """A JSON file: one object a line, or one array of objects.

    Returns
    -------
    Loaded
        Columns by name, the names in alphabetical order, each an object array of shape (N,): a number or truth value as
        text, a list of numbers as a float64 array, None where a record has no value.

    Raises
    ------
    DataError
        The file isn't there, or isn't such a file.

    Notes
    -----
    Guarantee: what stands in a record's columns depends on that record alone.
    """
    path = file_of(request)
    found: dict[str, list[Any]] = {}
    count = 0
    try:
        for row in _rows(path):
            for name, value in row.items():
                column = found.setdefault(name, [])
                column.extend([None] * (count - len(column)))
                column.append(_value(value))
            count += 1
    except (ValueError, TypeError, RecursionError) as error:  # its text may quote a record
        raise DataError(
            f"{request.shown}: it can't be read ({type(error).__name__}). Check that the file is whole, is UTF-8, and "
            "holds one object a line or one array of objects."
        ) from None
    columns = {name: as_column(found[name] + [None] * (count - len(found[name]))) for name in sorted(found)}
    return Loaded(count, columns, folder=path.parent)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects.

    Raises
    ------
    ValueError, TypeError
        It's not JSON, or not of objects.
    """
    with path.open(encoding="utf-8-sig") as file:
        begin = next((line for line in file if line.strip()), "")
        file.seek(0)
        texts = [file.read()] if begin.lstrip().startswith("[") else file
        for text in texts:
            if not text.strip():
                continue
            # a whole number stays as it is written: it may be too long for a float, or for an int of Python's
            value = json.loads(text, parse_int=str)
            for row in value if isinstance(value, list) else (value,):
                if not isinstance(row, dict):
                    raise TypeError
                yield row


def _value(value: Any) -> Any:
    """A value as columns hold it, from itself alone."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        return None if math.isnan(value) else text_of(value)
    if isinstance(value, dict):  # such as an image's: what stands in it for bytes would be text
        return {key: part for key, part in value.items() if key != "bytes"}
    try:
        return np.asarray(value, dtype=np.float64).ravel()
    except (ValueError, TypeError):  # a gap, a word, or lists of different lengths in it
        return value
