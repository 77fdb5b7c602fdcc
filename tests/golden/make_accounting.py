"""Write accounting.json: epsilon of over 200 plans by a second accountant, independent of the one that reports them.

    python tests/golden/make_accounting.py         # some minutes

    pld        dp-accounting's privacy loss distributions, every step composed: for what is reported by GDP or PRV
    gaussian   dp-accounting's closed formula, where losses are too small or too large for a grid
    prv        Opacus's privacy random variables, where PLD is what reports; its error may be 0.2 % of epsilon here

`epsilon` is the pessimistic figure and `least` the optimistic one: the truth lies between the two, up to the rounding
of floats. A row's events are [mechanism, noise multiplier, sample rate or null, steps].
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from dp_accounting.pld import privacy_loss_distribution as pld
from opacus.accountants import PRVAccountant

from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.events import CountEvent, GaussianEvent, PoissonEvent

Event = tuple[str, float, float | None, int]


def by_pld(events: list[Event], delta: float, pessimistic: bool, interval: float) -> float:
    total = None
    for _, noise, rate, steps in events:
        one = pld.from_gaussian_mechanism(
            noise,
            value_discretization_interval=interval,
            sampling_prob=1.0 if rate is None else rate,
            pessimistic_estimate=pessimistic,
        ).self_compose(steps)
        total = one if total is None else total.compose(one)
    assert total is not None
    return float(total.get_epsilon_for_delta(delta))


def by_formula(events: list[Event], delta: float) -> float:
    if not events:
        return 0.0
    return get_epsilon_gaussian(1 / math.sqrt(math.fsum(steps / noise**2 for _, noise, _, steps in events)), delta)


def by_prv(events: list[Event], delta: float, error: float) -> tuple[float, float]:
    accountant = PRVAccountant()
    accountant.history = [(noise, 1.0 if rate is None else rate, steps) for _, noise, rate, steps in events]
    found = accountant._get_dprv(error, delta / 1000).compute_epsilon(delta, delta / 1000, error)
    return float(found[2]), float(found[0])


def other(events: list[Event], delta: float) -> str:
    """The accountant that fedhead does not report with, so that every figure has a second opinion."""
    kinds = {"full-batch": GaussianEvent, "count": CountEvent}
    made = [
        PoissonEvent(noise, 1.0, rate, steps) if rate is not None else kinds[name](noise, 1.0, steps)
        for name, noise, rate, steps in events
    ]
    return "prv" if epsilon(made, delta).accountant == "pld" else "pld"


def row(by: str, events: list[Event], delta: float) -> dict[str, Any]:
    if by == "other":
        by = other(events, delta)
    if by == "gaussian":
        most = by_formula(events, delta)
        least = most * (1 - 1e-6)
    elif by == "prv":
        most, least = by_prv(events, delta, max(1e-5, 2e-3 * by_pld(events, delta, True, 1e-3)))
    else:
        # rounding adds up over the steps: a small epsilon needs a fine grid, and a large one fills it
        interval = min(1e-3, max(1e-5, 1e-4 * by_pld(events, delta, True, 1e-3)))
        most, least = (by_pld(events, delta, pessimistic, interval) for pessimistic in (True, False))
    sys.stderr.write(f"{by:8} {most:10.4f} {least:10.4f}  {delta:g} {events[:2]}\n")
    return {"by": by, "events": events, "delta": delta, "epsilon": most, "least": least}


def plans() -> list[tuple[str, list[Event], float]]:
    found: list[tuple[str, list[Event], float]] = []
    full = itertools.product((2.0, 5.0, 10.0, 20.0, 40.0, 100.0), (1, 20, 60, 300), (1e-4, 1e-5, 1e-6, 1e-8))
    found += [("pld", [("full-batch", noise, None, steps)], delta) for noise, steps, delta in full]
    poisson = itertools.product((0.8, 1.5, 4.0), (0.005, 0.02, 0.1, 0.4), (1, 60, 600), (1e-5, 1e-6))
    found += [("other", [("poisson", noise, rate, steps)], delta) for noise, rate, steps, delta in poisson]

    # corners
    found.append(("gaussian", [], 1e-5))
    for noise, steps, delta in [(1e3, 1, 1e-5), (1e4, 3, 1e-6), (1e6, 50, 1e-9), (1e5, 1, 1e-5), (0.1, 1, 1e-5)]:
        found.append(("gaussian", [("full-batch", noise, None, steps)], delta))
    for noise, steps, delta in [(0.01, 10, 1e-5), (0.001, 1, 1e-10), (1.0, 10**6, 1e-5), (3.0, 10**4, 1e-12)]:
        found.append(("gaussian", [("full-batch", noise, None, steps)], delta))
    for noise, steps, delta in [(5.0, 60, 1e-5), (20.0, 300, 1e-6), (0.05, 3, 1e-5)]:  # q = 1
        found.append(("gaussian", [("poisson", noise, 1.0, steps)], delta))
    for noise, steps, delta in [(10.0, 1, 1e-5), (10.0, 8, 1e-6), (200.0, 20, 1e-5)]:
        found.append(("gaussian", [("count", noise, None, steps)], delta))
    found.append(("gaussian", [("full-batch", 20.0 + k / 10, None, 1) for k in range(200)], 1e-5))
    found.append(
        ("pld", [("full-batch", 40.0, None, 30), ("count", 30.0, None, 5), ("full-batch", 25.0, None, 9)], 1e-5)
    )
    # mixtures
    two = [("full-batch", 20.0, None, 30), ("poisson", 2.0, 0.05, 60)]
    three: list[Event] = [*two, ("count", 25.0, None, 10)]
    five: list[Event] = [*three, ("poisson", 1.2, 0.01, 100), ("poisson", 5.0, 0.3, 20)]
    jitter: list[Event] = [("poisson", 1.5, 0.02 + k * 1e-12, 10) for k in range(6)]
    for events, delta in itertools.product((two, three, five, jitter), (1e-4, 1e-6)):
        found.append(("other", list(events), delta))
    # small and large figures of sampled steps
    small = [(20.0, 0.01, 100), (10.0, 0.01, 1000), (30.0, 0.05, 200), (6.0, 0.02, 20), (50.0, 0.1, 300)]
    found += [("other", [("poisson", *what)], 1e-5) for what in small]
    found += [("other", [("poisson", *what)], 1e-5) for what in [(0.5, 0.2, 30), (0.4, 0.5, 10), (1.0, 0.9, 40)]]
    # what PLD reports: many distinct rows, many steps
    found.append(("other", [("poisson", 1.0 + k / 50, 0.01 + k / 5000, 3) for k in range(20)], 1e-5))
    found.append(("other", [("poisson", 2.0 + k / 100, 0.02, 4) for k in range(40)], 1e-5))
    found.append(("other", [*five, *(("poisson", 3.0 + k / 10, 0.05, 5) for k in range(18))], 1e-5))
    found.append(("other", [("poisson", 1.0, 0.002, 40_000)], 1e-5))
    # between the noises and steps above, so that points of a single event are 200 by themselves
    further = itertools.product((3.0, 30.0), (10, 150), (3e-5, 1e-7))
    found += [("pld", [("full-batch", noise, None, steps)], delta) for noise, steps, delta in further]
    return found


def quiet() -> None:
    logging.disable(logging.WARNING)  # the optimistic figure takes another method, and says so every time
    warnings.simplefilter("ignore")


def main() -> None:
    plan = plans()
    with ProcessPoolExecutor(2, initializer=quiet) as pool:
        rows = list(pool.map(row, *zip(*plan, strict=True)))
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    text = f'{{\n "schema": 2,\n "rows": [\n  {lines}\n ]\n}}\n'
    Path(__file__).with_name("accounting.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
