"""Whether a round's sums are, number for number, those of an independent reference, with noise next to nothing.

Under the claimed noise a wrong sum of a few records is lost: with 250 records and noise of five clipping norms even a
third more on every second round hardly shows. Here the noise is a hundred-millionth, and one record that is clipped a
hundredth too little stands out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedhead.client.auditing.canaries import flat, joined, load_flat, sent_head
from fedhead.client.auditing.reference import Reference
from fedhead.client.auditing.setup import Setup
from fedhead.client.auditing.watching import watch
from fedhead.client.training import CHUNK
from fedhead.common.errors import RunError
from fedhead.common.features import FeatureSet
from fedhead.common.privacy.audit.findings import Check

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
_MANY: Final = CHUNK + 33  # units in a data set of several chunks
_MOST: Final = 20_000  # trained numbers up to which that is looked at: a few seconds


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
    and for small heads a data set of more than one chunk. Both sides read the same sample, so that sampling isn't
    looked at here.
    """
    plan, canaries = setup.plan, setup.canaries
    quiet = replace(plan, noise_multiplier=_NOISE, proximal_mu=0.0)
    trainer, reference = setup.trainer(double=True), Reference(setup.make_trainable(), setup.task)
    data = joined(setup.real, canaries.units())
    share = distance = 0.0
    sums = 0
    rounds = [(data, head) for head in _heads(setup)]
    if canaries.records is None and reference.parameters <= _MOST:
        many = torch.arange(_MANY) % len(data[1])
        rounds.append(((FeatureSet(data[0].values[many]), data[1][many]), rounds[0][1]))
    for number, ((units, wanted), head) in enumerate(rounds, 1):
        load_flat(trainer.trainable, head)
        allowed = ALLOWED + EACH * len(wanted) + (PERSON if canaries.records is not None else 0.0)
        try:
            seen = watch(trainer, units, wanted, quiet, setup.streams_for(number))
        except RunError:
            return Exactness(math.inf, math.inf, sums + 1)
        for step, release in enumerate(seen.releases(quiet)):
            index = None
            if plan.mechanism == "poisson":
                index = torch.from_numpy(seen.samples.get(step, np.empty(0, dtype=np.int64)))
            expected = reference.clipped_sum(
                seen.heads[step].double().numpy(), units, wanted, plan.clipping_norm, index
            )
            apart = float(np.linalg.norm(release - expected)) / plan.clipping_norm
            apart = apart if math.isfinite(apart) else math.inf
            share, distance, sums = max(share, apart / allowed), max(distance, apart), sums + 1
    return Exactness(share, distance, sums)


def _heads(setup: Setup) -> Iterator[FloatArray]:
    """Two after the canaries, and one that fits the real units."""
    for _ in range(2):
        yield sent_head(setup.make_trainable(), setup.canaries, setup.generator)
    model = setup.make_trainable().double()
    rows, targets = setup.features.values, setup.targets
    keep = rows.isfinite().all(1)
    values, wanted = rows[keep].double(), targets[targets >= 0][keep]  # of persons, record after record
    optimizer = torch.optim.Adam(model.trained().values(), lr=_RATE)
    for _ in range(_FITTED):
        optimizer.zero_grad()
        torch.autograd.backward(setup.task.losses(model(values, None), wanted).mean())
        optimizer.step()
    yield flat(model).float().double().numpy()
