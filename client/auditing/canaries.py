"""Crafted records whose clipped gradients are known, and the head that shows them best.

A canary is a feature vector with one number that is not 0, in a column that no other canary has. A linear layer's
gradient of it then lies in that column and in the bias: in its own column whatever is seen beyond the noise and the
other records is the canary's alone. Hence at most as many canaries as there are features.

Shapes: m canaries, D features, K outputs, P trained numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedhead.common.errors import InputError
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

LONG: Final = 10.0
"""Length of a canary that nothing normalises: all but a hundredth of its squared gradient lies in its own column, the
rest in the bias. Normalised ones are half and half, because the layer sees a 1 beside the constant 1 of its bias."""
NORMALISED: Final = 3.0  # any length other than 1: a training path that forgets to normalise shows
SURE: Final = 4.0  # clipping norms of an unnormalised canary: more than enough for any two labels

SPREAD: Final = 0.5  # of the auditor's logits on a canary: heads other than zero show wrong gradients
PUSH: Final = 3.0  # how far a canary's own label is pushed down, so that its gradient is long
GAIN: Final = 8.0  # of the layers behind the entry of an mlp: gradients grow on their way to the entry layer
ENTRY: Final = 0.02  # length of what the entry layer of an mlp gives: hidden units stay near zero, biases above it


@dataclass(frozen=True)
class Canaries:
    """m crafted records, or persons with several such records each.

    Attributes
    ----------
    features : int
        D.
    columns : int64 array, shape (m,)
        Which feature is not 0; all different.
    labels : int64 array, shape (m,)
    length : float, > 0
        The number there.
    seen : float, > 0
        What the head sees of it: 1 where feature vectors are normalised.
    records : int, >= 1, or None
        Records of each person, all alike; None where the unit is a record.
    """

    features: int
    columns: IntArray
    labels: IntArray
    length: float
    seen: float
    records: int | None = None

    def __len__(self) -> int:
        return len(self.columns)

    def units(self, chosen: BoolArray | None = None) -> tuple[FeatureSet, Tensor]:
        """The canaries as a training path takes them.

        Parameters
        ----------
        chosen : bool array, shape (m,), optional
            Which; default all.

        Returns
        -------
        features : FeatureSet
        targets : Tensor, int64, shape (n,), or (n, records)
        """
        keep = np.ones(len(self), dtype=bool) if chosen is None else chosen
        columns, labels = torch.from_numpy(self.columns[keep]), torch.from_numpy(self.labels[keep])
        each = self.records or 1
        values = torch.zeros(len(columns) * each, self.features)
        values[torch.arange(len(values)), columns.repeat_interleave(each)] = self.length
        if self.records is None:
            return FeatureSet(values), labels
        offsets = torch.arange(len(columns) + 1) * each
        return FeatureSet(values, offsets), labels[:, None].expand(-1, each).contiguous()


def craft(
    number: int,
    features: int,
    outputs: int,
    *,
    normalize: bool,
    clipping_norm: float,
    records_per_person: int | None = None,
    generator: np.random.Generator,
) -> Canaries:
    """Canaries in random columns with random labels.

    Parameters
    ----------
    number : int, from 1 to `features`
        m.
    features, outputs : int
        D and K.
    normalize : bool
        Whether the head sees feature vectors of length 1.
    clipping_norm : float, > 0
        C: unnormalised canaries are made long enough for it.
    records_per_person : int, >= 1, optional
        Under the unit "person": each canary is a person with so many records alike, as many as any person may have, so
        that clipping each record by itself would show.
    generator : numpy.random.Generator
        The auditor's own.

    Raises
    ------
    InputError
        More canaries than features, or none.
    """
    if not 1 <= number <= features:
        raise InputError(
            f"canaries is {number!r}: it must be from 1 to {features}, because each takes a feature for itself. Take "
            "fewer."
        )
    columns = generator.choice(features, number, replace=False).astype(np.int64)
    labels = generator.integers(outputs, size=number, dtype=np.int64)
    length = NORMALISED if normalize else max(LONG, SURE * clipping_norm)
    return Canaries(features, columns, labels, length, 1.0 if normalize else length, records_per_person)


def joined(first: tuple[FeatureSet, Tensor], second: tuple[FeatureSet, Tensor]) -> tuple[FeatureSet, Tensor]:
    """Two sets of units as one, in this order: records of one shape, or of tokens, or persons.

    Returns
    -------
    features : FeatureSet
    targets : Tensor, int64, shape (N,), or (N, T) with -1 behind a person's last record
    """
    (a, a_targets), (b, b_targets) = first, second
    values, targets, offsets = torch.cat([a.values.float(), b.values]), [a_targets, b_targets], None
    if a.offsets is not None and b.offsets is not None:
        offsets = torch.cat([a.offsets, a.offsets[-1] + b.offsets[1:]])
    if a_targets.dim() == 2:
        width = max(a_targets.shape[1], b_targets.shape[1])
        targets = [nn.functional.pad(t, (0, width - t.shape[1]), value=-1) for t in targets]
    return FeatureSet(values, offsets), torch.cat(targets)


def entry_weight(trainable: Trainable) -> str:
    """Name of the weight that multiplies the features, as in `Trainable.trained`.

    Raises
    ------
    InputError
        Something comes before the head's first linear layer, that layer isn't trained, or the head has dropout.
    """
    leaves = [(name, leaf) for name, leaf in trainable.head.named_modules(prefix="head") if not list(leaf.children())]
    name, first = leaves[0]
    if trainable.tail is not None or type(first) is not nn.Linear or not first.weight.requires_grad:
        raise InputError(
            "model.head is not audited by canaries: its first layer must be a trained linear layer on cached features. "
            "Use a linear or an mlp head, and model.unfreeze = 0."
        )
    if any(isinstance(leaf, nn.modules.dropout._DropoutNd) and leaf.p > 0 for leaf in trainable.modules()):
        raise InputError(
            "model.head.dropout is more than 0: what it drops is drawn inside the round, and no reference can follow. "
            "Audit the recipe with model.head.dropout = 0."
        )
    return f"{name}.weight"


def flat(trainable: Trainable) -> Tensor:
    """A copy of the trained numbers, shape (P,), in the order of `Trainable.trained`."""
    return torch.cat([p.detach().flatten() for p in trainable.trained().values()])


def load_flat(trainable: Trainable, head: FloatArray) -> None:
    """Load P trained numbers, as a round's message would."""
    parameters = list(trainable.trained().values())
    parts = torch.split(torch.from_numpy(head), [p.numel() for p in parameters])
    with torch.no_grad():
        for p, part in zip(parameters, parts, strict=True):
            p.copy_(part.view_as(p))


def sent_head(trainable: Trainable, canaries: Canaries, generator: np.random.Generator) -> FloatArray:
    """A head that a server after the canaries sends: one under which their gradients are long.

    Parameters
    ----------
    trainable : Trainable
        At its initial parameters.
    canaries : Canaries
    generator : numpy.random.Generator
        The auditor's own; each call gives another head.

    Returns
    -------
    float64 array, shape (P,)
        Numbers that float32 holds exactly, so that trainable and reference start from the same.

    Notes
    -----
    A server may send what it likes, and the guarantee must hold for it. Linear: the initial head, a random one, and
    each canary's own label pushed down in its column. Several layers: an entry near zero, so that logits stay small,
    and large weights behind it, so that most of a gradient's length is in the entry layer, where canaries are seen.
    """
    entry, parameters = entry_weight(trainable), trainable.trained()
    alone = sum(p.dim() == 2 for p in parameters.values()) == 1
    parts = []
    for name, p in parameters.items():
        start, drawn = p.detach().double().numpy(), generator.standard_normal(tuple(p.shape))
        if name == entry and alone:
            value = start + SPREAD / canaries.seen * drawn
            value[canaries.labels, canaries.columns] -= PUSH / canaries.seen
        elif name == entry:
            value = ENTRY / canaries.seen * drawn / np.sqrt(p.shape[0])
        elif p.dim() == 2:
            value = GAIN / np.sqrt(p.shape[0]) * drawn
        else:
            value = start + (SPREAD * drawn if alone else ENTRY * np.abs(drawn) / np.sqrt(p.numel()))
        parts.append(value.astype(np.float32).astype(np.float64).ravel())
    return np.concatenate(parts)
