"""The ledger: every charge of a data holder, admitted and made durable before its noise is drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedhead.common.privacy.filters import Totals, charge_of
from fedhead.common.privacy.ledger import reading
from fedhead.common.privacy.ledger.admission import (
    MOST,
    Denied,
    Granted,
    Repeated,
    Reservation,
    check_text,
    repeated,
    same_release,
    spend,
)
from fedhead.common.privacy.ledger.chain import GENESIS, Columns, Entry, Kind, LedgerError, Mark, digest_of
from fedhead.common.privacy.ledger.files import damaged
from fedhead.common.privacy.ledger.reading import Declaration, DomainSummary
from fedhead.common.privacy.ledger.state import Reserve, State, event_text
from fedhead.common.privacy.ledger.transactions import Transactions
from fedhead.common.privacy.terms import Terms


class Ledger(Transactions):
    """An append-only ledger of privacy, in one SQLite file.

    Parameters
    ----------
    path : Path
        The file: of one holder in a deployment, of all holders in a simulation.
    create : bool
        Make an empty ledger where there is no file.
    read_only : bool
        For audits: no row is ever written, and a folder without the right to write will do.

    Raises
    ------
    LedgerError
        No file, not a ledger, another schema, damaged, or not writable.

    Notes
    -----
    Guarantee: whatever left the holder had its charge on the disk before its noise was drawn, and all charges that were
    admitted, by any process, at any time, fit the declared terms (filters.py says what that means). A crash leaves a
    reserve that counts as spent; nothing is ever refunded. The order to keep: `reserve`, draw noise, `release`, send.

    Opening checks the file; the first use of a holder checks its whole chain, and every later one what other processes
    have added since. An object belongs to one process and is safe among its threads. Put the file on a local disk:
    SQLite's locks don't hold on most network file systems.
    """

    # ------------------------------------------------------------------------------------------------ what is written

    def declare(self, holder: str, domain: str, terms: Terms | None, disjoint_from: Sequence[str] = ()) -> None:
        """Set the budget of a domain; an entry where it differs from the last one.

        Parameters
        ----------
        holder, domain : str
        terms : Terms or None
            None: everything is admitted that no other domain's budget forbids.
        disjoint_from : sequence of str
            Domains of the holder that share no privacy unit with this one. It counts only once they declare the same;
            until then what they spend counts against this budget too.

        Raises
        ------
        LedgerError
        """
        self.declare_all([Declaration(holder, domain, terms, tuple(disjoint_from))])

    def declare_all(self, declarations: Sequence[Declaration]) -> None:
        """`declare` for many, in one transaction."""
        for one in declarations:
            for name, value in (("holder", one.holder), ("domain", one.domain)):
                check_text(f"declaration.{name}", value)
        with self._writing("declare"):
            for holder, domain, terms, disjoint_from in declarations:
                state = self._state(holder)
                disjoint = tuple(sorted(set(disjoint_from) - {domain}))
                known = state.domains.get(domain)
                if known is None or (known.terms, known.disjoint_from) != (terms, disjoint):
                    columns = Columns(
                        domain, terms=terms.to_json() if terms is not None else None,
                        disjoint_from=json.dumps(disjoint, separators=(",", ":")),
                    )  # fmt: skip
                    self._append(state, "terms", columns, state.totals(domain, None))

    def reserve(
        self, wanted: Sequence[Reservation], done: Sequence[tuple[str, int, bytes | None]] = ()
    ) -> list[Granted | Repeated | Denied]:
        """Charge rounds before their noise is drawn; one transaction, on disk when it returns.

        Parameters
        ----------
        wanted : sequence of Reservation
            Of one holder in a deployment, of all holders of a round in a simulation.
        done : sequence, as in `release`
            What a simulation made in the round before, marked released in the same transaction. A deployment calls
            `release` before it sends.

        Returns
        -------
        list of Granted, Repeated or Denied
            One each, in order; see admission.py. A Denied one spends nothing and does not stop the others.

        Raises
        ------
        InputError
            A reservation that can't be written down. Nothing was spent.
        LedgerError
            Nothing was admitted. After a failure of the disk the charges may be on it all the same: they count.
        """
        for one in wanted:
            one.check()
        self._charge_plans([one for one in wanted if one.plan is not None])
        with self._writing("reserve"):
            for one_done in done:
                self._release(*one_done)
            return [self._reserve(one) for one in wanted]

    def release(self, done: Sequence[tuple[str, int, bytes | None]]) -> list[Mark]:
        """Store what is about to be sent; one transaction, on disk when it returns. Only then may it leave.

        Parameters
        ----------
        done : sequence of (holder, sequence of the reserve, payload)
            payload: the bytes of the reply, for a server that asks again; None: not stored (simulation). Only those of
            a run's latest round are kept.

        Returns
        -------
        list of Mark
            The end of each holder's chain, for the reply.

        Raises
        ------
        LedgerError
            No such reserve, one that was abandoned, or one that was released with other bytes; or the disk failed.
            Nothing may leave.
        """
        with self._writing("release"):
            return [self._release(*one) for one in done]

    def abandon(self, holder: str, sequence: int) -> Mark:
        """Say that a reserve's bytes will never leave. It stays spent.

        Raises
        ------
        LedgerError
            No such reserve, or one that was released.
        """
        with self._writing("abandon"):
            state = self._state(holder)
            reserve = self._reserve_of(state, sequence)
            if reserve.status == "released":
                raise self._wrong(holder, sequence, "was released: it can't be abandoned")
            if reserve.status == "reserved":
                self._follow(state, reserve, "abandon")
            return state.mark

    # --------------------------------------------------------------------------------------------------- what is read

    def mark(self, holder: str) -> Mark:
        """The end of a holder's chain; goes with every reply."""
        with self._reading():
            return self._state(holder).mark

    def has(self, holder: str, mark: Mark) -> bool:
        """Whether the chain contains a mark that was seen before; False means that an older copy was restored."""
        if type(mark.sequence) is not int or not 0 < mark.sequence <= MOST:  # what arrives may be anything
            return mark == Mark(0, GENESIS)
        with self._reading():
            self._state(holder)
            found = self._connection.execute(
                "SELECT hash FROM entries WHERE holder = ? AND sequence = ?", (holder, mark.sequence)
            ).fetchone()
        return found is not None and found[0] == mark.hash

    def standing(self, holder: str) -> tuple[Mark, dict[str, Totals]]:
        """The end of a holder's chain and the totals of its domains, of one moment."""
        with self._reading():
            state = self._state(holder)
            return state.mark, {name: domain.totals for name, domain in sorted(state.domains.items())}

    def holders(self) -> list[str]:
        """Everyone who has a chain, sorted."""
        with self._reading():
            return reading.holders(self._connection)

    def summary(
        self, holder: str | None = None, delta: float | None = None, declared: Sequence[Declaration] = ()
    ) -> list[DomainSummary]:
        """What is spent and left, a domain each.

        Parameters
        ----------
        holder : str, optional
            All holders where it is left out.
        delta : float, in (0, 1), optional
            At which to state what was spent; a domain's own where it is left out.
        declared : sequence of Declaration, optional
            As if these had been declared, too; nothing is written.
        """
        named = reading.by_holder(declared)
        names = sorted({*self.holders(), *named}) if holder is None else [holder]
        with self._reading():
            states = (reading.as_declared(self._state(name), named.get(name, ())) for name in names)
            return [one for state in states for one in reading.summaries(state, delta)]

    def entries(self, holder: str | None = None) -> Iterator[Entry]:
        """All rows as they are stored, holder by holder, in order. Unchecked: `verify` checks them."""
        with self._reading():
            names = reading.holders(self._connection) if holder is None else [holder]
            return iter([entry for name in names for entry in reading.chain(self._connection, name)])

    def verify(self, holder: str | None = None) -> int:
        """Check everything again from the file: structure, chains, totals, ends, stored bytes.

        Returns
        -------
        int
            Rows checked.

        Raises
        ------
        LedgerError
            Names the first row that is wrong.
        """
        with self._reading():
            return reading.verify(self._connection, self.path, holder)

    def export(self, folder: Path) -> list[Path]:
        """Write each holder's chain, without stored bytes, to ``folder/<holder>/ledger.sqlite``, a ledger of its own.

        Raises
        ------
        LedgerError
            A holder's name that is no plain folder name, or the disk failed.
        """
        with self._reading():
            chains = ((name, list(reading.chain(self._connection, name))) for name in reading.holders(self._connection))
            return reading.export(self.path, chains, Path(folder))

    # ------------------------------------------------------------------------------------------------------- the rows

    def _charge_plans(self, sampled: list[Reservation]) -> None:
        """Compute what new Poisson plans cost before the write lock is taken: an accountant may take seconds."""
        if not sampled:
            return
        with self._reading():
            shares = [self._state(one.holder).share(one.domain, one.run) for one in sampled]
        for one, share in zip(sampled, shares, strict=True):
            if one.plan is not None and (share is None or share.plan is None):
                charge_of(one.plan.event, one.plan.delta)  # kept by its cache

    def _reserve(self, wanted: Reservation) -> Granted | Repeated | Denied:
        state = self._state(wanted.holder)
        before = repeated(state, wanted)
        if isinstance(before, str):
            return Denied(before)
        if before is not None:
            payload = self._payload(state, before)
            if payload is not None:
                return Repeated(before.sequence, payload, state.mark)
            if same_release(before, wanted):
                return Granted(before.sequence, state.mark)
        decided = spend(state, wanted)
        if isinstance(decided, str):
            return Denied(decided)
        if before is not None and before.status == "reserved":
            self._follow(state, before, "abandon")
        plan = wanted.plan.to_json() if wanted.plan is not None else None
        columns = Columns(
            wanted.domain, wanted.run, wanted.round, wanted.digest, wanted.unit, wanted.fingerprint, wanted.noise,
            event_text(wanted.event), plan, int(wanted.seeded),
        )  # fmt: skip
        sequence = self._append(state, "reserve", columns, decided.after)
        if wanted.metrics is not None and decided.after_metrics is not None:
            columns = columns._replace(event=event_text(wanted.metrics), plan=None, of=sequence)
            self._append(state, "reserve", columns, decided.after_metrics)
        return Granted(sequence, state.mark)

    def _release(self, holder: str, sequence: int, payload: bytes | None) -> Mark:
        state = self._state(holder)
        reserve = self._reserve_of(state, sequence)
        digest = digest_of(payload) if payload is not None else None
        if reserve.status == "released" and digest == reserve.payload_digest:
            return state.mark
        if reserve.status != "reserved" and not reserve.seeded:
            raise self._wrong(holder, sequence, f"was {reserve.status} before: its bytes must not leave")
        run = state.runs[reserve.run]
        if payload is not None and run.latest is reserve:
            if run.stored is not None:
                self._execute("DELETE FROM payloads WHERE holder = ? AND sequence = ?", (holder, run.stored))
            self._execute("INSERT OR REPLACE INTO payloads VALUES (?, ?, ?)", (holder, sequence, payload))
        self._follow(state, reserve, "release", digest)
        return state.mark

    def _follow(self, state: State, reserve: Reserve, kind: Kind, payload_digest: str | None = None) -> None:
        """Append what became of a reserve."""
        columns = Columns(
            reserve.domain, reserve.run, reserve.round, reserve.digest, of=reserve.sequence,
            payload_digest=payload_digest,
        )  # fmt: skip
        self._append(state, kind, columns, state.totals(reserve.domain, reserve.run))

    def _payload(self, state: State, reserve: Reserve) -> bytes | None:
        """The stored bytes of a reserve, None where there are none."""
        if reserve.status != "released" or reserve.payload_digest is None:
            return None
        self._flush()
        found = self._connection.execute(
            "SELECT bytes FROM payloads WHERE holder = ? AND sequence = ?", (state.holder, reserve.sequence)
        ).fetchone()
        if found is None:
            return None
        payload = bytes(found[0])
        if digest_of(payload) != reserve.payload_digest:
            raise damaged(self.path, f"the stored bytes of entry {reserve.sequence} of {state.holder} were changed")
        return payload

    def _reserve_of(self, state: State, sequence: int) -> Reserve:
        reserve = state.reserves.get(sequence)
        if reserve is None:
            raise self._wrong(state.holder, sequence, "is not a reserve")
        return reserve

    def _wrong(self, holder: str, sequence: int, what: str) -> LedgerError:
        return LedgerError(f"ledger {self.path}: entry {sequence} of {holder} {what}. Reserve the round again.")
