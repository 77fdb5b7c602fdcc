"""What every measurement of the audit takes: a training path, records, canaries, and the auditor's own chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedhead.client.auditing.canaries import Canaries
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
        A new trainable at its initial parameters, on the CPU, without dropout; in float64 for a deployment's streams.
    task : Task
    features : FeatureSet
        Real records, or persons; no canaries.
    targets : Tensor, int64, shape (N,), or (N, T) of persons
    plan : StepPlan
        Of every round.
    streams_for : callable
        Number of a round, from 1 -> the holder's streams.
    canaries : Canaries
        Persons exactly if the targets are persons'.
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
    canaries: Canaries
    generator: np.random.Generator
    path: str | None = None

    @property
    def real(self) -> Units:
        """The records that are no canaries, with their targets."""
        return self.features, self.targets

    def trainer(self, *, double: bool = False) -> Trainer:
        """A new trainer on the path that is audited."""
        made = self.make_trainable()
        return Trainer(made.double() if double else made, self.task, self.path)

    def check_mechanism(self) -> None:
        """Raise InputError for a plan that neither clips nor noises."""
        if self.plan.mechanism not in ("full-batch", "poisson"):
            raise InputError(
                f"privacy.mechanism is {self.plan.mechanism!r}: there is neither clipping nor noise to audit. Use "
                "full-batch or poisson."
            )
