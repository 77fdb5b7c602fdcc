"""Paths, addresses and files in packages, as people type them into recipes and the files of both sides."""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final

HOST_RULE: Final = "it must be a host name or an address, an IPv6 one in brackets, and a port, without a scheme"

_NAME: Final = re.compile(r"[\w.-]+")


def path_from(text: str, base: Path) -> Path:
    """A path as typed in a file: relative ones start from the file's folder, `~` is the user's home.

    Parameters
    ----------
    text : str
        `~somebody` stays as it is where nobody is called so, and is then a name like any other.
    base : Path
        The file's folder.
    """
    path = Path(text)
    with suppress(RuntimeError):  # no such user, or one without a home
        path = path.expanduser()
    return base / path


def in_package(text: str) -> tuple[str, str] | None:
    """Package and file of `PACKAGE/FILE`, as it follows `pkg://`; None where it names something outside of a package.

    A FILE that is a path of its own would be taken as it is: joined to the package's folder, `/etc` stays `/etc`. A
    dotted PACKAGE would have its parents imported.
    """
    package, _, inside = text.partition("/")
    path = PurePosixPath(inside)
    outside = path.is_absolute() or ".." in path.parts or "\x00" in inside
    return None if outside or not package.isidentifier() else (package, inside)


def address_of(text: str) -> tuple[str, int]:
    """Host and port of an address such as `fl.example.org:8443` or `[2001:db8::7]:8443`; the host without brackets."""
    host, _, port = text.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_host(text: str) -> bool:
    """Whether the host of an address `host:port` can be one: a name, an IPv4 address, or an IPv6 one in brackets."""
    host = text.rpartition(":")[0]
    if not (host.startswith("[") and host.endswith("]")):
        return _NAME.fullmatch(host) is not None
    try:
        ipaddress.IPv6Address(host[1:-1])
    except ValueError:
        return False
    return True
