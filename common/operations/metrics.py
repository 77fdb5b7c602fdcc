"""Metrics for Prometheus, on loopback only: whoever may read them is on this machine already.

Without a certificate or a password of its own, an endpoint must not be reachable from elsewhere; a scraper on another
machine goes through a tunnel or an agent. Values of labels come from fixed sets, so that nobody outside can make a
registry grow.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Collection
from typing import Any, Final

from prometheus_client import CollectorRegistry, start_http_server

from fedhead.common.config.faults import fault
from fedhead.common.errors import InputError

OTHER: Final = "other"

_SETTING: Final = "metrics"
_REMEDY: Final = "Give one such as 127.0.0.1:9100."


def loopback(address: str, setting: str = _SETTING) -> tuple[str, int]:
    """Host and port of an address that only this machine can reach.

    Parameters
    ----------
    address : str
        ``127.0.0.1:9100``, any other address in 127.0.0.0/8, ``[::1]:9100`` or ``localhost:9100``.
    setting : str
        What to call it in an error.

    Returns
    -------
    host : str
        An IP address. ``localhost`` is 127.0.0.1, whatever this machine's name service says it is.
    port : int
        1 to 65535, or 0 for a free one.

    Raises
    ------
    InputError
        It has another form, or another machine could reach it; one line.
    """
    parts = re.fullmatch(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+|::1):(?P<port>[0-9]{1,5})", address, re.ASCII)
    if parts is None or int(parts["port"]) > 65535:
        raise InputError(fault(setting, address, "it must be a host, a colon and a port up to 65535", _REMEDY))
    host = parts["host"].strip("[]")
    if host.casefold() == "localhost":
        host = "127.0.0.1"
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        found = None
    if found is None or not found.is_loopback or getattr(found, "ipv4_mapped", None) is not None:
        rule = (
            "it must be a loopback address (127.0.0.0/8, [::1] or localhost), because anybody who reaches it can read"
        )
        raise InputError(fault(setting, address, rule, _REMEDY))
    return str(found), int(parts["port"])


def serve_metrics(address: str, registry: CollectorRegistry) -> Callable[[], None]:
    """Serve a registry's metrics over HTTP in a thread of this process.

    Parameters
    ----------
    address : str
        As `loopback` takes it.
    registry : CollectorRegistry

    Returns
    -------
    close : callable
        Ends the thread and frees the port; may be called twice.

    Raises
    ------
    InputError
        The address is not one of loopback, is taken, or can't be used; one line.
    """
    host, port = loopback(address)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise _unusable(address, error) from error

    closed = False

    def close() -> None:
        nonlocal closed
        if not closed:
            closed = True
            server.shutdown()
            server.server_close()
            thread.join()

    return close


def check_free(address: str) -> None:
    """Refuse an address that `serve_metrics` couldn't serve at now. Listens for an instant, and answers nothing.

    Raises
    ------
    InputError
        As `serve_metrics` does.
    """
    host, port = loopback(address)
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise _unusable(address, error) from error


def _unusable(address: str, error: OSError) -> InputError:
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    rule = f"it can't be listened on ({reason})"
    return InputError(fault(_SETTING, address, rule, "Give a free port, or end what listens there."))


def one_of(value: Any, known: Collection[str]) -> str:
    """A label's value if it is a known one, else ``other``: a registry keeps every value it has ever seen."""
    return value if isinstance(value, str) and value in known else OTHER
