"""The records of a deployed holder: those that a run can use, each judged by itself.

A file may change after `check` and `join` have looked at it. If one record with an unknown label made a whole recipe be
refused, the refusal would tell that this record is there: it is left out instead, as one that isn't finite is.
"""

from __future__ import annotations

import logging

import numpy as np

from fedhead.client.holder import HolderFile
from fedhead.common.config import RunConfig
from fedhead.common.data.persons import named, names_of
from fedhead.common.data.records import Records
from fedhead.common.data.sources import load_records
from fedhead.common.privacy.summing import rounding_records

log = logging.getLogger("fedhead.client")


def own_records(holder: HolderFile, config: RunConfig) -> Records:
    """The records that a recipe can be trained on.

    Parameters
    ----------
    holder : HolderFile
    config : RunConfig
        Already with the holder's own source, columns and labels.

    Returns
    -------
    Records
        Without those whose label is not listed, or that don't say whose they are where data.person is given. How many
        those are is for the holder's own log alone. There may be none left.

    Raises
    ------
    DataError
        The source as a whole can't be read, or lacks a column.

    Notes
    -----
    Guarantee: whether a record is left out depends on that record and on public facts of the file (its columns, the
    length of its vectors) alone, and shows in nothing that leaves the holder.
    """
    records = load_records(config.data.source, config.data.columns, config.task.labels, holder.base, lenient=True)
    keep = records.labels >= 0
    if holder.data.person is not None:
        keep &= named(records, holder.data.person, "data.person")
    if keep.all():
        return records
    log.warning(
        "%s: %d of %d records are left out: their label is not in data.labels, or they don't say whose they are. "
        "fedhead check says which",
        holder.name, len(keep) - int(keep.sum()), len(keep),
    )  # fmt: skip
    return records.select(keep)


def counted(records: Records, person: str | None) -> int:
    """How many records `limits.most_records` counts: all, and more of persons whose records are added up first.

    Parameters
    ----------
    records : Records
    person : str or None
        The column of persons, where they are the unit.

    Raises
    ------
    DataError
        A record doesn't say whose it is.
    """
    if person is None:
        return len(records)
    _, lengths = np.unique(names_of(records, person, "data.person"), return_counts=True)
    return rounding_records(lengths.astype(np.int64))
