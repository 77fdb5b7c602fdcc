"""What the tests of the ledger reserve, and short names for what they ask it."""

from dataclasses import replace

from fedhead.common.privacy.events import GaussianEvent, PoissonEvent
from fedhead.common.privacy.ledger import Ledger, Mark, Plan, Reservation
from fedhead.common.privacy.terms import Terms

ONE = GaussianEvent(10.0, 1.0, 1)  # costs 0.01 of mu squared
TERMS = Terms(1.0, 1e-5)  # mu squared 0.0718...: seven of them
POISSON = PoissonEvent(1.0, 1.0, 0.01, 20)
PLAN = Plan(POISSON, 1e-6)
ROUNDS = 6  # of the seven that the budget admits


def want(round: int = 1, **changes) -> Reservation:
    base = Reservation("ann", "notes", "run", round, f"digest-{round}", ONE, "record", "f0", "os")
    return replace(base, **changes)


def one(ledger: Ledger, wanted: Reservation):
    (found,) = ledger.reserve([wanted])
    return found


def total(ledger: Ledger, domain: str = "notes", holder: str = "ann") -> float:
    return ledger.standing(holder)[1][domain].mu_squared


def kinds(ledger: Ledger) -> list[str]:
    return [entry.kind for entry in ledger.entries()]


def fill(ledger: Ledger, rounds: int = ROUNDS) -> Mark:
    """Release some rounds, from 0."""
    ledger.declare("ann", "notes", TERMS)
    for round in range(rounds):
        ledger.release([("ann", one(ledger, want(round)).sequence, b"payload" * 20)])
    return ledger.mark("ann")
