"""What others remember of a ledger: signed statements, and the marks that a server keeps.

A chain can't show that it is an older copy of itself. Whoever has seen its end can.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedhead.common.errors import InputError
from fedhead.common.privacy.audit.ledger import Bad, Reading
from fedhead.common.privacy.audit.statement import SUBJECT, verify_privacy_statement
from fedhead.common.privacy.filters import Totals
from fedhead.common.privacy.ledger import LedgerError, Mark, verify_statement
from fedhead.server.marks import read_marks
from fedhead.simulations.audit.ledger_rows import Chain
from fedhead.simulations.ledgers import MARKS

MOST_BYTES: Final = 64 * 2**20  # of a statement: far more than any holder has to say


@dataclass(frozen=True)
class Seen:
    """A place in a holder's chain that somebody has seen.

    Attributes
    ----------
    source : str
        Who says so, for messages.
    holder : str
    mark : Mark
    totals : mapping of str to Totals, or None
        Of each domain at that place.
    signed : bool
        Whether it is the holder's own statement.
    """

    source: str
    holder: str
    mark: Mark
    totals: Mapping[str, Totals] | None = None
    signed: bool = True


@dataclass
class Witnesses:
    """What was seen, and what is wrong with those who say so."""

    seen: list[Seen] = field(default_factory=list)
    signed: int = 0
    unsound: list[str] = field(default_factory=list)
    trusted: bool = True
    """Whether every signature was held against a key that is known from elsewhere."""


def gather(statements: Sequence[Path], keys: Sequence[str], marks: Path | None) -> Witnesses:
    """Read statements and marks.

    Parameters
    ----------
    statements : sequence of Path
        From `fedhead budget --sign`, or privacy statements.
    keys : sequence of str
        Public keys in hexadecimal, ``KEY`` or ``HOLDER=KEY``, known from elsewhere.
    marks : Path, optional
        A server's marks.json, or the folder that has it.

    Raises
    ------
    InputError
        A key is none, or a file can't be read.
    """
    found, known = Witnesses(), _known_keys(keys)
    if known and not statements:
        raise InputError(
            "--key is given without --statement: it says whose signature a statement has. Give the statement too."
        )
    for path in statements:
        text = read_text(path, "--statement").strip()
        try:
            one, key = _statement(path, text)
            if known:
                expected = known.get(one.holder, known.get("", set()))
                if key not in expected:
                    raise LedgerError(
                        f"it is signed with the key {key[:16]}..., which is not known to be {one.holder}'s"
                    )
            found.trusted = found.trusted and bool(known)
        except LedgerError as fault:
            found.unsound.append(f"{path.name}: {fault}")
            continue
        found.signed += 1
        found.seen.append(one)
    if marks is not None:
        file = marks / MARKS if marks.is_dir() else marks
        if not file.is_file():
            raise InputError(f'--marks is "{marks}": there is no marks.json. Name the one of the server\'s state.')
        try:
            seen = read_marks(file)
        except (InputError, OverflowError, RecursionError) as fault:
            raise InputError(
                f'--marks is "{marks}": it can\'t be read as marks. Name the marks.json that the server wrote.'
            ) from fault
        found.seen += [Seen(file.name, holder, mark, signed=False) for holder, mark in seen.items()]
    return found


def _statement(path: Path, text: str) -> tuple[Seen, str]:
    """A statement of either kind whose signature holds, and its key."""
    try:
        privacy = json.loads(text).get("subject") == SUBJECT
    except (ValueError, AttributeError, RecursionError):
        privacy = False
    if privacy:
        fields = verify_privacy_statement(text)
        return Seen(path.name, fields["holder"], Mark(fields["sequence"], fields["hash"])), fields["public_key"]
    stated = verify_statement(text)
    return Seen(path.name, stated.holder, stated.mark, stated.domains), stated.public_key


def read_text(path: Path, setting: str) -> str:
    """The text of a statement's file.

    Raises
    ------
    InputError
        It is no file, far too long, or no text.
    """
    try:
        # neither a pipe, which may never end, nor a file that would fill the memory
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise ValueError
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as fault:
        raise InputError(f'{setting} is "{path}": it can\'t be read. Name a file with a statement.') from fault


def check_key(key: str, given: str | None = None, more: str = "") -> None:
    """Refuse what is no public key; `given` is what the user wrote, `more` what else may be written."""
    try:
        good = len(bytes.fromhex(key)) == 32 and len(key) == 64
    except ValueError:
        good = False
    if not good:
        shown = key if given is None else given
        raise InputError(f"--key is {shown[:80]!a}: it must be 64 hexadecimal digits{more}. Ask the holder.")


def _known_keys(keys: Sequence[str]) -> dict[str, set[str]]:
    """Holder -> keys; those of nobody in particular under ""."""
    found: dict[str, set[str]] = {}
    for text in keys:
        holder, _, key = text.strip().rpartition("=")
        check_key(key, text, ", or HOLDER=KEY")
        found.setdefault(holder, set()).add(key.lower())
    return found


def behind(one: Seen, chains: Sequence[Chain]) -> Bad | None:
    """What a holder's chains lack of what was seen, or None; several chains are different ledgers of one name."""
    for chain in chains:
        if chain.has(one.mark):
            return _other_totals(one, chain.reading)
    # the number of the row comes from outside, and may be anything
    place = one.mark.sequence if isinstance(one.mark.sequence, int) else 0
    longest = max(len(chain.reading.hashes) for chain in chains)
    if place > longest:
        what = (
            f"is missing: {one.source} has seen it, and the ledger ends at row {longest} (an older copy was put back)"
        )
    else:
        what = f"is not the row that {one.source} has seen: the chain was written anew from there or before"
    return Bad(place, what, "high-water")


def _other_totals(one: Seen, reading: Reading) -> Bad | None:
    if one.totals is None:
        return None
    totals: dict[str, Totals] = {}
    for sequence, charged in reading.charged.items():
        if sequence <= one.mark.sequence:
            row = charged.row
            totals[row.domain] = Totals(row.domain_mu_squared, row.domain_epsilon, row.domain_delta)
    for name in sorted({*totals, *one.totals}):
        if totals.get(name, Totals()) != one.totals.get(name, Totals()):
            what = f"has totals of the domain {name!r:.60} other than those that {one.source} states"
            return Bad(one.mark.sequence, what, "high-water")
    return None
