"""How statements are signed: Ed25519 over canonical JSON, behind a context of its own for each kind of statement."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def canonical(fields: dict[str, Any]) -> str:
    """JSON with sorted keys and no spaces: one text for the same fields.

    Raises
    ------
    ValueError, TypeError
        A number is not finite, or a value is none of JSON's.
    """
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)


def signed_text(fields: dict[str, Any], key: Ed25519PrivateKey, context: bytes) -> str:
    """The canonical text of the fields and of the signature over all of them.

    Parameters
    ----------
    fields : dict
        As JSON has them; without `signature`.
    key : Ed25519PrivateKey
    context : bytes
        Of this kind of statement alone, so that a signature means nothing in another protocol.
    """
    return canonical({**fields, "signature": key.sign(context + canonical(fields).encode()).hex()})


def check_signature(fields: dict[str, Any], context: bytes) -> dict[str, Any]:
    """The fields without `signature`, which is that of the `public_key` that stands among them.

    Raises
    ------
    InvalidSignature
        The signature is another's, or of other fields.
    ValueError, TypeError, KeyError, AttributeError
        A field is missing, or is not what it must be.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    said = {name: value for name, value in fields.items() if name != "signature"}
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(fields["public_key"]))
    key.verify(bytes.fromhex(fields["signature"]), context + canonical(said).encode())
    return said
