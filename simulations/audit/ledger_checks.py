"""The verdicts of an audit of ledgers: what was looked at, what was wrong, what that means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedhead.common.privacy.audit.findings import Check
from fedhead.common.privacy.audit.ledger import Bad
from fedhead.simulations.audit.ledger_figures import Figures
from fedhead.simulations.audit.ledger_rows import Chain
from fedhead.simulations.audit.ledger_witnesses import Witnesses

# The checks of rows: what each looked at, and what it means that no row failed it.
_ROWS: Final = {
    "file": ("Files", "Every file is a whole ledger, by SQLite's check and by the ledger's own."),
    "chain": ("Hash chain", "Every row has its own SHA-256 and follows the one before: none was changed or left out."),
    "form": ("Form of rows", "Every row is written as fedhead writes it."),
    "totals": (
        "Running totals",
        "All totals are the exact sums of what was charged: nothing was refunded or left out.",
    ),
    "rounds": ("Rounds", "All that was released had been reserved, once; Poisson rounds stay within their plans."),
    "budget": ("Budgets", "No charge went beyond the terms that were declared at the time."),
    "payloads": ("Stored bytes", "What is kept of releases is what the rows say, and holds nothing uncharged."),
}


@dataclass
class Audit:
    """What was found so far: chains, files that can't be read, the first bad row of each chain, figures."""

    chains: list[Chain] = field(default_factory=list)
    broken: list[tuple[Path, str]] = field(default_factory=list)
    bad: dict[tuple[str, Path], Bad] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    disagree: list[str] = field(default_factory=list)
    understated: list[str] = field(default_factory=list)
    compared: int = 0
    alone: int = 0

    def fail(self, chain: Chain, bad: Bad) -> None:
        """Keep the earliest bad row of a chain."""
        known = self.bad.get((chain.holder, chain.path))
        if known is None or bad.sequence < known.sequence:
            self.bad[chain.holder, chain.path] = bad

    def compare(self, who: str, figures: Figures) -> None:
        """Hold the accountants against one another, and the ledger against both."""
        self.compared += 1
        self.alone += figures.second is None
        if figures.disagree is not None:
            self.disagree.append(f"{who}: {figures.disagree}")
        if figures.understated is not None:
            self.understated.append(f"{who}: {figures.understated}")


def row_checks(found: Audit) -> list[Check]:
    """Of files and their rows."""
    rows = sum(chain.reading.rows for chain in found.chains)
    stored = sum(chain.stored for chain in found.chains)
    checks = []
    for name, (title, meaning) in _ROWS.items():
        faults = [
            f"{holder}, row {bad.sequence}: it {bad.what}"
            for (holder, _), bad in found.bad.items()
            if bad.topic == name
        ]
        if name == "file":
            faults = [what for _, what in found.broken]
        figure = {"file": f"{len({chain.path for chain in found.chains})} files", "payloads": f"{stored} releases"}
        checks.append(_check(name, title, faults, figure.get(name, f"{rows:,} rows"), meaning))
    return checks


def witness_checks(found: Audit, witnesses: Witnesses, lost: Sequence[str]) -> list[Check]:
    """Of statements and marks; `lost`: holders that they speak of and that have no ledger here."""
    checks = []
    if witnesses.signed or witnesses.unsound:
        meaning = "Every statement is what the holder's key signed."
        if not witnesses.trusted:
            meaning = (
                "Every statement is what its own key signed: compare that key with the one you know the holder by."
            )
        checks.append(
            _check("signatures", "Signed statements", witnesses.unsound, f"{witnesses.signed} statements", meaning)
        )
    faults = [
        f"{holder}, row {bad.sequence}: it {bad.what}"
        for (holder, _), bad in found.bad.items()
        if bad.topic == "high-water"
    ]
    signed = {one.holder for one in witnesses.seen if one.signed}
    faults += [f"{holder}: there is a statement, and no ledger" for holder in dict.fromkeys(lost) if holder in signed]
    found.notes += [
        f"{holder}: there is a mark, and no ledger" for holder in dict.fromkeys(lost) if holder not in signed
    ]
    if witnesses.seen or faults:
        meaning = "Every ledger contains what others have seen of it: no older copy was put back."
        checks.append(_check("high-water", "High-water marks", faults, f"{len(witnesses.seen)} marks", meaning))
    else:
        found.notes.append(
            "no statement or mark was given: that a ledger's end was cut off, or an older copy put back, can't be seen"
        )
    return checks


def figure_checks(found: Audit) -> list[Check]:
    """Of epsilon."""
    if found.alone:
        found.notes.append("some figures are of one accountant: no grid of privacy losses holds their events")
    return [
        _check(
            "accountants", "Two accountants", found.disagree, f"{found.compared - found.alone} figures",
            "Exact GDP or PRV and privacy loss distributions agree within 1 % and 0.001 on every figure.",
        ),
        _check(
            "spent", "The ledger's own figures", found.understated, f"{found.compared} figures",
            "No figure of the ledger lies below what an accountant finds.",
        ),
    ]  # fmt: skip


def _check(name: str, title: str, faults: Sequence[str], figure: str, meaning: str) -> Check:
    if not faults:
        return Check(name, title, True, figure, meaning)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Check(name, title, False, f"{len(faults)} wrong", faults[0] + more)
