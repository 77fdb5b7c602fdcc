"""The ledger of privacy: what a data holder spent, admitted and made durable before noise is drawn.

    chain.py        one row, and the hash that chains it to the one before
    state.py        what a chain says: totals, runs, reserves; every row is checked before it counts
    admission.py    whether a state admits a round: repeats, order, plans, budgets
    files.py        the SQLite file: schema, making one, checking one
    log.py          whether SQLite's write-ahead log has lost what was durable
    transactions.py one writer at a time, and states in memory that never run ahead of the file
    store.py        Ledger: declare, reserve, release, abandon, mark, has
    reading.py      verification, summaries, a file a holder, the last mark
    signing.py      how statements are signed
    statements.py   signed statements

Imports neither torch, Flower, Opacus nor dp-accounting; the last two are loaded when a Poisson plan is charged.
"""

from fedhead.common.privacy.ledger.admission import Denied, Granted, Repeated, Reservation
from fedhead.common.privacy.ledger.chain import GENESIS, Entry, LedgerError, Mark
from fedhead.common.privacy.ledger.reading import Declaration, DomainSummary, RunSummary, stored_mark, unwritten
from fedhead.common.privacy.ledger.state import Plan
from fedhead.common.privacy.ledger.statements import Statement, load_key, statement, verify_statement
from fedhead.common.privacy.ledger.store import Ledger

__all__ = [
    "GENESIS",
    "Declaration",
    "Denied",
    "DomainSummary",
    "Entry",
    "Granted",
    "Ledger",
    "LedgerError",
    "Mark",
    "Plan",
    "Repeated",
    "Reservation",
    "RunSummary",
    "Statement",
    "load_key",
    "statement",
    "stored_mark",
    "unwritten",
    "verify_statement",
]
