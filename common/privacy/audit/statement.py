"""Privacy statements: what one holder spent, as an audit found it, signed by the holder's Ed25519 key.

A statement of the ledger (ledger/statements.py) fixes where a chain ends. This one says what that means: epsilon and
delta of each budget domain by two accountants and by the ledger itself, its budget, and how much was released when.
Anybody with the public key can verify it, without the ledger. It shows that the holder said so; the audit of the ledger
shows that it is so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import fedhead
from fedhead.common.errors import InputError
from fedhead.common.privacy.ledger.chain import LedgerError
from fedhead.common.privacy.ledger.signing import canonical, check_signature, signed_text
from fedhead.common.privacy.ledger.statements import public_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SCHEMA: Final = 2
SUBJECT: Final = "fedhead privacy statement"
RELATION: Final = "add or remove one unit"
_CONTEXT: Final = b"fedhead privacy statement\0"
_FIELDS: Final = {
    "schema", "subject", "holder", "sequence", "hash", "relation", "domains", "time", "fedhead", "public_key",
    "signature",
}  # fmt: skip
_DOMAIN: Final = {
    "domain", "unit", "noise", "first", "second", "ledger", "terms", "released", "reserved", "abandoned", "first_time",
    "last_time",
}  # fmt: skip
_FIGURE: Final = {"epsilon", "delta", "accountant"}
_TERMS: Final = {"epsilon", "delta", "poisson_share", "run_epsilon", "run_delta"}


def sign_privacy_statement(audited: Mapping[str, Any], key: Ed25519PrivateKey) -> str:
    """Sign what an audit of one holder found.

    Parameters
    ----------
    audited : mapping
        One of `holders` of the audit of a ledger, as JSON has it.
    key : Ed25519PrivateKey
        The holder's; see `fedhead.common.privacy.ledger.load_key`.

    Returns
    -------
    str
        Canonical JSON: sorted keys, no spaces.

    Raises
    ------
    InputError
        The audit did not pass, or there is nothing to state.
    """
    holder, mark = audited["holder"], audited["mark"]
    if not audited["passed"]:
        raise InputError(f"the audit of {holder} did not pass: there is nothing to sign. Look at its first bad row.")
    if mark is None or not mark["sequence"]:
        raise InputError(f"the ledger of {holder} has no row: there is nothing to sign. Name a ledger that was used.")
    fields: dict[str, Any] = {
        "schema": SCHEMA,
        "subject": SUBJECT,
        "holder": holder,
        "sequence": mark["sequence"],
        "hash": mark["hash"],
        "relation": RELATION,
        "domains": [_domain(one) for one in audited["domains"]],
        "time": datetime.now(UTC).isoformat(timespec="microseconds"),
        "fedhead": fedhead.__version__,
        "public_key": public_key(key),
    }
    text = signed_text(fields, key, _CONTEXT)
    verify_privacy_statement(text, fields["public_key"])
    return text


def verify_privacy_statement(text: str, expected_key: str | None = None) -> dict[str, Any]:
    """Read a privacy statement and check its signature; needs nothing but the text and the public key.

    Parameters
    ----------
    text : str
        What `sign_privacy_statement` returned, character by character.
    expected_key : str, optional
        The holder's public key in hexadecimal, known from elsewhere. Without it only the text is checked against the
        key that stands in it.

    Returns
    -------
    dict
        `holder`, `sequence` and `hash` (the end of the ledger), `relation`, `domains`, `time`, `fedhead`,
        `public_key`. Each domain: `unit`, `noise`, `first`, `second` and `ledger` (epsilon, delta, accountant; None
        where units are mixed), `terms`, `released`, `reserved`, `abandoned`, `first_time`, `last_time`. Infinity is
        "inf".

    Raises
    ------
    LedgerError
        Not a statement, changed since it was signed, with a field too many or too few, or signed with another key.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        fields: dict[str, Any] = json.loads(text)
        _check(fields, text)
        said = check_signature(fields, _CONTEXT)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, InvalidSignature) as fault:
        raise LedgerError(
            "privacy statement is not what a holder signed: its text must be unchanged. Ask the holder again."
        ) from fault
    if expected_key is not None and said["public_key"] != expected_key.lower():
        raise LedgerError(
            f"privacy statement is signed with the key {said['public_key'][:16]}...: it must be "
            f"{ascii(expected_key)[1:17]}.... Ask the holder which key is its own."
        )
    del said["schema"], said["subject"]
    return said


def _domain(one: Mapping[str, Any]) -> dict[str, Any]:
    releases = [row for row in one["releases"] if row["state"] == "released"]
    times = [row["time"] for row in releases]
    figures = one["epsilon"]
    return {
        "domain": one["domain"],
        "unit": list(one["unit"]),
        "noise": sorted({row["noise"] for row in one["releases"]}),
        "first": None if figures is None else figures["first"],
        "second": None if figures is None else figures["second"],
        "ledger": None if figures is None else figures["ledger"],
        "terms": one["terms"],
        **{state: sum(run[state] for run in one["runs"]) for state in ("released", "reserved", "abandoned")},
        "first_time": min(times, default=None),
        "last_time": max(times, default=None),
    }


def _check(fields: dict[str, Any], text: str) -> None:
    """Raise ValueError, TypeError or KeyError unless these are exactly a statement's fields, in canonical form."""
    if set(fields) != _FIELDS or canonical(fields) != text:
        raise ValueError
    if fields["schema"] != SCHEMA or type(fields["schema"]) is not int or fields["subject"] != SUBJECT:
        raise ValueError
    if type(fields["sequence"]) is not int or fields["sequence"] < 1 or fields["relation"] != RELATION:
        raise ValueError
    for name in ("holder", "hash", "time", "fedhead", "public_key", "signature"):
        if type(fields[name]) is not str or not fields[name]:
            raise TypeError
    for name, size in (("hash", 32), ("public_key", 32), ("signature", 64)):
        # fromhex also takes capitals and spaces: another text with the same meaning
        if bytes.fromhex(fields[name]).hex() != fields[name] or len(fields[name]) != 2 * size:
            raise ValueError
    for one in fields["domains"]:
        if set(one) != _DOMAIN or (one["terms"] is not None and set(one["terms"]) != _TERMS):
            raise ValueError
        for figure in (one["first"], one["second"], one["ledger"]):
            if figure is not None and (set(figure) != _FIGURE or not _number(figure["epsilon"])):
                raise ValueError


def _number(value: object) -> bool:
    return value == "inf" or (type(value) is float and value >= 0 and math.isfinite(value))
