"""What the ledger costs: a round in a deployment, a holder's round in a simulation, an audit of 10,000 events.

Deployment: one holder, one reserve and one release of a 20 kB reply a round; CPU time of the process, and beside it the
time with what the two fsyncs keep it waiting. Simulation: one transaction a round for all holders, which reserves it
and marks the last round released, with its fsync and without. Audit: `verify` of 10,000 events, each reserved and
released. Medians, so that a busy machine counts less; and the yardstick of yardstick.py, taken before, between and
after, to scale them by.

    python benchmarks/ledger.py
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from yardstick import PLAIN_STEPS, QUIET_US, yardstick

from fedhead.common.privacy.events import GaussianEvent
from fedhead.common.privacy.ledger import Declaration, Granted, Ledger, Reservation
from fedhead.common.privacy.terms import Terms
from fedhead.simulations.audit.ledgers import audit_ledgers

EVENT = GaussianEvent(1000.0, 1.0, 1)
TERMS = Terms(8.0, 1e-5)
REPLY = bytes(20_000)


def wanted(holder: str, round: int, seeded: bool) -> Reservation:
    digest = f"{round:064x}"
    return Reservation(holder, "notes", "run-1", round, digest, EVENT, "record", "f" * 64, "os", None, seeded)


def deployment(folder: Path, rounds: int) -> tuple[float, float]:
    """Milliseconds a round: CPU, and all."""
    cpu, wall = [], []
    with Ledger(folder / "deployment.sqlite") as ledger:
        ledger.declare("ann", "notes", TERMS)
        for round in range(rounds):
            started, clock = time.process_time(), time.perf_counter()
            (granted,) = ledger.reserve([wanted("ann", round, False)])
            assert isinstance(granted, Granted)
            ledger.release([("ann", granted.sequence, REPLY)])
            cpu.append(time.process_time() - started)
            wall.append(time.perf_counter() - clock)
    return 1e3 * statistics.median(cpu), 1e3 * statistics.median(wall)


def simulation(folder: Path, holders: int, rounds: int, synchronous: str) -> float:
    """CPU milliseconds a holder and round, the making of the reservations included."""
    names = [f"holder-{number}" for number in range(holders)]
    cpu = []
    done: list[tuple[str, int, bytes | None]] = []
    with Ledger(folder / f"simulation-{holders}-{synchronous}.sqlite") as ledger:
        ledger._connection.execute(f"PRAGMA synchronous = {synchronous}")
        ledger.declare_all([Declaration(name, "notes", TERMS) for name in names])
        for round in range(rounds):
            started = time.process_time()
            granted = ledger.reserve([wanted(name, round, True) for name in names], done)
            done = [
                (name, one.sequence, None) for name, one in zip(names, granted, strict=True) if type(one) is Granted
            ]
            assert len(done) == holders
            cpu.append(time.process_time() - started)
    return 1e3 * statistics.median(cpu) / holders


def simulations(folder: Path, steps: Callable[[int], None], speed: list[float]) -> dict[str, dict[str, float]]:
    """`simulation` for 10, 100 and 1,000 holders, with fsync and without; the yardstick is taken after each."""
    found: dict[str, dict[str, float]] = {}
    for what, synchronous in (("", "FULL"), ("_beyond_fsync", "OFF")):
        row = found[f"simulation_cpu_ms_a_holder_and_round{what}"] = {}
        for holders in (10, 100, 1000):
            row[str(holders)] = round(simulation(folder, holders, 40, synchronous), 4)
            speed += step_us(steps)
    return found


def audit(folder: Path, events: int) -> tuple[float, float, float]:
    """Seconds to verify a ledger, to open it and read its summary, and to audit it (`fedhead audit ledger`)."""
    path = folder / "audit.sqlite"
    with Ledger(path) as ledger:
        for start in range(0, events, 500):
            granted = ledger.reserve([wanted("ann", round, False) for round in range(start, start + 500)])
            ledger.release([("ann", one.sequence, None) for one in granted if type(one) is Granted])
        started = time.perf_counter()
        assert ledger.verify() == 2 * events
        verified = time.perf_counter() - started
    started = time.perf_counter()
    with Ledger(path) as ledger:
        ledger.summary("ann", delta=1e-5)
    opened = time.perf_counter() - started
    audit_ledgers([folder / "deployment.sqlite"])  # libraries load once
    started = time.perf_counter()
    assert audit_ledgers([path])["passed"]
    return verified, opened, time.perf_counter() - started


def step_us(steps: Callable[[int], None]) -> list[float]:
    """Microseconds of CPU that a plain step takes just now, a few times."""
    found = []
    for number in range(10):
        started = time.process_time()
        steps(number)
        found.append((time.process_time() - started) * 1e6 / PLAIN_STEPS)
    return found


def main() -> None:
    torch.set_num_threads(1)
    steps = yardstick()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps(0)
        speed = step_us(steps)
        cpu, wall = deployment(folder, 300)
        verified, opened, audited = audit(folder, 10_000)
        figures = {
            "deployment_cpu_ms_a_round": round(cpu, 3),
            "deployment_wall_ms_a_round": round(wall, 3),
            **simulations(folder, steps, speed),
            "verify_seconds_10000_events": round(verified, 3),
            "open_and_summary_seconds_10000_events": round(opened, 3),
            "audit_seconds_10000_events": round(audited, 3),
        }
    figures["yardstick_us"] = round(statistics.median(speed), 1)
    figures["scale_to_a_quiet_machine"] = round(QUIET_US / statistics.median(speed), 3)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
