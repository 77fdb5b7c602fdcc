"""What lies in a folder of keys: fingerprints, when certificates end, which file goes to whom, and what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedhead.common.config.faults import fault
from fedhead.common.errors import InputError
from fedhead.server.keys.certificates import host_text, hosts_of
from fedhead.server.keys.files import PRIVATE, KeyFolder
from fedhead.server.keys.pairs import (
    CA_CERTIFICATE,
    CA_KEY,
    RESERVED,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    certificate,
    fingerprint,
    key_file,
    node_key,
    node_public,
    pub_file,
    public_key,
)

SOON: Final = timedelta(days=30)

_GOES_TO: Final[Mapping[str, str]] = {
    CA_KEY: "nobody: keep it offline",
    CA_CERTIFICATE: "every data holder, and the server",
    SERVER_KEY: "the server alone",
    SERVER_CERTIFICATE: "the server",
}
_STYLES: Final[Mapping[str, str]] = {"valid": "green", "ends soon": "yellow", "ended": "bold red", "not yet": "yellow"}

T = TypeVar("T")


def describe_keys(folder: Path) -> dict[str, Any]:
    """What lies in a folder of keys; writes nothing.

    Parameters
    ----------
    folder : Path
        The server's, or one with a data holder's part.

    Returns
    -------
    dict
        ``folder``; ``authority`` and ``server``, each None or a dict of ``file``, ``name``, ``hosts``, ``begins`` and
        ``ends`` (ISO 8601, UTC), ``days_left``, ``state`` (valid; ends soon: within 30 days; ended; not yet),
        ``fingerprint`` of the key as `ssh-keygen -l` prints it, and ``sha256`` of the certificate; ``holders``, a list
        of ``name``, ``fingerprint`` or None, ``private`` and ``public``: whether that half is there; ``files``, a list
        of ``file``, ``mode`` and ``goes_to``; ``warnings``, a list of lines.

    Raises
    ------
    InputError
        There is no such folder, it can't be read, or it holds no keys. Every other fault is a warning.
    """
    return describe(folder, datetime.now(UTC))


def describe(folder: Path, now: datetime) -> dict[str, Any]:
    """What `describe_keys` returns, at a time."""
    return _Reading(KeyFolder(folder), now).found()


def show_keys(found: Mapping[str, Any]) -> None:
    """What `make_keys` or `describe_keys` found, on stdout, in 80 columns."""
    out = Console(highlight=False, markup=False, emoji=False)
    made = found.get("made")
    table = Table(title=Text(f"Keys in {found['folder']}"), title_justify="left", pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("mode", no_wrap=True)
    table.add_column("goes to", overflow="fold")
    if made is not None:
        table.add_column("", no_wrap=True)
    for row in found["files"]:
        state = [] if made is None else [Text("new", "green") if row["file"] in made else Text("kept", "dim")]
        table.add_row(Text(row["file"]), row["mode"], Text(row["goes_to"]), *state)
    out.print(table)
    _show_certificates(out, found)
    _show_holders(out, found["holders"])
    out.print(
        f"A data holder gets {CA_CERTIFICATE} and its own .key over a channel that nobody else reads, and puts them in "
        "holder.toml (ca, key). Then delete its .key here. The .pub files stay (holders in server.toml)."
    )
    for warning in found["warnings"]:
        out.print(Text(warning, "yellow"))


def _show_certificates(out: Console, found: Mapping[str, Any]) -> None:
    parts = [part for part in (found["authority"], found["server"]) if part is not None]
    if not parts:
        return
    table = Table(pad_edge=False)
    table.add_column("certificate", no_wrap=True)
    table.add_column("ends", no_wrap=True)
    table.add_column("of, and the fingerprint of its key", overflow="fold")
    for part in parts:
        ends = Text(f"{part['ends'][:10]}\n").append(part["state"], _STYLES[part["state"]])
        of = ", ".join(part["hosts"]) or part["name"]
        table.add_row(part["file"], ends, Text(f"{of}\n{part['fingerprint']}"))
    out.print(table)


def _show_holders(out: Console, holders: list[dict[str, Any]]) -> None:
    if not holders:
        return
    table = Table(pad_edge=False)
    table.add_column("data holder", overflow="fold")
    table.add_column("fingerprint of its key", no_wrap=True)
    table.add_column("private", no_wrap=True)
    for entry in holders:
        table.add_row(Text(entry["name"]), entry["fingerprint"] or "?", "here" if entry["private"] else "gone")
    out.print(table)


class _Reading:
    """One look at a folder; what can't be used becomes a warning."""

    def __init__(self, keys: KeyFolder, now: datetime) -> None:
        self.keys = keys
        self.now = now
        self.warnings: list[str] = []

    def found(self) -> dict[str, Any]:
        names = self.keys.names()
        holders = sorted({name[:-4] for name in names if name.endswith((".key", ".pub"))} - RESERVED)
        if not holders and not any(name in _GOES_TO for name in names):
            rule = "it holds no keys"
            raise InputError(fault("DIR", str(self.keys.path), rule, "Name another folder, or make some there."))
        authority, server = self.certificate(CA_CERTIFICATE), self.certificate(SERVER_CERTIFICATE)
        for name in (CA_KEY, SERVER_KEY):
            self.tried(partial(self.keys.read, name, PRIVATE))
        entries = [self.holder(holder) for holder in holders]
        if server is not None:  # a data holder's own folder needs no public half
            self.warnings += [
                f"{self.keys.path / pub_file(entry['name'])} is missing: the server needs it. Make keys for this name "
                "once more."
                for entry in entries
                if not entry["public"]
            ]
        listed = [*_GOES_TO, *(name for holder in holders for name in (key_file(holder), pub_file(holder)))]
        files = [self.file(name) for name in listed if name in names]
        self.warnings += [
            f"{self.keys.path / name} may hold a private key: a call that was killed has left it, or one writes it "
            "right now. A later call removes it."
            for name in self.keys.left_over()
        ]
        return {
            "folder": str(self.keys.path),
            "authority": authority,
            "server": server,
            "holders": entries,
            "files": files,
            "warnings": list(dict.fromkeys(self.warnings)),
        }

    def tried(self, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except InputError as error:
            self.warnings.append(str(error))
            return None

    def certificate(self, name: str) -> dict[str, Any] | None:
        read = self.tried(partial(certificate, self.keys, name))
        if read is None:
            return None
        state = self.state(read)
        path, end = self.keys.path / name, f"{read.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        remedy = (
            f"Move it away to have a new one made, with {CA_KEY} in the folder."
            if name == SERVER_CERTIFICATE
            else f"Make keys in a new folder, and give its {CA_CERTIFICATE} to every data holder."
        )
        if state in ("ended", "ends soon"):
            self.warnings.append(f"{path} {'ended' if state == 'ended' else 'ends'} on {end}. {remedy}")
        elif state == "not yet":
            begin = f"{read.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
            self.warnings.append(f"{path} is valid from {begin} on: check the clock of this machine.")
        return {
            "file": name,
            "name": read.subject.rfc4514_string(),
            "hosts": [host_text(host) for host in hosts_of(read)],
            "begins": read.not_valid_before_utc.isoformat(),
            "ends": read.not_valid_after_utc.isoformat(),
            "days_left": max(0, (read.not_valid_after_utc - self.now).days),
            "state": state,
            "fingerprint": fingerprint(public_key(self.keys, name, read)),
            "sha256": read.fingerprint(hashes.SHA256()).hex(":").upper(),
        }

    def state(self, read: x509.Certificate) -> str:
        if self.now < read.not_valid_before_utc:
            return "not yet"
        left = read.not_valid_after_utc - self.now
        if left <= timedelta(0):
            return "ended"
        return "ends soon" if left <= SOON else "valid"

    def holder(self, holder: str) -> dict[str, Any]:
        public = self.tried(partial(node_public, self.keys, holder))
        private = self.tried(partial(node_key, self.keys, holder))
        half = None if private is None else private.public_key()
        if public is not None and half is not None and public != half:
            self.warnings.append(
                f"{self.keys.path / pub_file(holder)} is not the public half of {key_file(holder)}: the two must "
                "belong together. Restore the right one."
            )
        shown = public or half
        return {
            "name": holder,
            "fingerprint": None if shown is None else fingerprint(shown),
            "private": self.keys.has(key_file(holder)),
            "public": self.keys.has(pub_file(holder)),
        }

    def file(self, name: str) -> dict[str, Any]:
        mode = self.tried(partial(self.keys.mode, name))
        return {"file": name, "mode": "?" if mode is None else f"{mode:04o}", "goes_to": _goes_to(name)}


def _goes_to(name: str) -> str:
    if name in _GOES_TO:
        return _GOES_TO[name]
    return f"{name[:-4]} alone" if name.endswith(".key") else "the server"
