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

from fedhead.client.auditing.canaries import flat, joined, load_flat
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
    """

    share: float
    distance: float
    sums: int

    def check(self) -> Check:
        """The verdict: a question without chance."""
        passed = self.share <= 1
        good = "Apart from the noise every sum is that of the records as drawn, each clipped by itself."
        bad = (
            "Apart from the noise a sum isn't that of the records as drawn, each clipped by itself: some are clipped "
            "too little, counted twice, mixed with others, or left out because of others."
        )
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
    Two heads under which gradients are long, one that fits the records, under which they are short and not clipped,
    and more than one chunk. Behind a cut, and with many trained numbers, fewer records are looked at. Both sides read
    the same sample and drop the same, so that neither is looked at here.
    """
    plan, canaries = setup.plan, setup.canaries
    quiet = replace(plan, noise_multiplier=_NOISE, proximal_mu=0.0)
    made = setup.make_trainable()
    reference = Reference(made, setup.task)
    small = made.tail is None and reference.parameters <= _MOST
    real = setup.real if small else (setup.features.slice(0, _FEW), setup.targets[:_FEW])
    worst = Exactness(0.0, 0.0, 0)
    heads = list(_heads(setup))
    rounds: list[tuple[Units, FloatArray, StepPlan]] = [(real, head, quiet) for head in heads]
    if canaries.records is None and small:
        many = torch.arange(_MANY) % len(real[1])
        rounds.append(((FeatureSet(real[0].values[many]), real[1][many]), heads[0], quiet))
    elif canaries.records is None:
        rounds.append((real, heads[0], replace(quiet, chunk=max(1, len(real[1]) // 3))))
    trainer = setup.trainer(double=True)
    for number, (units, head, plan_of) in enumerate(rounds, 1):
        load_flat(trainer.trainable, head)
        data = joined(units, canaries.units())
        allowed = ALLOWED + EACH * len(data[1]) + (PERSON if canaries.records is not None else 0.0)
        try:
            seen = watch(trainer, *data, plan_of, setup.streams_for(number))
        except RunError:
            return Exactness(math.inf, math.inf, worst.sums + 1)
        for step, release in enumerate(seen.releases(plan_of)):
            expected = _expected(setup, reference, data, seen, step)
            apart = float(np.linalg.norm(release - expected)) / plan.clipping_norm
            apart = apart if math.isfinite(apart) else math.inf
            worst = largest([worst, Exactness(apart / allowed, apart, 1)])
    return worst


def largest(found: Sequence[Exactness]) -> Exactness:
    """The worst of all that were found."""
    shares, distances, sums = zip(*((one.share, one.distance, one.sums) for one in found), strict=True)
    return Exactness(max(shares), max(distances), sum(sums))


def _expected(setup: Setup, reference: Reference, data: Units, seen: Seen, step: int) -> FloatArray:
    """The sum of a step by the reference: of all units, or without those whose gradients are planted, and theirs."""
    (units, wanted), norm, canaries = data, setup.plan.clipping_norm, setup.canaries
    index = np.arange(len(wanted))
    if setup.plan.mechanism == "poisson":
        index = seen.samples.get(step, np.empty(0, dtype=np.int64))
    planted = np.zeros(reference.parameters)
    if isinstance(canaries, PlantedCanaries):
        others = len(wanted) - len(canaries)
        chosen = np.isin(np.arange(len(canaries)) + others, index)
        planted, index = canaries.signatures(norm, chosen).total, index[index < others]
    head = seen.heads[step].double().numpy()
    return planted + reference.clipped_sum(head, units, wanted, norm, torch.from_numpy(index), seen.masks[step])


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
