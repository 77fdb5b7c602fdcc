"""One row of the ledger, and the hash that chains it to the row before.

Each holder has a chain of its own: sequence 1, 2, ...; a row's hash covers all its other columns, the previous row's
hash included, so that a row can't be changed, left out or moved without breaking every later hash. The chain alone
does not show that its end was cut off or that an older copy was put back: `Ledger.has` does, with a mark that somebody
else remembers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple, get_args

from fedhead.common.errors import FedheadError

Kind = Literal["terms", "reserve", "release", "abandon"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
GENESIS: Final = "0" * 64  # what the first row of a chain has as its previous hash


class LedgerError(FedheadError):
    """A ledger that can't be used: damaged, unreadable, not writable, of another schema, or asked for what is not so.

    Whenever it is raised, nothing was admitted and nothing may leave the holder.
    """


class Mark(NamedTuple):
    """A place in a holder's chain; the server returns the last one it has seen.

    Attributes
    ----------
    sequence : int
        0 before the first row.
    hash : str
        SHA-256 in hexadecimal.
    """

    sequence: int
    hash: str


class Entry(NamedTuple):
    """A row of the table ``entries``; what does not apply to its kind is None.

    Attributes
    ----------
    holder, sequence : str, int
        The chain and the place in it, from 1.
    time : str
        UTC, ISO 8601, in microseconds. Evidence only; nothing depends on it.
    kind : str
        terms: a budget was declared. reserve: an event was charged. release: its bytes may leave. abandon: they never
        will; the charge stays.
    domain, run, round
        What the row belongs to.
    digest : str
        Of the whole request.
    unit, noise : str
        Privacy unit and source of noise of a reserve.
    fingerprint : str
        Of a reserve its data's, keyed; of other rows random: from its hash nobody can tell a row's time.
    event : str
        Canonical JSON of the event.
    plan : str
        Poisson only: canonical JSON of the run's whole plan and the delta at which it is charged.
    seeded : int
        1: a retry draws the same noise again, so it is the same release.
    of : int
        The reserve that a release or an abandon speaks of; for a noised metric, the reserve of its round.
    payload_digest : str
        SHA-256 of the stored bytes of a release.
    terms, disjoint_from : str
        JSON of a declared budget, and of the domains that it says it shares no unit with.
    domain_mu_squared ... run_delta : float
        Totals of the domain and of the run within the domain after this row, rounded upwards.
    previous, hash : str
    """

    holder: str
    sequence: int
    time: str
    kind: str
    domain: str
    run: str | None
    round: int | None
    digest: str | None
    unit: str | None
    fingerprint: str | None
    noise: str | None
    event: str | None
    plan: str | None
    seeded: int | None
    of: int | None
    payload_digest: str | None
    terms: str | None
    disjoint_from: str | None
    domain_mu_squared: float
    domain_epsilon: float
    domain_delta: float
    run_mu_squared: float
    run_epsilon: float
    run_delta: float
    previous: str
    hash: str


class Columns(NamedTuple):
    """What differs from row to row: the columns of an Entry from ``domain`` to ``disjoint_from``, in the same order."""

    domain: str
    run: str | None = None
    round: int | None = None
    digest: str | None = None
    unit: str | None = None
    fingerprint: str | None = None
    noise: str | None = None
    event: str | None = None
    plan: str | None = None
    seeded: int | None = None
    of: int | None = None
    payload_digest: str | None = None
    terms: str | None = None
    disjoint_from: str | None = None


_encode: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def hash_of(values: Sequence[Any]) -> str:
    """SHA-256 over the canonical JSON of a row: an array of its columns in their order, all but the hash.

    Parameters
    ----------
    values : sequence
        The columns of an Entry up to ``previous``; infinity, which JSON lacks, is written as "inf".

    Raises
    ------
    ValueError
        A value is NaN.
    """
    try:
        text = _encode(values)
    except ValueError:
        text = _encode(["inf" if value == math.inf else value for value in values])
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(payload: bytes) -> str:
    """SHA-256 of stored bytes, in hexadecimal."""
    return hashlib.sha256(payload).hexdigest()
