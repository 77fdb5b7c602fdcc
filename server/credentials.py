"""Reading what a deployment proves itself with: the server's certificate and key, and the holders' public keys."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.common.errors import InputError

CURVES: Final = "P-256, P-384 or P-521"

_CURVES: Final = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)  # what Flower's node authentication takes
_LARGEST: Final = 1 << 20  # bytes; a key has less than a thousand


def public_key_pem(path: Path) -> bytes:
    """A data holder's public key: SubjectPublicKeyInfo in PEM, the form in which nodes are registered.

    Parameters
    ----------
    path : Path
        A public key on a curve of NIST, as one line of OpenSSH's format or in PEM.

    Raises
    ------
    InputError
        It is something else; the text is a rule without the file's name.
    OSError
        It can't be read.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise InputError("it must be a file")
    with open(path, "rb") as file:
        content = file.read(_LARGEST)
    if b"PRIVATE KEY" in content:
        raise InputError("it must be a public key, and this is a private one, which must never leave its holder")
    pem = content.lstrip().startswith(b"-----BEGIN")
    load = serialization.load_pem_public_key if pem else serialization.load_ssh_public_key
    try:
        key = load(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"it must be a public key on the curve {CURVES}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise InputError(f"it must be a public key on the curve {CURVES}")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def pair_fault(certificate: Path, key: Path) -> str | None:
    """What is wrong with a TLS certificate and its private key, as a rule; None when they fit each other.

    Whether the certificate is valid today is not looked at: see `valid_between`.

    Raises
    ------
    OSError
        One of them can't be read.
    """
    try:
        public = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    except (ValueError, UnsupportedAlgorithm):
        return f"{certificate.name} must be a certificate in PEM"
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it is encrypted
        return f"{key.name} must be a private key in PEM that is not encrypted"
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != public.public_bytes(*form):
        return f"{certificate.name} must be the certificate of {key.name}"
    return None


def valid_between(certificate: Path) -> tuple[datetime, datetime]:
    """The time that a certificate is valid in, in UTC.

    Raises
    ------
    OSError, ValueError
        It can't be read, or is none.
    """
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    return found.not_valid_before_utc, found.not_valid_after_utc
