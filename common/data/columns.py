"""From a source's columns to inputs and labels, with every fault told without showing a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from fedhead.common.data.inputs import ArrayImages, EncodedImages, Fetch, Inputs, Texts, Vectors
from fedhead.common.data.loaded import Kind, Loaded, Request, text_of
from fedhead.common.errors import DataError

ROLES: tuple[Kind, ...] = ("text", "image", "vector")
_TRUTH = {"true": "True", "false": "False"}  # as JSON writes them, and as they are read
SHOWN = 12  # columns or labels listed in a message


def find_columns(loaded: Loaded, columns: Mapping[str, str], request: Request) -> tuple[Kind, list[str]]:
    """The input's role and its column (several for a vector that spans columns).

    Raises
    ------
    DataError
        When a column that is named, or the default one, isn't there; lists those that are.
    """
    if request.role is None:
        for role in ROLES:
            if role in loaded.columns:
                return role, [role]
        raise DataError(
            f"{request.shown}: it has no column text, image or vector. Name the input's column in "
            f"{request.setting}.columns; available: {_listed(list(loaded.columns))}."
        )
    name = columns[request.role]
    if name in loaded.columns:
        return request.role, [name]
    if request.role == "vector" and ("," in name or name.endswith("*")):
        found: list[str] = []
        for part in (piece.strip() for piece in name.split(",")):
            matching = _matching(list(loaded.columns), part, columns.get("label", "label"))
            if not matching:
                raise _missing(request, "vector", part, loaded)
            found += matching
        return "vector", found
    raise _missing(request, request.role, name, loaded)


def _matching(names: Sequence[str], part: str, label: str) -> list[str]:
    """The columns that a part of a vector's setting names; a pattern never takes the label for a feature."""
    if part in names:
        return [part]
    return [name for name in names if name != label and fnmatchcase(name, part)] if part else []


def read_inputs(
    loaded: Loaded, role: Kind, chosen: Sequence[str], request: Request, *, lenient: bool = False
) -> Inputs:
    """The inputs of all records; texts and image files stay where they are until they are asked for.

    With `lenient`, a vector that is no list of numbers, or not as long as most, is NaN in every place.
    """
    if role == "vector":
        return Vectors(_vectors([loaded.columns[name] for name in chosen], request, lenient))
    name = chosen[0]
    if role == "image" and isinstance(loaded.columns, dict) and loaded.columns[name].dtype == np.uint8:
        return ArrayImages(loaded.columns[name])
    fetch = _fetch(loaded, name)
    return Texts(fetch, loaded.count) if role == "text" else EncodedImages(fetch, loaded.count, loaded.folder)


def map_labels(
    loaded: Loaded, column: str, labels: Sequence[str], request: Request, *, lenient: bool = False
) -> np.ndarray:
    """Positions of the records' labels in the task's list, compared as text.

    Returns
    -------
    int64 array, shape (N,)
        With `lenient` -1 for a label outside the list.

    Raises
    ------
    DataError
        When the column isn't there, or, unless `lenient`, labels stand outside the list: says how many records, never
        which value.
    """
    if column not in loaded.columns:
        raise _missing(request, "label", column, loaded)
    values = loaded.columns[column]
    if values.ndim != 1:
        raise DataError(
            f'{request.setting}.columns.label is "{column}": a label must be one value a record. Name another column.'
        )
    positions = {label: position for position, label in enumerate(labels)}
    distinct, inverse = np.unique(_texts(values), return_inverse=True)
    names = loaded.names.get(column, ())
    if names and set(labels) <= set(names):  # labels are given by name, the data holds numbers
        texts = [names[int(text)] if text.isdecimal() and int(text) < len(names) else "" for text in distinct]
    else:
        texts = [str(text) for text in distinct]
    positions = {_TRUTH[label]: place for label, place in positions.items() if label in _TRUTH} | positions
    mapped = np.array([positions.get(text, -1) for text in texts], dtype=np.int64)[inverse]
    outside = int((mapped < 0).sum())
    if outside and not lenient:
        raise DataError(
            f'{request.setting}.columns.label is "{column}": {outside} of {len(mapped)} records have a label outside '
            f"task.labels ({_listed(labels)}). Add the missing labels to task.labels (spaces and capitals count), or "
            "remove those records."
        )
    return mapped


def _texts(values: np.ndarray) -> np.ndarray:
    """Labels as text."""
    if values.dtype.kind in "iuU":
        return values.astype(str)
    return np.array([text_of(value) for value in values.tolist()], dtype=str)


def _vectors(parts: list[np.ndarray], request: Request, lenient: bool) -> np.ndarray:
    """float64 (N, D); a value that is missing becomes NaN."""
    try:
        columns = [_numbers(part, lenient) for part in parts]
    except (TypeError, ValueError):
        raise DataError(
            f"{request.shown}: a vector must be a list of numbers, as long in every record. Name a numeric column in "
            f"{request.setting}.columns.vector, or check the data."
        ) from None
    values = np.concatenate([column.reshape(len(column), -1) for column in columns], axis=1)
    if values.shape[1] == 0 or not (lenient or np.isfinite(values).all(axis=1).any()):
        raise DataError(
            f"{request.shown}: every vector holds a NaN or an infinity. Fill or drop the missing values, or leave out "
            f"the column that has them in {request.setting}.columns.vector."
        )
    return np.ascontiguousarray(values)


def _numbers(part: np.ndarray, lenient: bool) -> np.ndarray:
    """A column as float64; a list that is missing is as long as the others and all NaN."""
    if part.dtype.kind not in "OU":
        return part.astype(np.float64)
    number = _number_or_nan if lenient else _number
    values = part.tolist()
    widths = Counter(len(value) for value in values if isinstance(value, list | np.ndarray))
    if part.ndim == 1 and widths:
        if lenient:
            width = max(widths, key=lambda size: (widths[size], -size))
            values = [
                value if isinstance(value, list | np.ndarray) and len(value) == width else None for value in values
            ]
        else:
            (width,) = widths  # a ValueError when they differ
        found = np.full((len(values), width), np.nan)
        for row, value in enumerate(values):
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
                found[row] = value
            elif value is not None:
                found[row] = [number(one) for one in value]
        return found
    return np.asarray([number(value) for value in part.ravel().tolist()], dtype=np.float64).reshape(part.shape)


def _number(value: object) -> float:
    return float("nan") if value is None or value == "" else float(value)  # type: ignore[arg-type]


def _number_or_nan(value: object) -> float:
    try:
        return _number(value)
    except (TypeError, ValueError):
        return float("nan")


def _fetch(loaded: Loaded, name: str) -> Fetch:
    if loaded.fetch is None:
        values = loaded.columns[name]
        return lambda rows: list(values[rows])
    fetch = loaded.fetch
    return lambda rows: fetch(name, rows)


def _missing(request: Request, role: str, name: str, loaded: Loaded) -> DataError:
    return DataError(
        f'{request.setting}.columns.{role} is "{name}": the data has no such column. Use one of: '
        f"{_listed(list(loaded.columns))}."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
