"""From a recipe to features: what every process of a run does before the first round.

A simulation does it once and shares the outcome with all holders; a Ray worker does it from the warm feature cache.
"""

from __future__ import annotations

import copy
import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedhead.common import progress
from fedhead.common.config import RunConfig
from fedhead.common.config.faults import fault
from fedhead.common.data.partition import partition
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
    """Features and targets of N records.

    Attributes
    ----------
    features : FeatureSet
        N records.
    targets : Tensor, shape (N,), int64
    """

    features: FeatureSet
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def slice(self, start: int, stop: int) -> Labelled:
        """Records `start` to `stop`, as views."""
        return Labelled(self.features.slice(start, stop), self.targets[start:stop])


@dataclass(frozen=True)
class Split:
    """The records of a simulation.

    Attributes
    ----------
    train, test : Records
    holders : list of int arrays
        Rows of `train` at each holder.
    holder_tests : list of int arrays
        Rows of `test` that stem from each holder; empty lists where test records come from a source of their own.
    """

    train: Records
    test: Records
    holders: list[np.ndarray]
    holder_tests: list[np.ndarray]


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
    holders in the proportions that each label has at them.
    """
    data = config.data
    records = load_records(data.source, data.columns, config.task.labels, config.base)
    if data.test.fraction is None:
        assert data.test.source is not None
        columns = data.columns if data.test.columns is None else data.test.columns
        test = load_records(
            data.test.source, columns, config.task.labels, config.base, setting="data.test", split="test"
        )
        check_classes(records, config.task.labels)
        parts = partition(records, config.holders, config.run.seed)
        return Split(records, test, parts, [])
    train_rows, test_rows = split_records(records, data.test.fraction)
    if len(test_rows) == 0:
        raise DataError(
            f"data.test.fraction is {data.test.fraction}: none of the {len(records)} records is held out by it. Give a "
            "larger share, more distinct records, or test records of their own in data.test.source."
        )
    train, test = records.select(train_rows), records.select(test_rows)
    check_classes(train, config.task.labels)
    # The training records alone are partitioned, so that every holder has some; the held-out ones follow the label
    # mix of the holders that have their label, at random.
    parts = partition(train, config.holders, config.run.seed)
    return Split(train, test, parts, spread_like(train.labels, parts, test.labels, config.run.seed))


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
    size = len(records.inputs([0])[0]) if records.kind == "vector" and len(records) else None
    backbone = load_backbone(config.model, config.base, vector_size=size)
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
    return backbone, time.perf_counter() - started
