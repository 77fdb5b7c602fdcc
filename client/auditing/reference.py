"""An independent second way to the clipped sum: one unit at a time by autograd, in float64.

Nothing here is shared with what it checks: neither the clipping nor the gradient paths nor Opacus are imported.

Shapes: U units (records, or persons with up to T records), B units of a chunk, D features, K outputs, P trained
numbers, S outputs of the entry layer (K of a linear head, the first hidden layer's size of an mlp).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedhead.client.auditing.canaries import entry_weight
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.tasks import Task

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Masks = Mapping[int, tuple[Tensor, ...]]
"""Unit -> what each dropout of the head multiplied its numbers by, (H,), or (T, H) of a person."""

_NUMBERS: Final = 2**19  # of all gradients held at once: 4 MB, about what stays in a processor's cache


@dataclass(frozen=True)
class Signatures:
    """What of each canary can be seen in coordinates that no other canary has.

    Attributes
    ----------
    own : float64 array, shape (m, S)
        The clipped gradient in the canary's own column of the entry weight.
    norms : float64 array, shape (m,)
        L2 norm of the whole gradient before clipping.
    total : float64 array, shape (P,)
        Sum of the whole clipped gradients of the canaries that were chosen.
    stray : float
        Most of a clipped gradient's length that lies in the entry weight outside the canary's own column, in clipping
        norms: 0 up to rounding, or scores would see other canaries.
    """

    own: FloatArray
    norms: FloatArray
    total: FloatArray
    stray: float


class Reference:
    """Clipped gradients by `torch.func.grad`, unit by unit.

    Parameters
    ----------
    trainable : Trainable
        Copied, as it is; its parameters aren't read afterwards.
    task : Task

    Notes
    -----
    The gradient of a unit is that of its loss: of a person, of the sum over their records. Its factor is
    min(1, C / norm), with the norm over all trained parameters together; a unit whose gradient is not finite has
    factor 0. A record with inf or NaN in its features is left out, and the person's others count. Production aims a
    millionth below C, leaves out feature vectors longer than 1e18, and takes a person whose records cancel to less
    than a 32nd, in a layer, as that long there: with ordinary records a few thousandths of one C at most.
    Dropout multiplies by the masks that are given, and by 1 without any. Several units are taken at once by
    `torch.func.vmap`, which leaves each to itself; one after the other where a module doesn't allow it.
    Reference: Abadi et al. (2016), arXiv:1607.00133, Algorithm 1.
    """

    def __init__(self, trainable: Trainable, task: Task) -> None:
        self._model = copy.deepcopy(trainable).double()
        self._task = task
        self._shapes = {name: p.shape for name, p in self._model.trained().items()}
        self.parameters = sum(shape.numel() for shape in self._shapes.values())
        self._dropped = mask_dropout(self._model.head, "head")
        self._one_by_one = False

    @cached_property
    def _entry(self) -> str:
        return entry_weight(self._model)

    def clipped_sum(
        self,
        head: FloatArray,
        features: FeatureSet,
        targets: Tensor,
        clipping_norm: float,
        index: Tensor | None = None,
        masks: Masks | None = None,
    ) -> FloatArray:
        """The sum of the clipped gradients of some units.

        Parameters
        ----------
        head : float64 array, shape (P,)
            Trained parameters, in the order of `Trainable.trained`.
        features : FeatureSet
            U records of one shape, or of tokens, or U persons.
        targets : Tensor, int64, shape (U,), or (U, T) with -1 behind a person's last record
        clipping_norm : float, > 0
            C.
        index : Tensor, int64, optional
            Which units; default all.
        masks : mapping, optional
            Of dropout, of each of these units; one that isn't there is taken without dropout.

        Returns
        -------
        float64 array, shape (P,)
        """
        total = torch.zeros(self.parameters, dtype=torch.float64)
        for gradients, _, _, factors in self._clipped(head, features, targets, clipping_norm, index, masks):
            total += self._weighted(gradients, factors)
        return total.numpy()

    def gradients(
        self, head: FloatArray, features: FeatureSet, targets: Tensor, index: Tensor, masks: Masks | None = None
    ) -> FloatArray:
        """Gradients of some units, not clipped: float64, shape (U, P); zeros for a unit whose gradient isn't finite.

        Parameters
        ----------
        head, features, targets, index, masks
            As in `clipped_sum`.
        """
        pieces = self._clipped(head, features, targets, 1.0, index, masks)
        found = [torch.cat([g.flatten(1) for g in gradients.values()], 1) for gradients, _, _, _ in pieces]
        return torch.cat([torch.zeros(0, self.parameters, dtype=torch.float64), *found]).numpy()

    def signatures(
        self,
        head: FloatArray,
        features: FeatureSet,
        targets: Tensor,
        clipping_norm: float,
        columns: IntArray,
        chosen: NDArray[np.bool_],
    ) -> Signatures:
        """Each canary's clipped gradient in its own column, and the whole sum of those that are chosen.

        Parameters
        ----------
        head, features, targets, clipping_norm
            As in `clipped_sum`, of m canaries.
        columns : int64 array, shape (m,)
            Which feature each canary has for itself.
        chosen : bool array, shape (m,)
            Read for `total` alone: nothing else depends on it.
        """
        total = torch.zeros(self.parameters, dtype=torch.float64)
        own, lengths, stray, start = [], [], 0.0, 0
        which, weights = torch.from_numpy(columns), torch.from_numpy(chosen).double()
        for gradients, parts, norms, factors in self._clipped(head, features, targets, clipping_norm):
            stop = start + len(norms)
            entry = gradients[self._entry]  # (B, S, D)
            column = entry[torch.arange(len(norms)), :, which[start:stop]]  # (B, S)
            inside, whole = column.square().sum(1), parts[self._entry].square()
            stray = max(stray, float(((whole - inside).clamp(min=0).sqrt() * factors).max()) / clipping_norm)
            own.append(column * factors[:, None])
            lengths.append(norms)
            total += self._weighted(gradients, factors * weights[start:stop])
            start = stop
        return Signatures(torch.cat(own).numpy(), torch.cat(lengths).numpy(), total.numpy(), stray)

    def places(self, columns: IntArray) -> IntArray:
        """Where the columns of the entry weight lie among the P trained numbers: int64, shape (m, S)."""
        start = 0
        for name, shape in self._shapes.items():
            if name == self._entry:
                outputs, features = shape
                return np.asarray(start + np.arange(outputs)[None, :] * features + columns[:, None], dtype=np.int64)
            start += shape.numel()
        raise AssertionError("the entry weight is trained")

    def groups(self) -> dict[str, slice]:
        """Parameter name -> its place among the P trained numbers."""
        found, start = {}, 0
        for name, shape in self._shapes.items():
            found[name] = slice(start, start + shape.numel())
            start += shape.numel()
        return found

    def _loss(
        self, parameters: dict[str, Tensor], masks: dict[str, Tensor], values: Tensor, length: Tensor, targets: Tensor
    ) -> Tensor:
        """Loss of one unit: values (T, *shape) of T records, the tokens of each, and targets (T,), -1 for no record."""
        real = targets >= 0
        lengths = length.expand(1) if self._tokens else None
        outputs = torch.func.functional_call(self._model, {**parameters, **masks}, (values, lengths))
        losses = self._task.losses(outputs, targets.clamp(min=0))
        return torch.where(real, losses, 0.0).sum()

    def _gradients(self, *given: Any) -> dict[str, Tensor]:
        """Gradients of some units, name -> (B, *shape)."""
        gradient = torch.func.grad(self._loss)
        if not self._one_by_one:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    found: dict[str, Tensor] = torch.func.vmap(gradient, in_dims=(None, 0, 0, 0, 0))(*given)
                return found
            except (
                RuntimeError,
                ValueError,
                NotImplementedError,
            ):  # not every head can be mapped: one by one, the same
                self._one_by_one = True
        parameters, masks, *rest = given
        ones = [
            gradient(parameters, {name: mask[i] for name, mask in masks.items()}, *(part[i] for part in rest))
            for i in range(len(rest[0]))
        ]
        return {name: torch.stack([one[name] for one in ones]) for name in parameters}

    def _clipped(
        self,
        head: FloatArray,
        features: FeatureSet,
        targets: Tensor,
        clipping_norm: float,
        index: Tensor | None = None,
        masks: Masks | None = None,
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]]:
        """Gradients, name -> (B, *shape); norms by name and in all, (B,); clip factors (B,): chunk after chunk."""
        parts = torch.split(torch.from_numpy(head), [shape.numel() for shape in self._shapes.values()])
        parameters = {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
        units = torch.arange(len(targets)) if index is None else index
        self._tokens = targets.dim() == 1 and features.offsets is not None
        size = features.values[:1].numel() * (targets.shape[1] if targets.dim() == 2 else 1)
        for piece in torch.split(units, max(1, _NUMBERS // max(self.parameters, size))):
            if not len(piece):
                return
            values, lengths, wanted = _padded(features, targets, piece)
            dropped = self._masks(masks or {}, piece, wanted.shape[1], targets.dim() == 2)
            gradients = self._gradients(parameters, dropped, values, lengths, wanted)
            parts_of = {name: torch.linalg.vector_norm(g.flatten(1), dim=1) for name, g in gradients.items()}
            norms = torch.linalg.vector_norm(torch.stack(list(parts_of.values())), dim=0)
            gone = ~norms.isfinite()
            if bool(gone.any()):
                gradients = {name: _without(g, gone) for name, g in gradients.items()}
            yield gradients, parts_of, norms, (clipping_norm / norms).clamp(max=1).masked_fill(gone, 0.0)

    def _masks(self, masks: Masks, units: Tensor, width: int, persons: bool) -> dict[str, Tensor]:
        """Dropout's masks of some units, name -> (B, width, ...); nothing where there are none."""
        if not masks or not self._dropped:
            return {}
        found = {}
        for place, name in enumerate(self._dropped):
            some = next(iter(masks.values()))[place]
            shape = some.shape[1:] if persons else some.shape
            stacked = torch.ones(len(units), width, *shape, dtype=torch.float64)
            for row, unit in enumerate(units.tolist()):
                if unit in masks:
                    one = masks[unit][place].double().view(-1, *shape)[:width]
                    stacked[row, : len(one)] = one
            found[name] = stacked
        return found

    def _weighted(self, gradients: dict[str, Tensor], factors: Tensor) -> Tensor:
        return torch.cat([factors @ g.flatten(1) for g in gradients.values()])


def _without(gradients: Tensor, gone: Tensor) -> Tensor:
    """Zeros for the units that are gone: a factor of 0 would leave NaN."""
    return gradients.masked_fill(gone.view(-1, *[1] * (gradients.dim() - 1)), 0.0)


def _padded(features: FeatureSet, targets: Tensor, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values (B, T, *shape) in float64 of T records each, tokens (B,) of each, and targets (B, T).

    -1 and zeros for no record, or one that isn't finite.
    """
    wanted = targets[units]
    values, lengths = features.batch(units)  # of persons (B, T, D) and numbers of records; of texts those of tokens
    values = values.double()
    if wanted.dim() == 1:
        values, wanted = values[:, None], wanted[:, None]
    else:
        wanted = wanted[:, : values.shape[1]]
    gone = ~values.isfinite().flatten(2).all(2)
    wanted = wanted.masked_fill(gone, -1)
    shown = (wanted < 0).view(*wanted.shape, *[1] * (values.dim() - 2))
    return values.masked_fill(shown, 0.0), torch.ones(len(units)) if lengths is None else lengths, wanted


class _Masked(nn.Module):
    """A dropout whose mask is given."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones((), dtype=torch.float64))

    def forward(self, values: Tensor) -> Tensor:
        """Values times the mask."""
        return values * self.mask


def mask_dropout(module: nn.Module, prefix: str) -> list[str]:
    """Put a given mask in place of every dropout that drops; names of the masks, in the module's order."""
    found = []
    for name, child in list(module.named_children()):
        inner = f"{prefix}.{name}"
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0:
            setattr(module, name, _Masked())
            found.append(f"{inner}.mask")
        else:
            found += mask_dropout(child, inner)
    return found
