"""Evaluation of the global head on public test records, at the server."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedhead.common.models.memory import records_at_once
from fedhead.common.models.trainable import Trainable
from fedhead.common.preparation import Labelled
from fedhead.common.tasks import Task

BATCH = 4096


def outputs_of(trainable: Trainable, records: Labelled, batch: int = BATCH) -> Tensor:
    """The head's outputs over records, in batches of at most `batch` that fit in memory.

    Returns
    -------
    Tensor, shape (N, K)
    """
    batch = records_at_once(trainable, records.features, batch)
    trainable.eval()
    try:
        with torch.inference_mode():
            parts = []
            for start in range(0, len(records), batch):
                values, lengths = records.features.batch(slice(start, min(start + batch, len(records))))
                parts.append(trainable(values, lengths))
            return torch.cat(parts)
    finally:
        trainable.train()


class Evaluator:
    """Central evaluation.

    Parameters
    ----------
    trainable : Trainable
        Its parameters are overwritten by each evaluation.
    task : Task
    test : Labelled
        N public records; those whose features are not finite (corrupt images) are left out.
    """

    def __init__(self, trainable: Trainable, task: Task, test: Labelled) -> None:
        self.trainable, self.task = trainable, task
        self.test, self.usable = test, test.features.finite().nonzero().flatten()

    def __call__(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of a head given as name -> tensor."""
        load_state(self.trainable, state)
        return self.of_rows(self.usable)

    def of_rows(self, rows: Tensor) -> dict[str, float]:
        """Metrics of the head that was evaluated last, over some rows only (int64, any length)."""
        if len(rows) == 0:
            return {}
        outputs = self._outputs()
        return self.task.metrics(outputs[rows], self.test.targets[rows])

    def majority(self) -> dict[str, float]:
        """Metrics of always answering the most frequent label of the test records."""
        return self.task.majority(self.test.targets[self.usable])

    def _outputs(self) -> Tensor:
        return outputs_of(self.trainable, self.test)


def left_out(test: Labelled) -> list[str]:
    """A note on the test records that metrics leave out; none where all of them count."""
    missing = int((~test.features.finite()).sum())
    if not missing:
        return []
    return [
        f"{missing} of {len(test)} test records could not be read or gave no finite features; the metrics leave them "
        "out."
    ]


def load_state(trainable: Trainable, state: Mapping[str, Tensor]) -> None:
    """Put name -> tensor into the trained part, in place."""
    trained = trainable.trained()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state[name])
