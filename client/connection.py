"""Whether a data holder can reach its coordinator: address, TLS, both clocks, and whether its key is known there.

    server   the name leads somewhere, something listens there, TLS with exactly the holder's authority and that name
    ca       the file is an authority's certificate, and in date
    key      the file is a private key as nodes use it, closed to others, and the server knows its public half
    clock    the server takes signatures that are at most 5 s ahead of its clock and 305 s behind

What is sent is one request without a body and without saying that it has none. The server's gate looks at the signature
in its headers first, and at the length of the body next: 401 with a fixed text says what is wrong with the key or the
clock, 411 that nothing is, and whose key it is there. It ends with that, so that a node of this holder that runs is not
disturbed. Nothing of the records, their number or this holder's name is in it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.client.calling import PASSING, Answer, Silence, ask
from fedhead.client.findings import Finding, State, apart, count, span
from fedhead.client.holder import HolderFile
from fedhead.client.joining.identity import parse_key, read_authority, read_key
from fedhead.common.config.places import address_of
from fedhead.common.errors import InputError

PATIENCE: Final = 5.0  # seconds that each step of asking the server may take
SOON: Final = timedelta(days=30)  # a certificate that ends within this is told
MOST_AHEAD, MOST_BEHIND = 4.0, 300.0
"""Seconds that the clock here may differ from the server's: its own limits, 5 and 305, less what a look can miss."""
NOTED: Final = 2.0  # seconds that are told: less can't be told from a server that says whole seconds

_SETTINGS: Final = ("server", "ca", "key")
_PATH: Final = "/v1/fleet/send-node-heartbeat"
_TAKEN, _NOT_TAKEN = 411, 401
_UNKNOWN_KEY, _CLOCK = "unknown key", "clock"  # what the server's gate says to a 401
_AGAIN: Final = "; it will be tried again"


@dataclass(frozen=True)
class _Key:
    """The holder's private key, or what is wrong with its file."""

    private: ec.EllipticCurvePrivateKey | None
    fault: Finding | None


def connection(holder: HolderFile, *, connect: bool = True, joining: bool = False) -> Iterator[Finding]:
    """Everything that can be looked at before joining, in four lines.

    Parameters
    ----------
    holder : HolderFile
    connect : bool
        False: the network is not touched.
    joining : bool
        Whether the holder is about to join: what is missing is then a remedy, and a server that can't be reached now a
        warning, because joining goes on trying.
    """
    lacking = [name for name in _SETTINGS if getattr(holder, name) is None]
    if lacking:
        shown = f"{_listed(lacking)} {'is' if len(lacking) == 1 else 'are'} not given: fedhead join needs them all"
        remedy = f"Set {_listed(lacking)}; the coordinator tells the address and sends ca.crt."
        # a file without any of them is for looking at the data alone
        wanted = joining or len(lacking) < len(_SETTINGS)
        yield Finding("server", "remedy", shown, remedy) if wanted else Finding("server", "unknown", shown)
    now = datetime.now(UTC)
    authority, found_ca = ("", None) if holder.ca is None else _authority(holder.path(holder.ca), now)
    key = _Key(None, None) if holder.key is None else _read_key(holder.path(holder.key))
    answer: Answer | None = None
    if holder.server is not None and not lacking:
        if not connect:
            yield Finding("server", "unknown", f"{holder.server}: not tried")
        elif not authority:
            yield Finding("server", "unknown", f"{holder.server}: not tried, it takes the certificate in ca")
        else:
            try:
                answer = _ask(holder.server, authority, key.private)
            except Silence as silence:
                yield _silent(silence, holder.server, now, joining)
            else:
                yield _reached(answer, holder.server, now)
    if found_ca is not None:
        yield found_ca
    if holder.key is not None:
        yield key.fault or _known(answer, joining, holder.name)
    if answer is not None:
        yield _clock(answer)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ------------------------------------------------------------------------------------------------------------ the files


def _authority(path: Path, now: datetime) -> tuple[str, Finding]:
    """The authority's certificate in PEM, empty where it can't be used."""
    remedy = "Get ca.crt from the coordinator anew, in a way that you trust."
    try:
        text = read_authority(path)
        found = x509.load_pem_x509_certificates(text.encode())
    except InputError as error:
        return "", Finding("ca", "remedy", *apart(error))
    if not all(map(_signs, found)):
        return "", Finding("ca", "remedy", "it is not an authority's certificate, and vouches for nobody", remedy)
    begin, end = max(one.not_valid_before_utc for one in found), min(one.not_valid_after_utc for one in found)
    if end <= now:
        return text, Finding("ca", "remedy", f"it ended on {end:%Y-%m-%d}{_here(now)}", remedy)
    if begin > now:
        remedy = "Set the clock; if it is right, wait until then."
        return text, Finding("ca", "remedy", f"it begins on {_minute(begin)}{_here(now)}", remedy)
    if len(found) > 1:
        shown = f"{len(found)} authorities in one file: each of them can vouch for another server of that name"
        return text, Finding("ca", "warning", shown, "Keep the coordinator's alone.")
    state, shown = _until(end, now)
    return text, Finding("ca", state, shown, "Ask the coordinator for the next one." if state == "warning" else "")


def _signs(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _read_key(path: Path) -> _Key:
    """The holder's private key, by the rules that joining has."""
    try:
        return _Key(parse_key(read_key(path)), None)
    except InputError as error:
        return _Key(None, Finding("key", "remedy", *apart(error)))


# ----------------------------------------------------------------------------------------------------------- the server


def _ask(server: str, authority: str, key: ec.EllipticCurvePrivateKey | None) -> Answer:
    address = address_of(server)
    if key is None:
        return ask(address, authority, "GET", "/", {}, PATIENCE)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signed = datetime.now(UTC).isoformat()
    headers = {
        "flwr-public-key": base64.b64encode(public).decode(),
        "flwr-timestamp": signed,
        "flwr-signature": base64.b64encode(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
    }
    return ask(address, authority, "POST", _PATH, headers, PATIENCE)


def _reached(answer: Answer, server: str, now: datetime) -> Finding:
    state, shown = _until(answer.certificate.not_valid_after_utc, now)
    remedy = "Tell the coordinator to have it made anew." if state == "warning" else ""
    return Finding("server", state, f"{server} answers over TLS; its certificate {shown}", remedy)


def _known(answer: Answer | None, joining: bool, name: str) -> Finding:
    """What the server says to the holder's key."""
    if answer is None:
        return Finding("key", "ok", "closed to others; not shown to the server")
    if answer.status == _TAKEN:
        there = _said(answer.body, "name")
        if isinstance(there, str) and there != name:
            return Finding(
                "key", "remedy", f'at the server it is the key of "{_shown(there)}", and name is "{name}"',
                f"Take the key that the coordinator made for {name}, or correct name.",
            )  # fmt: skip
        return Finding("key", "ok", "closed to others, and known to the server")
    if answer.status >= 500:  # more connections than it takes, or what lies before it while it starts
        return Finding(
            "key", "warning" if joining else "remedy",
            f"the server can't answer now (status {answer.status})" + (_AGAIN if joining else ""),
            "Wait a minute; if it stays so, ask the coordinator what its log says.",
        )  # fmt: skip
    if answer.status != _NOT_TAKEN:
        return Finding(
            "key", "remedy", f"what answers is no server of fedhead (status {answer.status})",
            "Check the port with the coordinator.",
        )  # fmt: skip
    said = _said(answer.body, "detail")
    if said == _UNKNOWN_KEY:
        return Finding(
            "key", "remedy", "the server doesn't know it",
            "Send the .pub file to the coordinator, who names it in server.toml.",
        )  # fmt: skip
    if said == _CLOCK or (answer.ahead is not None and _too_far(answer.ahead)):
        return Finding("key", "unknown", "the server can't say before the clock is right")
    return Finding("key", "remedy", "the server doesn't take its signature", "Ask the coordinator what its log says.")


def _said(body: bytes, what: str) -> object:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found.get(what) if isinstance(found, dict) else None


def _clock(answer: Answer) -> Finding:
    if answer.ahead is None:
        return Finding("clock", "unknown", "the server doesn't say its time")
    off, far = abs(answer.ahead), _too_far(answer.ahead)
    side = "ahead of" if answer.ahead > 0 else "behind"
    text = f"about {span(off)} {side} the server's"
    if far:
        return Finding(
            "clock", "remedy", f"{text}, which takes 5 s ahead and 5 min behind",
            "Set the clock and keep it right (NTP); if it is right, tell the coordinator.",
        )  # fmt: skip
    if off > max(NOTED, answer.within):
        return Finding("clock", "warning", text, "Keep it right (NTP): beyond 5 s ahead or 5 min behind nothing works.")
    return Finding("clock", "ok", f"the same as the server's, within {max(2, round(off + answer.within))} s")


def _too_far(ahead: float) -> bool:
    return not -MOST_BEHIND <= ahead <= MOST_AHEAD


def _silent(silence: Silence, server: str, now: datetime, joining: bool) -> Finding:
    """Why the server can't be asked, and what to do."""
    host, port = address_of(server)
    certificate = silence.certificate
    whether = "Ask the coordinator whether the server runs."
    text, remedy = {
        "name": ("its name isn't known here", f"Correct server, or have this network's DNS know {host}."),
        "refused": ("nothing listens there", f"{whether} Then check the port."),
        "slow": (
            f"no answer within {PATIENCE:.0f} s",
            f"Have the firewall let TCP out to {host}, port {port}. {whether}",
        ),
        "network": (f"there is no way to it ({silence.detail})", f"Check this machine's network. {whether}"),
        "silent": (
            "it takes the connection and then says nothing", f"Check the port, and what lies between. {whether}",
        ),
        "cut": ("it takes the connection and then ends it", f"Check the port, and what lies between. {whether}"),
        "no-tls": ("what answers there speaks no TLS", "Check the port with the coordinator."),
        "authority": (
            "its certificate is not signed by the authority in ca",
            "Get ca.crt from the coordinator anew, in a way that you trust; if it is the same, a stranger answers.",
        ),
        "host": (
            f"its certificate is for {_hosts(certificate)}, not for {host}",
            "Write server as in the certificate, or have the coordinator make one for this name.",
        ),
        "time": _out_of_time(certificate, now),
        "tls": (f"TLS fails ({silence.detail})", "Tell the coordinator what stands here."),
        "http": ("its certificate is right, but it speaks no HTTP", "Check the port with the coordinator."),
    }[silence.reason]  # fmt: skip
    passing = joining and silence.reason in PASSING
    shown = f"{server}: {text}" + (_AGAIN if passing else "")
    return Finding("server", "warning" if passing else "remedy", shown, remedy)


def _out_of_time(certificate: x509.Certificate | None, now: datetime) -> tuple[str, str]:
    clock = "Set the clock here if it is wrong; if it is right, "
    if certificate is not None and certificate.not_valid_after_utc <= now:
        text = f"its certificate ended on {_minute(certificate.not_valid_after_utc)}{_here(now)}"
        return text, clock + "have the coordinator make a new one."
    if certificate is not None and certificate.not_valid_before_utc > now:
        text = f"its certificate begins on {_minute(certificate.not_valid_before_utc)}{_here(now)}"
        return text, clock + "wait until then."
    return f"the authority in ca isn't valid now{_here(now)}", clock + "have the coordinator send a new ca.crt."


def _hosts(certificate: x509.Certificate | None) -> str:
    if certificate is None:
        return "another name"
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return "no host"
    names = [_shown(str(one.value)) for one in found if isinstance(one, x509.DNSName | x509.IPAddress)]
    return ", ".join(names[:4]) + (" and others" if len(names) > 4 else "") or "no host"


def _shown(name: str) -> str:
    """A name of a certificate that wasn't accepted: a stranger wrote it, and it goes to a terminal."""
    return "".join(letter if "!" <= letter <= "~" else "?" for letter in name[:100])


# ------------------------------------------------------------------------------------------------------------ in words


def _until(end: datetime, now: datetime) -> tuple[State, str]:
    days = (end - now) // timedelta(days=1)
    return ("warning" if end - now < SOON else "ok"), f"ends on {end:%Y-%m-%d}, in {count(days, 'day')}"


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _here(now: datetime) -> str:
    return f"; the clock here says {_minute(now)}"
