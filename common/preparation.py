"""From a recipe to features: what every process of a run does before the first round.

A simulation does it once and shares the outcome with all holders; a Ray worker does it from the warm feature cache.
"""

from __future__ import annotations

import copy
import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedhead.common import progress
from fedhead.common.config import RunConfig
from fedhead.common.config.faults import fault
from fedhead.common.data.partition import partition, partition_persons
from fedhead.common.data.persons import (
    Persons,
    check_column,
    codes_of,
    group_persons,
    majority_labels,
    names_of,
    split_persons,
    tell_left_out,
)
from fedhead.common.data.records import Records, check_classes, split_records
from fedhead.common.data.sources import SOURCES, load_records
from fedhead.common.errors import ConfigError, DataError
from fedhead.common.features import FeatureSet, extract
from fedhead.common.models.backbones import Backbone, load_backbone
from fedhead.common.models.heads import make_head
from fedhead.common.models.trainable import Trainable
from fedhead.common.tasks import Task


@dataclass(frozen=True)
class Labelled:
    """Features and targets of N records, or of N persons with up to T records each.

    Attributes
    ----------
    features : FeatureSet
        N records; of persons ragged.
    targets : Tensor, int64, shape (N,), or (N, T) of persons
        -1 behind a person's last record.
    """

    features: FeatureSet
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def slice(self, start: int, stop: int) -> Labelled:
        """Records `start` to `stop`, as views."""
        return Labelled(self.features.slice(start, stop), self.targets[start:stop])

    def take(self, rows: np.ndarray) -> Labelled:
        """A copy of the records at these positions, in this order."""
        order = torch.from_numpy(rows)
        return Labelled(self.features.take(order), self.targets[order])

    def by_person(self, offsets: np.ndarray) -> Labelled:
        """Persons of records that lie person after person; features are a view.

        Parameters
        ----------
        offsets : int64 array, shape (P + 1,)
            Person i has the records from `offsets[i]` up to `offsets[i + 1]`.

        Returns
        -------
        Labelled
            P persons.
        """
        assert self.features.offsets is None, "a person's records are feature vectors, not sequences"
        ends = torch.from_numpy(offsets)
        lengths = ends.diff()
        targets = torch.full((len(lengths), int(lengths.max()) if len(lengths) else 0), -1)
        targets[torch.arange(targets.shape[1]) < lengths[:, None]] = self.targets
        return Labelled(FeatureSet(self.features.values, ends), targets)


@dataclass(frozen=True)
class Split:
    """The records of a simulation.

    Attributes
    ----------
    train, test : Records
    holders : list of int arrays
        Rows of `train` at each holder; under the unit "person" person after person, without their surplus.
    holder_tests : list of int arrays
        Rows of `test` that stem from each holder; empty lists where test records come from a source of their own.
    persons : list of Persons, or None
        The persons of each holder, under the unit "person"; their rows are those in `holders`.
    """

    train: Records
    test: Records
    holders: list[np.ndarray]
    holder_tests: list[np.ndarray]
    persons: list[Persons] | None = None

    @property
    def units(self) -> int:
        """How many records, or persons, all holders have together: what `declared_records` counts."""
        return sum(len(part) for part in (self.holders if self.persons is None else self.persons))


def default_cache() -> Path:
    """Folder of cached features when none is given: `fedhead/features` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fedhead" / "features"


def import_readers(config: RunConfig) -> float:
    """Import what reading and spreading records needs; the seconds it took.

    Imports take seconds and reading takes tenths: they are counted apart.
    """
    started = time.perf_counter()
    for source in (config.data.source, config.data.test.source):
        kind = (source or "").partition(":")[0]
        if kind in SOURCES:
            SOURCES[kind].load()
    importlib.import_module("flwr_datasets.partitioner")
    return time.perf_counter() - started


def read_split(config: RunConfig) -> Split:
    """Read the records of a simulation and spread them over its holders.

    Test records are held out by a keyed hash of each record, never by its index. Held-out records are spread over the
    holders in the proportions that each label has at them. Under the unit "person", all this is done with persons: by a
    keyed hash of the person, and with all their records.

    Raises
    ------
    DataError
        The records can't be read, split or spread.
    """
    data, person = config.data, _person(config)
    records = load_records(data.source, data.columns, config.task.labels, config.base)
    if data.test.fraction is None:
        assert data.test.source is not None
        columns = data.columns if data.test.columns is None else data.test.columns
        test = load_records(
            data.test.source, columns, config.task.labels, config.base, setting="data.test", split="test"
        )
        check_classes(records, config.task.labels)
        return _spread(config, records, test, person)
    if person is None:
        train_rows, test_rows = split_records(records, data.test.fraction)
    else:
        train_rows, test_rows = split_persons(records, person, data.test.fraction)
    if len(test_rows) == 0:
        raise DataError(
            f"data.test.fraction is {data.test.fraction}: none of the {len(records)} records is held out by it. Give a "
            "larger share, more distinct records, or test records of their own in data.test.source."
        )
    train, test = records.select(train_rows), records.select(test_rows)
    check_classes(train, config.task.labels)
    # The training records alone are partitioned, so that every holder has some; the held-out ones follow the label
    # mix of the holders that have their label, at random.
    return _spread(config, train, test, person, held_out=True)


def _person(config: RunConfig) -> str | None:
    """The column of persons where they are the unit."""
    if config.privacy.unit != "person":
        return None
    assert config.privacy.person is not None  # held by the recipe's checks
    return config.privacy.person


def _spread(config: RunConfig, train: Records, test: Records, person: str | None, held_out: bool = False) -> Split:
    """Spread training records, and test records that were held out of the same source, over the holders."""
    seed = config.run.seed
    if person is None:
        if config.privacy.person is not None:
            check_column(train, config.privacy.person)  # a column that isn't there would warn of nothing
        parts = partition(train, config.holders, seed)
        return Split(train, test, parts, spread_like(train.labels, parts, test.labels, seed) if held_out else [])
    parts = partition_persons(train, config.holders, seed, person)
    groups = [group_persons(train.select(part), person, config.privacy.records_per_person) for part in parts]
    persons = [replace(group, rows=part[group.rows]) for part, group in zip(parts, groups, strict=True)]
    tests: list[np.ndarray] = []
    if held_out:
        codes, _ = codes_of(names_of(test, person))
        spread = spread_like(train.labels, parts, majority_labels(codes, test.labels), seed)
        tests = [np.flatnonzero(np.isin(codes, chosen)) for chosen in spread]
    return Split(train, test, [group.rows for group in persons], tests, persons)


def holder_parts(config: RunConfig, train: Labelled, split: Split, names: Sequence[str]) -> list[Labelled]:
    """Each holder's training data, records or persons, contiguous: one copy of the features, whatever the holders.

    Parameters
    ----------
    train : Labelled
        All records of `split.train`.
    names : sequence of str
        The holders', for their own logs, which say how many records of persons are left out.

    Returns
    -------
    list of Labelled
    """
    joined, parts, start = train.take(np.concatenate(split.holders)), [], 0
    for number, rows in enumerate(split.holders):
        part = joined.slice(start, start + len(rows))
        start += len(rows)
        if split.persons is not None:
            tell_left_out(names[number], split.persons[number], config.privacy.records_per_person)
            part = part.by_person(split.persons[number].offsets)
        parts.append(part)
    return parts


def spread_like(labels: np.ndarray, parts: list[np.ndarray], others: np.ndarray, seed: int) -> list[np.ndarray]:
    """Spread other records over the holders in the proportions that each label has at them.

    Parameters
    ----------
    labels : int array, shape (N,)
    parts : list of int arrays
        Rows of each holder.
    others : int array, shape (M,)
        Labels of the records to spread.

    Returns
    -------
    list of int arrays
        Rows of `others` for each holder; disjoint, covering all.
    """
    rng = np.random.default_rng([seed, 0x7E57])
    classes = int(max(labels.max(initial=0), others.max(initial=0))) + 1
    counts = np.stack([np.bincount(labels[part], minlength=classes) for part in parts]).astype(float)  # (holders, K)
    owner = np.zeros(len(others), dtype=np.int64)
    for k in range(classes):
        rows = np.flatnonzero(others == k)
        share = counts[:, k] if counts[:, k].sum() else np.ones(len(parts))
        owner[rows] = rng.choice(len(parts), size=len(rows), p=share / share.sum())
    return [np.flatnonzero(owner == i) for i in range(len(parts))]


def featurize(config: RunConfig, backbone: Backbone, records: Records, cache: Path | None, stage: str) -> Labelled:
    """Features and targets of records, from the cache where they are in it."""

    def tell(done: int, total: int) -> None:
        progress.advance(stage, done, total)

    listener: Callable[[int, int], None] = tell
    features = extract(backbone, records, cache, config.model.features, progress=listener)
    return Labelled(features, torch.from_numpy(records.labels))


def make_trainable(config: RunConfig, backbone: Backbone, task: Task) -> Trainable:
    """The trained part of a recipe's model, initialised from its seed alone (a head that leaks nothing)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        head = make_head(config.model.head, backbone.dim, task.outputs)
    tail = copy.deepcopy(backbone.tail)  # training changes it; the backbone serves the next run too
    return Trainable(tail, config.model.features.normalize, head)


def load_backbone_for(config: RunConfig, records: Records) -> tuple[Backbone, float]:
    """The backbone of a recipe, for the records that it will read, and the seconds that loading it took."""
    started = time.perf_counter()
    store = records.store  # also where none of its records are left
    size = len(store.read(np.zeros(1, dtype=np.int64))[0]) if records.kind == "vector" and len(store) else None
    backbone = load_backbone(config.model, config.base, vector_size=size)
    check_kind(config, backbone, records)
    return backbone, time.perf_counter() - started


def check_kind(config: RunConfig, backbone: Backbone, records: Records) -> None:
    """Refuse records that a backbone doesn't read.

    Raises
    ------
    ConfigError
    """
    if backbone.kind != records.kind:
        raise ConfigError(
            [
                fault(
                    "model.backbone", config.model.backbone,
                    f"it reads {backbone.kind}s, but the records are {records.kind}s",
                    "Choose another backbone, or say in data.columns which column to read.",
                )
            ]
        )  # fmt: skip
