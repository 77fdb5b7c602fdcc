"""One row of a chain, looked at by itself: its place, its hash, its columns."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Final, Literal

from fedhead.common.privacy.ledger.chain import Entry

Topic = Literal["chain", "form", "totals", "rounds", "budget"]

_START: Final = "0" * 64
_KINDS: Final = ("terms", "reserve", "release", "abandon")


class Fault(Exception):
    """The first thing that is wrong with a row."""

    def __init__(self, topic: Topic, what: str) -> None:
        self.topic, self.what = topic, what
        super().__init__(what)


def totals_of(row: Entry) -> tuple[float, ...]:
    """Totals of the domain, then of the run: mu_squared, epsilon and delta of each."""
    return (
        row.domain_mu_squared, row.domain_epsilon, row.domain_delta, row.run_mu_squared, row.run_epsilon, row.run_delta,
    )  # fmt: skip


def row_hash(row: Entry) -> str:
    """SHA-256 of a row: JSON of the list of its columns but the last, in ASCII, without spaces, infinity as "inf"."""
    columns = [None if column is None else "inf" if column == math.inf else column for column in row[:-1]]
    return hashlib.sha256(json.dumps(columns, separators=(",", ":"), allow_nan=False).encode("ascii")).hexdigest()


def check_link(row: Entry, holder: str, hashes: Sequence[str]) -> None:
    """Raise Fault unless a row is the next one of a holder's chain, whose earlier rows have these hashes."""
    last = hashes[-1] if hashes else _START
    if row.holder != holder or row.sequence != len(hashes) + 1:
        raise Fault("chain", "is missing, or rows stand in another order")
    if row.previous != last:
        raise Fault("chain", "does not follow the row before: a row was changed, taken out or put in")
    try:
        good = row.hash == row_hash(row)
    except (TypeError, ValueError, UnicodeError):
        good = False
    if not good:
        raise Fault("chain", "has a hash that is not its own: the row was changed")


def check_form(row: Entry) -> None:
    """Raise Fault unless a row has the columns that its kind needs."""
    texts: dict[str, tuple[str, ...]] = {
        "terms": ("time", "domain", "disjoint_from"),
        "reserve": ("time", "domain", "run", "digest", "unit", "fingerprint", "noise", "event"),
        "release": ("time", "domain", "run", "digest"),
        "abandon": ("time", "domain", "run", "digest"),
    }
    if row.kind not in _KINDS:
        raise Fault("form", "is of an unknown kind")
    if any(type(getattr(row, name)) is not str for name in texts[row.kind]):
        raise Fault("form", f"is a row of kind {row.kind} without all of its columns")
    if row.kind != "terms" and (type(row.round) is not int or row.round < 0):
        raise Fault("form", f"is a row of kind {row.kind} without its round")
    if any(type(value) is not float or not value >= 0 for value in totals_of(row)):
        raise Fault("form", "has a total that is not a number from 0")
