"""Transactions of the ledger: one writer at a time, states in memory that never run ahead of the file."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from fedhead.common.failpoints import reach
from fedhead.common.privacy.filters import Totals
from fedhead.common.privacy.ledger import reading
from fedhead.common.privacy.ledger.chain import Columns, Entry, Kind, LedgerError, hash_of
from fedhead.common.privacy.ledger.files import INSERT, connect, failures
from fedhead.common.privacy.ledger.state import State


class Transactions:
    """A checked connection, the states that were replayed from it, and the rows that wait for the next commit.

    A state is used only while it stands at the end of its chain in the file. The write lock is taken before anything
    is read that an admission depends on (BEGIN IMMEDIATE), and SQLite's ``data_version`` says whether another process
    has written since; then the rows that are new are replayed, each of them checked. Whatever goes wrong in a
    transaction, all states are dropped and replayed from the file.
    """

    def __init__(self, path: Path, create: bool = True, read_only: bool = False) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self._connection = connect(self.path, create, read_only)
        self._file = self._identity()
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._states: dict[str, State] = {}
        self._current: set[str] = set()  # holders whose state is at the end of the chain in the file
        self._version = -1
        self._rows: list[Entry] = []
        self._time = ""

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, state: State, kind: Kind, columns: Columns, after: tuple[Totals, Totals]) -> int:
        """Add a row to a holder's chain, in memory until the next `_flush`; its sequence.

        A reserve has the fingerprint of its data, which nobody else can compute. Every other row gets a random one:
        hashes leave the holder, and who could guess all of a row but its time would read the time off its hash.
        """
        total, of_run = after
        if kind != "reserve":
            columns = columns._replace(fingerprint=secrets.token_hex(16))
        values = (
            state.holder, state.sequence + 1, self._time, kind, *columns, total.mu_squared, total.epsilon, total.delta,
            of_run.mu_squared, of_run.epsilon, of_run.delta, state.hash,
        )  # fmt: skip
        entry = Entry(*values, hash_of(values))
        state.apply(entry, after)
        self._rows.append(entry)
        return entry.sequence

    @contextmanager
    def _writing(self, operation: str) -> Iterator[None]:
        """One transaction that holds the write lock from its first read on; all or nothing, on disk at its end."""
        if self.read_only:
            raise LedgerError(f"ledger {self.path} is open for reading only: it can't take a charge. Open it anew.")
        with self._lock, failures(self.path):
            reach(f"ledger.{operation}.begin")
            self._own()
            try:
                self._begin()
                reach(f"ledger.{operation}.locked")
                self._look()
                self._time = datetime.now(UTC).isoformat(timespec="microseconds")
                yield
                self._flush()
                reach(f"ledger.{operation}.written")
                self._execute("COMMIT")
                reach(f"ledger.{operation}.committed")
            except BaseException:
                # what is in memory may be ahead of the file, or behind it after a failed fsync: replay it
                self._rows.clear()
                self._states.clear()
                self._current.clear()
                if self._connection.in_transaction:
                    self._execute("ROLLBACK")
                raise

    def _begin(self) -> None:
        self._execute("BEGIN IMMEDIATE")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One snapshot of the file; may be nested, and within a write."""
        with self._lock, failures(self.path):
            if self._connection.in_transaction:
                yield
                return
            self._own()
            self._execute("BEGIN")
            try:
                self._look()
                yield
            finally:
                self._execute("ROLLBACK")

    def _look(self) -> None:
        """Notice what other processes have written since."""
        version = self._connection.execute("PRAGMA data_version").fetchone()[0]
        if version != self._version:
            self._version = version
            self._current.clear()

    def _state(self, holder: str) -> State:
        """A holder's state, with all rows that are in the file, each of them checked."""
        state = self._states.get(holder)
        if state is not None and holder in self._current:
            return state
        if state is None:
            state = State(holder)
        try:
            reading.replay(self._connection, self.path, state)
        except BaseException:
            self._states.pop(holder, None)
            raise
        self._states[holder] = state
        self._current.add(holder)
        return state

    def _flush(self) -> None:
        if self._rows:
            self._connection.executemany(INSERT, self._rows)
            ends = {row.holder: (row.holder, row.sequence, row.hash) for row in self._rows}
            self._connection.executemany("INSERT OR REPLACE INTO heads VALUES (?, ?, ?)", list(ends.values()))
            self._rows.clear()

    def _execute(self, sql: str, values: tuple[Any, ...] = ()) -> None:
        self._connection.execute(sql, values)

    def _identity(self) -> tuple[int, int]:
        with failures(self.path):
            found = os.stat(self.path)
        return found.st_dev, found.st_ino

    def _own(self) -> None:
        """Refuse to go on in a forked process, or when another file has taken the ledger's name."""
        if os.getpid() != self._process:
            raise LedgerError(f"ledger {self.path} was opened by another process: open it anew in each process.")
        if self._identity() != self._file:
            raise LedgerError(f"ledger {self.path} was replaced while it was open: start anew with the file you mean.")
