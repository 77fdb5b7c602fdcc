"""Sockets and HTTP servers: two in one event loop, ended together."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedhead.common.config.faults import fault
from fedhead.common.errors import InputError
from fedhead.server.server_file import address_of

KEEP_ALIVE: Final = 30  # seconds; longer than a client keeps a connection, so that it is the client who closes it
GRACE: Final = 2  # seconds that requests under way have at the end
_BACKLOG: Final = 256
SILENCE: Final = 10.0  # seconds between looks; twice without a whole request head and a connection is cut


class Server(uvicorn.Server):
    """A server that leaves signals to others, and waits for nobody who asks for nothing."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests under way end; idle connections are cut, for a TLS peer may take its time with a goodbye."""
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is None or cycle.response_complete:
                connection.transport.abort()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: two servers in one process can't both have them."""
        yield


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that cuts connections on which nobody asks for anything.

    uvicorn's own limit is for the time between a whole answer and the next byte. A stranger could otherwise hold a
    connection for ever by sending nothing, or half a request.
    """

    def connection_made(self, transport: Any) -> None:
        """Begin to look at the connection."""
        super().connection_made(transport)
        self._waited = False
        self._look = self.loop.call_later(SILENCE, self._look_at_it)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop looking."""
        self._look.cancel()
        super().connection_lost(exc)

    def _look_at_it(self) -> None:
        cycle: Any = self.cycle  # None before the first request, whatever its annotation says
        waits = cycle is None or (cycle.response_complete and self.timeout_keep_alive_task is None)
        if waits and self._waited:
            self.transport.abort()
            return
        self._waited = waits
        self._look = self.loop.call_later(SILENCE, self._look_at_it)


def bound(setting: str, address: str) -> socket.socket:
    """A socket that has a port of its own.

    Parameters
    ----------
    setting : str
        Name of the address in server.toml.
    address : str
        Host and port.

    Raises
    ------
    InputError
        The port is taken, or the address is none of this machine; one line.
    """
    host, port = address_of(address)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(where)
            found.listen(_BACKLOG)  # two sockets may be bound to one port, but only one may listen
            found.setblocking(False)
        except BaseException:
            found.close()
            raise
        return found
    except OSError as error:
        raise InputError(
            fault(
                setting, address, f"it can't be listened on ({error.strerror})",
                "End what uses the port, or give another address.",
            )
        ) from error  # fmt: skip


def http_server(application: Any, *, lifespan: bool, connections: int, tls: tuple[Path, Path] | None = None) -> Server:
    """A server for one application.

    Parameters
    ----------
    application : ASGI application
    lifespan : bool
        Whether the application is told of its start and end.
    connections : int
        More at once are answered with 503.
    tls : (Path, Path), optional
        Certificate and private key; TLS 1.2 is the oldest that is spoken.
    """
    config = uvicorn.Config(
        application, http=PatientProtocol, ws="none", lifespan="on" if lifespan else "off", log_config=None,
        access_log=False, server_header=False, proxy_headers=False, limit_concurrency=connections,
        timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=GRACE, backlog=_BACKLOG,
        ssl_certfile=tls[0] if tls else None, ssl_keyfile=tls[1] if tls else None,
    )  # fmt: skip
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    return Server(config)


async def run_together(servers: list[tuple[Server, socket.socket]]) -> None:
    """Run servers until one of them ends, and then end all of them."""

    async def one(server: Server, listener: socket.socket) -> None:
        try:
            await server.serve(sockets=[listener])
        finally:
            for other, _ in servers:
                other.should_exit = True

    await asyncio.gather(*(one(server, listener) for server, listener in servers))
