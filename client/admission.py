"""Between a request and its training: the holder's limits, then its ledger.

    check      limits of the holder's own, from the request alone          -> a fixed code
    admit      reserve the whole round in the ledger, durably               -> a fixed code, or the stored release
    (train)    noise is drawn only now
    release    keep the release, durably, and mark it released; then it may leave

Nothing of the records is read before `admit` has returned. A round that was reserved and never released stays spent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from flwr.app import RecordDict

from fedhead.client.policy import check_request
from fedhead.common.config.limits import Budget, Limits
from fedhead.common.errors import Refused
from fedhead.common.privacy.events import CountEvent, Event, PoissonEvent, event_of
from fedhead.common.privacy.ledger import (
    Declaration,
    Denied,
    Granted,
    Ledger,
    LedgerError,
    Mark,
    Plan,
    Repeated,
    Reservation,
)
from fedhead.common.protocol import Asked, pack
from fedhead.common.refusals import (
    BEYOND_BUDGET,
    BEYOND_PLAN,
    BEYOND_RUN,
    CHANGED_ROUND,
    NO_LEDGER,
    OLD_LEDGER,
    OTHER_UNIT,
    STALE_ROUND,
    refusal,
)
from fedhead.common.round_request import RoundRequest

log = logging.getLogger("fedhead.client")

CODES: Mapping[str, int] = {
    "budget": BEYOND_BUDGET,
    "run": BEYOND_RUN,
    "plan": BEYOND_PLAN,
    "changed": CHANGED_ROUND,
    "stale": STALE_ROUND,
    "unit": OTHER_UNIT,
}
REASONS: Mapping[str, str] = {"unit": "its budget was begun with another privacy unit, and one budget covers one unit"}
"""What the holder's own log says in place of a word."""
DOMAIN = "default"
TRUSTING = ".holder-unit"
"""Ends the domain of runs under the unit "holder": their noise is the server's, and so is their account. Units are
never mixed in one figure."""


@dataclass(frozen=True)
class Admitted:
    """A round that may be trained, or was: `payload` is then the release that was kept."""

    sequence: int = 0
    mark: Mark | None = None
    payload: bytes | None = None
    expected: bool = False


@dataclass
class Admission:
    """What admits the requests to the holders of one process.

    Parameters
    ----------
    ledger : Ledger or None
        None only for a simulation's comparison without privacy, whose holders and head are thrown away.
    limits : Limits or None
        None in a simulation that sets none.
    budget : Budget or None
        None where nothing limits the sum, as in a simulation that sets none: everything is written down all the same.
    fingerprints : mapping of str to str
        Holder -> digest of its records; evidence only.
    simulated : bool
        Whether noise comes from the recipe's seed. A round that is repeated then draws the same noise, so that nothing
        has to be kept; and what is written down is collected and written with the next round.
    """

    ledger: Ledger | None
    limits: Limits | None = None
    budget: Budget | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    simulated: bool = False
    _expected: dict[tuple[str, str], Granted | Repeated | Denied] = field(default_factory=dict)
    _released: list[tuple[str, int, bytes | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.ledger is not None and self.budget is not None:
            terms, disjoint = self.budget.terms(), tuple(self.budget.disjoint_from)
            self.ledger.declare_all(
                [Declaration(name, self.budget.domain, terms, disjoint) for name in self.fingerprints]
            )

    def check(self, request: RoundRequest) -> None:
        """Hold a request to the holder's limits.

        Raises
        ------
        Refused
            With a fixed code.
        """
        if self.limits is not None:
            budgeted = self.budget is not None and request.unit != "holder"
            check_request(request, self.limits, budgeted=budgeted)

    def expect(self, asked: Sequence[tuple[str, Asked]], noise: str) -> None:
        """Reserve a round for many holders in one transaction; `admit` then finds it done.

        Holders whose request is beyond their limits are left out: `admit` refuses them.
        """
        if self.ledger is None:
            return
        self._expected.clear()
        good = [(holder, one) for holder, one in asked if self._within(one.request)]
        done, self._released = self._released, []
        found = self.ledger.reserve([self._reservation(holder, one, noise) for holder, one in good], done)
        for (holder, one), outcome in zip(good, found, strict=True):
            self._expected[holder, one.digest] = outcome

    def granted(self, holder: str, digest: str) -> bool:
        """Whether a round that was expected is reserved, durably, and nothing of it was released before."""
        return isinstance(self._expected.get((holder, digest)), Granted)

    def admit(self, holder: str, asked: Asked, noise: str) -> Admitted:
        """Admit a round, durably, or refuse it; see the module.

        Parameters
        ----------
        noise : str
            Where the noise will come from; it is written into the ledger.

        Raises
        ------
        Refused
            With a fixed code that depends on limits, ledger and request only.
        """
        self.check(asked.request)
        if self.ledger is None:
            return Admitted()
        try:
            if asked.seen is not None and not self.ledger.has(holder, asked.seen):
                log.error(
                    "%s: the ledger is older than the server has seen it: restore the newest copy, or stop what joins "
                    "with this key and another ledger", holder,
                )  # fmt: skip
                raise refusal(OLD_LEDGER)
            outcome = self._expected.pop((holder, asked.digest), None)
            expected = outcome is not None
            if outcome is None:
                (outcome,) = self.ledger.reserve([self._reservation(holder, asked, noise)])
        except LedgerError as fault:
            log.error("%s: %s", holder, fault)
            raise refusal(NO_LEDGER) from fault
        if isinstance(outcome, Denied):
            why = REASONS.get(outcome.reason, outcome.reason)
            log.warning("%s: round %d is refused: %s", holder, asked.request.round, why)
            raise refusal(CODES[outcome.reason])
        if isinstance(outcome, Repeated):
            return Admitted(outcome.sequence, outcome.mark, outcome.payload)
        return Admitted(outcome.sequence, outcome.mark, expected=expected)

    def release(self, holder: str, admitted: Admitted, content: RecordDict) -> Mark | None:
        """Keep a release, durably, before it leaves; gives where the ledger then stands.

        Raises
        ------
        Refused
            The ledger can't be written: nothing may leave.
        """
        if self.ledger is None:
            return None
        done = (holder, admitted.sequence, None if self.simulated else pack(content))
        if admitted.expected:  # written with the next round's
            self._released.append(done)
            return admitted.mark
        try:
            (mark,) = self.ledger.release([done])
        except LedgerError as fault:
            log.error("%s: %s", holder, fault)
            raise refusal(NO_LEDGER) from fault
        return mark

    def fail(self, holder: str, admitted: Admitted) -> None:
        """Write down that a round which was admitted released nothing; it stays spent."""
        if self.ledger is None:
            return
        try:
            self.ledger.abandon(holder, admitted.sequence)
        except LedgerError as fault:  # without that row it counts as spent all the same
            log.error("%s: %s", holder, fault)

    def mark(self, holder: str) -> Mark | None:
        """Where a holder's ledger stands; None where it has none, or it can't be read."""
        with suppress(LedgerError):
            return None if self.ledger is None else self.ledger.mark(holder)
        return None

    def flush(self) -> None:
        """Write what was collected in a simulation."""
        if self.ledger is not None and self._released:
            self.ledger.release(self._released)
        self._released = []

    def close(self) -> None:
        """Write what was collected, and close the ledger."""
        if self.ledger is not None:
            self.flush()
            self.ledger.close()

    def _domain(self, request: RoundRequest) -> str:
        domain = DOMAIN if self.budget is None else self.budget.domain
        return domain + TRUSTING if request.unit == "holder" else domain

    def _within(self, request: RoundRequest) -> bool:
        try:
            self.check(request)
        except Refused:
            return False
        return True

    def _reservation(self, holder: str, asked: Asked, noise: str) -> Reservation:
        request = asked.request
        return Reservation(
            holder=holder,
            domain=self._domain(request),
            run=request.run,
            round=request.round,
            digest=asked.digest,
            event=event_of_request(request),
            unit=request.unit,
            fingerprint=self.fingerprints.get(holder, ""),
            noise=noise,
            plan=plan_of_request(request),
            seeded=self.simulated,
            metrics=None if request.metrics_noise is None else CountEvent(request.metrics_noise, 1.0, 1),
            foreseen=foreseen(request),
        )


def event_of_request(request: RoundRequest) -> Event:
    """The mechanism event of a round, from its request alone."""
    return event_of(
        request.mechanism, request.noise_multiplier, request.clipping_norm, request.local_steps, request.sample_rate
    )


def foreseen(request: RoundRequest) -> tuple[Event, ...]:
    """What the rest of a run will ask for, by what its request says; Poisson plans are charged whole anyway."""
    further: list[Event] = []
    if request.mechanism == "full-batch" and request.plan_steps > request.local_steps:
        steps = request.plan_steps - request.local_steps
        further.append(event_of("full-batch", request.noise_multiplier, request.clipping_norm, steps))
    if request.plan_counts is not None:
        counts = request.plan_counts.number - (request.metrics_noise is not None)
        if counts > 0:
            further.append(CountEvent(request.plan_counts.noise_multiplier, 1.0, counts))
    return tuple(further)


def plan_of_request(request: RoundRequest) -> Plan | None:
    """All Poisson steps of the run, which the first round is charged with; None for other mechanisms."""
    if request.mechanism != "poisson":
        return None
    assert request.sample_rate is not None  # held by the check of the request
    return Plan(
        PoissonEvent(request.noise_multiplier, request.clipping_norm, request.sample_rate, request.plan_steps),
        request.delta,
    )
