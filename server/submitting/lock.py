"""One submit at a time for one server: a lock that the operating system takes back when its process dies."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedhead.common.errors import InputError, RunError

_SECONDS: Final = 1.0  # `held` looks by taking it for an instant


class SubmitLock:
    """The lock, taken.

    Parameters
    ----------
    path : Path
        Its file; stays when the lock is given back.

    Raises
    ------
    RunError
        Another process has it.
    InputError
        The file can't be made.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InputError(
                f"{path} can't be opened ({error.strerror}). Run this as the user of the server."
            ) from error
        until = time.monotonic() + _SECONDS
        while not _take(self._handle, fcntl.LOCK_EX):
            if time.monotonic() > until:
                os.close(self._handle)
                owner = owner_of(path)
                whose = "" if owner is None else f" (process {owner})"
                raise RunError(
                    f'another run is under way{whose}. Wait for it, or run "fedhead stop --server SERVER.toml".'
                )
            time.sleep(0.05)
        with suppress(OSError):  # it is only shown
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """As `release`."""
        self.release()

    def release(self) -> None:
        """Give it back; more than once does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def owner_of(path: Path) -> int | None:
    """The process that has the lock, as it says in the file.

    None where nobody has it, where it hasn't said so yet, or where that number is another process here: the lock is
    then held from within a container, which counts processes anew.
    """
    if not held(path):
        return None
    try:
        text = path.read_bytes()[:20].strip()
        if not text.isdigit():
            return None
        number, lock = int(text), path.stat()
        handles = Path(f"/proc/{number}/fd")
        if not Path("/proc/self/fd").is_dir() or any(_is(handle, lock) for handle in handles.iterdir()):
            return number
    except OSError:
        pass
    return None


def _is(handle: Path, file: os.stat_result) -> bool:
    try:
        return os.path.samestat(handle.stat(), file)
    except OSError:  # closed since
        return False


def held(path: Path) -> bool:
    """Whether a process has the lock."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _take(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def _take(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
