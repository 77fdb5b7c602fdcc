"""Running totals of a chain, held against exact sums row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedhead.common.privacy.audit.recount import INFINITE, total_fits, units
from fedhead.common.privacy.audit.rows import Fault, totals_of
from fedhead.common.privacy.ledger.chain import Entry


@dataclass
class Sums:
    """Exact sums of a domain or of a run within it, in units, and the totals as the last row has them."""

    mu_squared: int = 0
    delta: int = 0
    rows: int = 0
    totals: tuple[float, float, float] = (0.0, 0.0, 0.0)


def check_unchanged(row: Entry, domain: Sums, run: Sums) -> None:
    """Raise Fault where a row that charges nothing changes a total."""
    for name, before, after in (
        ("domain", domain.totals, totals_of(row)[:3]),
        ("run", run.totals, totals_of(row)[3:]),
    ):
        if any(before) and not any(after):
            raise Fault(
                "totals", f"has a total of the {name} of 0, after charges (an accountant that was started anew)"
            )
        if any(new < old for new, old in zip(after, before, strict=True)):
            raise Fault("totals", f"takes a charge back: its total of the {name} is smaller than before (a refund)")
        if after != before:
            raise Fault("totals", f"changes the total of the {name} without charging an event")


def check_grown(
    name: str, sums: Sums, after: tuple[float, ...], cost: int, delta: float, epsilon: tuple[float, float]
) -> None:
    """Add a charge to exact sums, and hold a row's totals against them.

    Parameters
    ----------
    name : str
        "domain" or "run".
    sums : Sums
        Before the row; changed in place.
    after : (mu_squared, epsilon, delta)
        Totals as the row has them.
    cost : int
        To the Gaussian part, in units.
    delta : float, >= 0
        To the Poisson part: that of a plan that starts, else 0.
    epsilon : (float, float)
        Between which figures the plan may have been charged; (0, 0) where none starts.

    Raises
    ------
    Fault
        A total is smaller than before, below the exact sum, or above it by more than rounding.
    """
    sums.rows += 1
    sums.mu_squared = min(sums.mu_squared + cost, INFINITE)
    sums.delta += units(delta)
    before = sums.totals
    for old, new, exact, own in (
        (before[0], after[0], sums.mu_squared, cost),
        (before[2], after[2], sums.delta, units(delta)),
    ):
        found = units(new)
        if found < exact or new < old:
            raise Fault("totals", _shortfall(name, units(old), found, own))
        if not total_fits(found, exact, sums.rows):
            raise Fault("totals", f"has a total of the {name} above the exact sum of all charges")
    _check_epsilon(name, before[1], after[1], *epsilon)
    sums.totals = after[0], after[1], after[2]


def _check_epsilon(name: str, before: float, after: float, low: float, high: float) -> None:
    """The same for the epsilon of Poisson plans, whose exact sum nobody knows."""
    if math.isinf(low):
        if not math.isinf(after):
            raise Fault("totals", f"left a release without privacy out of the total of the {name}")
        return
    if after < before:
        raise Fault("totals", _shortfall(name, units(before), units(after), units(low)))
    if after == before and (low <= 0 or math.isinf(before)):
        return
    grown, slack = after - before, 0.0 if high == 0 else after * 1e-9
    if not grown >= low - slack:
        raise Fault("totals", f"charged {grown:.4g} of epsilon to the {name} for a Poisson plan of at least {low:.4g}")
    if not grown <= high + slack:
        raise Fault("totals", f"has a total of the {name} above the sum of all charges")


def _shortfall(name: str, before: int, after: int, cost: int) -> str:
    """Why a total is too small."""
    if before and after and abs(after - cost) <= cost // 10**9:
        return (
            f"has a total of the {name} that holds its own charge alone: all charges before it are left out (an "
            "accountant that was started anew)"
        )
    if after < before:
        return f"has a total of the {name} that is smaller than before: a charge was taken back (a refund)"
    if after == before:
        return f"was not charged: the total of the {name} is what it was before"
    return f"has a total of the {name} below the exact sum of all charges: a charge was left out or cut"
