"""server.toml: the coordinator's own file, read by `fedhead serve`, `submit`, `status` and `stop`.

address, certificates     where data holders connect, over TLS, and what the server proves itself with
control                   where the coordinator's own commands connect; loopback, never reachable for holders
holders                   public key files of the data holders; the name of a file is the holder's name
state                     folder of the database, the tokens and the state of the run
least_holders, ...        what a run waits for
declared_records          what the updates of single holders weigh

Nothing here imports Flower or PyTorch, so that the commands that only ask are quick.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from fedhead.common.config.faults import fault, setting_name
from fedhead.common.config.files import SettingsFile, judged
from fedhead.common.config.names import NAME_RULE, is_name
from fedhead.common.config.places import HOST_RULE, address_of, is_host, path_from
from fedhead.common.config.tables import read_toml
from fedhead.common.errors import ConfigError, InputError
from fedhead.common.privacy.events import MOST_STEPS
from fedhead.server.credentials import CURVES, pair_fault, public_key_pem

__all__ = ["ServerFile", "address_of", "load_server", "make_server"]

_PATH: Final = r"^[^\x00]+$"
_ADDRESS: Final = r"^\S+:[0-9]{1,5}$"
_PAGE: Final = "docs/deploy.md"
_STARTS: Final = "Paths start at the file's folder; correct it."


class ServerFile(SettingsFile):
    """A whole server.toml."""

    address: str = Field(
        "0.0.0.0:8443", pattern=_ADDRESS, description="Where data holders connect, over TLS: address and port."
    )
    control: str = Field(
        "127.0.0.1:8444",
        pattern=_ADDRESS,
        description="Where submit, status and stop connect: an address of this machine alone, and a port.",
    )
    certificates: str = Field(
        pattern=_PATH, description="Folder with server.crt and server.key, as `fedhead keys` makes it."
    )
    holders: list[str] = Field(
        min_length=1, description="Public key files of the data holders; `st-mary.pub` is the holder st-mary."
    )
    state: str = Field(
        "state", pattern=_PATH, description="Folder of the database, the tokens and the state of the run."
    )
    least_holders: int = Field(2, ge=1, description="How many data holders a round needs.")
    round_deadline: float = Field(
        300.0, ge=1, le=86_400, description="Seconds that a data holder has for its part of a round."
    )
    holders_deadline: float = Field(
        600.0, ge=1, le=604_800, description="Seconds that a run waits for least_holders to be there."
    )
    declared_records: dict[str, Annotated[int, Field(ge=1, le=MOST_STEPS)]] | None = Field(
        None,
        description="Public constants of the data holders that divide by one of their own: name and number, the "
        "weight of its updates. Default: the recipe's, for all.",
    )
    metrics: str | None = Field(
        None, pattern=_ADDRESS, description="Where this machine's monitoring reads figures; loopback. Default: nowhere."
    )
    message_megabytes: int = Field(
        512, ge=1, le=2047, description="Most that one request may bring, in MiB; protobuf has no more than 2 GiB."
    )

    @property
    def folder(self) -> Path:
        """The state folder; it may not be there yet."""
        return self.path(self.state)

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.path(self.certificates) / "server.crt"

    @property
    def key(self) -> Path:
        """The private key of the server's certificate."""
        return self.path(self.certificates) / "server.key"

    @property
    def public_keys(self) -> dict[str, Path]:
        """Name of each data holder -> its public key file."""
        return {Path(text).stem: self.path(text) for text in self.holders}

    def public_pems(self) -> dict[str, bytes]:
        """Name of each data holder -> its public key, as the server's database has it: SubjectPublicKeyInfo in PEM.

        Raises
        ------
        ConfigError
            Files have changed since server.toml was read and hold no public keys any more.
        """
        found, faults = {}, []
        for name, path in self.public_keys.items():
            try:
                found[name] = public_key_pem(path)
            except (OSError, InputError) as error:
                faults.append(fault("holders", str(path), _reason(error), _STARTS))
        if faults:
            raise ConfigError(faults)
        return found

    @property
    def link_database(self) -> Path:
        """Nodes, runs and messages under way, as Flower keeps them."""
        return self.folder / "link.sqlite"

    @property
    def token_file(self) -> Path:
        """The token that submit, status and stop prove themselves with."""
        return self.folder / "control.token"

    @property
    def secret_file(self) -> Path:
        """The secret that the server's part of a run is taken with."""
        return self.folder / "superexec.secret"

    @property
    def run_file(self) -> Path:
        """How the run under way is doing; written by submit after every round."""
        return self.folder / "run.json"

    @property
    def marks_file(self) -> Path:
        """What was seen of each data holder's ledger, over all runs."""
        return self.folder / "marks.json"

    @property
    def submit_lock(self) -> Path:
        """Locked by the one submit that runs."""
        return self.folder / "submit.lock"

    @property
    def serve_lock(self) -> Path:
        """Locked by the one serve that runs."""
        return self.folder / "serve.lock"


@dataclass(frozen=True)
class _Parts:
    """The settings of a file; None for one that has faults of its own, or isn't given."""

    address: str | None = None
    control: str | None = None
    metrics: str | None = None
    certificates: str | None = None
    holders: list[str] | None = None
    least_holders: int | None = None
    declared_records: dict[str, int] | None = None


def load_server(path: str | Path) -> ServerFile:
    """Read a server.toml.

    Parameters
    ----------
    path : path
        A TOML file; relative paths inside it start from its folder.

    Raises
    ------
    ConfigError
        With every fault at once, one line each.
    """
    path = Path(path)
    raw = read_toml(path, "SERVER", f"Name the coordinator's own file; {_PAGE} shows one.")
    return make_server(raw, base=path.parent)


def make_server(raw: Mapping[str, Any], base: Path | None = None) -> ServerFile:
    """A coordinator's settings from a nested mapping.

    Parameters
    ----------
    raw : mapping
        The settings of the file.
    base : Path, optional
        Folder that relative paths start from; default: the current one.

    Raises
    ------
    ConfigError
        With every fault at once, one line each.
    """
    return judged(ServerFile, raw, base, _Parts, _RULES, _PAGE)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _addresses(parts: _Parts, _: Path) -> Iterator[str]:
    given = {name: text for name in ("address", "control", "metrics") if (text := getattr(parts, name)) is not None}
    for name, text in given.items():
        host, port = address_of(text)
        if not 1 <= port <= 65_535:
            yield fault(name, text, "a port must be a number from 1 to 65535", "Give one such as 8443.")
        if name == "address" and not is_host(text):
            yield fault(name, text, HOST_RULE, "Give one such as 0.0.0.0:8443.")
        if name != "address" and not _loopback(host):
            yield fault(
                name, text, "it must be an address of this machine alone",
                "Give 127.0.0.1 and a port; data holders must never reach it.",
            )  # fmt: skip
    seen: dict[int, str] = {}
    for name, text in given.items():
        other = seen.setdefault(address_of(text)[1], name)
        if other != name:
            yield fault(name, text, f"it must have another port than {other}", "Give another port.")


def _certificates(parts: _Parts, base: Path) -> Iterator[str]:
    if parts.certificates is None:
        return
    folder = path_from(parts.certificates, base)
    there = True
    for name in ("server.crt", "server.key"):
        if not os.path.isfile(folder / name):
            there = False
            yield fault(
                "certificates", parts.certificates, f"there is no {name} in it",
                'Paths start at the file\'s folder; correct it, or run "fedhead keys".',
            )  # fmt: skip
    if not there:
        return
    try:
        found = pair_fault(folder / "server.crt", folder / "server.key")
        mode = stat.S_IMODE((folder / "server.key").stat().st_mode)
    except OSError as error:
        yield fault("certificates", parts.certificates, f"it can't be read ({error.strerror})", "Check its rights.")
        return
    if found is not None:
        yield fault("certificates", parts.certificates, found, 'Restore the right files, or run "fedhead keys".')
    if mode & 0o077:
        yield fault(
            "certificates", parts.certificates,
            f"server.key must be open to its owner alone, and its mode is {mode:04o}", "Run chmod 600 on it.",
        )  # fmt: skip


def _holders(parts: _Parts, base: Path) -> Iterator[str]:
    names: dict[str, str] = {}
    keys: dict[bytes, str] = {}
    for index, text in enumerate(parts.holders or ()):
        setting = f"holders[{index}]"
        name = Path(text).stem
        if not is_name(name):
            yield fault(setting, text, NAME_RULE, "Give the file such a name; it is the holder's.")
        elif (other := names.setdefault(name.casefold(), text)) != text or text in (parts.holders or ())[:index]:
            yield fault(
                setting, text, f"a name must be listed once, and it is that of {other}", "Rename it, or remove it."
            )
        try:
            key = public_key_pem(path_from(text, base))
        except (OSError, ValueError, InputError) as error:
            yield fault(setting, text, _reason(error), _STARTS)
            continue
        owner = keys.setdefault(key, text)
        if owner != text:
            yield fault(
                setting,
                text,
                f"its key must be another than that of {owner}",
                "Ask each data holder for a key of its own.",
            )


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError):
        return f"it can't be read ({error.strerror})"
    return str(error) if isinstance(error, InputError) else f"it must be a public key file, of the curve {CURVES}"


def _least(parts: _Parts, _: Path) -> Iterator[str]:
    if parts.least_holders is None or parts.holders is None or not parts.holders:
        return
    if parts.least_holders > len(parts.holders):
        yield fault(
            "least_holders", parts.least_holders, f"it must be at most the number of holders, {len(parts.holders)}",
            "Lower it, or list more holders.",
        )  # fmt: skip


def _declared(parts: _Parts, _: Path) -> Iterator[str]:
    if parts.holders is None:
        return
    names = sorted({Path(text).stem for text in parts.holders})
    for name, count in (parts.declared_records or {}).items():
        if name not in names:
            yield fault(
                setting_name(("declared_records", name), {}), count,
                f"it must be the name of a holder: {', '.join(names)}",
                "Correct it, or list its public key in holders.",
            )  # fmt: skip


_RULES: tuple[Callable[[_Parts, Path], Iterator[str]], ...] = (
    _addresses, _certificates, _holders, _least, _declared,
)  # fmt: skip
