"""The closed form for persons: what of a holder's features never changes, and the clipped sum over persons.

Shapes: P persons, R records of all of them, D features, K outputs, N the holder's persons.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fedhead.common.features import FeatureSet
from fedhead.common.privacy.clipping import feature_reach
from fedhead.common.privacy.sequences import (
    Grams,
    Grouping,
    group,
    keep_grams,
    linear_softmax_summed,
    pieces_of,
    with_grams,
    with_kept,
)

_NORM_ELEMENTS: Final = 2**22  # most numbers that are measured at once
_PIECE: Final = 2**26  # most numbers that the features of records at once may have
_KEPT: Final = 2**23  # Gram matrices are kept up to so many numbers, 64 MB, or as many as the features have


def flat_labels(targets: Tensor, lengths: Tensor) -> Tensor:
    """Labels of all records, person after person: padded (P, T) and lengths (P,) -> (R,)."""
    return targets[torch.arange(targets.shape[1], device=targets.device) < lengths[:, None]]


class PersonRows:
    """A holder's features as the closed form reads them.

    Parameters
    ----------
    features : FeatureSet
        N persons, ragged.
    head : nn.Linear
    normalize : bool
        Whether the layer sees feature vectors of length 1.
    """

    @torch.no_grad()
    def __init__(self, features: FeatureSet, head: Any, normalize: bool) -> None:
        # a new object: whoever watches whether the holder's own is still in use must not see this one
        self.features, self.head = FeatureSet(features.values, features.offsets), head
        weight, bias = head.weight, head.bias is not None
        assert features.offsets is not None
        self.lengths = features.offsets.diff()
        at_once = max(1, _NORM_ELEMENTS // weight.shape[1])
        parts = [
            feature_reach(piece.to(weight.device, weight.dtype), bias=bias, normalize=normalize)
            for piece in torch.split(features.values, at_once)
        ]
        self.reach = torch.cat([part[0] for part in parts]) if parts else weight.new_zeros(0)
        self.scale = torch.cat([s for _, s in parts if s is not None]) if parts and normalize else None
        gone = ~self.reach.isfinite()
        self.gone = gone if bool(gone.any()) else None
        self.reach.masked_fill_(gone, 0.0)
        self._room = max(_KEPT, features.values.numel())
        self._groupings: dict[tuple[int, int], Grouping] = {}
        self._grams: Grams | None = None

    @torch.no_grad()
    def clipped_sum(self, targets: Tensor, index: Tensor | slice, clipping_norm: float) -> tuple[Tensor, Tensor | None]:
        """Sum of the clipped gradients of some persons.

        Parameters
        ----------
        targets : Tensor, int64, shape (N, T)
            -1 behind a person's last record.
        index : int64 Tensor, or slice
        clipping_norm : float, > 0

        Returns
        -------
        grad_weight : Tensor, shape (K, D)
        grad_bias : Tensor, shape (K,), or None
        """
        persons = torch.arange(len(self.features))[index]
        pieces = pieces_of(self.lengths[persons], max(1, _PIECE // max(self.head.weight.shape)))
        if len(pieces) <= 1:
            return self._clipped_sum(targets, index, clipping_norm)
        start = index.indices(len(self.features))[0] if isinstance(index, slice) else 0
        total, total_bias = None, None
        for piece in pieces:
            mine = slice(start + piece.start, start + piece.stop) if isinstance(index, slice) else persons[piece]
            weight, bias = self._clipped_sum(targets, mine, clipping_norm)
            total = weight if total is None else total.add_(weight)
            total_bias = bias if total_bias is None or bias is None else total_bias.add_(bias)
        assert total is not None
        return total, total_bias

    def _clipped_sum(
        self, targets: Tensor, index: Tensor | slice, clipping_norm: float
    ) -> tuple[Tensor, Tensor | None]:
        head = self.head
        places, lengths = self.features.places(index)
        labels = flat_labels(targets[index], lengths.to(targets.device)).to(head.weight.device)
        x = self.features.values[places].to(head.weight.device, head.weight.dtype)
        gone = None if self.gone is None else self.gone[places]
        if gone is not None:
            x = x.masked_fill(gone[:, None], 0.0)
        scale = None if self.scale is None else self.scale[places]
        grouping = self._grouping(index, lengths.to(head.weight.device), x, scale)
        return linear_softmax_summed(
            x, labels, grouping, head.weight, head.bias, clipping_norm,
            reach=self.reach[places], scale=scale, gone=gone,
        )  # fmt: skip

    def _grouping(self, index: Tensor | slice, lengths: Tensor, x: Tensor, scale: Tensor | None) -> Grouping:
        """Full-batch steps come in the same slices again and again: those keep their Gram matrices where they are."""
        outputs = self.head.weight.shape[0]
        if not isinstance(index, slice):
            if self._grams is None:
                self._grams = self._keep()
            return with_kept(group(lengths, x.shape[1], outputs), index.to(lengths.device), self._grams)
        key = index.start, index.stop
        if key not in self._groupings:
            found = group(lengths, x.shape[1], outputs)
            found = with_grams(found, x, scale, bias=self.head.bias is not None, most=self._room)
            self._room -= sum(block.gram.numel() for block in found.blocks if block.gram is not None)
            self._groupings[key] = found
        return self._groupings[key]

    def _keep(self) -> Grams:
        values, weight = self.features.values, self.head.weight
        if self.gone is not None:
            values = values.masked_fill(self.gone.to(values.device)[:, None], 0.0)
        scale = None if self.scale is None else self.scale.to(values.device)
        bias = self.head.bias is not None
        found = keep_grams(self.lengths, values, scale, weight.shape[0], bias=bias, most=self._room)
        self._room -= sum(grams.numel() for grams in found.kept.values())
        return Grams(found.slots.to(weight.device), {t: grams.to(weight.device) for t, grams in found.kept.items()})
