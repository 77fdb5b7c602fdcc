"""The state folder: closed to others, used by one serve at a time, with two secrets that are made once."""

from __future__ import annotations

import fcntl
import os
import secrets
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedhead.common.config.faults import fault
from fedhead.common.errors import InputError
from fedhead.server.server_file import ServerFile

_SECRET_BYTES: Final = 32  # 256 bits, written as 64 hexadecimal digits


@contextmanager
def held_state(server: ServerFile) -> Iterator[None]:
    """The state folder, for this process alone; made, mode 0700, where there is none.

    Raises
    ------
    InputError
        It can't be made or written, others may enter it, or another `fedhead serve` has it; one line.
    """
    folder = server.folder
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
        if mode & 0o077:
            raise InputError(
                fault(
                    "state", str(folder), f"the folder must be closed to others, and its mode is {mode:04o}",
                    f"Run: chmod 700 {shlex.quote(str(folder))}",
                )
            )  # fmt: skip
        handle = os.open(server.serve_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(
            fault("state", str(folder), f"it must be a folder that can be written ({error.strerror})", "Correct it.")
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                fault(
                    "state", str(folder), 'another "fedhead serve" uses it',
                    "End that one, or give each server a state folder of its own.",
                )
            ) from error  # fmt: skip
        yield
    finally:
        os.close(handle)


def kept_secret(path: Path) -> str:
    """A secret of 64 hexadecimal digits, made with mode 0600 where there is no such file, and never overwritten.

    Raises
    ------
    InputError
        The file can't be read or made, others have rights to it, or it holds something else; one line.

    Notes
    -----
    Guarantee: the file appears whole or not at all, whatever is killed, and is on disk when this returns.
    """
    try:
        if not os.path.lexists(path):
            _make(path, secrets.token_hex(_SECRET_BYTES))
        return read_secret(path)
    except OSError as error:
        raise InputError(f"{path} can't be made or read ({error.strerror}). Check the rights and the space.") from error


def read_secret(path: Path) -> str:
    """A secret that `kept_secret` made.

    Raises
    ------
    InputError
        Others have rights to it, or it holds something else; one line.
    OSError
        It can't be read, or isn't there.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise InputError(
            f"{path} has mode {mode:04o}: a secret must be open to its owner alone. Others may know it by now: remove "
            'it, and restart "fedhead serve", which makes another.'
        )
    text = path.read_bytes()[:1024].decode("ascii", "replace").strip()
    if len(text) != 2 * _SECRET_BYTES or not set(text) <= set("0123456789abcdef"):
        raise InputError(
            f'{path} holds no secret: it must have 64 hexadecimal digits. Remove it, and restart "fedhead serve".'
        )
    return text


def _make(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(aside, path)  # fails where there is a file by now; that one counts
    except FileExistsError:
        pass
    finally:
        aside.unlink(missing_ok=True)
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
