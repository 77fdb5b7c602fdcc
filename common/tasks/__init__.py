"""The tasks: what a head's outputs mean.

Every task works on outputs of shape (B, K), or (B, T, K) for sequence tasks, and gives the loss **of one record**:
`losses` returns shape (B,), so that clipping per record means the same for every task. A new task is a module here and
a row in `TASKS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from fedhead.common.config.schema import TaskSettings
from fedhead.common.errors import ConfigError
from fedhead.common.loading import load_reference


class Task(Protocol):
    """What a kind of task must give; B records, K outputs."""

    @property
    def outputs(self) -> int:
        """K, the size of the head's last layer."""

    @property
    def closed_form(self) -> str | None:
        """Name of the loss whose per-record gradient on a linear head is known in closed form, or None."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each record: (B, K), (B,) -> (B,). Depends on that record alone."""

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Metrics over public test records: (B, K), (B,) -> name -> value. Never called on private records."""

    def majority(self, targets: Tensor) -> dict[str, float]:
        """The same metrics for always answering the most frequent label of `targets`."""

    def predict(self, outputs: Tensor) -> tuple[list[str], np.ndarray]:
        """Labels and probabilities: (B, K) -> B labels, (B, K) array."""


@dataclass(frozen=True)
class TaskKind:
    """A row of the tasks table; `load` imports the task only when it is used."""

    summary: str
    load: Callable[[], Callable[[TaskSettings], Task]]


def _classification() -> Callable[[TaskSettings], Task]:
    from fedhead.common.tasks.classification import Classification

    return Classification


TASKS: Mapping[str, TaskKind] = {
    "classification": TaskKind("one label a record", _classification),
}


def make_task(settings: TaskSettings) -> Task:
    """The task of a recipe; `module:package.module:name` is called with the task's settings."""
    if settings.kind.startswith("module:"):
        factory = load_reference(settings.kind, "task.kind")
        try:
            inspect.signature(factory).bind(settings)
        except (TypeError, ValueError):
            raise ConfigError(
                [f'task.kind is "{settings.kind}": it must take one argument, the settings. Change its arguments.']
            ) from None
        task: Task = factory(settings)
        shown = f'task.kind is "{settings.kind}"'
        needed = [name for name in vars(Task) if not name.startswith("_")]
        missing = [name for name in needed if not hasattr(task, name)]
        if missing:
            raise ConfigError([f"{shown}: it has no {', '.join(missing)}. A task must have {', '.join(needed)}."])
        if not isinstance(task.outputs, int) or task.outputs < 1:
            raise ConfigError([f"{shown}: its outputs must be a whole number of at least 1. Change the property."])
        return task
    return TASKS[settings.kind].load()(settings)
