"""The ledgers of simulated holders: one database for all of them, and a file of its own for each at the end of a run.

They lie in the folder of the run, or in the one that `--state` names, which keeps the holders between runs: what they
spent there stays spent.
"""

from __future__ import annotations

from pathlib import Path

from fedhead.client.workplace import LEDGER
from fedhead.common.privacy.ledger import Ledger
from fedhead.simulations.folders import HOLDERS

MARKS = "marks.json"


def ledger_of(folder: Path, state: str | Path | None) -> Path:
    """Where the ledger of all simulated holders lies."""
    return (folder if state is None else Path(state)) / LEDGER


def export(ledger: Path, folder: Path) -> None:
    """Give each holder a file of its own: beside the ledger, and in the folder of the run."""
    book = Ledger(ledger)
    try:
        for target in dict.fromkeys([ledger.parent, folder / HOLDERS]):
            target.mkdir(parents=True, exist_ok=True)
            book.export(target)
    finally:
        book.close()
