"""What a gradient path is, and the quickest one: the closed form of a linear head. Others: hooked.py, table: paths.py.

Shapes: B records, D features, K outputs.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedhead.common.errors import InputError
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.clipping import feature_reach, linear_softmax_clipped_sum
from fedhead.common.tasks import Task

Index = Tensor | slice

_NORM_ELEMENTS: Final = 2**22  # most numbers that are measured at once


class Features(Protocol):
    """What a path needs of a holder's features; `fedhead.common.features.FeatureSet` is one."""

    def __len__(self) -> int:
        """N, the holder's true count."""

    def batch(self, index: Index) -> tuple[Tensor, Tensor | None]:
        """Values (B, *shape) and lengths (B,) or None."""


def _take(values: Tensor, index: Index) -> Tensor:
    # twice as fast as indexing with a tensor
    return values[index] if isinstance(index, slice) else values.index_select(0, index)


class GradientPath(ABC):
    """Adds clipped gradients of records to ``p.summed_grad``.

    Parameters
    ----------
    trainable : Trainable
    task : Task

    Notes
    -----
    Guarantee: one record moves the sum by at most the clipping norm (L2, over all trained parameters together), a
    record with inf or NaN in it, in its loss or in its gradient by nothing; rounding of the sum comes on top.
    """

    def __init__(self, trainable: Trainable, task: Task) -> None:
        self.trainable = trainable
        self.task = task
        self.parameters: list[Any] = list(trainable.trained().values())
        for p in self.parameters:
            p.summed_grad = None

    def begin(self, features: Features, targets: Tensor, clipping_norm: float) -> None:
        """Start a round on a holder's features (N records) and targets (N,)."""
        self.features, self.targets, self.clipping_norm = features, targets, clipping_norm

    def end(self) -> None:
        """End the round: let go of the holder's data."""
        del self.features, self.targets

    def records_at_once(self, chunk: int) -> int:
        """How many of `chunk` records fit in memory; depends on shapes only, never on values."""
        return chunk

    def read(self, samples: Sequence[Tensor]) -> Sequence[Any]:
        """What `add_rows` takes for each of several samples (int64), where reading them together is quicker."""
        return samples

    def add_rows(self, index: Any) -> None:
        """Add the records at `index` of the round's features: int64, a slice, or what `read` gave."""
        first = self.parameters[0]
        values, lengths = self.features.batch(index)
        if lengths is not None:
            lengths = lengths.to(first.device)
        self.add(values.to(first.device, first.dtype), lengths, self.targets[index].to(first.device))

    @abstractmethod
    def add(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> None:
        """Add records: values (B, *shape), lengths (B,) or None, targets (B,)."""

    def _accumulate(self, sums: list[Tensor]) -> None:
        for p, total in zip(self.parameters, sums, strict=True):
            p.summed_grad = total if p.summed_grad is None else p.summed_grad.add_(total)

    def _losses(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> Tensor:
        """The loss of each record, (B,). Any other shape would clip something else than records, without a sign."""
        losses = self.task.losses(self.trainable(values, lengths), targets)
        if losses.shape != (len(targets),):
            raise InputError(
                f"task.losses is of shape {tuple(losses.shape)}: it must be ({len(targets)},), one loss a record. Sum "
                "or average over what belongs to a record, and nothing else."
            )
        return losses


class Rows(NamedTuple):
    """B records for the closed form: features (B, D), targets (B,), what `feature_reach` says, one-hot rows (B, K)."""

    x: Tensor
    y: Tensor
    reach: Tensor
    scale: Tensor | None
    hot: Tensor | None = None


def _is_cross_entropy(task: Task) -> bool:
    """Whether a task that says so has that loss: its own class may have changed it, and kept what it inherited."""
    outputs, targets = torch.eye(task.outputs).cumsum(1), torch.arange(task.outputs)
    expected = nn.functional.cross_entropy(outputs, targets, reduction="none")
    losses = task.losses(outputs, targets)
    return losses.shape == expected.shape and torch.allclose(losses, expected)


class ClosedForm(GradientPath):
    """A linear head on one feature vector a record, with cross-entropy."""

    def __init__(self, trainable: Trainable, task: Task) -> None:
        super().__init__(trainable, task)
        self.head: Any = trainable.head
        # norms of features never change: kept for as long as the features live, one pair of numbers a record
        self._known: dict[int, tuple[weakref.ref[Any], tuple[Tensor, Tensor | None, Tensor | None]]] = {}

    @staticmethod
    def fits(trainable: Trainable, task: Task) -> bool:
        """Whether the closed form is the gradient of this head and task."""
        head = trainable.head
        trained = trainable.trained().values()
        return (
            task.closed_form == "cross-entropy"
            and trainable.tail is None
            and type(head) is nn.Linear
            and len(trained) == len(list(head.parameters()))
            and _is_cross_entropy(task)
        )

    def begin(self, features: Features, targets: Tensor, clipping_norm: float) -> None:
        """Start a round; norms of features that were seen before are not computed again."""
        super().begin(features, targets, clipping_norm)
        known = self._known.get(id(features))
        if known is None or known[0]() is not features:
            key = id(features)
            known = weakref.ref(features, lambda _: self._known.pop(key, None)), self._measure(features)
            self._known[key] = known
        self._reach, self._scale, self._broken = known[1]

    @torch.no_grad()
    def _measure(self, features: Features) -> tuple[Tensor, Tensor | None, Tensor | None]:
        weight, bias = self.head.weight, self.head.bias is not None
        at_once = max(1, _NORM_ELEMENTS // weight.shape[1])
        parts = []
        for start in range(0, len(features), at_once):
            values, _ = features.batch(slice(start, min(start + at_once, len(features))))
            values = values.to(weight.device, weight.dtype)
            parts.append(feature_reach(values, bias=bias, normalize=self.trainable.normalize))
        reach = torch.cat([part[0] for part in parts]) if parts else weight.new_zeros(0)
        scale = torch.cat([s for _, s in parts if s is not None]) if parts and self.trainable.normalize else None
        broken = ~reach.isfinite()
        return reach, scale, broken if bool(broken.any()) else None

    @torch.no_grad()
    def read(self, samples: Sequence[Tensor]) -> Sequence[Rows]:
        """The records of several samples, gathered and normalised in one go: a quarter of a small step's time."""
        sizes = [len(sample) for sample in samples]
        rows = self._rows(torch.cat(list(samples)))
        x = rows.x if rows.scale is None else rows.x.mul_(rows.scale[:, None])
        hot = x.new_zeros(len(rows.y), self.head.weight.shape[0]).scatter_(1, rows.y.unsqueeze(1), 1.0)
        parts = zip(*(torch.split(values, sizes) for values in (x, rows.y, rows.reach, hot)), strict=True)
        return [Rows(x_part, y_part, reach, None, hot_part) for x_part, y_part, reach, hot_part in parts]

    @torch.no_grad()
    def add_rows(self, index: Index | Rows) -> None:
        """Add the records at `index`, with the norms known from before."""
        self._add(*(index if isinstance(index, Rows) else self._rows(index)))

    def _rows(self, index: Index) -> Rows:
        weight = self.head.weight
        x, _ = self.features.batch(index)
        x = x.to(weight.device, weight.dtype)
        if self._broken is not None:
            x = x.masked_fill(_take(self._broken, index)[:, None], 0.0)
        scale = None if self._scale is None else _take(self._scale, index)
        return Rows(x, _take(self.targets, index).to(weight.device), _take(self._reach, index), scale)

    @torch.no_grad()
    def add(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> None:
        """Add records: values (B, D), targets (B,)."""
        reach, scale = feature_reach(values, bias=self.head.bias is not None, normalize=self.trainable.normalize)
        self._add(values.masked_fill(~reach.isfinite()[:, None], 0.0), targets, reach, scale)

    def _add(self, x: Tensor, y: Tensor, reach: Tensor, scale: Tensor | None, hot: Tensor | None = None) -> None:
        weight, bias = linear_softmax_clipped_sum(
            x, y, self.head.weight, self.head.bias, self.clipping_norm, reach=reach, scale=scale, hot=hot
        )
        self._accumulate([weight] if bias is None else [weight, bias])
