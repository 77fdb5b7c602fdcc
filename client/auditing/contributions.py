"""Whether one record, or one person, moves a released sum by more than the clipping norm.

Residuals show a wrong sum of ordinary records, but not what the strangest record could do, and noise hides what few
records do. So here the noise is next to nothing, and data sets that differ in one unit go through production training
one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedhead.client.auditing.canaries import Canaries, flat, joined, load_flat
from fedhead.client.auditing.planted import TOKENS, PlantedCanaries, linear_layers
from fedhead.client.auditing.setup import Setup, Units
from fedhead.client.auditing.watching import watch
from fedhead.client.training import StepPlan, Trainer
from fedhead.common.errors import RunError
from fedhead.common.features import FeatureSet
from fedhead.common.privacy.audit.findings import Check
from fedhead.common.privacy.conditioning import longest_weights
from fedhead.common.privacy.noise import Streams

FloatArray = NDArray[np.float64]

TOLERANCE: Final = 2.0**-10
"""Most that a contribution may be beyond the clipping norm, in clipping norms: what a deployment's noise is widened for
rounding (`lattice.ETA`), and more than float32 loses in sums of a few hundred records."""

_NOISE: Final = 1e-8  # noise multiplier: ten steps of a deployment's lattice, lost in the tolerance
_SIZES: Final = (0, 1, 7, 33)  # units that are there already
_CHUNK: Final = 16  # of records: the largest data set comes in several
_REAL: Final = 2  # real units, and as many canaries, that are added
_LABELS: Final = 10  # that each crafted unit is tried with
_MANY: Final = 20_000  # trained numbers from which, as behind a cut, fewer heads, sizes and labels are tried
_LARGE: Final = {torch.float32: 2.0**6, torch.float64: 2.0**16}
"""Length of the huge head, in clipping norms; less where a deployed holder takes less. In float32 gradients under so
large a head would be rounding, which no claim covers."""

_ALIKE: Final = 2.0**16  # length of all alike rows together, in clipping norms
_HUGE: Final = 1e12  # the number that is huge in a record with one
_ORDINARY: Final = ("a real one", "a canary")


@dataclass(frozen=True)
class Contributions:
    """How far single units moved sums.

    Attributes
    ----------
    largest : float, >= 0
        Over all units, heads and data sets, in clipping norms; inf for a sum that is not a number or was refused.
    kind : str
        Of the unit that moved most.
    by_kind : dict of str to float
        The largest of each kind.
    by_size : dict of int to float
        The largest beside so many units that were there already.
    unit : "record" or "person"
    tried : int
        Pairs of data sets that were compared.
    """

    largest: float
    kind: str
    by_kind: dict[str, float]
    by_size: dict[int, float]
    unit: str
    tried: int

    def check(self) -> Check:
        """The verdict: a question without chance."""
        passed = self.largest <= 1 + TOLERANCE
        good = (
            f"No {self.unit}, however strange, moves a sum by more than the clipping norm that the noise is made for."
        )
        bad = f"{self.fault()} Epsilon is larger than claimed."
        return Check(
            "largest-contribution",
            f"The most that one {self.unit} moves a sum",
            passed,
            f"{self.largest:.6g} clipping norms at most, in {self.tried} pairs of data sets",
            good if passed else bad,
        )

    def fault(self) -> str:
        """What is wrong, from which units moved too much beside how many others."""
        fewest, most = min(self.by_size), max(self.by_size)
        ordinary = max((moved for kind, moved in self.by_kind.items() if kind in _ORDINARY), default=0.0)
        if self.by_size[fewest] > 2 * self.by_size[most] and self.by_size[fewest] > 1 + TOLERANCE:
            return (
                f"One {self.unit} moves a sum by {self.by_size[fewest]:.3g} clipping norms beside {fewest} others and "
                f"by {self.by_size[most]:.3g} beside {most}: the divisor follows the true count, which must not show."
            )
        if self.by_size[fewest] <= 1 + TOLERANCE < self.by_size[most]:
            return (
                f"One {self.unit} ({self.kind}) moves a sum by {self.by_size[most]:.3g} clipping norms beside {most} "
                f"others, and by {self.by_size[fewest]:.3g} beside {fewest}: {self.unit}s are clipped together, not "
                "each by itself."
            )
        if ordinary > 0.99 * self.largest:
            return (
                f"A {self.unit} like any other is clipped to {ordinary:.3g} times the clipping norm that the noise is "
                "made for."
            )
        return (
            f"One {self.unit} ({self.kind}) moves a sum by {self.largest:.3g} clipping norms: {self.unit}s of that "
            "kind are not clipped to the clipping norm that the noise is made for."
        )


def largest_contribution(setup: Setup) -> Contributions:
    """Add one unit after the other to data sets of several sizes, and measure how far the sum moves.

    Parameters
    ----------
    setup : Setup
        Best in float64. Of the plan, clipping norm, mechanism and optimizer are read; noise, rate and chunk are
        replaced.

    Returns
    -------
    Contributions

    Raises
    ------
    InputError
        The plan has no noise, or the head can't be audited so.

    Notes
    -----
    A sum is measured as the release times the declared divisor, under a noise multiplier of 1e-8, and with every record
    sampled. The true sensitivity is at least `largest`; that none of the units tried breaks the bound is evidence, and
    for the clipping itself the proof is in `fedhead.common.privacy.clipping`. A head drops nothing meanwhile: what
    dropout drops doesn't depend on what a unit holds, and whatever it drops, units are clipped by the same code.
    """
    setup.check_mechanism()
    setup = setup.without_dropout()
    plan, canaries, generator, real = setup.plan, setup.canaries, setup.generator, setup.real
    quiet = replace(
        plan,
        noise_multiplier=_NOISE,
        sample_rate=None if plan.sample_rate is None else 1.0,
        local_steps=1,
        proximal_mu=0.0,
        learning_rate=1e-3,
        chunk=_CHUNK,
    )
    measure = _Measure(setup.trainer(), quiet, setup.streams_for)
    made = setup.make_trainable()
    small = made.tail is None and len(flat(made)) <= _MANY
    added = list(_added(real, canaries, setup.task.outputs if small else 1, generator))
    by_kind: dict[str, float] = {}
    by_size: dict[int, float] = {}
    tried, turns = 0, 0
    for head in _heads(setup, small):
        for size in sorted({min(size, len(setup.targets)) for size in (_SIZES if small else _SIZES[::2])}):
            for there in _there(real, canaries, size):
                before = measure.sum(head, there)
                # two labels of each kind at a time, others with each data set: all of them come up
                turn, turns = turns, turns + 2
                chosen = (units[(turn + i) % len(units)] for units in added for i in range(min(2, len(units))))
                for kind, unit in [*chosen, *_again(there)]:
                    moved = _distance(measure.sum(head, joined(there, unit)), before) / plan.clipping_norm
                    by_kind[kind] = max(by_kind.get(kind, 0.0), moved)
                    by_size[size] = max(by_size.get(size, 0.0), moved)
                    tried += 1
    worst = max(by_kind, key=lambda kind: by_kind[kind])
    unit_name = "record" if canaries.records is None else "person"
    return Contributions(by_kind[worst], worst, by_kind, by_size, unit_name, tried)


class _Measure:
    """Sums of clipped gradients, from what production training releases."""

    def __init__(self, trainer: Trainer, plan: StepPlan, streams_for: Callable[[int], Streams]) -> None:
        self.trainer, self.plan, self.streams_for, self.count = trainer, plan, streams_for, 0

    def sum(self, head: FloatArray, units: Units) -> FloatArray | None:
        """The sum at a head, shape (P,); None where the round refused: whoever sees that has learned of a unit."""
        self.count += 1
        load_flat(self.trainer.trainable, head)
        try:
            seen = watch(self.trainer, *units, self.plan, self.streams_for(self.count))
        except RunError:
            return None
        found: FloatArray = seen.releases(self.plan).sum(0)
        return found


def _distance(a: FloatArray | None, b: FloatArray | None) -> float:
    if a is None or b is None:
        return math.inf
    moved = float(np.linalg.norm(a - b))
    return moved if math.isfinite(moved) else math.inf


def _heads(setup: Setup, small: bool) -> Iterator[FloatArray]:
    """One after the canaries; of small heads also zero, a random one, a huge one, and one whose outputs are all alike.

    Alike rows in the last layer let the gradient cancel on its way back, so that only its rounding goes on: whoever
    measures and sums with different rounding is wrong by all of it.
    """
    yield setup.sent_head()
    if not small:
        return
    start, generator = flat(setup.make_trainable()), setup.generator
    drawn = generator.standard_normal(len(start))
    yield np.zeros(len(start))
    yield start.double().numpy() + drawn
    made, norm = setup.make_trainable(), setup.plan.clipping_norm
    layers, huge = linear_layers(made), _LARGE[start.dtype] * norm
    if len(layers) == 1:
        persons = setup.canaries.records is not None
        huge = min(huge, 0.9 * longest_weights(layers[0].inputs, layers[0].outputs, norm, persons=persons))
    yield drawn / float(np.linalg.norm(drawn)) * huge
    if len(layers) > 1:
        alike, last = start.double().numpy() + drawn, layers[-1]
        if not made.normalize:
            first = slice(layers[0].weight, layers[0].weight + layers[0].outputs * layers[0].inputs)
            alike[first] /= _HUGE  # so that one huge number leaves hidden units where they have gradients
        rows = np.tile(generator.standard_normal(last.inputs), last.outputs)
        rows *= _ALIKE * norm / float(np.linalg.norm(rows))
        alike[last.weight : last.weight + len(rows)] = rows
        yield alike


def _there(real: Units, canaries: Canaries | PlantedCanaries, size: int) -> Iterator[Units]:
    """Data sets that a unit is added to: real units, and canaries all of one label."""
    features, targets = real
    yield features.slice(0, size), targets[:size]
    chosen = np.arange(len(canaries)) < size
    if chosen.any():
        alike = replace(canaries, labels=np.zeros_like(canaries.labels))
        yield alike.units(chosen)


def _again(there: Units) -> Iterator[tuple[str, Units]]:
    """A unit that is there already, once more, and the same with its label changed."""
    features, targets = there
    if len(targets):
        first, wanted = features.slice(0, 1), targets[:1]
        yield "a duplicate", (first, wanted)
        yield "a duplicate with another label", (first, torch.where(wanted > 0, 0, torch.where(wanted == 0, 1, -1)))


def _added(
    real: Units, canaries: Canaries | PlantedCanaries, outputs: int, generator: np.random.Generator
) -> Iterator[list[tuple[str, Units]]]:
    """Units to add, each with what it is; in a list those that differ in their label only."""
    features, targets = real
    for i in range(min(_REAL, len(targets))):
        yield [(_ORDINARY[0], (features.slice(i, i + 1), targets[i : i + 1]))]
    for i in range(min(_REAL, len(canaries))):
        yield [(_ORDINARY[1], canaries.units(np.arange(len(canaries)) == i))]
    shape, each = features.shape, canaries.records or 1
    labels = range(outputs) if outputs <= _LABELS else sorted({0, outputs - 1, *generator.choice(outputs, _LABELS - 2)})
    ordinary = torch.from_numpy(generator.standard_normal(shape)).float()
    one = torch.zeros(shape)
    one.view(-1)[int(generator.integers(one.numel()))] = _HUGE
    broken = ordinary.clone()
    broken.view(-1)[0] = torch.nan
    hostile = {
        "zeros": torch.zeros(shape),
        "1e30 everywhere": torch.full(shape, 1e30),
        "not a number": torch.full(shape, torch.nan),
        "one number that is not a number": broken,
        "inf": torch.full(shape, torch.inf),
        "one huge number": one,
        "long": 1e6 * ordinary,
        "tiny": 1e-30 * ordinary,
    }
    for kind, row in hostile.items():
        own = labels if bool(row.isfinite().all()) else (0,)
        yield [(kind, _unit(row.expand(each, *shape), int(label), canaries)) for label in own]
    if canaries.records is not None:
        for times, kind in ((1, "the most records"), (3, "more than the most records"), (64, "a great many records")):
            for row in (ordinary, 1e3 * ordinary):
                yield [(kind, _unit(row.expand(times * each, -1), 0, canaries))]
        mixed = torch.cat([ordinary.expand(each, -1), broken[None], one[None]])
        yield [("ordinary and broken records", _unit(mixed, 0, canaries))]


def _unit(rows: Tensor, label: int, canaries: Canaries | PlantedCanaries) -> Units:
    """One record, or one person with these records."""
    if canaries.records is None and isinstance(canaries, PlantedCanaries) and canaries.ragged:
        tokens = rows[:1].expand(TOKENS, *rows.shape[1:]).contiguous()
        return FeatureSet(tokens, torch.tensor([0, TOKENS])), torch.tensor([label])
    if canaries.records is None:
        return FeatureSet(rows[:1].contiguous()), torch.tensor([label])
    return FeatureSet(rows.contiguous(), torch.tensor([0, len(rows)])), torch.full((1, len(rows)), label)
