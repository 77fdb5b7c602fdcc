"""What is read out of a ledger: replays, verification, summaries, and a file a holder."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

from fedhead.common.failpoints import reach
from fedhead.common.privacy.accounting import Spent
from fedhead.common.privacy.filters import Left, Totals, least, left, spent
from fedhead.common.privacy.ledger.chain import GENESIS, Entry, LedgerError, Mark, digest_of
from fedhead.common.privacy.ledger.files import damaged, failures, fill, sync_folder
from fedhead.common.privacy.ledger.state import Domain, State
from fedhead.common.privacy.terms import Terms


class Declaration(NamedTuple):
    """The budget of a domain, as its holder declares it; see `Ledger.declare`."""

    holder: str
    domain: str
    terms: Terms | None
    disjoint_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunSummary:
    """What one run has spent of a domain.

    Attributes
    ----------
    run : str
    rounds : int
        Different rounds that were charged.
    reserved, released, abandoned : int
        Reserves by what became of them; all are spent.
    totals : Totals
    spent : Spent or None
        None without a delta to state it at.
    """

    run: str
    rounds: int
    reserved: int
    released: int
    abandoned: int
    totals: Totals
    spent: Spent | None


@dataclass(frozen=True)
class DomainSummary:
    """What is spent and left of a domain.

    Attributes
    ----------
    holder, domain : str
    terms : Terms or None
    disjoint_from : tuple of str
        As this domain declares it; it counts for those that declare the same.
    overlapping : tuple of str
        The other domains that count against this one's budget.
    units, noise : tuple of str
        Privacy units and sources of noise that were seen. Several units have no epsilon in common.
    seeded : bool
        Whether any noise came from a seed: epsilon means nothing to whoever knows it.
    totals, shared : Totals
        Of the domain itself, and together with those that overlap it.
    spent : Spent or None
        `totals` as (epsilon, delta); None without terms and delta.
    left : Left or None
        What the terms leave beyond `shared`, and those of the domains that overlap; None without terms.
    runs : tuple of RunSummary
    others : tuple of (Terms, Totals)
        The terms of the domains that overlap, and what counts against each: admission holds to them too.
    """

    holder: str
    domain: str
    terms: Terms | None
    disjoint_from: tuple[str, ...]
    overlapping: tuple[str, ...]
    units: tuple[str, ...]
    noise: tuple[str, ...]
    seeded: bool
    totals: Totals
    shared: Totals
    spent: Spent | None
    left: Left | None
    runs: tuple[RunSummary, ...]
    others: tuple[tuple[Terms, Totals], ...] = ()

    def left_by(self, terms: Terms, further: Totals | None = None) -> Left:
        """What is left by these terms of the domain, and by those of the domains that overlap.

        Parameters
        ----------
        further : Totals, optional
            What this domain is to spend beyond what it has spent.
        """
        budgets = [(terms, self.shared), *self.others]
        return least(*(left(one, total if further is None else total.plus(further)) for one, total in budgets))

    @property
    def given_away(self) -> bool:
        """Whether a deployed holder let a seed that arrived draw its noise: the sender can take it off again."""
        return not self.seeded and any("seeded" in source for source in self.noise)


# One look-up a row, because the table is sorted by sequence first; a row that is missing is left out.
_CHAIN: Final = (
    "WITH RECURSIVE place(n) AS (SELECT ? UNION ALL SELECT n + 1 FROM place WHERE n < ?) SELECT entries.* FROM place "
    "CROSS JOIN entries ON entries.sequence = place.n AND entries.holder = ?"
)


def chain(connection: sqlite3.Connection, holder: str, after: int = 0) -> Iterator[Entry]:
    """A holder's rows in order, those after a sequence."""
    end = connection.execute("SELECT sequence FROM heads WHERE holder = ?", (holder,)).fetchone()
    if end is None or end[0] <= after:
        return iter(())
    return map(Entry._make, connection.execute(_CHAIN, (after + 1, end[0], holder)))


def replay(connection: sqlite3.Connection, path: Path, state: State) -> int:
    """Take a holder's rows beyond the state's end into the state; LedgerError for the first that is wrong."""
    before = state.sequence
    for entry in chain(connection, state.holder, before):
        fault = state.fault(entry)
        if fault is not None:
            raise damaged(path, f"entry {entry.sequence} of {state.holder} {fault}")
        state.apply(entry)
    end = connection.execute("SELECT sequence, hash FROM heads WHERE holder = ?", (state.holder,)).fetchone()
    beyond = connection.execute(
        "SELECT 1 FROM entries WHERE sequence = ? AND holder = ?", (state.sequence + 1, state.holder)
    ).fetchone()
    if end != (tuple(state.mark) if state.sequence else None) or beyond is not None:
        raise damaged(path, f"the chain of {state.holder} does not end where it should: rows are missing")
    return state.sequence - before


def stored_mark(path: Path, holder: str) -> Mark | None:
    """Where a holder's chain ends, as the file says it: nothing is checked, so that it costs the same for any ledger.

    Parameters
    ----------
    path : Path
        A ledger, which other processes may have open; nothing of it is changed.
    holder : str

    Returns
    -------
    Mark or None
        The start of all chains where the holder has no row; None where the file is not there or can't be read.
    """
    try:
        if not path.is_file():
            return None
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("SELECT sequence, hash FROM heads WHERE holder = ?", (holder,)).fetchone()
    except (OSError, sqlite3.Error):
        return None
    return Mark(0, GENESIS) if found is None else Mark(*found)


def holders(connection: sqlite3.Connection) -> list[str]:
    """Everyone who has a chain, sorted."""
    return [row[0] for row in connection.execute("SELECT holder FROM heads ORDER BY holder")]


def verify(connection: sqlite3.Connection, path: Path, holder: str | None) -> int:
    """Check a ledger from its first row to its last; see `Ledger.verify`."""
    if connection.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
        raise damaged(path, "SQLite's check fails")
    count = 0
    for name in holders(connection) if holder is None else [holder]:
        state = State(name)
        count += replay(connection, path, state)
        stored = connection.execute("SELECT sequence, bytes FROM payloads WHERE holder = ?", (name,))
        for sequence, payload in stored:
            reserve = state.reserves.get(sequence)
            if reserve is None or not isinstance(payload, bytes) or digest_of(payload) != reserve.payload_digest:
                raise damaged(path, f"the stored bytes of entry {sequence} of {name} were changed")
    if holder is None:
        if connection.execute("SELECT COUNT(*) FROM entries").fetchone()[0] != count:
            raise damaged(path, "there are entries that belong to no chain")
        lost = connection.execute("SELECT 1 FROM payloads WHERE holder NOT IN (SELECT holder FROM heads)").fetchone()
        if lost is not None:
            raise damaged(path, "there are stored bytes that belong to no chain")
    return count


def by_holder(declarations: Iterable[Declaration]) -> dict[str, list[Declaration]]:
    """Holder -> its declarations, in their order."""
    found: dict[str, list[Declaration]] = {}
    for one in declarations:
        found.setdefault(one.holder, []).append(one)
    return found


def as_declared(state: State, declarations: Iterable[Declaration]) -> State:
    """A state as it would be with these declarations of its holder written; `state` itself stays what it is."""
    found = copy(state)
    found.domains = dict(state.domains)
    for one in declarations:
        before = found.domains.get(one.domain, Domain())
        disjoint = tuple(sorted(set(one.disjoint_from) - {one.domain}))
        found.domains[one.domain] = replace(before, terms=one.terms, disjoint_from=disjoint)
    return found


def summaries(state: State, delta: float | None) -> list[DomainSummary]:
    """A summary of each domain of a holder, by name."""
    return [_summary(state, name, domain, delta) for name, domain in sorted(state.domains.items())]


def unwritten(declarations: Iterable[Declaration]) -> list[DomainSummary]:
    """The summaries that a ledger without any row would give after these declarations."""
    named = sorted(by_holder(declarations).items())
    return [found for name, own in named for found in summaries(as_declared(State(name), own), None)]


def _summary(state: State, name: str, domain: Domain, delta: float | None) -> DomainSummary:
    overlapping, terms = state.overlapping(name)[1:], domain.terms
    others = [(state.domains[other].terms, _shared(state, other)) for other in overlapping]
    found = DomainSummary(
        state.holder, name, terms, domain.disjoint_from, tuple(sorted(overlapping)),
        tuple(sorted(domain.units)), tuple(sorted(domain.noises)), domain.seeded, domain.totals, _shared(state, name),
        _spent(terms, domain.totals, delta), None, tuple(_runs(state, name, terms, delta)),
        tuple((own, shared) for own, shared in others if own is not None),
    )  # fmt: skip
    return found if terms is None else replace(found, left=found.left_by(terms))


def _shared(state: State, name: str) -> Totals:
    """What counts against a domain's budget."""
    total = state.domains[name].totals
    for other in state.overlapping(name)[1:]:
        total = total.plus(state.domains[other].totals)
    return total


def _runs(state: State, domain: str, terms: Terms | None, delta: float | None) -> Iterable[RunSummary]:
    reserves: dict[str, list[tuple[int, str]]] = {}
    for one in state.reserves.values():
        if one.domain == domain:
            reserves.setdefault(one.run, []).append((one.round, one.status))
    for run, found in reserves.items():
        status = [state for _, state in found]
        totals = state.runs[run].shares[domain].totals
        yield RunSummary(
            run, len({round for round, _ in found}), status.count("reserved"), status.count("released"),
            status.count("abandoned"), totals, _spent(terms, totals, delta),
        )  # fmt: skip


def _spent(terms: Terms | None, totals: Totals, delta: float | None) -> Spent | None:
    return None if terms is None and delta is None else spent(terms, totals, delta)


def export(path: Path, chains: Iterable[tuple[str, list[Entry]]], folder: Path) -> list[Path]:
    """Write each chain to a ledger of its own; see `Ledger.export`."""
    written = []
    with failures(folder):
        for holder, entries in chains:
            if holder in (".", "..") or any(mark in holder for mark in "/\\\0"):
                raise LedgerError(
                    f"ledger {path} has the holder {holder!r:.60}: no folder can have that name. Rename it."
                )
            target = folder / holder / "ledger.sqlite"
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}")
            try:
                os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
                # no write-ahead log: the file can be copied and read anywhere
                fill(temporary, journal="MEMORY", entries=entries)
                reach("ledger.export.written")
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(target.parent)
            written.append(target)
    return written
