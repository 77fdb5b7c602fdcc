"""Which ledgers there are, and which of them are copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from fedhead.common.errors import InputError
from fedhead.common.privacy.ledger import Mark

NAMES: Final = ("ledger.sqlite", "ledgers.sqlite")  # of one holder; of all holders of a simulation
KEY: Final = "ledger.key"  # beside a ledger: what its holder signs with


def ledger_files(paths: Iterable[Path]) -> list[Path]:
    """Every ledger that is named, and every one below a folder that is named; each once, in order.

    Raises
    ------
    InputError
        Nothing is there.
    """
    return list(dict.fromkeys(file for path in paths for file in _below(path)))


def _below(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f'LEDGER is "{path}": there is no such file or folder. Name a ledger, or a folder of a run.')
    if path.is_file():
        return [path]
    files = sorted(file for name in NAMES for file in path.rglob(name) if file.is_file())
    if not files:
        raise InputError(f'LEDGER is "{path}": there is no ledger below it. Name a ledger, or a folder of a run.')
    return files


def newest(chains: Sequence[tuple[Mark, Path]], has: Callable[[Path, Mark], bool]) -> list[Path]:
    """The files whose chain of a holder no other one goes on from: a copy of a ledger is not a second spend.

    Parameters
    ----------
    chains : sequence of (Mark, Path)
        The end of one holder's chain in each file.
    has : callable
        ``has(path, mark)``: whether that holder's chain in a file contains a mark.
    """
    kept: list[Path] = []
    # The longest first; of equal ones that with all holders, which is then open for the next holder too.
    for mark, file in sorted(chains, key=lambda chain: (-chain[0].sequence, chain[1].name != NAMES[1], chain[1])):
        if not any(has(other, mark) for other in kept):
            kept.append(file)
    return kept
