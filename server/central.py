"""Privacy of a whole data holder: the server clips every update and adds noise once, to their sum.

    update    received minus sent head, all trained parameters together; a data holder that sent none has the update 0
    clip      to L2 norm clipping_norm; what is not finite contributes nothing
    noise     Gaussian, standard deviation noise_multiplier * clipping_norm in each coordinate, on the sum
    divide    by the declared size of the cohort, never by the number of replies; every holder has the same weight

The strategy then sees one update, as if a single holder had sent it, so that its server optimizer applies unchanged.

Guarantee: each round is a Gaussian mechanism of this noise multiplier for every holder that was asked, under adding or
removing one holder's update, whatever is in it; all rounds together are what a `GaussianEvent` of one step for each of
them costs. No amplification by sampling is claimed: which holders are asked, and which of them answer, is not hidden.
The server sees the updates before any noise and is trusted with them. Reference: McMahan, Ramage, Talwar, Zhang (2018),
arXiv:1710.06963, Algorithm 1, with a fixed denominator and without its sampling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from fedhead.common import protocol
from fedhead.common.config import RunConfig
from fedhead.common.errors import Refused, RunError
from fedhead.common.planned import central
from fedhead.common.privacy.clipping import SHRINK
from fedhead.common.privacy.events import GaussianEvent
from fedhead.common.privacy.ledger import Declaration, Denied, Ledger, Repeated, Reservation
from fedhead.common.privacy.noise import Streams, simulation_streams, system_streams
from fedhead.common.privacy.terms import Terms
from fedhead.common.round_request import RoundRequest

LEDGER: Final = "server-ledger.sqlite"
"""The server's own ledger, in the folder of the run."""
DOMAIN: Final = "default"
UNSEEN: Final = "unseen"  # in place of the data's fingerprint
_STREAM: Final = "(server)"  # in place of a holder's name: no holder draws from this stream


def clipped_sum(updates: Iterable[Tensor], clipping_norm: float, coordinates: int) -> Tensor:
    """The sum of updates, each scaled to an L2 norm of at most the clipping norm.

    Parameters
    ----------
    updates : iterable of Tensor, shape (P,)
        One a data holder, all trained parameters together; any values.
    clipping_norm : float, > 0
        Sensitivity of the sum, in units of the parameters.
    coordinates : int
        P; the sum of no updates has that shape too.

    Returns
    -------
    Tensor, float64, shape (P,)
        Finite.

    Notes
    -----
    Guarantee: adding or removing one update, inf and NaN included, moves the sum by at most clipping_norm (L2), up to
    the rounding of float64 sums, which `fedhead.common.privacy.lattice.ETA` covers.
    """
    total = torch.zeros(coordinates, dtype=torch.float64)
    for update in updates:
        values = update.to(torch.float64)
        largest = float(values.abs().max()) if coordinates else 0.0  # NaN and inf stay what they are
        if not 0 < largest < float("inf"):
            continue  # left out, not multiplied: 0 times NaN is NaN
        # by the largest value first, so that no square leaves the range of floats
        norm = float((values / largest).norm())
        if norm * largest > clipping_norm * SHRINK:
            values = (values / largest) * (clipping_norm * SHRINK / norm)
        total += values
    return total


@dataclass
class Central:
    """Turns the updates of a round into one noised update, and charges it.

    Attributes
    ----------
    noise_multiplier : float, > 0
    clipping_norm : float, > 0
    cohort : int
        Declared number of holders in a round: the divisor.
    seed : int or None
        Of a simulation's noise; None draws it from the operating system.
    ledger : Ledger or None
        Where rounds are charged before their noise is drawn; None in tests of the arithmetic alone.
    """

    noise_multiplier: float
    clipping_norm: float
    cohort: int
    seed: int | None
    ledger: Ledger | None = None
    _released: list[tuple[str, int, bytes | None]] = field(default_factory=list)

    @property
    def event(self) -> GaussianEvent:
        """What a round costs a holder that was asked, whether or not it answered."""
        return GaussianEvent(self.noise_multiplier, self.clipping_norm, 1)

    def combine(
        self, request: RoundRequest, asked: Sequence[str], sent: ArrayRecord, replies: list[Message]
    ) -> Message:
        """One reply in place of all: the sent head plus the noised mean update.

        Parameters
        ----------
        request : RoundRequest
        asked : sequence of str
            Names of all holders of the round's cohort; each is charged, durably, before noise is drawn.
        sent : ArrayRecord
            The head that they were sent.
        replies : list of Message
            With arrays of the head's names and shapes; in an order that does not depend on their arrival.

        Raises
        ------
        LedgerError
            The ledger can't be used: nothing was drawn.
        RunError
            The ledger does not admit the round.
        """
        like = {name: torch.from_numpy(array.numpy()) for name, array in sent.items()}
        start = _flat(like)
        streams = self._streams(request.round)
        granted, kept = self._reserve(request, asked, streams.source)
        if kept:  # the process ended between this release and its checkpoint
            head = torch.frombuffer(bytearray(kept), dtype=torch.float64)
        else:
            total = clipped_sum(_updates(replies, like, start), self.clipping_norm, len(start))
            noise = streams.noise(0)
            noised = noise.add(total, noise_multiplier=self.noise_multiplier, clipping_norm=self.clipping_norm)
            head = start + noised / self.cohort
            self._keep(granted, head)
        pieces = torch.split(head, [value.numel() for value in like.values()])
        state = {name: piece.view(like[name].shape) for name, piece in zip(like, pieces, strict=True)}
        weight = MetricRecord({protocol.WEIGHT: 1})
        return Message(
            RecordDict({protocol.ARRAYS: protocol.to_arrays(state), protocol.METRICS: weight}), 1, MessageType.TRAIN
        )

    def close(self) -> None:
        """Write what was collected, and close the ledger."""
        if self.ledger is not None:
            if self._released:
                self.ledger.release(self._released)
            self._released = []
            self.ledger.close()

    def _keep(self, granted: list[tuple[str, int]], head: Tensor) -> None:
        """Write down that a head was released; without a seed the head, too, once, for a run that goes on from before.

        Noise that is drawn anew would be another release.
        """
        if self.seed is not None:  # a repeated round draws the same noise: written with the next one's, in one go
            self._released = [(name, sequence, None) for name, sequence in granted]
        elif self.ledger is not None and granted:
            (first, sequence), *others = granted
            whole = (first, sequence, head.numpy().tobytes())
            self.ledger.release([whole, *((name, number, b"") for name, number in others)])

    def _streams(self, number: int) -> Streams:
        return system_streams() if self.seed is None else simulation_streams(self.seed, _STREAM, number)

    def _reserve(self, request: RoundRequest, asked: Sequence[str], source: str) -> tuple[list[tuple[str, int]], bytes]:
        """Charge a round: each holder's entry, or the head that was released for this very round."""
        if self.ledger is None:
            return [], b""
        digest = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
        done, self._released = self._released, []
        outcomes = self.ledger.reserve(
            [
                Reservation(
                    holder=name,
                    domain=DOMAIN,
                    run=request.run,
                    round=request.round,
                    digest=digest,
                    event=self.event,
                    unit="holder",
                    fingerprint=UNSEEN,
                    noise=source,
                    seeded=self.seed is not None,
                )
                for name in asked
            ],
            done,
        )
        granted = []
        kept = [outcome.payload for outcome in outcomes if isinstance(outcome, Repeated)]
        if self.seed is None and len(kept) == len(asked) and kept[0]:
            return [], kept[0]
        for name, outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, Repeated) and self.seed is None:
                raise RunError(
                    f"round {request.round} was released before, by the server's own ledger: noise drawn anew would be "
                    "another release, and none was drawn. Start the run anew in another folder."
                )
            if not isinstance(outcome, Denied):
                granted.append((name, outcome.sequence))
            # a run that was stopped repeats rounds after its checkpoint; from the same seed they are no new release
            elif outcome.reason != "stale" or self.seed is None:
                raise RunError(
                    f"round {request.round} is refused by the server's own ledger ({outcome.reason}): no noise was "
                    "drawn. Start the run anew in another folder."
                )
        return granted, b""


def central_of(
    config: RunConfig, noise_multiplier: float, holders: Sequence[str], folder: Path, simulated: bool
) -> Central | None:
    """What the server does for the unit `holder`; None for any other, and for a run without privacy.

    Parameters
    ----------
    noise_multiplier : float
        As planned for the run.
    holders : sequence of str
        Names. Where the recipe gives an epsilon, it is the budget of each in the server's ledger.
    folder : Path
        Of the run; the ledger is kept in it.
    simulated : bool
        Whether noise may come from the recipe's seed.
    """
    privacy = config.privacy
    if not central(config):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / LEDGER)
    if privacy.epsilon is not None:
        terms = Terms(privacy.epsilon, privacy.delta)
        ledger.declare_all([Declaration(name, DOMAIN, terms) for name in holders])
    return Central(
        noise_multiplier,
        privacy.clipping_norm,
        config.holders.per_round or config.holders.count,
        config.run.seed if simulated else None,
        ledger,
    )


def _updates(replies: list[Message], like: Mapping[str, Tensor], start: Tensor) -> Iterable[Tensor]:
    for reply in replies:
        arrays = reply.content.array_records.get(protocol.ARRAYS, ArrayRecord())
        try:
            yield _flat(protocol.from_arrays(arrays, like)) - start
        except Refused:
            # that it isn't finite may be due to one record: it goes into no log and no result
            continue


def _flat(state: Mapping[str, Tensor]) -> Tensor:
    """All parameters as one float64 vector; the difference of two finite float32 numbers is then finite."""
    return torch.cat([value.detach().to("cpu", torch.float64).flatten() for value in state.values()])
