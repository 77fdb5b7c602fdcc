"""What a gradient path is, and the quickest one: the closed form of a linear head. Others: hooked.py, table: paths.py.

Shapes: B records, D features, K outputs. Under the unit "person", B counts persons, each with up to T records: features
(B, T, D), targets (B, T) with -1 where there is no record. What is said of a record then holds of a person.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedhead.client.persons import PersonRows
from fedhead.common.errors import InputError
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.clipping import feature_reach, linear_softmax_clipped_sum
from fedhead.common.privacy.sequences import group, linear_softmax_summed, similar_lengths, unusable
from fedhead.common.tasks import Task

Index = Tensor | slice

_NORM_ELEMENTS: Final = 2**22  # most numbers that are measured at once
_PIECE: Final = 2**26  # most numbers that the features of one chunk of persons may have


class Features(Protocol):
    """What a path needs of a holder's features; `fedhead.common.features.FeatureSet` is one."""

    def __len__(self) -> int:
        """N, the holder's true count."""

    def batch(self, index: Index) -> tuple[Tensor, Tensor | None]:
        """Values (B, *shape) and lengths (B,) or None."""


def of_persons(targets: Tensor) -> bool:
    """Whether the unit is a person: targets (B, T) rather than (B,)."""
    return targets.dim() == 2


def losses_of(trainable: Trainable, task: Task, values: Tensor, lengths: Tensor | None, targets: Tensor) -> Tensor:
    """The loss of each record, (B,); of each person the sum over their records.

    Parameters
    ----------
    values : Tensor, shape (B, *shape), or (B, T, D) of persons
    lengths : Tensor, int64, shape (B,), or None
    targets : Tensor, int64, shape (B,), or (B, T) of persons

    Raises
    ------
    InputError
        The task gives another number of losses: that would clip something else than records, without a sign.
    """
    outputs = trainable(values, lengths)
    real = targets >= 0 if of_persons(targets) else None
    if real is not None:
        outputs, targets = outputs[real], targets[real]
    losses = task.losses(outputs, targets)
    if losses.shape != (len(targets),):
        raise InputError(
            f"task.losses is of shape {tuple(losses.shape)}: it must be ({len(targets)},), one loss a record. Sum "
            "or average over what belongs to a record, and nothing else."
        )
    if real is None:
        return losses
    return losses.new_zeros(len(real)).index_add(0, real.nonzero()[:, 0], losses)


def without_unusable(values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Persons without the records whose features aren't finite: zeros and -1 in their place; the others stay.

    Parameters
    ----------
    values : Tensor, shape (B, T, D)
    targets : Tensor, int64, shape (B, T)
    """
    gone = unusable(values)
    if not bool(gone.any()):
        return values, targets
    return values.masked_fill(gone[..., None], 0.0), targets.masked_fill(gone, -1)


def persons_at_once(chunk: int, targets: Tensor, width: int) -> int:
    """How many of `chunk` persons fit in memory as (B, T, width), each with as many records as any."""
    return max(1, min(chunk, _PIECE // max(1, targets.shape[1] * width)))


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
    record with inf or NaN in it, in its loss or in its gradient by nothing; rounding of the sum comes on top. The same
    holds of a person with all their records: gradients are summed over them before they are clipped. Of a person, a
    record with inf or NaN in its features is left out and the others count; inf or NaN in a loss or in the summed
    gradient leaves out the person.
    """

    def __init__(self, trainable: Trainable, task: Task) -> None:
        self.trainable = trainable
        self.task = task
        self.parameters: list[Any] = list(trainable.trained().values())
        for p in self.parameters:
            p.summed_grad = None

    def begin(self, features: Features, targets: Tensor, clipping_norm: float) -> None:
        """Start a round on a holder's features (N records) and targets (N,), or of N persons (N, T)."""
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
        for piece in self._pieces(index) if of_persons(self.targets) else (index,):
            values, lengths = self.features.batch(piece)
            targets = self.targets[piece]
            if lengths is not None:
                lengths = lengths.to(first.device)
                targets = targets[:, : values.shape[1]] if of_persons(targets) else targets
            self.add(values.to(first.device, first.dtype), lengths, targets.to(first.device))

    def _pieces(self, index: Index) -> list[Tensor]:
        """Persons in groups of about as many records, for one with many would pad all others, and not too large."""
        persons = torch.arange(len(self.targets))[index]
        lengths = (self.targets[persons] >= 0).sum(1).cpu()
        width = self.features.batch(slice(0, 1))[0].shape[-1] if len(persons) else 1
        pieces: list[Tensor] = []
        for places in similar_lengths(lengths):
            longest = max(1, int(lengths[places].max()))
            pieces += torch.split(persons[places], max(1, _PIECE // (longest * width)))
        return pieces

    @abstractmethod
    def add(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> None:
        """Add records: values (B, *shape), lengths (B,) or None, targets (B,); or persons: targets (B, T)."""

    def _accumulate(self, sums: list[Tensor]) -> None:
        for p, total in zip(self.parameters, sums, strict=True):
            p.summed_grad = total if p.summed_grad is None else p.summed_grad.add_(total)

    def _losses(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> Tensor:
        return losses_of(self.trainable, self.task, values, lengths, targets)


Measured = tuple[Tensor, Tensor | None, Tensor | None]
"""Of N records: what `feature_reach` says, and which are broken (None: none is)."""


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
    """A linear head on one feature vector a record, or one each of a person's records, with cross-entropy."""

    def __init__(self, trainable: Trainable, task: Task) -> None:
        super().__init__(trainable, task)
        self.head: Any = trainable.head
        # norms of features never change: kept for as long as the features live, one pair of numbers a record
        self._known: dict[int, tuple[weakref.ref[Any], PersonRows | Measured]] = {}
        self._persons: PersonRows | None = None

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
        # aliases without gradients: they follow every step, and no step has to switch gradients off
        bias = self.head.bias
        self._weight, self._bias = self.head.weight.detach(), None if bias is None else bias.detach()
        known = self._measured(features, persons=of_persons(targets))
        self._persons = known if isinstance(known, PersonRows) else None
        if not isinstance(known, PersonRows):
            self._reach, self._scale, self._broken = known

    def measured(self, features: Features) -> Measured:
        """What the closed form needs of each of a holder's N records; kept for as long as the features live."""
        found = self._measured(features, persons=False)
        assert not isinstance(found, PersonRows), "features of records and of persons are not the same"
        return found

    def _measured(self, features: Any, *, persons: bool) -> PersonRows | Measured:
        known = self._known.get(id(features))
        if known is None or known[0]() is not features:
            key = id(features)
            found = PersonRows(features, self.head, self.trainable.normalize) if persons else self._measure(features)
            known = weakref.ref(features, lambda _: self._known.pop(key, None)), found
            self._known[key] = known
        return known[1]

    def _measure(self, features: Features) -> Measured:
        weight, bias = self.head.weight.detach(), self.head.bias is not None
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

    def read(self, samples: Sequence[Tensor]) -> Sequence[Tensor | Rows]:
        """The records of several samples, gathered and normalised in one go: a quarter of a small step's time."""
        if self._persons is not None:
            return samples
        sizes = [sample.shape[0] for sample in samples]
        rows = self._rows(torch.cat(list(samples)))
        x = rows.x if rows.scale is None else rows.x.mul_(rows.scale[:, None])
        hot = x.new_zeros(len(rows.y), self._weight.shape[0]).scatter_(1, rows.y.unsqueeze(1), 1.0)
        parts = zip(*(torch.split(values, sizes) for values in (x, rows.y, rows.reach, hot)), strict=True)
        return [Rows(x_part, y_part, reach, None, hot_part) for x_part, y_part, reach, hot_part in parts]

    def add_rows(self, index: Index | Rows) -> None:
        """Add the records at `index`, with the norms known from before."""
        if self._persons is not None:
            assert not isinstance(index, Rows), "`read` leaves persons as they are"
            self._sum(self._persons.clipped_sum(self.targets, index, self.clipping_norm))
            return
        self._add(*(index if isinstance(index, Rows) else self._rows(index)))

    def _rows(self, index: Index) -> Rows:
        weight = self._weight
        x, _ = self.features.batch(index)
        x = x.to(weight.device, weight.dtype)
        if self._broken is not None:
            x = x.masked_fill(_take(self._broken, index)[:, None], 0.0)
        scale = None if self._scale is None else _take(self._scale, index)
        return Rows(x, _take(self.targets, index).to(weight.device), _take(self._reach, index), scale)

    def add(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> None:
        """Add records: values (B, D), targets (B,); or persons: (B, T, D), lengths (B,), targets (B, T)."""
        if of_persons(targets):
            self._add_persons(*without_unusable(values, targets))
            return
        reach, scale = feature_reach(values, bias=self.head.bias is not None, normalize=self.trainable.normalize)
        self._add(values.masked_fill(~reach.isfinite()[:, None], 0.0), targets, reach, scale)

    def _add(self, x: Tensor, y: Tensor, reach: Tensor, scale: Tensor | None, hot: Tensor | None = None) -> None:
        weight, bias = linear_softmax_clipped_sum(
            x, y, self._weight, self._bias, self.clipping_norm, reach=reach, scale=scale, hot=hot
        )
        self._accumulate([weight] if bias is None else [weight, bias])

    @torch.no_grad()
    def _add_persons(self, values: Tensor, targets: Tensor) -> None:
        real = targets >= 0
        x, lengths, head = values[real], real.sum(1), self.head
        reach, scale = feature_reach(x, bias=head.bias is not None, normalize=self.trainable.normalize)
        grouping = group(lengths, *head.weight.shape[::-1])
        self._sum(
            linear_softmax_summed(
                x, targets[real], grouping, head.weight, head.bias, self.clipping_norm, reach=reach, scale=scale
            )
        )

    def _sum(self, found: tuple[Tensor, Tensor | None]) -> None:
        weight, bias = found
        self._accumulate([weight] if bias is None else [weight, bias])
