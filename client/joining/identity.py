"""What a holder joins with: the server's address, the certificate it is known by, and the holder's private key."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from fedhead.client.holder import HolderFile
from fedhead.common.config.faults import fault
from fedhead.common.errors import ConfigError, InputError

_LARGEST: Final = 1 << 20  # bytes; keys and certificates have a few thousand
_WHATS: Final = {
    "server": "Set it to the coordinator's address, such as fl.example.org:8443.",
    "ca": "Set it to the coordinator's ca.crt.",
    "key": "Set it to this holder's private key, as the coordinator made it.",
}


def check_given(holder: HolderFile) -> None:
    """Refuse a file that doesn't say where to join, and as whom.

    Raises
    ------
    ConfigError
        Everything that is missing, at once.
    """
    missing = [name for name in _WHATS if getattr(holder, name) is None]
    if missing:
        raise ConfigError([f"{name} is missing: it must be given to join. {_WHATS[name]}" for name in missing])


def read_authority(path: Path) -> str:
    """The certificates of a file, in PEM and nothing besides.

    Raises
    ------
    InputError
        It can't be read, or has none.
    """
    try:
        found = x509.load_pem_x509_certificates(_read(path, "ca"))
    except ValueError as error:
        raise InputError(
            fault("ca", str(path), "it must be a certificate in PEM", "Ask the coordinator for its ca.crt again.")
        ) from error
    return b"".join(one.public_bytes(Encoding.PEM) for one in found).decode("ascii")


def read_key(path: Path) -> str:
    """A holder's private key, as PEM of PKCS #8 whatever the file's own format.

    Parameters
    ----------
    path : Path
        OpenSSH's format, which `fedhead keys` writes, or PEM; not encrypted, and closed to others.

    Raises
    ------
    InputError
        It can't be read, is no such key, or is open to others; nothing of it is in the text.
    """
    content = _read(path, "key", private=True)
    try:
        load: Any = load_ssh_private_key if b"BEGIN OPENSSH PRIVATE KEY" in content else load_pem_private_key
        key = load(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it is encrypted
        raise InputError(
            fault(
                "key", str(path), "it must be a private key that is not encrypted",
                "Use the file that the coordinator's `fedhead keys` made.",
            )
        ) from error  # fmt: skip
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(
        key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1
    ):
        raise InputError(
            fault(
                "key", str(path), "it must be on the curve P-256, P-384 or P-521",
                "Use the file that the coordinator's `fedhead keys` made.",
            )
        )  # fmt: skip
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode("ascii")


def parse_key(text: str) -> ec.EllipticCurvePrivateKey:
    """A key as `read_key` gives it."""
    key = load_pem_private_key(text.encode("ascii"), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _read(path: Path, setting: str, private: bool = False) -> bytes:
    try:
        # not to wait for a pipe in the file's place
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(fault(setting, str(path), "it must be a file", "Correct the path."))
            mode = stat.S_IMODE(status.st_mode)
            if private and mode & 0o077:
                raise InputError(
                    fault(
                        setting, str(path), f"it must be open to its owner alone, and its mode is {mode:04o}",
                        f"Run: chmod 600 {shlex.quote(str(path))}",
                    )
                )  # fmt: skip
            return file.read(_LARGEST)
    except OSError as error:
        raise InputError(
            fault(setting, str(path), f"it can't be read ({error.strerror})", "Correct the path, or its rights.")
        ) from error
