"""The ledger's SQLite file: its schema, how one is made, and what is checked before one is used.

WAL with ``synchronous=FULL``: a commit has returned from fsync before it returns to us, and a process that dies in the
middle of one leaves all of it or nothing. A new ledger is built under another name and linked into place, so that a
file of that name is always a whole ledger, whatever died while it was made.

The database and its ``-shm`` file are opened by SQLite alone: to close a second handle on them would drop the locks of
this process (POSIX), and with them the one writer at a time.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedhead.common.failpoints import reach
from fedhead.common.privacy.ledger.chain import Entry, LedgerError
from fedhead.common.privacy.ledger.log import lost_rows

SCHEMA: Final = 1
APPLICATION: Final = 0x66686C67  # "fhlg" in the file's header
BUSY_SECONDS: Final = 60.0  # how long a process waits for another one's transaction

_TYPES: Final = {"sequence": "INTEGER", "round": "INTEGER", "seeded": "INTEGER", "of": "INTEGER"}
_NOT_NULL: Final = {"holder", "sequence", "time", "kind", "domain", "previous", "hash"}


def _column(name: str) -> str:
    kind = "REAL NOT NULL" if name.startswith(("domain_", "run_")) else _TYPES.get(name, "TEXT")
    return f'"{name}" {kind}{" NOT NULL" if name in _NOT_NULL else ""}'


# Types, names and texts are compared word by word when a file is opened: a change here is a new SCHEMA.
OBJECTS: Final = {
    # by sequence first: the rows of all holders of a simulated round lie together, which more than halves a commit
    "entries": (
        f"CREATE TABLE entries ({', '.join(_column(name) for name in Entry._fields)}, "
        "PRIMARY KEY (sequence, holder)) WITHOUT ROWID"
    ),
    # the end of each chain once more, so that a lost last row is noticed
    "heads": (
        "CREATE TABLE heads (holder TEXT PRIMARY KEY NOT NULL, sequence INTEGER NOT NULL, hash TEXT NOT NULL) "
        "WITHOUT ROWID"
    ),
    "payloads": (
        "CREATE TABLE payloads (holder TEXT NOT NULL, sequence INTEGER NOT NULL, bytes BLOB NOT NULL, "
        "PRIMARY KEY (holder, sequence))"
    ),
    "entries_stay": (
        "CREATE TRIGGER entries_stay BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries are never deleted'); "
        "END"
    ),
    "entries_keep": (
        "CREATE TRIGGER entries_keep BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'entries are never changed'); "
        "END"
    ),
    "events": (
        "CREATE VIEW events AS SELECT spent.holder, spent.sequence, spent.time, spent.domain, spent.run, spent.round, "
        "spent.unit, spent.fingerprint, spent.event, spent.noise, CASE last.kind WHEN 'release' THEN 'released' "
        "WHEN 'abandon' THEN 'abandoned' ELSE 'reserved' END AS state, spent.previous, spent.hash FROM entries AS "
        "spent LEFT JOIN (SELECT holder, of, kind, MAX(sequence) FROM entries WHERE kind IN ('release', 'abandon') "
        "GROUP BY holder, of) AS last ON last.holder = spent.holder AND last.of = COALESCE(spent.of, spent.sequence) "
        "WHERE spent.kind = 'reserve'"
    ),
}


def failure(path: Path, fault: Exception, read_only: bool = False) -> LedgerError:
    """What a fault of SQLite or of the operating system means for the user, in one line."""
    text = (getattr(fault, "strerror", None) or str(fault)).rstrip(".")
    if read_only and ("unable to open" in text or "ermission" in text):
        return LedgerError(f"ledger {path} can't be read ({text}). Give this user the right to read it.")
    remedy = "Restore it from a copy; a server that has seen more will say so."
    if "full" in text or "No space" in text or "File too large" in text:
        remedy = "Free some space on the disk, then try again."
    elif "locked" in text or "busy" in text:
        remedy = "Wait for the other process that uses it, or end it."
    elif any(word in text for word in ("readonly", "Read-only", "ermission", "unable to open", "attempt to write")):
        remedy = "Give this user the right to write the file and its folder."
    return LedgerError(f"ledger {path} failed ({text}): nothing was admitted and nothing may leave. {remedy}")


@contextmanager
def failures(path: Path, read_only: bool = False) -> Iterator[None]:
    """Turn every fault of SQLite, of a damaged text or of the operating system into a LedgerError."""
    try:
        yield
    except (sqlite3.Error, sqlite3.Warning, OSError, UnicodeError) as fault:
        raise failure(path, fault, read_only) from fault


def make(path: Path) -> None:
    """Make an empty ledger, mode 0600, in a folder that is made with mode 0700 where there is none.

    Of several processes that make the same ledger at once, one wins and the others use its file.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    try:
        fill(temporary, journal="WAL")
        reach("ledger.create.written")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        reach("ledger.create.linked")
        sync_folder(path.parent)
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)


def fill(path: Path, journal: str, entries: list[Entry] | None = None) -> None:
    """Write the schema, and a holder's entries, into an empty file; on disk when it returns."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute(f"PRAGMA journal_mode = {journal}")
        connection.execute("BEGIN")
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {SCHEMA}")
        for sql in OBJECTS.values():
            connection.execute(sql)
        if entries:
            connection.executemany(INSERT, entries)
            connection.execute("INSERT INTO heads VALUES (?, ?, ?)", (*entries[-1][:2], entries[-1].hash))
        connection.execute("COMMIT")
    finally:
        connection.close()
    with open(path, "rb") as file:
        os.fsync(file.fileno())


INSERT: Final = f"INSERT INTO entries VALUES ({', '.join('?' * len(Entry._fields))})"


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder durable."""
    if os.name != "posix":
        return  # a folder can't be opened there
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def connect(path: Path, create: bool, read_only: bool) -> sqlite3.Connection:
    """A checked connection to a ledger; LedgerError for anything else.

    Notes
    -----
    Checked: the header, application and schema version, every table's text, the file's structure (SQLite's quick
    check), and that the write-ahead log of a process that died has not been damaged since. Rows are checked when a
    holder is first used.
    """
    with failures(path, read_only):
        if create and not read_only and not path.exists():
            make(path)
        if not path.is_file():
            raise LedgerError(f"ledger {path} is not there: it must be a file. Check the path.")
        if lost_rows(path):
            raise damaged(path, "its write-ahead log has lost rows")
        mode = "mode=ro" if read_only else "mode=rw"
        if read_only and not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists():
            mode = "immutable=1"  # nobody can write there, and SQLite could not make its own files
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?{mode}", uri=True, isolation_level=None, timeout=BUSY_SECONDS,
            check_same_thread=False,
        )  # fmt: skip
    try:
        with failures(path, read_only):
            _check(connection, path, read_only)
    except BaseException:
        connection.close()
        raise
    return connection


def _check(connection: sqlite3.Connection, path: Path, read_only: bool) -> None:
    def one(sql: str) -> object:
        return connection.execute(sql).fetchone()[0]

    if one("PRAGMA application_id") != APPLICATION:
        raise LedgerError(f"ledger {path} is not a ledger: it must be what fedhead wrote. Check the path.")
    version = one("PRAGMA user_version")
    if version != SCHEMA:
        raise LedgerError(
            f"ledger {path} has schema {version}: this fedhead knows {SCHEMA}. Install the fedhead that wrote it."
        )
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cache_size = -65536")  # a round of thousands of holders stays in memory until its commit
    if not read_only:
        if one("PRAGMA journal_mode = WAL") != "wal":
            raise LedgerError(
                f"ledger {path} can't keep a write-ahead log: its folder must allow it. Use a local disk."
            )
        connection.execute("PRAGMA synchronous = FULL")
    found = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
    if found != OBJECTS:
        raise damaged(path, "its tables are not those of a ledger")
    if one("PRAGMA quick_check(1)") != "ok":
        raise damaged(path, "SQLite's check fails")
    if not read_only:
        connection.execute("BEGIN IMMEDIATE")  # shows that the file can be written
        connection.execute("ROLLBACK")


def damaged(path: Path, what: str) -> LedgerError:
    """The error of a ledger whose content is not what was written."""
    return LedgerError(
        f"ledger {path} is damaged ({what}): nothing was admitted and nothing may leave. Restore it from a copy; a "
        "server that has seen more will say so."
    )
