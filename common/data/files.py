"""Readers of tables (CSV, Parquet, saved data sets) through Hugging Face `datasets`.

`datasets` turns a file into an Arrow file and maps it into memory. Those copies of private records are made in a folder
of their own that only the owner can read, and the folder is removed as soon as the files are mapped: afterwards nothing
is left behind, not even by a kill. No network is used, and no code that comes with the data is ever run.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from pandas.errors import ParserWarning  # type: ignore[import-untyped]

from fedhead.common.data.loaded import LazyColumns, Loaded, Request
from fedhead.common.data.paths import file_of, folder_of
from fedhead.common.errors import DataError


def load_csv(request: Request) -> Loaded:
    """A CSV file with a header. Every value is read as text, so that labels stay as typed and "null" is a word."""
    path = file_of(request)

    def read(cache: str) -> Dataset:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            header = next(csv.reader(lines), [])
            if not any(line.strip() for line in lines):  # not parsed: a field may be longer than this reader takes
                raise DataError(f"{request.shown}: it holds no record. Add records below the header.")
        if len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise DataError(f"{request.shown}: every column must have a name of its own. Correct the first line.")
        features = Features({name: Value("string") for name in header})
        # A row with more fields than the header must be a fault; pandas would else shift it and name rows by it, or
        # cut it off with a warning.
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)
            return Dataset.from_csv(
                str(path),
                features=features,
                cache_dir=cache,
                keep_default_na=False,
                index_col=False,
                on_bad_lines="error",
            )

    return _loaded(_read(request, read), path.parent)


def load_parquet(request: Request) -> Loaded:
    """A Parquet file."""
    path = file_of(request)
    return _loaded(_read(request, lambda cache: Dataset.from_parquet(str(path), cache_dir=cache)), path.parent)


def load_saved(request: Request) -> Loaded:
    """A folder written by `save_to_disk`; of a dictionary of splits, the one that is asked for."""
    path = folder_of(request)
    return _loaded(_read(request, lambda _: datasets.load_from_disk(str(path))), path)


def _read(request: Request, read: Callable[[str], Dataset | DatasetDict]) -> Dataset:
    cache = tempfile.mkdtemp(prefix="fedhead-")  # readable by the owner only
    try:
        with quiet():
            found = read(cache)
    except DataError:
        raise
    except Exception as error:  # the message of a parser may quote a record: only the kind of fault is passed on
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(
                f"{request.shown}: there is no room in {tempfile.gettempdir()} for a copy of it. Free some space, or "
                "set TMPDIR to a folder that has some."
            ) from None
        raise DataError(
            f"{request.shown}: it can't be read ({type(cause).__name__}). Check that the file is whole, has the "
            "format that the source names, and is UTF-8."
        ) from None
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    if isinstance(found, DatasetDict):
        if request.split not in found and (len(found) > 1 or {*found} <= {"train", "test"}):
            raise DataError(
                f'{request.shown}: it has no part "{request.split}". Rename one of its parts: {", ".join(found)}.'
            )
        found = found[request.split] if request.split in found else next(iter(found.values()))
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither progress bars nor log lines of `datasets` (they could show a record), and no count of downloads."""
    from datasets.utils import logging

    bars, level, counts = (
        datasets.are_progress_bars_disabled(),
        logging.get_verbosity(),
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS,
    )
    datasets.disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
        logging.set_verbosity(level)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts


def _loaded(table: Dataset, folder: Path) -> Loaded:
    """Columns of a table; images stay encoded, and are decoded by us, so that a corrupt one can be skipped."""
    for name, feature in table.features.items():
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
    plain = table.with_format(None)
    in_order = getattr(table, "_indices", table) is None

    def column(name: str) -> np.ndarray:
        kind = table.data.column(name).type
        if in_order and (pa.types.is_primitive(kind) or pa.types.is_string(kind)):
            # `datasets` copies the description of all columns for each column: a minute for 500 of them
            return np.asarray(table.data.column(name).to_pylist())
        values = plain[name][:]
        try:
            return np.asarray(values)
        except ValueError:  # lists of different lengths
            found = np.empty(len(values), dtype=object)
            found[:] = values
            return found

    def fetch(name: str, rows: np.ndarray) -> list[Any]:
        found: list[Any] = plain.select_columns([name])[rows.tolist()][name] if len(rows) else []
        return found

    names = {name: feature.names for name, feature in table.features.items() if isinstance(feature, ClassLabel)}
    return Loaded(len(table), LazyColumns(table.column_names, column), names, fetch, folder)
