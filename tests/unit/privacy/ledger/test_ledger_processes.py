"""Eight processes spend from one budget: together they get exactly what it admits, and none fails."""

import os
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest

from fedhead.common.privacy.events import GaussianEvent
from fedhead.common.privacy.filters import Totals, charge_of
from fedhead.common.privacy.ledger import Denied, Granted, Ledger, LedgerError, Reservation, store
from fedhead.common.privacy.terms import Terms

EVENT = GaussianEvent(30.0, 1.0, 1)
TERMS = Terms(1.0, 1e-5)
PROCESSES = 8
FIT = int(Fraction(TERMS.mu_squared) / (Fraction(1) / 30**2))  # by rational arithmetic: 64


class UncheckedLock(Ledger):
    """Twin: what is left is looked up before the transaction that writes."""

    def reserve(self, wanted):
        total = self.standing("ann")[1].get("notes", Totals()).plus(charge_of(EVENT))
        if total.mu_squared > TERMS.mu_squared:
            return [Denied("budget")]
        time.sleep(0.002)
        return super().reserve(wanted)


class DeferredLock(Ledger):
    """Twin: the transaction starts without the write lock."""

    def _begin(self) -> None:
        self._execute("BEGIN DEFERRED")


def spend_all(path: Path, kind: type[Ledger], number: int, start: float) -> int:
    """A process: reserve and release until denied. Returns what it got; 255 for an error, 254 for another answer."""
    try:
        ledger = kind(path)
        time.sleep(max(0.0, start - time.monotonic()))
        for round in range(FIT + 1):
            wanted = Reservation("ann", "notes", f"run-{number}", round, f"d{round}", EVENT, "record", "f", "os")
            (got,) = ledger.reserve([wanted])
            if isinstance(got, Denied):
                return round if got.reason == "budget" else 254
            if not isinstance(got, Granted):
                return 254
            ledger.release([("ann", got.sequence, b"bytes")])
            time.sleep(0.004)  # or whoever is first may take all
        return 254
    except LedgerError:
        return 255


@dataclass
class Outcome:
    got: list[int]
    rows: int
    failed: bool

    @property
    def sound(self) -> bool:
        return not self.failed and sum(self.got) == self.rows == FIT


def run(path: Path, kind: type[Ledger], terms: Terms | None) -> Outcome:
    with Ledger(path) as ledger:
        ledger.declare("ann", "notes", terms)
    start, children = time.monotonic() + 0.3, []
    for number in range(PROCESSES):
        child = os.fork()
        if child == 0:
            code = 253
            try:
                code = spend_all(path, kind, number, start)
            finally:
                os._exit(code)
        children.append(child)
    got = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    with Ledger(path) as ledger:
        rows = sum(entry.kind == "reserve" for entry in ledger.entries())
        ledger.verify()
    return Outcome(got, rows, any(code > FIT for code in got))


def test_eight_processes_get_exactly_the_budget(tmp_path: Path):
    outcome = run(tmp_path / "ledger.sqlite", Ledger, TERMS)
    assert outcome.sound, outcome
    assert sum(one > 0 for one in outcome.got) > 1, "they did not run at the same time"


def test_twin_that_admits_outside_of_the_transaction(tmp_path: Path):
    # its file has no terms: the twin's own look-up is all that stands before the write
    assert not run(tmp_path / "ledger.sqlite", UncheckedLock, None).sound


def test_twin_without_the_write_lock(tmp_path: Path):
    assert not run(tmp_path / "ledger.sqlite", DeferredLock, TERMS).sound


def test_twin_that_trusts_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A state that is not replayed when another process has written."""
    monkeypatch.setattr(store.Ledger, "_look", lambda self: None)
    with Ledger(tmp_path / "ledger.sqlite") as first, Ledger(tmp_path / "ledger.sqlite") as second:
        first.declare("ann", "notes", TERMS)
        second.mark("ann")
        wanted = [Reservation("ann", "notes", "run", n, f"d{n}", EVENT, "record", "f", "os") for n in range(FIT)]
        first.reserve(wanted)
        with pytest.raises(LedgerError):  # the chain's places are taken: the table refuses the second row
            second.reserve([Reservation("ann", "notes", "run-2", 1, "d", EVENT, "record", "f", "os")])


def test_eight_processes_make_one_ledger_and_one_key(tmp_path: Path):
    from fedhead.common.privacy.ledger import load_key
    from fedhead.common.privacy.ledger.statements import public_key

    start = time.monotonic() + 0.2
    read, write = os.pipe()
    children = []
    for number in range(PROCESSES):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                time.sleep(max(0.0, start - time.monotonic()))
                with Ledger(tmp_path / "state" / "ledger.sqlite") as ledger:
                    ledger.declare(f"holder-{number}", "notes", TERMS)
                os.write(write, (public_key(load_key(tmp_path / "state" / "key.pem")) + "\n").encode())
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * PROCESSES
    os.close(write)
    with os.fdopen(read) as lines:
        assert len(set(lines)) == 1
    with Ledger(tmp_path / "state" / "ledger.sqlite") as ledger:
        assert ledger.verify() == len(ledger.holders()) == PROCESSES
    assert sorted(file.name for file in (tmp_path / "state").iterdir()) == ["key.pem", "ledger.sqlite"]
