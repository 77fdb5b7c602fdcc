"""The rows of a ledger's file as they are stored: read only, and read by as little of the ledger's own code as can be.

A file that SQLite itself finds damaged is still read as far as it goes, to name the first row that is wrong.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from fedhead.common.privacy.audit.ledger import Bad, Reading, read
from fedhead.common.privacy.ledger.chain import Entry, LedgerError, Mark, digest_of
from fedhead.common.privacy.ledger.files import connect, failures

Contents = Callable[[Entry, bool, bytes], str | None]
"""What is wrong with the stored bytes of a reserve: its row, whether a count was charged with it, the bytes."""


@dataclass(frozen=True)
class Chain:
    """One holder's rows in one file, read.

    Attributes
    ----------
    path : Path
    reading : Reading
    first_bad : Bad or None
        Of rows, of the end of the chain, and of stored bytes.
    stored : int
        Releases whose bytes are kept.
    """

    path: Path
    reading: Reading
    first_bad: Bad | None
    stored: int = 0

    @property
    def holder(self) -> str:
        """Whose chain it is."""
        return self.reading.holder

    @property
    def mark(self) -> Mark | None:
        """The last good row; None where there is none."""
        hashes = self.reading.hashes
        return Mark(len(hashes), hashes[-1]) if hashes else None

    def has(self, mark: Mark) -> bool:
        """Whether the chain contains a row that was seen before."""
        return 0 < mark.sequence <= len(self.reading.hashes) and self.reading.hashes[mark.sequence - 1] == mark.hash


@dataclass
class _Stored:
    """What a file has of one holder."""

    rows: list[Entry] = field(default_factory=list)
    head: tuple[object, object] | None = None
    payloads: dict[object, object] = field(default_factory=dict)


def read_file(path: Path, contents: Contents) -> list[Chain]:
    """Every chain of a ledger's file, by holder.

    Raises
    ------
    LedgerError
        The file can't be read as a ledger. Its text names the first bad row, where that can be found.
    """
    try:
        with closing(connect(path, create=False, read_only=True)) as connection, failures(path):
            stored = _stored(connection)
    except LedgerError as fault:
        found = _salvaged(path)
        raise LedgerError(str(fault) if found is None else f"{found} {fault}") from fault
    return [_chain(path, holder, one, contents) for holder, one in sorted(stored.items())]


def _stored(connection: sqlite3.Connection) -> dict[str, _Stored]:
    # bytes that are no text come back as something whose hash can't fit, so that their row is named
    connection.text_factory = lambda raw: raw.decode("utf-8", "backslashreplace")
    found: dict[str, _Stored] = {}
    for values in connection.execute("SELECT * FROM entries ORDER BY holder, sequence"):
        row = Entry._make(values)
        found.setdefault(str(row.holder), _Stored()).rows.append(row)
    for holder, sequence, hashed in connection.execute("SELECT holder, sequence, hash FROM heads"):
        found.setdefault(str(holder), _Stored()).head = sequence, hashed
    for holder, sequence, data in connection.execute("SELECT holder, sequence, bytes FROM payloads"):
        found.setdefault(str(holder), _Stored()).payloads[sequence] = data
    return found


def _chain(path: Path, holder: str, stored: _Stored, contents: Contents) -> Chain:
    reading = read(holder, stored.rows)
    last = reading.hashes[-1] if reading.hashes else None
    faults = [reading.first_bad] if reading.first_bad is not None else []
    if not faults and stored.head != (len(reading.hashes), last):
        what = "is missing: the file itself says that the chain ends elsewhere"
        faults.append(Bad(len(reading.hashes) + 1, what, "chain"))
    faults += _payload_faults(reading, stored.payloads, contents)
    return Chain(path, reading, min(faults, key=lambda bad: bad.sequence, default=None), len(stored.payloads))


def _payload_faults(reading: Reading, payloads: Mapping[object, object], contents: Contents) -> list[Bad]:
    """Where stored bytes and rows disagree; beyond the first bad row nothing is looked at."""
    faults = []
    for sequence, data in payloads.items():
        one = reading.charged.get(sequence) if isinstance(sequence, int) else None
        if one is None or one.of is not None or one.ended is None:
            if reading.first_bad is None:
                place = sequence if isinstance(sequence, int) else 0
                faults.append(Bad(place, "has stored bytes, and was never released", "payloads"))
            continue
        what: str | None
        if not isinstance(data, bytes) or digest_of(data) != reading.payloads.get(one.row.sequence):
            what = f"stored other bytes than the row says that row {sequence} released: they were changed"
        else:
            what = contents(one.row, one.count is not None, data)
        if what is not None:
            faults.append(Bad(one.ended.sequence, what, "payloads"))
    return faults


def _salvaged(path: Path) -> str | None:
    """The first bad row of a file that SQLite finds damaged, in words; None where no row shows it."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            stored = _stored(connection)
    except (sqlite3.Error, sqlite3.Warning, OSError, ValueError, TypeError, MemoryError):
        return None
    for holder, one in sorted(stored.items()):
        bad = read(holder, one.rows).first_bad
        if bad is not None:
            return f"row {bad.sequence} of {holder!r:.60} {bad.what};"
    return None
