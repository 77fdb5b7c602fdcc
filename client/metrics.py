"""Noised metrics: how many units a head answers right, with noise, and nothing else.

Counted on units that `fedhead.common.data.holdout` keeps apart from training. Neither how many those are nor a loss
leaves: the server divides by public numbers (fedhead.server.metrics).

Shapes: N units, B records of one unit, D features, K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import Final, Protocol

import torch
from torch import Tensor

from fedhead.client.gradients import Features
from fedhead.common.errors import InputError
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.clipping import finite_records
from fedhead.common.privacy.events import CountEvent
from fedhead.common.privacy.noise import Noise
from fedhead.common.tasks import Task

SENSITIVITY: Final = 1.0
"""Most that one unit moves the count: a record is right or wrong, a person counts by the share of right answers."""

_BLOCK: Final = 1024  # units whose outputs are compared at once


class Held(Protocol):
    """What is counted on; `fedhead.common.preparation.Labelled` is one."""

    @property
    def features(self) -> Features:
        """N records of one shape or of tokens; or, ragged, N persons with one vector a record."""

    @property
    def targets(self) -> Tensor:
        """int64: (N,) for records; (N, most records of a person) for persons, -1 behind a person's last record."""


def count_correct(trainable: Trainable, task: Task, held: Held) -> float:
    """How many units are answered right, without noise: it stays at the holder.

    Parameters
    ----------
    trainable : Trainable
        With the head that is to be counted; its mode is put back.
    task : Task
        An answer is right when the largest output is the target's. A task that means something else by it has
        ``correct(outputs, targets)``: (B, K), (B,) -> bool (B,), each from that record alone.
    held : Held
        N units kept apart from training; N may be 0.

    Returns
    -------
    count : float, in [0, N]
        Sum over units. A record counts 1 or 0. A person counts the share of their records that are right, so that a
        person with many records counts no more than one with a single record.

    Raises
    ------
    InputError
        ``task.correct`` gives something else than one bool a record, or features and targets differ in length.

    Notes
    -----
    Guarantee: adding or removing one unit moves the count by at most 1, whatever is in its records (the rounding of a
    sum of shares comes on top; for records the count is exact). A record whose features or outputs are not finite
    counts 0.

    Units go through the head one by one. In one batch a unit's outputs depend, in the last bits, on how many others
    there are: on data full of near ties one further unit could then turn the answers of all of them.
    """
    features, targets = held.features, held.targets
    if len(features) != len(targets):
        raise InputError("targets differ in number from features: each unit must have some. Rebuild the features.")
    mode = trainable.training
    trainable.eval()
    try:
        with torch.inference_mode():
            return math.fsum(_shares(trainable, task, features, targets))
    finally:
        trainable.train(mode)


def noised_count(trainable: Trainable, task: Task, held: Held, noise_multiplier: float, noise: Noise) -> float:
    """The count of right answers plus Gaussian noise: the release that `count_event` describes.

    Parameters
    ----------
    trainable, task, held
        As in `count_correct`. Without any unit the release is noise alone.
    noise_multiplier : float, > 0
        Standard deviation of the noise, in units.
    noise : Noise
        A source used for nothing else.

    Returns
    -------
    float
        Not clamped and not rounded: it may be negative, and lie above the number of units.

    Raises
    ------
    InputError
        The noise multiplier is not a finite number more than 0; see also `count_correct`.

    Notes
    -----
    Guarantee: mu = 1/noise_multiplier Gaussian differential privacy under adding or removing one unit; see Dong, Roth,
    Su (2022), arXiv:1905.02383. Charge `count_event` before calling this.
    """
    multiplier = count_event(noise_multiplier).noise_multiplier
    total = torch.tensor([count_correct(trainable, task, held)], dtype=torch.float64)
    return float(noise.add(total, noise_multiplier=multiplier, clipping_norm=SENSITIVITY).item())


def count_event(noise_multiplier: float) -> CountEvent:
    """What one noised count spends, from the request alone.

    Raises
    ------
    InputError
        The noise multiplier is not a finite number more than 0.
    """
    return CountEvent(noise_multiplier, SENSITIVITY, 1)


def _shares(trainable: Trainable, task: Task, features: Features, targets: Tensor) -> Iterator[float]:
    """Each unit's part of the count, in [0, 1], from that unit alone."""
    first = next(iter(trainable.trained().values()))
    for start in range(0, len(targets), _BLOCK):
        units = range(start, min(start + _BLOCK, len(targets)))
        answered = [_answer(trainable, features, targets, unit, first) for unit in units]
        outputs, wanted, finite = (torch.cat(parts) for parts in zip(*answered, strict=True))
        # what follows compares number by number: here a batch changes nothing
        right = _right(task, outputs, wanted) & finite & finite_records(outputs)
        before, ends = 0, accumulate(len(found) for _, found, _ in answered)
        known = [0, *right.cumsum(0).tolist()]
        for end in ends:
            yield (known[end] - known[before]) / (end - before) if end > before else 0.0
            before = end


def _answer(
    trainable: Trainable, features: Features, targets: Tensor, unit: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One unit through the head, in the format of `like`: outputs (B, K), targets (B,), finite records (B,)."""
    wanted = targets[unit : unit + 1]
    values, lengths = features.batch(slice(unit, unit + 1))
    if targets.dim() == 2:  # a person: one sequence of records, which are a batch of their own
        values, lengths = values[0], None
        wanted = wanted[0, : len(values)]
    # copied: where in memory a unit lies depends on those before it, and may change the last bits
    values = values.to(like.device, like.dtype).clone()
    lengths = None if lengths is None else lengths.to(like.device)
    return trainable(values, lengths), wanted.to(like.device), finite_records(values, lengths)


def _right(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether each record is answered right: (B, K), (B,) -> bool (B,)."""
    own = getattr(task, "correct", None)
    right: Tensor = outputs.argmax(-1) == targets if own is None else own(outputs, targets)
    if not isinstance(right, Tensor) or right.dtype != torch.bool or right.shape != targets.shape:
        raise InputError(
            "task.correct does not give one bool a record: its shape must be that of the targets. Compare each "
            "record's outputs with its target, and nothing else."
        )
    return right
