"""Each holder's training data, and what it keeps apart from training to count right answers on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedhead.common.config import RunConfig
from fedhead.common.data.holdout import holdout_rows
from fedhead.common.data.persons import Persons, group_persons, names_of
from fedhead.common.data.records import Records
from fedhead.common.preparation import Labelled, Split, holder_parts


@dataclass(frozen=True)
class Placed:
    """The data of some holders.

    Attributes
    ----------
    training : list of (name, Labelled)
        In the holders' order.
    apart : dict of str to Labelled
        Holder -> what it keeps apart; empty where no counts are asked for.
    """

    training: list[tuple[str, Labelled]]
    apart: dict[str, Labelled]


def place(config: RunConfig, train: Labelled, split: Split, names: Sequence[str]) -> Placed:
    """The data of each holder, one copy of the features for all of them.

    Parameters
    ----------
    train : Labelled
        All records of `split.train`.
    names : sequence of str
        The holders'.
    """
    metrics = config.privacy.metrics
    if metrics is None:
        return Placed(list(zip(names, holder_parts(config, train, split, names), strict=True)), {})
    person = config.privacy.person if config.privacy.unit == "person" else None
    whose = None if person is None else names_of(split.train, person)
    apart = holdout_rows(split.train.digests(), metrics.fraction, whose)
    training = holder_parts(config, train, _only(split, ~apart), names)
    held = holder_parts(config, train, _only(split, apart, tell=False), names)
    return Placed(list(zip(names, training, strict=True)), dict(zip(names, held, strict=True)))


def alone(config: RunConfig, records: Records) -> Split:
    """The records of one holder as a split of one part; nothing is held out."""
    rows = np.arange(len(records))
    if config.privacy.unit != "person":
        return Split(records, records, [rows], [])
    assert config.privacy.person is not None  # held by the recipe's checks
    persons = group_persons(records, config.privacy.person, config.privacy.records_per_person, "data.person")
    return Split(records, records, [persons.rows], [], [persons])


def _only(split: Split, chosen: np.ndarray, tell: bool = True) -> Split:
    """The split with the chosen records alone: bool, shape (N,), the same for all records of a person.

    What is left out of persons with many records is told once, with the training records.
    """
    holders = [part[chosen[part]] for part in split.holders]
    persons = None if split.persons is None else [_persons(one, chosen, tell) for one in split.persons]
    return replace(split, holders=holders, persons=persons)


def _persons(persons: Persons, chosen: np.ndarray, tell: bool) -> Persons:
    keep, lengths = chosen[persons.rows[persons.offsets[:-1]]], np.diff(persons.offsets)
    offsets = np.concatenate([[0], lengths[keep].cumsum()]).astype(np.int64)
    return Persons(persons.rows[np.repeat(keep, lengths)], offsets, persons.left_out if tell else 0)
