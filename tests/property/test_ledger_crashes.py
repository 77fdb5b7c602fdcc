"""200 random SIGKILLs of a process that spends from a ledger, and what must hold after each.

The process is forked from a small one without torch. It reserves, draws, stores, releases and sends, as a data holder
does; it is killed at a random moment, or kills itself at a random failpoint. What it drew and what it sent stands in
files of its own, written in single calls. After every kill:

    everything that was sent is in the ledger, released, with the same digest
    every draw of noise has a reserve of its own
    no row that was there before is gone or different, and the chain verifies
    the totals cover all reserves, by rational arithmetic

Wrong processes ("twins") go through the same checks and must be caught.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from fedhead.common.failpoints import FAILPOINTS, installed
from fedhead.common.privacy.events import GaussianEvent
from fedhead.common.privacy.ledger import Granted, Ledger, LedgerError, Repeated, Reservation, store
from fedhead.common.privacy.terms import Terms

EVENT = GaussianEvent(40.0, 1.0, 1)
COST = Fraction(1, 40**2)
TERMS = Terms(8.0, 1e-5)  # enough for all rounds between two fresh ledgers
FRESH = 20  # kills of one ledger
POINTS = [name for name in FAILPOINTS if name.startswith("ledger.") and "export" not in name and "key" not in name]
POINTS += ["drawn", "sent"]  # the process's own
RECORD = struct.Struct("<QQ32s")  # sequence, round, SHA-256


def work(folder: Path, twin: str, reach) -> None:
    """The process: rounds without end, from the last one that the ledger knows."""
    drawn = os.open(folder / "drawn", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    sent = os.open(folder / "sent", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    if twin == "refunds":
        store.same_release = lambda reserve, wanted: True
    ledger = Ledger(folder / "state" / "ledger.sqlite")
    ledger.declare("ann", "notes", TERMS)
    rounds = [entry.round for entry in ledger.entries("ann") if entry.round is not None]
    round = max(rounds, default=1)
    while True:
        wanted = Reservation("ann", "notes", "run", round, f"digest-{round}", EVENT, "record", "f", "os")
        if twin == "reserves last":
            payload = draw(drawn, ledger.mark("ann").sequence + 1, round, reach)
            send(sent, ledger.mark("ann").sequence + 1, round, payload, reach)
            (got,) = ledger.reserve([wanted])
            ledger.release([("ann", got.sequence, payload)])
        else:
            (got,) = ledger.reserve([wanted])
            if isinstance(got, Repeated):
                send(sent, got.sequence, round, got.payload, reach)
            elif isinstance(got, Granted):
                payload = draw(drawn, got.sequence, round, reach)
                if random.random() < 0.15:
                    ledger.abandon("ann", got.sequence)
                    continue
                if twin == "sends first":
                    send(sent, got.sequence, round, payload, reach)
                ledger.release([("ann", got.sequence, payload)])
                send(sent, got.sequence, round, payload, reach)
            else:
                raise AssertionError(got)
        round += 1


def draw(drawn: int, sequence: int, round: int, reach) -> bytes:
    payload = os.urandom(random.choice((16, 3000)))
    os.write(drawn, RECORD.pack(sequence, round, hashlib.sha256(payload).digest()))
    reach("drawn")
    return payload


def send(sent: int, sequence: int, round: int, payload: bytes, reach) -> None:
    os.write(sent, RECORD.pack(sequence, round, hashlib.sha256(payload).digest()))
    reach("sent")


def faults(folder: Path, before: list[str]) -> tuple[list[str], list[str]]:
    """What does not hold after a kill, and the hashes of all rows."""
    found = []
    try:
        with Ledger(folder / "state" / "ledger.sqlite") as ledger:
            ledger.verify()
            rows = list(ledger.entries())
    except LedgerError as error:
        return [f"unusable: {error}"], before
    hashes = [row.hash for row in rows]
    if hashes[: len(before)] != before:
        found.append("rows were lost")
    reserves = {row.sequence: row for row in rows if row.kind == "reserve"}
    released = {(row.of, row.payload_digest) for row in rows if row.kind == "release"}
    digests: dict[int, set[bytes]] = {}
    for sequence, round, digest in records(folder / "sent"):
        digests.setdefault(round, set()).add(digest)
        if (sequence, digest.hex()) not in released:
            found.append("sent, and not in the ledger as released")
    if any(len(of_round) > 1 for of_round in digests.values()):
        found.append("two different replies of one round")
    draws = Counter(sequence for sequence, *_ in records(folder / "drawn"))
    if any(sequence not in reserves for sequence in draws):
        found.append("noise without a reserve")
    if any(count > 1 for count in draws.values()):
        found.append("two draws on one reserve")
    if rows and Fraction(rows[-1].domain_mu_squared) < len(reserves) * COST:
        found.append("totals below the charges")
    return found, hashes


def records(path: Path) -> list[tuple[int, int, bytes]]:
    return list(RECORD.iter_unpack(path.read_bytes())) if path.exists() else []


def kill_once(folder: Path, twin: str, rng: random.Random) -> str:
    """Fork the process and kill it; where it was."""
    point, count = (rng.choice(POINTS), rng.randint(1, 3)) if rng.random() < 0.5 else ("", 0)
    left, choices = [count], rng.random()
    last = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            random.seed(choices)

            def reach(name: str) -> None:
                os.write(last[1], (name + "\n").encode())
                left[0] -= name == point
                if name == point and left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            with installed(reach):
                work(folder, twin, reach)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os.close(last[1])
    deadline = time.monotonic() + (rng.uniform(0.0, 0.06) if not point else 0.25)
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            child = 0
            break
        time.sleep(0.002)
    if child:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(last[0]) as lines:
        names = lines.read().splitlines()
    return names[-1] if names else "start"


def campaign(twin: str, kills: int, seed: int) -> dict:
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    places: Counter[str] = Counter()
    rows = sent = 0
    for start in range(0, kills, FRESH):
        with tempfile.TemporaryDirectory() as name:
            folder, before = Path(name), []
            for _ in range(min(FRESH, kills - start)):
                places[kill_once(folder, twin, rng)] += 1
                new, before = faults(folder, before)
                found.update(new)
                if new:
                    break
            rows += len(before)
            sent += len(records(folder / "sent"))
    return {"faults": found, "places": places, "rows": rows, "sent": sent, "torch": "torch" in sys.modules}


def run(twin: str, kills: int, seed: int = 0) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, twin, str(kills), str(seed)], capture_output=True, text=True, check=True, timeout=280
    )
    assert done.stderr == "" or twin  # only a wrong process may fail by itself
    return json.loads(done.stdout)


@pytest.mark.slow
def test_200_kills_leave_no_spend_out():
    found = run("", 200)
    assert found["faults"] == {}
    assert found["torch"] is False
    assert sum(found["places"].values()) == 200
    assert set(found["places"]) >= {f"ledger.{what}.{stage}" for what in ("reserve", "release") for stage in
                                    ("begin", "locked", "written", "committed")} | {"drawn", "sent"}  # fmt: skip
    assert found["sent"] > 200
    assert found["rows"] > 400


@pytest.mark.slow
@pytest.mark.parametrize("twin", ["reserves last", "sends first", "refunds"])
def test_twins_are_caught(twin: str):
    assert run(twin, 60)["faults"] != {}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(campaign(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
