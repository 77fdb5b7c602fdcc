"""`fedhead serve`: one process, two HTTP servers, one state.

    public port, TLS      Fleet routes for data holders (public.py)
    control, loopback     Flower's Control and Runtime for the coordinator's commands (private.py)

SIGTERM and SIGINT end it within seconds. SIGHUP reads server.toml, the holders' keys and the certificate again. What is
under way survives in the state folder, and a server that is started again goes on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedhead.common.config.faults import fault
from fedhead.common.errors import FedheadError, InputError
from fedhead.server.credentials import valid_between
from fedhead.server.link.environment import check_flower, import_flower, set_environment
from fedhead.server.link.state import held_state, kept_secret
from fedhead.server.server_file import ServerFile, address_of, load_server

if TYPE_CHECKING:
    from socket import socket

    from fedhead.server.link.listening import Server
    from fedhead.server.link.registry import Registry

log = logging.getLogger("fedhead")

_SOON: Final = 30  # days before the certificate's end from which on there is a warning
_LASTING: Final = ("address", "control", "metrics", "message_megabytes")
_POLLED: Final = 0.02  # seconds between looks for whether both servers have started
_LOOKED: Final = 2.0  # seconds between looks for which data holders are there


def serve(path: str | Path, *, on_ready: Callable[[], None] | None = None) -> None:
    """Run the coordinator's link until SIGTERM or SIGINT.

    Parameters
    ----------
    path : path
        A server.toml.
    on_ready : function, optional
        Called once, when data holders and commands can connect.

    Raises
    ------
    ConfigError
        The file has faults: every one at once.
    InputError
        A port or the state folder is in use, the certificate has ended, or Flower is another version; one line.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to read again
    server = load_server(path)
    check_flower()
    _allow_connections()
    _check_certificate(server)
    with held_state(server):
        token, secret = kept_secret(server.token_file), kept_secret(server.secret_file)
        set_environment(server.folder / "flower")
        os.close(os.open(server.link_database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite keeps the mode
        from fedhead.server.link.listening import bound

        with bound("address", server.address) as public, bound("control", server.control) as private:
            import_flower()
            link = _made(Path(path), server, token, secret)
            asyncio.run(link.run(public, private, on_ready))


def _made(path: Path, server: ServerFile, token: str, secret: str) -> _Link:
    """A link on the database that is there, or on a new one."""
    from sqlalchemy.exc import DatabaseError

    try:
        return _Link(path, server, token, secret)
    except DatabaseError as error:  # its text may be a statement with what is in it
        raise InputError(
            fault(
                "state", str(server.folder), f"its {server.link_database.name} can't be used ({error.orig})",
                "Check the space left. A damaged file may be moved away; what is under way is then lost.",
            )
        ) from error  # fmt: skip


class _Link:
    """A running link."""

    def __init__(self, path: Path, server: ServerFile, token: str, secret: str) -> None:
        from fedhead.server.link.bell import Bell
        from fedhead.server.link.figures import ServerFigures
        from fedhead.server.link.flower import make_inner
        from fedhead.server.link.listening import http_server
        from fedhead.server.link.nodes import await_heartbeats
        from fedhead.server.link.private import make_private
        from fedhead.server.link.public import make_public
        from fedhead.server.link.registry import Registry

        self.path, self.server = path, server
        self.bell, self.figures = Bell(), ServerFigures()
        self.figures.certificate(server.certificate)
        host, port = address_of(server.control)
        inner = make_inner(str(server.link_database), host, port, token, secret.encode())
        state = inner.state.linkstate_factory.state()
        await_heartbeats(state)  # first: Flower notes who is gone whenever it is asked about nodes
        self.registry: Registry = Registry(state)
        self.registry.update(server.public_pems())
        most = server.message_megabytes * 2**20
        self.public: Server = http_server(
            make_public(inner, self.registry, self.bell, most, self.figures), lifespan=False,
            connections=128 + 8 * len(server.holders), tls=(server.certificate, server.key),
        )  # fmt: skip
        self.private: Server = http_server(make_private(inner, self.bell, most), lifespan=True, connections=128)

    async def run(self, public: socket, private: socket, on_ready: Callable[[], None] | None) -> None:
        """Serve until `stop`."""
        from fedhead.server.link.listening import run_together

        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
            loop.add_signal_handler(signal.SIGHUP, self.reload)
        close = self._show_figures()
        telling = asyncio.create_task(self._tell(on_ready))
        try:
            await run_together([(self.public, public), (self.private, private)])
        finally:
            telling.cancel()
            close()
            log.info("the server has ended")

    def stop(self) -> None:
        """Let both servers end; nobody waits for messages any more."""
        self.bell.stop()
        self.public.should_exit = self.private.should_exit = True

    def reload(self) -> None:
        """Take in the keys and the certificate as they are now; where they have faults all stays as it was.

        Of the other settings those that this process uses stay what they were when it began.
        """
        try:
            server = load_server(self.path)
            if server.folder != self.server.folder:
                raise InputError(fault("state", server.state, "it can't change while the server runs", "Restart it."))
            _check_certificate(server)
            keys = server.public_pems()
            assert self.public.config.ssl is not None
            self.public.config.ssl.load_cert_chain(server.certificate, server.key)
            self.figures.certificate(server.certificate)
        except (FedheadError, OSError) as error:
            for line in str(error).splitlines():
                log.error("nothing was taken in: %s", line)
            return
        try:
            self.registry.update(keys)
        except Exception as error:  # whatever the database says: the server goes on with those that it knows
            log.error("new keys could not be registered (%s). Send SIGHUP again.", type(error).__name__)
            return
        log.info("keys and certificate were read again; %s", self._registered())
        changed = [name for name in _LASTING if getattr(server, name) != getattr(self.server, name)]
        if changed:
            log.warning("what changed of %s counts from the next start on. Restart the server.", ", ".join(changed))

    async def _tell(self, on_ready: Callable[[], None] | None) -> None:
        """Say when both servers answer, and from then on who comes and goes."""
        while not (self.public.started and self.private.started):
            await asyncio.sleep(_POLLED)
        log.info(
            "data holders connect to %s, commands to %s; %s",
            self.server.address, self.server.control, self._registered(),
        )  # fmt: skip
        if on_ready is not None:
            on_ready()
        while True:  # until it is cancelled
            await asyncio.sleep(_LOOKED)
            with contextlib.suppress(Exception):  # a database that is busy; the next look tells
                await asyncio.to_thread(self.registry.tell)

    def _registered(self) -> str:
        names = sorted(self.registry.names.values())
        return f"{len(names)} data holders are registered: {', '.join(names)}"

    def _show_figures(self) -> Callable[[], None]:
        self.figures.watch(nodes=self.registry.online, run=lambda: _run_of(self.server.run_file))
        if self.server.metrics is None:
            return lambda: None
        from fedhead.common.operations.metrics import serve_metrics

        return serve_metrics(self.server.metrics, self.figures.registry)


def _allow_connections() -> None:
    """As many open files as this process may have: a stranger's idle connections count, and 1024 are soon there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_certificate(server: ServerFile) -> None:
    """Refuse a certificate that no data holder would take today, and say when it ends."""
    begin, end = valid_between(server.certificate)
    now = datetime.now(UTC)
    if not begin <= now < end:
        when = f"begins on {begin:%Y-%m-%d}" if now < begin else f"ended on {end:%Y-%m-%d}"
        raise InputError(
            fault(
                "certificates", server.certificates, f"server.crt must be valid today, and it {when}",
                'Move it away and run "fedhead keys", or correct the clock.',
            )
        )  # fmt: skip
    level = logging.WARNING if (end - now).days < _SOON else logging.INFO
    log.log(level, "the certificate is valid until %s (%d days)", f"{end:%Y-%m-%d}", (end - now).days)


def _run_of(path: Path) -> dict[str, Any] | None:
    """What `submit` last wrote about its run; None where there is nothing that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
