"""Signed statements: what a holder says that its ledger holds, with its Ed25519 key.

A statement fixes the end of the chain, and with it every row before, so a holder can't take back later what it has
stated. It does not show that the ledger tells the truth about what left the holder.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedhead.common.failpoints import reach
from fedhead.common.privacy.filters import Totals
from fedhead.common.privacy.ledger.chain import LedgerError, Mark
from fedhead.common.privacy.ledger.files import failures, sync_folder
from fedhead.common.privacy.ledger.signing import canonical, check_signature, signed_text
from fedhead.common.privacy.ledger.store import Ledger

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SCHEMA: Final = 1
_FIELDS: Final = {"schema", "holder", "sequence", "hash", "domains", "time", "public_key", "signature"}
_CONTEXT: Final = b"fedhead ledger statement\0"


@dataclass(frozen=True)
class Statement:
    """A statement whose signature holds.

    Attributes
    ----------
    holder : str
    mark : Mark
        The end of the chain that it speaks of.
    domains : dict of str to Totals
    time : str
        UTC, by the holder's clock.
    public_key : str
        Hexadecimal; compare it with the one that you know the holder by.
    """

    holder: str
    mark: Mark
    domains: dict[str, Totals]
    time: str
    public_key: str


def load_key(path: Path) -> Ed25519PrivateKey:
    """The holder's signing key; made once, mode 0600, in a folder that is made with mode 0700 where there is none.

    Raises
    ------
    LedgerError
        The file can't be read or written, or holds no Ed25519 key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    with failures(path):
        if not path.exists():
            _make_key(path)
        text = path.read_bytes()
    try:
        key = serialization.load_pem_private_key(text, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise LedgerError(f"key {path} is not an Ed25519 key: it must be what fedhead made. Restore it from a copy.")
    return key


def _make_key(path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(
                Ed25519PrivateKey.generate().private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                )
            )
            file.flush()
            os.fsync(file.fileno())
        reach("ledger.key.written")
        try:
            os.link(temporary, path)  # of several processes one wins, and all read the same key
        except FileExistsError:
            return
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def public_key(key: Ed25519PrivateKey) -> str:
    """The public half of a key, in hexadecimal."""
    from cryptography.hazmat.primitives import serialization

    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def statement(ledger: Ledger, holder: str, key: Ed25519PrivateKey) -> str:
    """A signed statement of where a holder's ledger stands.

    Returns
    -------
    str
        Canonical JSON: holder, sequence, hash, totals of each domain, time, public key, and the signature over all
        the others.

    Raises
    ------
    LedgerError
        The ledger is damaged, or has no entry of the holder.
    """
    mark, domains = ledger.standing(holder)
    if not mark.sequence:
        raise LedgerError(f"ledger {ledger.path} has no entry of {holder}: there is nothing to state. Check the name.")
    fields: dict[str, Any] = {
        "schema": SCHEMA,
        "holder": holder,
        "sequence": mark.sequence,
        "hash": mark.hash,
        "domains": {name: _to_list(totals) for name, totals in domains.items()},
        "time": datetime.now(UTC).isoformat(timespec="microseconds"),
        "public_key": public_key(key),
    }
    return signed_text(fields, key, _CONTEXT)


def verify_statement(text: str, expected_key: str | None = None) -> Statement:
    """Read a statement and check its signature.

    Parameters
    ----------
    text : str
        What `statement` returned.
    expected_key : str, optional
        The holder's public key in hexadecimal, known from elsewhere. Without it only the text is checked against the
        key that stands in it.

    Raises
    ------
    LedgerError
        Not a statement, changed since it was signed, or signed with another key.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        fields = json.loads(text)
        if set(fields) != _FIELDS or fields["schema"] != SCHEMA or canonical(fields) != text:
            raise ValueError
        if fields["signature"] != fields["signature"].lower() or fields["public_key"] != fields["public_key"].lower():
            raise ValueError  # capitals mean the same number: a text that was changed
        check_signature(fields, _CONTEXT)
        found = Statement(
            fields["holder"], Mark(fields["sequence"], fields["hash"]),
            {name: Totals(*map(float, totals)) for name, totals in fields["domains"].items()}, fields["time"],
            fields["public_key"],
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, InvalidSignature) as fault:
        raise LedgerError(
            "statement is not what a holder signed: its text must be unchanged. Ask the holder again."
        ) from fault
    if expected_key is not None and found.public_key != expected_key:
        raise LedgerError(
            f"statement is signed with the key {found.public_key[:16]}...: it must be {expected_key[:16]}.... "
            "Ask the holder which key is its own."
        )
    return found


def _to_list(totals: Totals) -> list[float | str]:
    return [value if value < float("inf") else "inf" for value in (totals.mu_squared, totals.epsilon, totals.delta)]
