"""What the coordinator remembers of each holder's ledger between runs: the last (sequence, hash) that it saw.

It goes back to the holder with every request. A holder whose ledger doesn't contain it was given an older copy of its
ledger, and refuses to go on: what was spent since then would be spent a second time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedhead.common.errors import InputError
from fedhead.common.privacy.ledger import Mark
from fedhead.common.writing import write_aside


def read_marks(path: Path) -> dict[str, Mark]:
    """Holder -> mark; empty where there is no file yet.

    Raises
    ------
    InputError
        The file can't be read.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): Mark(int(sequence), str(hashed)) for name, (sequence, hashed) in rows.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(
            f'"{path}" can\'t be read: it must be what fedhead wrote. Restore it from a copy; removing it lets an '
            "older copy of a holder's ledger go unnoticed."
        ) from error


def newest(seen: Mapping[str, Mark], others: Mapping[str, Mark]) -> dict[str, Mark]:
    """Of each holder the mark of the higher sequence, of equal ones the first.

    A ledger only grows. A run that goes on from an old checkpoint, or a holder that shows an older ledger, must not
    make us forget what we have seen.
    """
    found = dict(seen)
    for name, mark in others.items():
        if name not in found or mark.sequence > found[name].sequence:
            found[name] = mark
    return found


def write_marks(path: Path, marks: Mapping[str, Mark]) -> None:
    """Replace the file as a whole, durably; holders that were not in this run keep the mark that they had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {name: list(mark) for name, mark in sorted(newest(read_marks(path), marks).items())}
    write_aside(path, (json.dumps(rows, indent=0) + "\n").encode(), durable=True)
