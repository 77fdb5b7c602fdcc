"""Making what is missing of a deployment's keys and certificates, and refusing what doesn't fit together.

A private half is always there before its public one, so that what a killed process leaves can be completed: the public
half is made from the private one. A public half alone is as it should be: the private one has gone to its holder, or
was made there.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.common.config.faults import fault
from fedhead.common.config.names import NAME_RULE, is_name
from fedhead.common.errors import ConfigError, InputError
from fedhead.server.keys.certificates import (
    host_name,
    host_text,
    hosts_of,
    make_authority,
    make_server_certificate,
    signs,
)
from fedhead.server.keys.files import PRIVATE, PUBLIC, KeyFolder
from fedhead.server.keys.pairs import (
    CA_CERTIFICATE,
    CA_KEY,
    RESERVED,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    certificate,
    key_file,
    node_bytes,
    node_key,
    node_public,
    pub_file,
    public_bytes,
    public_key,
    tls_bytes,
    tls_key,
)
from fedhead.server.keys.report import describe

DEFAULT_HOSTS: Final = ("localhost", "127.0.0.1")
LONGEST_DAYS: Final = 3650

_LONGEST_FILE_NAME: Final = 200  # bytes; file systems take 255


def make_keys(
    folder: Path, holders: Sequence[str], *, hosts: Sequence[str] | None = None, days: int = 365
) -> dict[str, Any]:
    """Make what is missing of a deployment's keys and certificates; what is there stays as it is.

    Parameters
    ----------
    folder : Path
        Made with mode 0700 where there is none.
    holders : sequence of str
        Names of data holders, as in their holder.toml. Those who have a key already keep it.
    hosts : sequence of str, optional
        DNS names and IP addresses that holders will know the server by. None: those of the certificate that is there,
        or DEFAULT_HOSTS for a new one.
    days : int, 1 to 3650
        How long new certificates are valid; they begin 5 minutes ago. The server's ends with the authority's at the
        latest.

    Returns
    -------
    dict
        What `describe_keys` returns, and ``made`` and ``kept``: names of files.

    Raises
    ------
    ConfigError
        Holders, hosts or days are not what they must be: every fault at once, nothing is written.
    InputError
        The folder or a file in it can't be used, or the server's certificate is for other hosts; one line. Nothing is
        written, save where the disk itself fails.

    Notes
    -----
    Guarantee: no file is ever replaced. Every file appears whole or not at all, whatever is killed; a second call
    completes what a killed one began. Processes at the same time end with one set of keys that fit each other.
    """
    return make_at(folder, holders, hosts, days, datetime.now(UTC))


def make_at(
    folder: Path, holders: Sequence[str], hosts: Sequence[str] | None, days: int, now: datetime
) -> dict[str, Any]:
    """What `make_keys` does, at a time."""
    faults = [*_holder_faults(holders), *_host_faults(hosts), *_day_faults(days)]
    if faults:
        raise ConfigError(faults)
    wanted = None if hosts is None else _general(hosts)
    keys = KeyFolder(folder)
    keys.prepare()
    _check(keys, holders, wanted, now)
    _make_certificates(keys, wanted or _general(DEFAULT_HOSTS), days, now)
    for holder in holders:
        _make_pair(keys, holder)
    _check(keys, holders, wanted, now)  # another process may have been the quicker one, with other hosts
    files = [CA_KEY, CA_CERTIFICATE, SERVER_KEY, SERVER_CERTIFICATE]
    files += [name for holder in holders for name in (key_file(holder), pub_file(holder))]
    kept = [name for name in files if name not in keys.made and keys.has(name)]
    return {**describe(folder, now), "made": keys.made, "kept": kept}


def _holder_faults(holders: Sequence[str]) -> list[str]:
    if isinstance(holders, str) or not holders:
        rule = "there must be at least one data holder"
        return [fault("holders", holders, rule, "Give their names, as in each one's holder.toml.")]
    faults, seen = [], set[str]()
    for holder in holders:
        rule, remedy = "", 'Give another, such as "st-mary".'
        if not is_name(holder):
            rule = NAME_RULE
        elif holder.casefold() in RESERVED:
            rule = f"{', '.join(sorted(RESERVED))} name files of the server's own"
        elif holder[0] in ".-" or len(os.fsencode(holder)) > _LONGEST_FILE_NAME:
            rule = "a name of files must begin with a letter, digit or underscore, and be short"
        elif (same := unicodedata.normalize("NFC", holder).casefold()) in seen:  # one file, on some disks
            rule, remedy = "a name must be given once, whatever its capitals", "Remove the repetition."
        else:
            seen.add(same)
        if rule:
            faults.append(fault("holder", holder, rule, remedy))
    return faults


def _host_faults(hosts: Sequence[str] | None) -> list[str]:
    if hosts is None:
        return []
    if isinstance(hosts, str) or not hosts:
        rule = "there must be at least one host"
        return [fault("hosts", hosts, rule, "Give the names or addresses that holders will connect to.")]
    rule = "it must be a DNS name or an IP address that holders can connect to"
    remedy = "Give one such as fl.example.org or 192.0.2.7, without a port or a scheme."
    return [fault("host", host, rule, remedy) for host in hosts if host_name(host) is None]


def _day_faults(days: int) -> list[str]:
    if type(days) is int and 1 <= days <= LONGEST_DAYS:
        return []
    return [fault("days", days, f"it must be a whole number from 1 to {LONGEST_DAYS}", "Give one such as 365.")]


def _general(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Hosts as a certificate names them, each once."""
    found = [host_name(host) for host in hosts]
    return list(dict.fromkeys(host for host in found if host is not None))


def _check(keys: KeyFolder, holders: Sequence[str], hosts: list[x509.GeneralName] | None, now: datetime) -> None:
    """Refuse what is there and doesn't fit, and what would have to be made without the authority's key.

    What is made first is read last: while another process makes them, there is never a second half without its first.
    """
    server = certificate(keys, SERVER_CERTIFICATE)
    server_key = tls_key(keys, SERVER_KEY)
    authority = certificate(keys, CA_CERTIFICATE)
    keys.read(CA_KEY, PRIVATE)  # its rights; it may be encrypted as long as nothing has to be signed
    if server is not None:
        _check_server(keys, server, server_key, authority, hosts)
    elif authority is not None:
        _check_authority(keys, authority, now)
    for holder in holders:
        public, private = node_public(keys, holder), node_key(keys, holder)
        if public is not None and private is not None and private.public_key() != public:
            raise _misfit(keys, pub_file(holder), key_file(holder))


def _check_server(
    keys: KeyFolder, server: x509.Certificate, key: ec.EllipticCurvePrivateKey | None,
    authority: x509.Certificate | None, hosts: list[x509.GeneralName] | None,
) -> None:  # fmt: skip
    """The server's certificate, its key, its authority and its hosts must belong together."""
    if authority is None:
        raise InputError(
            f"{keys.path / CA_CERTIFICATE} is missing: it must be there, for {SERVER_CERTIFICATE} is signed by it. Put "
            "it back, or name a new folder."
        )
    if key is not None and key.public_key() != public_key(keys, SERVER_CERTIFICATE, server):
        raise _misfit(keys, SERVER_CERTIFICATE, SERVER_KEY)
    try:
        server.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise InputError(
            f"{keys.path / SERVER_CERTIFICATE} is not signed by {CA_CERTIFICATE}: the two must belong together. Put "
            f"the right {CA_CERTIFICATE} back, or move {SERVER_CERTIFICATE} away to have a new one made."
        ) from error
    lacking = [host_text(host) for host in hosts or () if host not in hosts_of(server)]
    if lacking:
        there = ", ".join(map(host_text, hosts_of(server))) or "no host"
        raise InputError(
            fault(
                "hosts", lacking, f"{keys.path / SERVER_CERTIFICATE} is for {there}, and is never overwritten",
                f"Move it away to have one made for all hosts that you name, with {CA_KEY} in the folder.",
            )
        )  # fmt: skip


def _check_authority(keys: KeyFolder, authority: x509.Certificate, now: datetime) -> None:
    """Whether the authority that is there can sign a server's certificate."""
    key = tls_key(keys, CA_KEY)
    if key is None:
        raise InputError(
            f"{keys.path / CA_KEY} is missing: it must be there to sign a certificate for the server. Bring it back "
            "from where it is kept, or name a new folder."
        )
    if key.public_key() != public_key(keys, CA_CERTIFICATE, authority):
        raise _misfit(keys, CA_CERTIFICATE, CA_KEY)
    if not signs(authority):
        raise InputError(f"{keys.path / CA_CERTIFICATE} is no authority's: it must be one. Name a new folder.")
    if authority.not_valid_after_utc <= now:
        raise InputError(
            f"{keys.path / CA_CERTIFICATE} ended on {authority.not_valid_after_utc:%Y-%m-%d}: it must be valid to sign "
            "a certificate for the server. Name a new folder, and give its ca.crt to every holder."
        )


def _misfit(keys: KeyFolder, public: str, private: str) -> InputError:
    return InputError(
        f"{keys.path / public} is not the public half of {private}: the two must belong together. Restore the right "
        "one."
    )


def _make_certificates(keys: KeyFolder, hosts: list[x509.GeneralName], days: int, now: datetime) -> None:
    """The authority and the server's certificate, where they are missing; every step goes on from what is on disk."""
    if certificate(keys, SERVER_CERTIFICATE) is not None:
        return
    authority_key = _tls_key(keys, CA_KEY)
    if not keys.has(CA_CERTIFICATE):
        keys.add(CA_CERTIFICATE, _pem(make_authority(authority_key, now, days)), PUBLIC)
    authority = certificate(keys, CA_CERTIFICATE)
    if authority is None:
        raise _gone(keys, CA_CERTIFICATE)
    server = _tls_key(keys, SERVER_KEY).public_key()
    made = make_server_certificate(server, hosts, authority, authority_key, now, days)
    keys.add(SERVER_CERTIFICATE, _pem(made), PUBLIC)


def _tls_key(keys: KeyFolder, name: str) -> ec.EllipticCurvePrivateKey:
    if not keys.has(name):
        keys.add(name, tls_bytes(ec.generate_private_key(ec.SECP256R1())), PRIVATE)
    found = tls_key(keys, name)  # of several processes one has won, and all go on with its key
    if found is None:
        raise _gone(keys, name)
    return found


def _make_pair(keys: KeyFolder, holder: str) -> None:
    """A holder's pair, or the half that is missing; never a private key for a public one that is there."""
    if keys.has(pub_file(holder)):
        return
    if not keys.has(key_file(holder)):
        keys.add(key_file(holder), node_bytes(ec.generate_private_key(ec.SECP384R1())), PRIVATE)
    private = node_key(keys, holder)
    if private is None:
        raise _gone(keys, key_file(holder))
    keys.add(pub_file(holder), public_bytes(private.public_key(), holder), PUBLIC)


def _gone(keys: KeyFolder, name: str) -> InputError:
    return InputError(
        f"{keys.path / name} is missing: it was there a moment ago. Let nothing else change the folder, and try again."
    )


def _pem(made: x509.Certificate) -> bytes:
    return made.public_bytes(serialization.Encoding.PEM)
