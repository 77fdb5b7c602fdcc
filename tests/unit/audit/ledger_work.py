"""Ledgers that tests of their audit share: rounds from the reserve to the release, and what an audit of them says."""

import torch

from fedhead.common import protocol
from fedhead.common.privacy.events import CountEvent, GaussianEvent, PoissonEvent
from fedhead.common.privacy.ledger import (
    Granted,
    Ledger,
    Plan,
    Reservation,
)
from fedhead.common.privacy.terms import Terms
from fedhead.simulations.audit.ledgers import (
    passed,
)

STEP = GaussianEvent(30.0, 1.0, 2)
COUNT = CountEvent(70.0, 1.0, 1)
PLAN = Plan(PoissonEvent(2.0, 1.0, 0.05, 40), 1e-7)
TERMS = Terms(6.0, 1e-5, 0.25)


def pack(event, holder="ann", count=None, **extra):
    """Bytes of a release, as a deployed holder stores them."""
    content = protocol.released({"weight": torch.zeros(2, 3)}, 100, holder, event.to_json(), count)
    for name, value in extra.items():
        content[protocol.RELEASE][name] = value
    return protocol.pack(content)


def want(round, event=STEP, run="first", holder="ann", domain="notes", **more):
    fields = {"unit": "record", "noise": "aes-ctr-gaussian", **more}
    return Reservation(holder, domain, run, round, f"{run} {round}", event, fingerprint="f", **fields)


def give(ledger, wanted, payload=None):
    """A round from its reserve to its release."""
    (got,) = ledger.reserve([wanted])
    assert isinstance(got, Granted), got
    count = None if wanted.metrics is None else 17.5
    ledger.release([(wanted.holder, got.sequence, payload or pack(wanted.event, wanted.holder, count))])
    return got.sequence


def fill(path, holder="ann", rounds=3):
    with Ledger(path) as ledger:
        ledger.declare(holder, "notes", TERMS)
        for round in range(rounds):
            give(ledger, want(round, holder=holder, metrics=COUNT if round == 1 else None))
    return path


def checks(found):
    return {check["name"]: check["passed"] for check in found["checks"]}


def bad(found):
    """The first bad row of the only ledger, and the failed checks."""
    assert not passed(found)
    (one,) = found["holders"]
    assert not one["passed"]
    assert one["domains"] == []
    return one["first_bad"]["sequence"], one["first_bad"]["what"], {k for k, good in checks(found).items() if not good}
