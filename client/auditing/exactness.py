"""Whether a round's sums are, number for number, those of an independent reference, with noise next to nothing.

Under the claimed noise a wrong sum of a few records is lost: with 250 records and noise of five clipping norms even a
third more on every second round hardly shows. Here the noise is a hundred-millionth, and one record that is clipped a
hundredth too little stands out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedhead.client.auditing.canaries import flat, joined, load_flat
from fedhead.client.auditing.diagnosis import fault_of
from fedhead.client.auditing.planted import PlantedCanaries
from fedhead.client.auditing.reference import Reference
from fedhead.client.auditing.setup import Setup, Units, still
from fedhead.client.auditing.watching import Seen, watch
from fedhead.client.training import CHUNK, StepPlan
from fedhead.common.errors import RunError
from fedhead.common.features import FeatureSet
from fedhead.common.privacy.audit.findings import Check
from fedhead.common.privacy.clipping import finite_records

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

ALLOWED: Final = 2.0**-10
"""Most that a sum may be from the reference, in clipping norms, beside `EACH` a unit: rounding, as in contributions."""
EACH: Final = 2.0**-19
"""Production aims 2^-20 below the clipping norm. All is compared in float64, also for a simulation: float32 would lose
more under large logits, and the code is the same."""
PERSON: Final = 2.0**-6
"""More for persons: one whose records cancel is taken for longer than it is; see `Reference`."""

_NOISE: Final = 1e-8  # noise multiplier
_FITTED: Final = 60  # steps of Adam on the real records: gradients get short
_RATE: Final = 0.1
_BRIEFLY, _SLOW = 15, 0.01  # the same behind a cut
_MANY: Final = CHUNK + 33  # units in a data set of several chunks
_MOST: Final = 20_000  # trained numbers up to which that is looked at: a few seconds
_TELLING: Final = 20  # units in the smallest data set, or a quarter of the trained numbers
_TOLD: Final = 2**24  # numbers of all gradients up to which a fault is explained: 128 MB
_FEW: Final = 64  # records that a head is fitted to, and a whole round is made of, behind a cut or with more numbers


@dataclass(frozen=True)
class Exactness:
    """How far sums were from the reference.

    Attributes
    ----------
    share : float, >= 0
        The largest distance of a sum, as a share of what is allowed; inf for one that is no number or was refused.
    distance : float, >= 0
        The same in clipping norms.
    sums : int
        That were compared.
    fault : str
        What is wrong with the first that failed, in a sentence; "" if none did.
    """

    share: float
    distance: float
    sums: int
    fault: str = ""

    def check(self) -> Check:
        """The verdict: a question without chance."""
        passed = self.share <= 1
        good = "Apart from the noise every sum is that of the records as drawn, each clipped by itself."
        bad = f"Apart from the noise a sum is wrong. {self.fault}".strip()
        figure = f"{self.distance:.2g} clipping norms apart at most, in {self.sums} sums"
        return Check("exact-sums", "Sums against an independent reference", passed, figure, good if passed else bad)


def largest_difference(setup: Setup) -> Exactness:
    """Compare the sums of whole rounds with `Reference`, step by step, at each step's own head.

    Parameters
    ----------
    setup : Setup
        Of the plan, the noise is replaced; steps, rate, chunk and optimizer stay.

    Notes
    -----
    A few records first, so few that a fault can be told by name. Then with canaries: two heads under which gradients
    are long, one that fits the records, under which they are short and not clipped, and more than one chunk. Behind a
    cut, and with many trained numbers, fewer records are looked at. Both sides read the same sample and drop the same,
    so that neither is looked at here.
    """
    plan, canaries = setup.plan, setup.canaries
    quiet = replace(plan, noise_multiplier=_NOISE, proximal_mu=0.0)
    made = setup.make_trainable()
    reference = Reference(made, setup.task)
    small = made.tail is None and reference.parameters <= _MOST
    real = setup.real if small else (setup.features.slice(0, _FEW), setup.targets[:_FEW])
    worst = Exactness(0.0, 0.0, 0)
    heads = list(_heads(setup))
    crafted = canaries.units()
    few = min(_TELLING, max(1, reference.parameters // 4))
    rounds: list[tuple[Units, FloatArray, StepPlan]] = [((real[0].slice(0, few), real[1][:few]), heads[0], quiet)]
    rounds += [(joined(real, crafted), head, quiet) for head in heads]
    if canaries.records is None and small:
        many = torch.arange(_MANY) % len(real[1])
        rounds.append((joined((FeatureSet(real[0].values[many]), real[1][many]), crafted), heads[0], quiet))
    elif canaries.records is None:
        rounds.append((joined(real, crafted), heads[0], replace(quiet, chunk=max(1, len(real[1]) // 3))))
    trainer, unit = setup.trainer(double=True), "record" if canaries.records is None else "person"
    for number, (data, head, plan_of) in enumerate(rounds, 1):
        load_flat(trainer.trainable, head)
        allowed = ALLOWED + EACH * len(data[1]) + (PERSON if canaries.records is not None else 0.0)
        try:
            seen = watch(trainer, *data, plan_of, setup.streams_for(number))
        except RunError:
            fault = worst.fault or f"A round of {len(data[1])} {unit}s was refused: they show by that alone."
            return Exactness(math.inf, math.inf, worst.sums + 1, fault)
        for step, release in enumerate(seen.releases(plan_of)):
            stepped = _Step(setup, reference, data, seen, step, planted=number > 1)
            apart = float(np.linalg.norm(release - stepped.expected())) / plan.clipping_norm
            apart = apart if math.isfinite(apart) else math.inf
            fault = "" if apart <= allowed else stepped.fault(release, unit)
            worst = largest([worst, Exactness(apart / allowed, apart, 1, fault)])
    return worst


def largest(found: Sequence[Exactness]) -> Exactness:
    """The worst of all that were found, with the fault of the first that has one."""
    shares, distances, sums = zip(*((one.share, one.distance, one.sums) for one in found), strict=True)
    return Exactness(max(shares), max(distances), sum(sums), next((one.fault for one in found if one.fault), ""))


@dataclass(frozen=True)
class _Step:
    """A step of a round that was seen, and what it was of; `planted` says that its last units are the canaries."""

    setup: Setup
    reference: Reference
    data: Units
    seen: Seen
    step: int
    planted: bool

    @property
    def head(self) -> FloatArray:
        return self.seen.heads[self.step].double().numpy()

    def drawn(self) -> tuple[Tensor, BoolArray]:
        """Positions of the units that were drawn, without those whose gradients are planted; and which of these."""
        canaries, number = self.setup.canaries, len(self.data[1])
        index = np.arange(number)
        if self.setup.plan.mechanism == "poisson":
            index = self.seen.samples.get(self.step, np.empty(0, dtype=np.int64))
        planted = len(canaries) if self.planted and isinstance(canaries, PlantedCanaries) else 0
        others = number - planted
        return torch.from_numpy(index[index < others]), np.isin(np.arange(planted) + others, index)

    def expected(self) -> FloatArray:
        """The sum by the reference."""
        (index, chosen), norm, canaries = self.drawn(), self.setup.plan.clipping_norm, self.setup.canaries
        total = self.reference.clipped_sum(self.head, *self.data, norm, index, self.seen.masks[self.step])
        if len(chosen) and isinstance(canaries, PlantedCanaries):
            total = total + canaries.signatures(norm, chosen).total
        return total

    def fault(self, release: FloatArray, unit: str) -> str:
        """What is wrong with what was released instead."""
        (index, chosen), canaries = self.drawn(), self.setup.canaries
        if (len(index) + chosen.sum()) * self.reference.parameters > _TOLD:
            return f"It isn't that of the {unit}s as drawn, each clipped by itself."
        rows = self.reference.gradients(self.head, *self.data, index, self.seen.masks[self.step])
        if len(chosen) and isinstance(canaries, PlantedCanaries):
            ones = (np.arange(len(chosen)) == i for i in chosen.nonzero()[0])
            rows = np.concatenate([rows, *(canaries.signatures(math.inf, one).total[None] for one in ones)])
        return fault_of(release, rows, self.setup.plan.clipping_norm, unit)


def _heads(setup: Setup) -> Iterator[FloatArray]:
    """Two after the canaries, and one that fits some real units."""
    for _ in range(2):
        yield setup.sent_head()
    model = still(setup.make_trainable().double())
    targets = setup.targets
    if targets.dim() == 2:  # of persons record after record
        features, wanted = FeatureSet(setup.features.values), targets[targets >= 0]
    else:
        features, wanted = setup.features, targets
    values, lengths = features.batch(slice(0, len(features) if model.tail is None else _FEW))
    keep = finite_records(values, lengths)
    values, wanted = values[keep].double(), wanted[: len(values)][keep]
    lengths = None if lengths is None else lengths[keep]
    optimizer = torch.optim.Adam(model.trained().values(), lr=_RATE if model.tail is None else _SLOW)
    for _ in range(_FITTED if model.tail is None else _BRIEFLY):
        optimizer.zero_grad()
        torch.autograd.backward(setup.task.losses(model(values, lengths), wanted).mean())
        optimizer.step()
    yield flat(model).float().double().numpy()
