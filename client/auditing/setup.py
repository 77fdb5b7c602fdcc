"""What every measurement of the audit takes: a training path, records, canaries, and the auditor's own chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedhead.client.auditing.canaries import Canaries, sent_head
from fedhead.client.auditing.planted import PlantedCanaries, moved_head
from fedhead.client.auditing.planting import Planting
from fedhead.client.gradients import ClosedForm
from fedhead.client.training import StepPlan, Trainer
from fedhead.common.errors import InputError
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.noise import Streams
from fedhead.common.tasks import Task

Units = tuple[FeatureSet, Tensor]


@dataclass(frozen=True)
class Setup:
    """A training path that is audited, and what it is audited with.

    Parameters
    ----------
    make_trainable : callable
        A new trainable at its initial parameters, on the CPU; in float64 for a deployment's streams. Without dropout
        for crafted records.
    task : Task
    features : FeatureSet
        Real records, or persons; no canaries.
    targets : Tensor, int64, shape (N,), or (N, T) of persons
    plan : StepPlan
        Of every round.
    streams_for : callable
        Number of a round, from 1 -> the holder's streams.
    canaries : Canaries or PlantedCanaries
        Crafted records, or crafted gradients. Persons exactly if the targets are persons'.
    generator : numpy.random.Generator
        The auditor's own: coins, heads and crafted records. Nothing of the holder's draws on it.
    path : str, optional
        Gradient path, as `Trainer` takes it.
    """

    make_trainable: Callable[[], Trainable]
    task: Task
    features: FeatureSet
    targets: Tensor
    plan: StepPlan
    streams_for: Callable[[int], Streams]
    canaries: Canaries | PlantedCanaries
    generator: np.random.Generator
    path: str | None = None

    @property
    def real(self) -> Units:
        """The records that are no canaries, with their targets."""
        return self.features, self.targets

    def trainer(self, *, double: bool = False) -> Trainer:
        """A new trainer on the path that is audited."""
        made, task = self.make_trainable(), self.task
        made = made.double() if double else made
        if isinstance(self.canaries, PlantedCanaries):
            task = Planting(self.canaries, made).watched(task)
        trainer = Trainer(made, task, self.path)
        if isinstance(self.canaries, PlantedCanaries) and isinstance(trainer.path, ClosedForm):
            raise InputError(
                "canaries are planted gradients: the closed form captures none. Craft records, or take another path."
            )
        return trainer

    def sent_head(self) -> NDArray[np.float64]:
        """A head that a server after the canaries sends, shape (P,); each call gives another."""
        if isinstance(self.canaries, PlantedCanaries):
            return moved_head(self.make_trainable(), self.generator)
        return sent_head(self.make_trainable(), self.canaries, self.generator)

    def without_dropout(self) -> Setup:
        """The same, with a head that drops nothing."""
        return replace(self, make_trainable=lambda: still(self.make_trainable()))

    def check_mechanism(self) -> None:
        """Raise InputError for a plan that neither clips nor noises."""
        if self.plan.mechanism not in ("full-batch", "poisson"):
            raise InputError(
                f"privacy.mechanism is {self.plan.mechanism!r}: there is neither clipping nor noise to audit. Use "
                "full-batch or poisson."
            )


def still(trainable: Trainable) -> Trainable:
    """The same trainable, whose dropouts drop nothing from now on."""
    for module in trainable.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return trainable
