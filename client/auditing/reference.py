"""An independent second way to the clipped sum: one unit at a time by autograd, in float64.

Nothing here is shared with what it checks: neither the clipping nor the gradient paths nor Opacus are imported.

Shapes: U units (records, or persons with up to T records), B units of a chunk, D features, K outputs, P trained
numbers, S outputs of the entry layer (K of a linear head, the first hidden layer's size of an mlp).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedhead.client.auditing.canaries import entry_weight
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.tasks import Task

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

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
    Reference: Abadi et al. (2016), arXiv:1607.00133, Algorithm 1.
    """

    def __init__(self, trainable: Trainable, task: Task) -> None:
        self._model = copy.deepcopy(trainable).double()
        self._task = task
        self._shapes = {name: p.shape for name, p in self._model.trained().items()}
        self._entry = entry_weight(trainable)
        self.parameters = sum(shape.numel() for shape in self._shapes.values())
        self._gradients = torch.func.vmap(torch.func.grad(self._loss), in_dims=(None, 0, 0))

    def clipped_sum(
        self, head: FloatArray, features: FeatureSet, targets: Tensor, clipping_norm: float, index: Tensor | None = None
    ) -> FloatArray:
        """The sum of the clipped gradients of some units.

        Parameters
        ----------
        head : float64 array, shape (P,)
            Trained parameters, in the order of `Trainable.trained`.
        features : FeatureSet
            U records of one feature vector each, or U persons.
        targets : Tensor, int64, shape (U,), or (U, T) with -1 behind a person's last record
        clipping_norm : float, > 0
            C.
        index : Tensor, int64, optional
            Which units; default all.

        Returns
        -------
        float64 array, shape (P,)
        """
        total = torch.zeros(self.parameters, dtype=torch.float64)
        for gradients, _, _, factors in self._clipped(head, features, targets, clipping_norm, index):
            total += self._weighted(gradients, factors)
        return total.numpy()

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

    def _loss(self, parameters: dict[str, Tensor], values: Tensor, targets: Tensor) -> Tensor:
        """Loss of one unit: values (T, D) and targets (T,), -1 where there is no record."""
        real = targets >= 0
        outputs = torch.func.functional_call(self._model, parameters, (values,))
        losses = self._task.losses(outputs, targets.clamp(min=0))
        return torch.where(real, losses, 0.0).sum()

    def _clipped(
        self, head: FloatArray, features: FeatureSet, targets: Tensor, clipping_norm: float, index: Tensor | None = None
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]]:
        """Gradients, name -> (B, *shape); norms by name and in all, (B,); clip factors (B,): chunk after chunk."""
        parts = torch.split(torch.from_numpy(head), [shape.numel() for shape in self._shapes.values()])
        parameters = {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
        units = torch.arange(len(targets)) if index is None else index
        held = max(self.parameters, features.values.shape[-1] * (targets.shape[1] if targets.dim() == 2 else 1))
        for piece in torch.split(units, max(1, _NUMBERS // held)):
            if not len(piece):
                return
            values, wanted = _padded(features, targets, piece)
            gradients: dict[str, Any] = self._gradients(parameters, values, wanted)
            lengths = {name: torch.linalg.vector_norm(g.flatten(1), dim=1) for name, g in gradients.items()}
            norms = torch.linalg.vector_norm(torch.stack(list(lengths.values())), dim=0)
            gone = ~norms.isfinite()
            if bool(gone.any()):
                gradients = {name: _without(g, gone) for name, g in gradients.items()}
            yield gradients, lengths, norms, (clipping_norm / norms).clamp(max=1).masked_fill(gone, 0.0)

    def _weighted(self, gradients: dict[str, Tensor], factors: Tensor) -> Tensor:
        return torch.cat([factors @ g.flatten(1) for g in gradients.values()])


def _without(gradients: Tensor, gone: Tensor) -> Tensor:
    """Zeros for the units that are gone: a factor of 0 would leave NaN."""
    return gradients.masked_fill(gone.view(-1, *[1] * (gradients.dim() - 1)), 0.0)


def _padded(features: FeatureSet, targets: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Feature vectors (B, T, D) in float64 and targets (B, T); -1 and zeros for no record, or one that isn't finite."""
    wanted = targets[units]
    if wanted.dim() == 1:
        values, wanted = features.values[units].double()[:, None], wanted[:, None]
    else:
        assert features.offsets is not None, "persons are ragged"
        starts, lengths = features.offsets[:-1][units], features.offsets.diff()[units]
        places = torch.arange(int(lengths.max()))
        rows = (starts[:, None] + places).clamp(max=len(features.values) - 1)
        values, wanted = features.values[rows].double(), wanted[:, : len(places)]
    gone = ~values.isfinite().all(2)
    wanted = wanted.masked_fill(gone, -1)
    return values.masked_fill((wanted < 0)[..., None], 0.0), wanted
