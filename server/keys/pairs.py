"""What the files of a key folder are called, and how each is read and written; all keys are on curves of NIST."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.common.errors import InputError
from fedhead.server.keys.files import PRIVATE, PUBLIC, KeyFolder

CA_CERTIFICATE: Final = "ca.crt"
CA_KEY: Final = "ca.key"
SERVER_CERTIFICATE: Final = "server.crt"
SERVER_KEY: Final = "server.key"
RESERVED: Final = frozenset({"ca", "server"})  # a holder of this name would take these files for its own


def key_file(holder: str) -> str:
    """Name of a holder's private key."""
    return f"{holder}.key"


def pub_file(holder: str) -> str:
    """Name of a holder's public key."""
    return f"{holder}.pub"


def certificate(keys: KeyFolder, name: str) -> x509.Certificate | None:
    """A certificate; None where there is none.

    Raises
    ------
    InputError
        The file is none, holds another kind of key, or others may write it.
    """
    content = keys.read(name, PUBLIC)
    if content is None:
        return None
    found: x509.Certificate = _parsed(
        keys, name, "a certificate in PEM", lambda: x509.load_pem_x509_certificate(content)
    )
    public_key(keys, name, found)
    return found


def public_key(keys: KeyFolder, name: str, found: x509.Certificate) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate that was read from a file of this name."""
    return _on_a_curve(keys, name, found.public_key())


def tls_key(keys: KeyFolder, name: str) -> ec.EllipticCurvePrivateKey | None:
    """The private key of the authority or of the server; None where there is none.

    Raises
    ------
    InputError
        The file is none, is encrypted, or others have any right to it.
    """
    content = keys.read(name, PRIVATE)
    return _private(
        keys, name, None if content is None else lambda: serialization.load_pem_private_key(content, password=None)
    )


def node_key(keys: KeyFolder, holder: str) -> ec.EllipticCurvePrivateKey | None:
    """A holder's private key; None where there is none, as after it went to the holder.

    Raises
    ------
    InputError
        The file is none, is encrypted, or others have any right to it.
    """
    content, name = keys.read(key_file(holder), PRIVATE), key_file(holder)
    return _private(
        keys, name, None if content is None else lambda: serialization.load_ssh_private_key(content, password=None)
    )


def node_public(keys: KeyFolder, holder: str) -> ec.EllipticCurvePublicKey | None:
    """A holder's public key; None where there is none.

    Raises
    ------
    InputError
        The file is none, or others may write it.
    """
    content, name = keys.read(pub_file(holder), PUBLIC), pub_file(holder)
    if content is None:
        return None
    what = "a public key in OpenSSH format"
    return _on_a_curve(keys, name, _parsed(keys, name, what, lambda: serialization.load_ssh_public_key(content)))


def tls_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as TLS servers read it: PKCS #8 in PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def node_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as Flower's nodes read it: OpenSSH's own format, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def public_bytes(key: ec.EllipticCurvePublicKey, comment: str) -> bytes:
    """A public key as one line of OpenSSH's format."""
    return _openssh(key) + b" " + comment.encode() + b"\n"


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 over a public key, as `ssh-keygen -l` prints it."""
    blob = base64.b64decode(_openssh(key).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _openssh(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def _private(keys: KeyFolder, name: str, load: Callable[[], Any] | None) -> ec.EllipticCurvePrivateKey | None:
    if load is None:
        return None
    found = _parsed(keys, name, "a private key that is not encrypted", load)
    _on_a_curve(keys, name, found.public_key())
    assert isinstance(found, ec.EllipticCurvePrivateKey)
    return found


def _parsed(keys: KeyFolder, name: str, what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it is encrypted
        raise InputError(
            f"{keys.path / name} can't be used: it must be {what}. Restore it, or move it away."
        ) from error


def _on_a_curve(keys: KeyFolder, name: str, key: Any) -> ec.EllipticCurvePublicKey:
    """Flower takes keys on these curves only, and OpenSSH knows no others of NIST."""
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1):
        return key
    raise InputError(
        f"{keys.path / name} has another kind of key: it must be on the curve P-256, P-384 or P-521. Move it away."
    )
