"""`fedhead join`: take part in a federation, until SIGTERM, with the code that is installed here and no other."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from fedhead.client.holder import HolderFile, load_holder
from fedhead.client.joining.guard import check_flower, environment
from fedhead.client.joining.identity import check_given, read_authority, read_key
from fedhead.common.errors import InputError

log = logging.getLogger("fedhead.client")

LOCK: Final = "join.lock"


def join(path: Path, *, json_logs: bool = False) -> int:
    """Join the federation that a holder's file names.

    Parameters
    ----------
    path : Path
        A holder.toml with `server`, `ca` and `key`.
    json_logs : bool
        Logs as JSON.

    Returns
    -------
    status : int
        0 after SIGTERM or SIGINT, 1 where `fedhead check` finds something to change, or the server will never take
        this holder; the log says what to do.

    Raises
    ------
    InputError
        The file, the key or the certificate can't be used, or another process has joined with this storage folder.
    RunError
        Another Flower is installed than join is made for.
    """
    from fedhead.common.operations.logs import set_up_logs

    set_up_logs("client", as_json=json_logs)
    check_flower()
    holder = load_holder(path)
    check_given(holder)
    assert holder.server is not None
    assert holder.ca is not None
    assert holder.key is not None
    settings = {
        "node": {
            "server": holder.server,
            "authority": read_authority(holder.path(holder.ca)),
            "key": read_key(holder.path(holder.key)),
            "json_logs": json_logs,
        },
        "executor": {"holder": str(path.resolve()), "json_logs": json_logs},
    }
    with ExitStack() as stack:
        stack.enter_context(only_one(holder))
        surroundings = environment(holder.folder)
        os.environ.update(surroundings)  # the check below may import Flower
        if not ready(path):
            return 1
        return _supervise(stack, holder, settings, surroundings)


def ready(path: Path) -> bool:
    """Whether `fedhead check` finds nothing that has to be changed; the log says what it found."""
    from fedhead.client.checking import check_holder

    report = check_holder(path, connect=True, joining=True)
    for finding in report.findings:
        if finding.state in ("warning", "remedy"):
            level = logging.ERROR if finding.state == "remedy" else logging.WARNING
            log.log(level, "%s: %s. %s", finding.name, finding.text.rstrip("."), finding.remedy)
    if not report.good:
        log.error(
            '%s does not join: the lines above say what to change; "fedhead check" shows them, too', report.holder
        )
    return report.good


@contextmanager
def only_one(holder: HolderFile) -> Iterator[None]:
    """Hold the storage folder's lock, so that no second process joins with it.

    Raises
    ------
    InputError
        Another process has it, or the folder can't be used.
    """
    folder = holder.folder
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(
            f"storage.folder is {folder}: it can't be used ({error.strerror}). Correct its rights, or name another."
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"storage.folder is {folder}: another `fedhead join` runs with it. End that one, or give this holder a "
                "folder of its own."
            ) from error
        yield
    finally:
        os.close(handle)


def has_joined(holder: HolderFile) -> bool:
    """Whether a process has joined with this storage folder: whether it holds the lock."""
    with suppress(FileNotFoundError, PermissionError), open(holder.folder / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _supervise(
    stack: ExitStack, holder: HolderFile, settings: dict[str, dict[str, object]], surroundings: dict[str, str]
) -> int:
    from fedhead.client.joining.figures import HolderFigures
    from fedhead.client.joining.process import command_of
    from fedhead.client.joining.supervisor import Supervisor
    from fedhead.common.operations.metrics import serve_metrics

    figures = HolderFigures()
    if holder.metrics is not None:
        stack.callback(serve_metrics(holder.metrics, figures.registry))
    supervisor = Supervisor(
        commands={name: command_of(name) for name in settings},
        settings=settings,
        environment=surroundings,
        figures=figures,
        server=str(holder.server),
    )
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, lambda *_: supervisor.stop())
            stack.callback(signal.signal, number, before)
    log.info("%s joins %s", holder.name, holder.server)
    status = supervisor.run()
    log.info("%s has left", holder.name)
    return status
