"""Whether a request comes from the holder of a registered key: looked at before anything of its body is read.

A node signs the time with its key and sends both in headers. Flower checks the same later, and that the node named in
the body is the key's. Without this first look a stranger could have bodies of any size read into memory.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Callable, Container
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedhead.server.link.flower import PUBLIC_KEY_HEADER, SIGNATURE_HEADER, TIME_HEADER

NO_PROOF: Final = "no proof of a node's key"
UNKNOWN_KEY: Final = "unknown key"
CLOCK: Final = "clock"

_BEHIND: Final = 300.0  # seconds; Flower's own limits, less its tolerance
_AHEAD: Final = 5.0


def node_proof(
    keys: Callable[[], Container[bytes]], now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> Callable[[dict[bytes, bytes]], str | None]:
    """A check of a request's headers.

    Parameters
    ----------
    keys : function
        The public keys that may connect, in PEM.
    now : function
        The time.

    Returns
    -------
    function
        From headers to None where the proof is good, or NO_PROOF, UNKNOWN_KEY or CLOCK. The last only goes to somebody
        who has a registered key.
    """

    def check(headers: dict[bytes, bytes]) -> str | None:
        try:
            key = b64decode(headers[PUBLIC_KEY_HEADER], validate=True)
            signature = b64decode(headers[SIGNATURE_HEADER], validate=True)
            signed = headers[TIME_HEADER]
            at = datetime.fromisoformat(signed.decode("ascii"))
        except (KeyError, ValueError, binascii.Error):
            return NO_PROOF
        if key not in keys():
            return UNKNOWN_KEY
        try:
            _loaded(key).verify(signature, signed, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return NO_PROOF
        if at.tzinfo is None:
            return NO_PROOF
        age = (now() - at).total_seconds()
        return None if -_AHEAD < age < _BEHIND + _AHEAD else CLOCK

    return check


@lru_cache(maxsize=1024)
def _loaded(pem: bytes) -> ec.EllipticCurvePublicKey:
    key = load_pem_public_key(pem)
    assert isinstance(key, ec.EllipticCurvePublicKey)  # only such are registered
    return key
