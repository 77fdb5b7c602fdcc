"""What dropout dropped of each record in a round of production training, for the reference to drop the same.

Shapes: B units of a call, H numbers that a dropout sees, T records of a person.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedhead.client.auditing.reference import Masks
from fedhead.common.errors import InputError
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.clipping import finite_records

MULTIPLYING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # the others shift and scale, too


@dataclass(frozen=True, eq=False, repr=False)
class WatchedFeatures(FeatureSet):
    """Features that remember which units were read last."""

    asked: list[Tensor | slice] = field(default_factory=list)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """As `FeatureSet.batch`; remembered."""
        self.asked[:] = [index]
        return super().batch(index)

    def positions(self, values: Tensor, lengths: Tensor | None) -> Tensor:
        """Which units a call's values are: those that were read last, without what isn't finite."""
        read = torch.arange(len(self))[self.asked[0]]
        if len(read) == len(values):
            return read
        found, tokens = super().batch(read)
        return read[finite_records(found, tokens if lengths is not None else None)]


class DropoutMasks:
    """Records what the head's dropouts draw, and leaves them to draw what they would have drawn.

    Parameters
    ----------
    trainable : Trainable

    Notes
    -----
    Before a dropout draws, it is let loose on ones from the same state of torch's generator, which is then put back:
    what comes out is the mask that it is about to use.
    """

    def __init__(self, trainable: Trainable) -> None:
        self.trainable = trainable
        self.dropouts = [
            m for m in trainable.head.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0
        ]
        for one in self.dropouts:
            if type(one) not in MULTIPLYING:
                raise InputError(
                    f"model.head has a {type(one).__name__}: the audit can follow {MULTIPLYING[0].__name__} only, "
                    "which multiplies. Use that."
                )
        self._units: dict[int, tuple[Tensor, ...]] = {}
        self._call: list[tuple[nn.Module, Tensor]] = []
        self._features: WatchedFeatures | None = None
        self._positions = torch.zeros(0, dtype=torch.int64)

    def taken(self) -> Masks:
        """The masks since this was last asked."""
        found, self._units = self._units, {}
        return found

    @contextmanager
    def watching(self, features: FeatureSet) -> Iterator[FeatureSet]:
        """Features to train on meanwhile; the very same where nothing drops."""
        if not self.dropouts:
            yield features
            return
        self._features = WatchedFeatures(features.values, features.offsets)
        hooks = [
            self.trainable.register_forward_pre_hook(self._begin),
            self.trainable.register_forward_hook(self._end),
            *(one.register_forward_pre_hook(self._look) for one in self.dropouts),
        ]
        try:
            yield self._features
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        assert self._features is not None
        self._call = []
        if self._features.asked and len(given[0]):
            self._positions = self._features.positions(given[0], given[1] if len(given) > 1 else None)

    def _look(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if module.training:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                self._call.append((module, module.forward(torch.ones_like(given[0])).clone()))

    def _end(self, _: nn.Module, given: tuple[Any, ...], __: Tensor) -> None:
        masks = [mask for module in self.dropouts for seen, mask in self._call if seen is module]
        if not self._call or len(self._positions) != len(given[0]):
            return  # records that were made up to try a head
        if len(masks) != len(self.dropouts) or any(len(mask) != len(given[0]) for mask in masks):
            raise InputError(
                "model.head has a dropout that isn't used once for all records: the audit can't follow it. Use each "
                "once."
            )
        for row, unit in enumerate(self._positions.tolist()):
            self._units[unit] = tuple(mask[row] for mask in masks)
