"""Certificates of a federation: one authority of its own, and the server's certificate, which it signs.

The authority signs servers directly (path length 0). A holder trusts the authority's certificate and nothing else, so
the server sends its own certificate alone: there is nothing between the two that a chain would have to show.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLOCK_SKEW: Final = timedelta(minutes=5)  # a holder's clock may be this much behind the server's

_LABEL: Final = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")
_KEY_USAGES: Final = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


def host_name(text: object) -> x509.GeneralName | None:
    """A host as a certificate names it: an IP address, or a DNS name in lower case; None for anything else.

    Refused besides: addresses that mean "all interfaces", where nobody can connect to; wildcards, ports, schemes, and
    names with other letters than those of ASCII, which are written in their `xn--` form.
    """
    if not isinstance(text, str) or "%" in text:  # fe80::1%eth0 is an address on one machine only
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        pass
    else:
        return None if address.is_unspecified else x509.IPAddress(address)
    labels = text.lower().split(".")
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        return None
    return x509.DNSName(text.lower())


def make_authority(key: ec.EllipticCurvePrivateKey, now: datetime, days: int) -> x509.Certificate:
    """The certificate of an authority, signed by itself.

    Its name ends in eight digits of its random key: two authorities are told apart, and a certificate that is made
    again from the same key has the same name.

    Parameters
    ----------
    key : EllipticCurvePrivateKey
    now : datetime
        UTC; it is valid from 5 minutes before.
    days : int
        For how long.
    """
    identity = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    name = _name(f"fedhead CA {identity.digest.hex()[:8]}")
    return (
        _builder(name, name, key.public_key(), now, now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
        .sign(key, hashes.SHA256())
    )


def make_server_certificate(
    key: ec.EllipticCurvePublicKey, hosts: Sequence[x509.GeneralName], authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey, now: datetime, days: int,
) -> x509.Certificate:  # fmt: skip
    """The certificate of a server at these hosts; it ends with its authority's at the latest.

    Parameters
    ----------
    key : EllipticCurvePublicKey
        The server's.
    hosts : sequence of GeneralName
        From `host_name`.
    authority, authority_key
        Who signs.
    now : datetime
        UTC; it is valid from 5 minutes before.
    days : int
        For how long, at most.
    """
    end = min(now + timedelta(days=days), authority.not_valid_after_utc)
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        _builder(_name("fedhead server"), authority.subject, key, now, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(signer, critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def hosts_of(certificate: x509.Certificate) -> list[x509.GeneralName]:
    """The hosts that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [host for host in found if isinstance(host, x509.DNSName | x509.IPAddress)]


def host_text(host: x509.GeneralName) -> str:
    """A host as it is typed."""
    return str(host.value)


def signs(authority: x509.Certificate) -> bool:
    """Whether a certificate is an authority's."""
    try:
        return authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _name(text: str) -> x509.Name:
    return x509.Name([
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "fedhead"), x509.NameAttribute(NameOID.COMMON_NAME, text),
    ])  # fmt: skip


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.astimezone(UTC) - CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*names: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in names for name in _KEY_USAGES})
