"""Rounds of production training on records with canaries, and all that an auditor sees of them.

The auditor plays a server that may send any head and knows all records but one: which canaries are among them.

Shapes: T steps of all rounds, P trained numbers, m canaries, S numbers of a canary's own column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedhead.client.auditing.canaries import joined, load_flat
from fedhead.client.auditing.planted import PlantedCanaries
from fedhead.client.auditing.reference import Reference, Signatures
from fedhead.client.auditing.setup import Setup, Units
from fedhead.client.auditing.watching import Seen, noise_scale, replay_error, watch
from fedhead.common.errors import InputError
from fedhead.common.privacy.lattice import lattice_step
from fedhead.common.privacy.noise import Streams
from fedhead.common.progress import advance

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

_TOLD: Final = 2.0**44  # steps: float64 then keeps a hundredth of a step through a product and a quotient

STRAY: Final = 1e-6  # clipping norms: above rounding, below anything that scores would notice


@dataclass(frozen=True)
class Observations:
    """What the rounds showed.

    Attributes
    ----------
    scores : float64 array, shape (m,)
        For each canary the sum over steps of the log-likelihood ratio of "in" against "out"; see `log_ratios`.
    included : bool array, shape (m,)
        Which were in. Drawn by fair coins before anything else and read by no score.
    residuals : float64 array, shape (T, P)
        Releases without the clipped sum of all that was in, in standard deviations of the noise: independent and
        standard normal if all is right.
    groups : dict of str to slice
        Parameter name -> its place among the P numbers.
    sampled : list of T int64 arrays, or None
        Each step's sample, as drawn; None without sampling.
    rates : set of float
        Sampling rates that were asked for; the plan's alone if all is right.
    records : int
        Units in the data set, canaries included.
    signal : float, in [0, 1]
        Mean squared norm of the part of a canary that scores see, in clipping norms.
    clipped : float, in [0, 1]
        Share of canaries, over all steps, whose gradient was at least as long as the clipping norm.
    along : float64 array, shape (T,)
        Each step's residual along its clipped sum: independent and standard normal if all is right. A sum that is
        longer or shorter than it should be shows here long before it shows in any one number.
    off_lattice : float, in [0, 0.5]
        Furthest that a released number was from a whole multiple of the lattice's step, in steps; 0 where there is no
        lattice (a simulation), or where floats are too coarse to tell.
    replay_error : float
        The largest of all rounds; see `watching.replay_error`. 0 up to rounding if all is right.
    unplanned_steps : int
        Steps seen beyond those planned, or short of them.
    empty : float64 array, shape (steps of a round, P)
        Residuals of a round on no records: noise alone.
    asked_twice : tuple of two float64 arrays, shape (P,), or None
        Residuals of the first step of the first round, and of that very round asked again: independent. The head is the
        same, because noise that is made from the round, the head or the records then comes back as well. None for a
        simulation's streams, whose draws are the same for the same round by design.
    steps_per_round : int
    """

    scores: FloatArray
    included: BoolArray
    residuals: FloatArray
    groups: dict[str, slice]
    sampled: list[IntArray] | None
    rates: set[float]
    records: int
    signal: float
    clipped: float
    along: FloatArray
    off_lattice: float
    replay_error: float
    unplanned_steps: int
    empty: FloatArray
    asked_twice: tuple[FloatArray, FloatArray] | None
    steps_per_round: int


def log_ratios(
    release: FloatArray, clean: FloatArray, own: FloatArray, places: IntArray, scale: float, rate: float
) -> FloatArray:
    """What one step says for each canary's being in, against its being out.

    Parameters
    ----------
    release : float64 array, shape (P,)
        The noised sum.
    clean : float64 array, shape (P,)
        The clipped sum of the records that are no canaries, as they were sampled.
    own : float64 array, shape (m, S)
        Each canary's clipped gradient in its own column.
    places : int64 array, shape (m, S)
        Where that column lies among the P numbers.
    scale : float, > 0
        Standard deviation of the noise.
    rate : float, in (0, 1]
        Probability with which a canary that is in takes part in the step; 1 without sampling.

    Returns
    -------
    float64 array, shape (m,)
        log(1 - q + q exp(a)), where a is the log-likelihood ratio of the canary's taking part in the step.

    Notes
    -----
    Which canaries were in is no argument: a score can't see it. Given all other records and their samples, the sum
    over steps is the most powerful test's statistic for what lies in the canary's own column (Neyman & Pearson 1933).
    """
    beyond = (release - clean)[places]  # (m, S)
    a = ((beyond * own).sum(1) - 0.5 * (own * own).sum(1)) / scale**2
    found: FloatArray = a if rate == 1 else np.logaddexp(np.log1p(-rate), np.log(rate) + a)
    return found


def observe(setup: Setup, rounds: int) -> Observations:
    """Put canaries among the records by fair coins, and train and watch.

    Parameters
    ----------
    setup : Setup
        Its streams are asked for one round more, on no records.
    rounds : int, >= 1

    Raises
    ------
    InputError
        The plan has no noise, canaries and records differ in unit, or the head can't be audited so.

    Notes
    -----
    Coins are fair and independent, canaries take the production path, and scores read no coin: the conditions under
    which bounds from guesses about canaries hold (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846).
    """
    _check(setup, rounds)
    audit = _Audit(setup, setup.generator.random(len(setup.canaries)) < 0.5)
    heads = [setup.sent_head() for _ in range(rounds + 1)]
    for number in range(1, rounds + 1):
        audit.round(heads[number - 1], setup.streams_for(number))
        advance("audit", number, rounds)
    empty = audit.empty(heads[rounds], setup.streams_for(rounds + 1))
    again, pair = setup.streams_for(1), None
    if not again.seeded:
        pair = audit.residuals[0], audit.again(heads[0], again)
    return audit.observations(empty, pair)


def _check(setup: Setup, rounds: int) -> None:
    setup.check_mechanism()
    setup.plan.event()  # refuses what breaks a rule
    if rounds < 1:
        raise InputError(f"rounds is {rounds!r}: it must be at least 1. Audit one round or more.")
    if (setup.targets.dim() == 2) != (setup.canaries.records is not None):
        raise InputError(
            f"canaries.records is {setup.canaries.records!r}: canaries must be persons exactly where the records are. "
            "Craft them with records_per_person for persons, without it for records."
        )


class _Audit:
    """One run of the experiment; see `observe`."""

    def __init__(self, setup: Setup, included: BoolArray) -> None:
        self.reference = Reference(setup.make_trainable(), setup.task)
        self.trainer = setup.trainer()
        self.shapes = [p.shape for p in self.trainer.parameters]
        self.real, self.plan, self.included = setup.real, setup.plan, included
        self.canaries = canaries = setup.canaries
        self.data = joined(setup.real, canaries.units(included))
        self.crafted = canaries.units()
        if isinstance(canaries, PlantedCanaries):
            self.places = canaries.places
        else:
            self.places = self.reference.places(canaries.columns)
        self.number_of = np.cumsum(included) - 1  # among those that are in
        self.scores = np.zeros(len(canaries))
        self.residuals: list[FloatArray] = []
        self.sampled: list[IntArray] = []
        self.rates: set[float] = set()
        self.along: list[float] = []
        self.signal, self.clipped, self.error, self.unplanned = 0.0, 0.0, 0.0, 0
        self.off_lattice = 0.0

    @property
    def rate(self) -> float:
        return float(self.plan.sample_rate or 1.0) if self.plan.mechanism == "poisson" else 1.0

    def see(self, head: FloatArray, data: Units, streams: Streams) -> Seen:
        load_flat(self.trainer.trainable, head)
        seen = watch(self.trainer, *data, self.plan, streams)
        self.error = max(self.error, replay_error(seen, self.plan, self.shapes))
        self.rates |= set(seen.rates.values())
        self.unplanned += abs(len(seen.gradients) - self.plan.local_steps)
        return seen

    def round(self, head: FloatArray, streams: Streams) -> None:
        """A round on all records: scores and residuals of its steps."""
        seen = self.see(head, self.data, streams)
        scale = noise_scale(self.plan, streams)
        for step, release in enumerate(seen.releases(self.plan)):
            clean, signatures = self.expected(seen, step)
            self.scores += log_ratios(release, clean, signatures.own, self.places, scale, self.rate)
            total = clean + signatures.total
            self.residuals.append((release - total) / scale)
            length = float(np.linalg.norm(total))
            if length > 0:
                self.along.append(float(self.residuals[-1] @ total) / length)
            if not streams.seeded:
                self.off_lattice = max(self.off_lattice, off_lattice(release, self.plan.clipping_norm))
            self.signal += float(np.square(signatures.own).sum(1).mean()) / self.plan.clipping_norm**2
            self.clipped += float((signatures.norms >= self.plan.clipping_norm).mean())
            if self.plan.mechanism == "poisson":
                self.sampled.append(_sample(seen, step))

    def expected(self, seen: Seen, step: int) -> tuple[FloatArray, Signatures]:
        """By the reference: the clean sum of a step's records, and its canaries."""
        head, norm, chosen, index = seen.heads[step].double().numpy(), self.plan.clipping_norm, self.included, None
        if self.plan.mechanism == "poisson":
            sample, others = _sample(seen, step), len(self.real[1])
            index = torch.from_numpy(sample[sample < others])
            chosen = chosen & np.isin(self.number_of + others, sample)
        clean = self.reference.clipped_sum(head, *self.real, norm, index, seen.masks[step])
        if isinstance(self.canaries, PlantedCanaries):
            return clean, self.canaries.signatures(norm, chosen)
        signatures = self.reference.signatures(head, *self.crafted, norm, self.canaries.columns, chosen)
        if signatures.stray > STRAY:
            raise InputError(
                "model.head is not audited by canaries: its first layer sees a feature vector more than once, and "
                "canaries would be seen in one another's columns. Use a linear or an mlp head."
            )
        return clean, signatures

    def empty(self, head: FloatArray, streams: Streams) -> FloatArray:
        """Residuals of a round on no records."""
        features, targets = self.data
        nothing = features.slice(0, 0), targets[:0]
        return self.see(head, nothing, streams).releases(self.plan) / noise_scale(self.plan, streams)

    def again(self, head: FloatArray, streams: Streams) -> FloatArray:
        """Residuals of the first step of a round that was asked for before."""
        seen = self.see(head, self.data, streams)
        clean, signatures = self.expected(seen, 0)
        released: FloatArray = seen.releases(self.plan)[0]
        return (released - clean - signatures.total) / noise_scale(self.plan, streams)

    def observations(self, empty: FloatArray, pair: tuple[FloatArray, FloatArray] | None) -> Observations:
        steps = len(self.residuals)
        return Observations(
            scores=np.nan_to_num(self.scores),  # a release that is not a number is for the residuals to show
            included=self.included,
            residuals=np.stack(self.residuals),
            groups=self.reference.groups(),
            sampled=self.sampled if self.plan.mechanism == "poisson" else None,
            rates=self.rates,
            records=len(self.data[1]),
            signal=self.signal / steps,
            clipped=self.clipped / steps,
            along=np.array(self.along),
            off_lattice=self.off_lattice,
            replay_error=self.error,
            unplanned_steps=self.unplanned,
            empty=empty,
            asked_twice=pair,
            steps_per_round=self.plan.local_steps,
        )


def off_lattice(release: FloatArray, clipping_norm: float) -> float:
    """Furthest that a number is from a multiple of the lattice's step, in steps; 0 where floats can't tell."""
    scaled = release / lattice_step(clipping_norm)
    if not np.isfinite(scaled).all() or np.abs(scaled).max(initial=0.0) > _TOLD:
        return 0.0
    return float(np.abs(scaled - np.round(scaled)).max(initial=0.0))


def _sample(seen: Seen, step: int) -> IntArray:
    """A step's sample; none if none was drawn, so that whatever took part without one is a residual."""
    return seen.samples.get(step, np.empty(0, dtype=np.int64))
