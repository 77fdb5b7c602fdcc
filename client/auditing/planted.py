"""Canaries whose gradients are planted where production captures them, in coordinates of their own.

Where the clipped sum has no closed form, a crafted feature vector's gradient is spread over layers, dropout and
whatever lies between. So what is crafted here is the gradient itself. A canary is a record like any other to the
training path: sampled, read, run through the module, clipped, summed. But in one trained linear layer what enters in
its row, and the gradient that comes back to its row, are replaced by crafted vectors, and everywhere else its gradient
is zero. The layer's gradient of it is then their outer product: one number of the weight, and a little of the bias.

Shapes: m canaries, B units of a call, T records of a person, D inputs and K outputs of a layer, P trained numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedhead.client.auditing.reference import Signatures
from fedhead.common.errors import InputError
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

MARK: Final = 2.0**22
"""All numbers of canary j's record are this plus j: float32 holds them exactly, and no real record looks like that."""
MOST: Final = 2**20  # canaries, by the room that marks have
TOKENS: Final = 2  # of a text that is a canary

LONG: Final = 32.0
"""Length of what enters the layer. All but a thousandth of a canary's squared gradient is then in the one number of the
weight, and the rest in the bias."""
SHORTEST: Final = 1.5  # clipping norms of a canary's gradient in all its records, before clipping
LONGEST: Final = 150.0
SPREAD: Final = 0.3  # of what is added to the parameters, beside one over the root of a layer's inputs


@dataclass(frozen=True)
class Layer:
    """A trained linear layer, and where its numbers lie among the P.

    Attributes
    ----------
    name : str
        Of the module.
    outputs, inputs : int
        K and D.
    weight : int
        Place of the weight's first number.
    bias : int or None
        The same of the bias; None where none is trained.
    """

    name: str
    outputs: int
    inputs: int
    weight: int
    bias: int | None


def linear_layers(trainable: Trainable) -> list[Layer]:
    """The trained linear layers, in the module's order."""
    starts, start = {}, 0
    for name, p in trainable.trained().items():
        starts[name] = start
        start += p.numel()
    return [
        Layer(name, module.out_features, module.in_features, starts[f"{name}.weight"], starts.get(f"{name}.bias"))
        for name, module in trainable.named_modules()
        if type(module) is nn.Linear and f"{name}.weight" in starts
    ]


@dataclass(frozen=True)
class PlantedCanaries:
    """m records, or persons with several such records each, whose gradients are crafted.

    Attributes
    ----------
    layers : tuple of Layer
    layer : int64 array, shape (m,)
        In which of them each canary's gradient lies.
    output, input : int64 array, shape (m,)
        In which number of its weight; no two have the same.
    length : float64 array, shape (m,)
        L2 norm, in gradient units, of a record's gradient of that weight.
    labels : int64 array, shape (m,)
    parameters : int
        P.
    shape : tuple of int
        Of a record's values, or of a token's.
    ragged : bool
        Whether records have tokens.
    records : int, >= 1, or None
        Records of each person, all alike; None where the unit is a record.
    """

    layers: tuple[Layer, ...]
    layer: IntArray
    output: IntArray
    input: IntArray
    length: FloatArray
    labels: IntArray
    parameters: int
    shape: tuple[int, ...]
    ragged: bool
    records: int | None = None

    def __len__(self) -> int:
        return len(self.layer)

    @property
    def most(self) -> int:
        """As many canaries as there could be: one for each trained number of a linear layer's weight."""
        return most_planted(self.layers)

    @property
    def places(self) -> IntArray:
        """Where each canary's own number lies among the P: int64, shape (m, 1)."""
        weights, inputs = (np.array([getattr(one, what) for one in self.layers]) for what in ("weight", "inputs"))
        found: IntArray = weights[self.layer] + self.output * inputs[self.layer] + self.input
        return found[:, None]

    def units(self, chosen: BoolArray | None = None) -> tuple[FeatureSet, Tensor]:
        """The canaries as a training path takes them; see `Canaries.units`."""
        keep = np.arange(len(self)) if chosen is None else np.flatnonzero(chosen)
        marks, labels = torch.from_numpy(MARK + keep).float(), torch.from_numpy(self.labels[keep])
        each = TOKENS if self.ragged else self.records or 1
        values = marks.repeat_interleave(each).view(-1, *[1] * len(self.shape)).expand(-1, *self.shape).contiguous()
        offsets = torch.arange(len(keep) + 1) * each
        if self.records is None:
            return FeatureSet(values, offsets if self.ragged else None), labels
        return FeatureSet(values, offsets), labels[:, None].expand(-1, each).contiguous()

    def signatures(self, clipping_norm: float, chosen: BoolArray) -> Signatures:
        """What is to be seen of each canary in its own number, and of all that are chosen together.

        Parameters
        ----------
        clipping_norm : float, > 0
        chosen : bool array, shape (m,)
            Read for `total` alone.

        Notes
        -----
        In closed form: an outer product of vectors of one number each, clipped with the bias.
        """
        shared = np.array([one.bias is not None for one in self.layers])[self.layer] / LONG
        length = self.length * (self.records or 1)
        norms = length * np.sqrt(1 + shared**2)
        own = length * np.minimum(1.0, clipping_norm / norms)
        total = np.zeros(self.parameters)
        np.add.at(total, self.places[chosen, 0], own[chosen])
        bias = np.array([one.bias or 0 for one in self.layers])[self.layer] + self.output
        there = chosen & (shared > 0)
        np.add.at(total, bias[there], (own * shared)[there])
        return Signatures(own[:, None], norms, total, 0.0)


def most_planted(layers: tuple[Layer, ...] | list[Layer]) -> int:
    """As many canaries as these layers have room for."""
    return min(MOST, sum(one.outputs * one.inputs for one in layers))


def plant(
    number: int,
    trainable: Trainable,
    real: FeatureSet,
    outputs: int,
    *,
    clipping_norm: float,
    records_per_person: int | None = None,
    generator: np.random.Generator,
) -> PlantedCanaries:
    """Canaries in random numbers of random linear layers, of random length, with random labels.

    Parameters
    ----------
    number : int, from 1 to as many as all weights of trained linear layers have numbers
        m.
    trainable : Trainable
    real : FeatureSet
        Records, whose shape the canaries take.
    outputs : int
        Labels to draw from.
    clipping_norm : float, > 0
        C: gradients are made from 1.5 to 150 times as long.
    records_per_person : int, >= 1, optional
        As in `craft`.
    generator : numpy.random.Generator
        The auditor's own.

    Raises
    ------
    InputError
        More canaries than places, or none; no linear layer is trained; or a real record looks like a canary.
    """
    layers = linear_layers(trainable)
    if not layers:
        raise InputError(
            "model.head is not audited by canaries: their gradients are planted in trained linear layers, and it has "
            "none. Use torch.nn.Linear in it."
        )
    if not 1 <= number <= most_planted(layers):
        raise InputError(
            f"canaries is {number!r}: it must be from 1 to {most_planted(layers)}, because each takes a number of a "
            "linear layer for itself. Take fewer."
        )
    if bool(marked(real.values.flatten(1).float(), number).any()):
        raise InputError(
            f"data: all features of a record are the same number above {MARK:.0f}, by which the audit knows its "
            "canaries. Scale the features."
        )
    ends = np.cumsum([one.outputs * one.inputs for one in layers])
    drawn = np.sort(generator.choice(int(ends[-1]), number, replace=False))
    generator.shuffle(drawn)
    layer = np.searchsorted(ends, drawn, side="right").astype(np.int64)
    within = drawn - (ends - np.diff(ends, prepend=0))[layer]
    inputs = np.array([one.inputs for one in layers])[layer]
    times = np.exp(generator.uniform(math.log(SHORTEST), math.log(LONGEST), number))
    return PlantedCanaries(
        tuple(layers),
        layer,
        (within // inputs).astype(np.int64),
        (within % inputs).astype(np.int64),
        clipping_norm * times / (records_per_person or 1),
        generator.integers(outputs, size=number, dtype=np.int64),
        sum(p.numel() for p in trainable.trained().values()),
        real.shape,
        real.offsets is not None and records_per_person is None,
        records_per_person,
    )


def moved_head(trainable: Trainable, generator: np.random.Generator) -> FloatArray:
    """A head that a server may send: the initial one and some noise, so that every layer has gradients.

    Returns
    -------
    float64 array, shape (P,)
        Numbers that float32 holds exactly.
    """
    parts = []
    for p in trainable.trained().values():
        inputs = p[0].numel() if p.dim() > 1 else 10 * SPREAD
        moved = p.detach().double().numpy() + SPREAD / math.sqrt(inputs) * generator.standard_normal(tuple(p.shape))
        parts.append(moved.astype(np.float32).astype(np.float64).ravel())
    return np.concatenate(parts)


def marked(rows: Tensor, count: int) -> Tensor:
    """Which rows (N, S) are marked with a number below `count`: bool, shape (N,)."""
    first = rows[:, :1]
    good = (first >= MARK) & (first < MARK + count) & (first == first.round())
    return (good & (rows == first)).all(1) & good.any(1)


def unmarked(marks: Tensor) -> Tensor:
    """The numbers that marks (N,) stand for: int64, shape (N,)."""
    return (marks.double() - MARK).long()
