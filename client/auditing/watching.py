"""Recorders of what a round samples and releases; they pass everything on untouched.

Shapes: T steps of a round, P trained numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedhead.client.auditing.canaries import flat
from fedhead.client.auditing.dropped import DropoutMasks
from fedhead.client.auditing.reference import Masks
from fedhead.client.gradients import Features
from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config.schema import SGD, AdamW
from fedhead.common.features import FeatureSet
from fedhead.common.privacy.events import Event
from fedhead.common.privacy.lattice import sensitivity
from fedhead.common.privacy.noise import Noise, Purpose, Streams

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class WatchedStreams(Streams):
    """A holder's streams, and which samples were drawn from them.

    Parameters
    ----------
    streams : Streams

    Attributes
    ----------
    samples : dict of int to int64 array
        Step -> positions that were drawn.
    rates : dict of int to float
        Step -> probability that was asked for.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.seeded, self.source = streams.seeded, streams.source
        self.samples: dict[int, IntArray] = {}
        self.rates: dict[int, float] = {}

    def generator(self, step: int, purpose: Purpose) -> torch.Generator:
        """As the holder's."""
        return self._streams.generator(step, purpose)

    def noise(self, step: int) -> Noise:
        """As the holder's."""
        return self._streams.noise(step)

    def sample(self, step: int, records: int, rate: float) -> Tensor:
        """As the holder's; remembered."""
        drawn = self._streams.sample(step, records, rate)
        self.samples[step], self.rates[step] = drawn.numpy().copy(), rate
        return drawn


@dataclass(frozen=True)
class Seen:
    """What a round took in and let out, in the numbers' own format.

    Attributes
    ----------
    received, left : Tensor, shape (P,)
        The trained numbers before and after.
    heads : Tensor, shape (T, P)
        Before each step.
    gradients : Tensor, shape (T, P)
        What each step handed to the optimizer: noised, divided, with the pull.
    samples : dict of int to int64 array
        Step -> sample; empty without sampling.
    rates : dict of int to float
        Step -> sampling rate that was asked for.
    masks : list of T mappings
        Unit -> what dropout multiplied its numbers by in a step; empty without dropout.
    """

    received: Tensor
    left: Tensor
    heads: Tensor
    gradients: Tensor
    samples: dict[int, IntArray]
    rates: dict[int, float]
    masks: list[Masks] = field(default_factory=list)

    def releases(self, plan: StepPlan) -> FloatArray:
        """The noised sums, float64, shape (T, P): gradients without the pull, times the declared divisor."""
        pull = plan.proximal_mu * (self.heads.double() - self.received.double())
        found: FloatArray = ((self.gradients.double() - pull) * plan.divisor).numpy()
        return found


def watch(
    trainer: Trainer,
    features: FeatureSet,
    targets: Tensor,
    plan: StepPlan,
    streams: Streams,
    *,
    training: Callable[[FeatureSet, Tensor, StepPlan, Streams], Any] | None = None,
) -> Seen:
    """A round of production training, looked at through its optimizer's step hook.

    Parameters
    ----------
    trainer : Trainer
        With the received parameters loaded.
    features, targets, plan, streams
        As `Trainer.round` takes them.
    training : callable, optional
        What to call with them; default `trainer.round`.

    Notes
    -----
    The hook fires after noise and division and before the step. What leaves beside it is for `replay_error` to find.
    """
    heads: list[Tensor] = []
    gradients: list[Tensor] = []

    dropout = DropoutMasks(trainer.trainable)
    masks: list[Masks] = []

    def look(optimizer: Any) -> None:
        masks.append(dropout.taken())
        heads.append(flat(trainer.trainable))
        gradients.append(torch.cat([p.grad.flatten() for p in optimizer.params]))

    watched, received = WatchedStreams(streams), flat(trainer.trainable)
    optimizer = trainer.optimizer_of(plan.optimizer)
    optimizer.attach_step_hook(look)
    try:
        with dropout.watching(features) as shown:
            (trainer.round if training is None else training)(shown, targets, plan, watched)
    finally:
        optimizer.step_hook = None
    left, none = flat(trainer.trainable), received.new_zeros(0, len(received))
    return Seen(
        received,
        left,
        torch.stack(heads) if heads else none,
        torch.stack(gradients) if gradients else none,
        watched.samples,
        watched.rates,
        masks,
    )


class WatchedTrainer(Trainer):
    """A trainer whose rounds are looked at, whoever asks for them.

    Attributes
    ----------
    seen : list of Seen
        Of each round, in order.
    """

    def __init__(self, trainer: Trainer) -> None:
        vars(self).update(vars(trainer))
        self.seen: list[Seen] = []

    def round(self, features: Features, targets: Tensor, plan: StepPlan, streams: Streams) -> Event:
        """As `Trainer.round`; remembered."""
        assert isinstance(features, FeatureSet)  # what a workplace's records are
        self.seen.append(watch(self, features, targets, plan, streams, training=super().round))
        return plan.event()


def replay_error(seen: Seen, plan: StepPlan, shapes: list[torch.Size]) -> float:
    """How far what left is from what the noised gradients alone explain.

    Parameters
    ----------
    seen : Seen
    plan : StepPlan
    shapes : list of torch.Size
        Of the trained parameters, in their order.

    Returns
    -------
    float, >= 0
        The largest difference of a trained number, after any step, as a share of the largest move of one in the round.
        0 up to rounding if all is right; inf where it is not a number.

    Notes
    -----
    An optimizer of torch's own, made here, steps from the received parameters along the gradients that were seen.
    Where its way is the production's, what left is a function of the noised gradients and of nothing else.
    """
    sizes = [shape.numel() for shape in shapes]
    parameters = [
        part.clone().view(shape) for part, shape in zip(torch.split(seen.received, sizes), shapes, strict=True)
    ]
    optimizer = _optimizer(plan, parameters)
    worst, ends = 0.0, [*seen.heads[1:], seen.left]
    for gradient, end in zip(seen.gradients, ends, strict=False):
        for p, part in zip(parameters, torch.split(gradient, sizes), strict=True):
            p.grad = part.view_as(p)
        optimizer.step()
        now = torch.cat([p.flatten() for p in parameters])
        worst = _larger(worst, float((now - end).abs().max()))
    if not len(seen.gradients):
        return math.inf if bool((seen.left != seen.received).any()) else 0.0
    moved = float((torch.cat([p.flatten() for p in parameters]) - seen.received).abs().max())
    return 0.0 if worst == 0 else worst / moved if moved > 0 else math.inf


def _larger(a: float, b: float) -> float:
    return math.inf if math.isnan(b) else max(a, b)


def _optimizer(plan: StepPlan, parameters: list[Tensor]) -> torch.optim.Optimizer:
    settings, rate = plan.optimizer, plan.learning_rate
    if isinstance(settings, SGD):
        return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=settings.weight_decay)
    kind = torch.optim.AdamW if isinstance(settings, AdamW) else torch.optim.Adam
    return kind(parameters, lr=rate, betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay)


def noise_scale(plan: StepPlan, streams: Streams) -> float:
    """Standard deviation that the noise of a sum claims, in gradient units.

    Notes
    -----
    A deployment's noise is that of a sensitivity of C (1 + ETA), because rounding counts (`lattice.ETA`); a
    simulation's is that of C.
    """
    wide = plan.clipping_norm if streams.seeded else sensitivity(plan.clipping_norm)
    return plan.noise_multiplier * wide
