"""How simulated records are spread over holders, by the partitioners of flwr-datasets.

The partitioners see a small table of labels and positions only, never the records. A new way to spread is a function
here and a row in `PARTITIONERS`.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhead.common.config.schema import (
    ColumnPartition,
    DirichletPartition,
    HolderSettings,
    ModulePartition,
    ShardPartition,
    SizePartition,
)
from fedhead.common.data.persons import codes_of, majority_labels, names_of
from fedhead.common.data.records import Records
from fedhead.common.errors import DataError
from fedhead.common.loading import load_reference

if TYPE_CHECKING:
    from datasets import Dataset

Spread = Callable[[Records, HolderSettings, int, str], list[np.ndarray]]
"""(records, settings, seed, what a record stands for in messages: "record" or "person") -> rows of each holder"""


def _iid(records: Records, settings: HolderSettings, seed: int, unit: str) -> list[np.ndarray]:
    from flwr_datasets.partitioner import IidPartitioner

    order = np.random.default_rng(seed).permutation(len(records))
    partitioner = IidPartitioner(settings.count)
    partitioner.dataset = _table(index=order)
    # The parts are contiguous pieces of the shuffled table, so their columns can be read without a copy.
    return [partitioner.load_partition(holder).data.column("index").to_numpy() for holder in range(settings.count)]


def _dirichlet(records: Records, settings: HolderSettings, seed: int, unit: str) -> list[np.ndarray]:
    from flwr_datasets.partitioner import DirichletPartitioner

    assert isinstance(settings.partition, DirichletPartition)
    alpha = settings.partition.alpha
    partitioner = DirichletPartitioner(
        settings.count, "label", alpha, min_partition_size=1, self_balancing=False, shuffle=False, seed=seed
    )
    partitioner.dataset = _table(label=records.labels)
    try:
        return _assigned(partitioner, settings.count)
    except (ValueError, FloatingPointError):  # all of its attempts left a holder without a record
        raise DataError(
            f"holders.partition.alpha is {alpha}: {settings.count} holders of {len(records)} {unit}s can't all get a "
            f"{unit}. Give a larger alpha, fewer holders, or more {unit}s."
        ) from None


def _shards(records: Records, settings: HolderSettings, seed: int, unit: str) -> list[np.ndarray]:
    from flwr_datasets.partitioner import ShardPartitioner

    assert isinstance(settings.partition, ShardPartition)
    each, total = settings.partition.shards, settings.partition.shards * settings.count
    if total > len(records):
        raise DataError(
            f"holders.partition.shards is {each}: {settings.count} holders need {total} shards, and there are "
            f"{len(records)} {unit}s. Give fewer shards or fewer holders."
        )
    shuffled = np.random.default_rng(seed).permutation(len(records))
    by_label = shuffled[np.argsort(records.labels[shuffled], kind="stable")]
    pieces = np.array_split(by_label, total)
    # The partitioner deals out whole shards: given records it would drop those that don't fill the last one.
    partitioner = ShardPartitioner(
        settings.count, "shard", num_shards_per_partition=each, shard_size=1, shuffle=False, seed=seed
    )
    partitioner.dataset = _table(shard=np.arange(total))
    return [np.concatenate([pieces[shard] for shard in dealt]) for dealt in _assigned(partitioner, settings.count)]


def _by_column(records: Records, settings: HolderSettings, seed: int, unit: str) -> list[np.ndarray]:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    assert isinstance(settings.partition, ColumnPartition)
    column = settings.partition.column
    if column not in records.columns:
        raise DataError(
            f'holders.partition.column is "{column}": the data has no such column. Use one of: '
            f"{', '.join(records.columns)}."
        )
    values = records.column(column)
    gaps = sum(value is None or value == "" or str(value) == "nan" for value in values.tolist())
    if gaps:
        raise DataError(
            f'holders.partition.column is "{column}": {gaps} of {len(records)} records have no value there. Fill the '
            "column, or drop those records."
        )
    distinct, holder = np.unique(values.astype(str), return_inverse=True)
    if len(distinct) != settings.count:
        raise DataError(
            f'holders.partition.column is "{column}": it has {len(distinct)} values, but holders.count is '
            f"{settings.count}. Set holders.count = {len(distinct)}, or name another column."
        )
    partitioner = NaturalIdPartitioner("holder")
    partitioner.dataset = _table(holder=holder)
    return _assigned(partitioner, settings.count)


def _sizes(records: Records, settings: HolderSettings, seed: int, unit: str) -> list[np.ndarray]:
    from flwr_datasets.partitioner import SizePartitioner

    assert isinstance(settings.partition, SizePartition)
    sizes = settings.partition.sizes
    if len(sizes) != settings.count:
        raise DataError(
            f"holders.partition.sizes has {len(sizes)} sizes, but holders.count is {settings.count}: they must agree. "
            f"Set holders.count = {len(sizes)}."
        )
    if sum(sizes) > len(records):
        raise DataError(
            f"holders.partition.sizes add up to {sum(sizes)}: there are {len(records)} {unit}s. Give smaller sizes."
        )
    order = np.random.default_rng(seed).permutation(len(records))
    partitioner = SizePartitioner(list(sizes))
    partitioner.dataset = _table(index=order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes that leave records over are allowed
        return [order[part] for part in partitioner.partition_id_to_indices.values()]


@dataclass(frozen=True)
class Partitioner:
    """A row of the partitioners table."""

    summary: str
    spread: Spread


PARTITIONERS: Mapping[str, Partitioner] = {
    "iid": Partitioner("evenly at random", _iid),
    "dirichlet": Partitioner("label shares drawn from a Dirichlet distribution", _dirichlet),
    "label-shards": Partitioner("sorted by label, cut into shards, dealt out", _shards),
    "by-column": Partitioner("one holder for each value of a column, in the order of the values", _by_column),
    "sizes": Partitioner("given numbers of records, at random; records left over go to nobody", _sizes),
}


def partition(records: Records, settings: HolderSettings, seed: int, unit: str = "record") -> list[np.ndarray]:
    """Spread records over holders.

    Parameters
    ----------
    records : Records
    settings : HolderSettings
    seed : int
        The same records, settings and seed give the same parts.
    unit : "record" or "person"
        What a record stands for, in messages.

    Returns
    -------
    list of int64 arrays, one a holder
        Sorted, disjoint, none empty. Together they cover all records, save for `sizes` that add up to less and for a
        partitioner of the user's own.

    Raises
    ------
    DataError
        When there are more holders than records, or a holder would get none.
    """
    if settings.count > len(records):
        raise DataError(
            f"holders.count is {settings.count}: there are only {len(records)} {unit}s to spread. Give fewer holders "
            f"or more {unit}s."
        )
    chosen = settings.partition
    if isinstance(chosen, ModulePartition):
        parts = _module(records, chosen, settings.count, seed, unit)
    else:
        parts = PARTITIONERS[chosen.kind].spread(records, settings, seed, unit)
    parts = [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]
    empty = sum(len(part) == 0 for part in parts)
    if empty:
        raise DataError(
            f'holders.partition.kind is "{chosen.kind}": {empty} of {settings.count} holders get no {unit}. Give fewer '
            "holders, or another partition."
        )
    return parts


def partition_persons(records: Records, settings: HolderSettings, seed: int, column: str) -> list[np.ndarray]:
    """Spread persons over holders: all records of a person at one.

    Parameters
    ----------
    records : Records
    settings : HolderSettings
    seed : int
    column : str
        Whose record it is.

    Returns
    -------
    list of int64 arrays, one a holder
        Rows of `records`, as `partition` gives them. Every kind of partition sees one record a person, labelled with
        the person's most frequent label; sizes are numbers of persons. `by-column` alone goes by the records' own
        column, and somebody may then be at several holders.

    Raises
    ------
    DataError
        As `partition`, of persons; or when a record has no person.
    """
    codes, first = codes_of(names_of(records, column))
    if isinstance(settings.partition, ColumnPartition):
        return partition(records, settings, seed)
    persons = replace(records.select(first), labels=majority_labels(codes, records.labels))
    owner = np.full(len(first), -1)
    for holder, part in enumerate(partition(persons, settings, seed, "person")):
        owner[part] = holder
    return [np.flatnonzero(owner[codes] == holder) for holder in range(settings.count)]


def _module(records: Records, chosen: ModulePartition, holders: int, seed: int, unit: str) -> list[np.ndarray]:
    """Parts from a partitioner of the user's own, checked: one a holder, disjoint, within the records."""
    spread = load_reference(chosen.kind, "holders.partition.kind")
    shown = f'holders.partition.kind is "{chosen.kind}"'
    try:
        inspect.signature(spread).bind(records.labels, holders, seed, **chosen.options)
    except (TypeError, ValueError):
        raise DataError(
            f"{shown}: it must take (labels, holders, seed) and holders.partition.options. Change its arguments."
        ) from None
    given = spread(records.labels.copy(), holders, seed, **chosen.options)
    if not isinstance(given, list | tuple):
        raise DataError(f"{shown}: it must return a list, not {type(given).__name__}. Return one index array a holder.")
    parts = [np.asarray(part) for part in given]
    if len(parts) != holders:
        raise DataError(f"{shown}: it gave {len(parts)} parts for {holders} holders. Return one index array a holder.")
    if any(part.ndim != 1 or (part.size and part.dtype.kind not in "iu") for part in parts):
        raise DataError(f"{shown}: a part must be a flat array of integers. Return the positions of its {unit}s.")
    positions = np.concatenate(parts)
    if positions.size and (positions.min() < 0 or positions.max() >= len(records)):
        raise DataError(f"{shown}: it gave positions outside 0 to {len(records) - 1}. Return positions of {unit}s.")
    if len(np.unique(positions)) != len(positions):
        raise DataError(f"{shown}: it gave a {unit} to two holders. Return disjoint index arrays.")
    return parts


def _table(**columns: np.ndarray) -> Dataset:
    """The columns a partitioner looks at, and each row's number."""
    from datasets import Dataset

    rows = len(next(iter(columns.values())))
    return Dataset.from_dict({**columns, "row": np.arange(rows)})


def _assigned(partitioner: Any, holders: int) -> list[np.ndarray]:
    """Row numbers of every part.

    Notes
    -----
    Asking for each part as a data set takes milliseconds a holder. When the first part is asked for, the partitioner
    has written down the row numbers of all; a version that doesn't keep them is asked for every part.
    """
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # of further attempts; and a progress bar of its own
        first = partitioner.load_partition(0)
        rows = getattr(partitioner, "_partition_id_to_indices", None)
        if rows is not None and len(rows) == holders:
            return [np.asarray(rows[holder], dtype=np.int64) for holder in range(holders)]
        others = [partitioner.load_partition(holder) for holder in range(1, holders)]
        return [np.asarray(part["row"][:], dtype=np.int64) for part in (first, *others)]
