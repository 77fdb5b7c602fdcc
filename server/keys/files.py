"""A folder of keys: files that are written once, whole or not at all, and never replaced.

Every file is written under another name, flushed, and linked to its own name. A link fails where there is a file
already, so that of several processes one wins and the others read what it wrote. A process that dies leaves whole files
under their own names and, at worst, one file whose name begins with `.fedhead-`; a later call removes that.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fedhead.common.config.faults import fault
from fedhead.common.errors import InputError
from fedhead.common.failpoints import reach

PRIVATE: Final = 0o600
PUBLIC: Final = 0o644

_FOLDER: Final = 0o700
_LARGEST: Final = 1 << 20  # bytes; the files made here have less than two thousand
_ASIDE: Final = re.compile(r"\.fedhead-[0-9a-f]{16}\.part")
_LEFT_SECONDS: Final = 600.0  # what another process writes right now has its name within milliseconds


class KeyFolder:
    """The files of one folder.

    Parameters
    ----------
    path : Path
        Need not be there yet.

    Attributes
    ----------
    made : list of str
        Names of the files that this object has made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made: list[str] = []

    def prepare(self) -> None:
        """Make the folder, mode 0700, where there is none, and take away what killed processes have left.

        Raises
        ------
        InputError
            It is no folder, others may enter it, or it can't be written.
        """
        with self._failures():
            if not os.path.lexists(self.path):
                self.path.mkdir(mode=_FOLDER, parents=True, exist_ok=True)
                _sync(self.path.parent)
            self._check()
            mode = stat.S_IMODE(self.path.stat().st_mode)
            if mode & 0o077:
                raise InputError(
                    fault(
                        "DIR", str(self.path),
                        f"a folder of private keys must be closed to others, and its mode is {mode:04o}",
                        f"Run: chmod 700 {shlex.quote(str(self.path))}",
                    )
                )  # fmt: skip
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise InputError(
                    fault(
                        "DIR", str(self.path), "this user must have the right to write there",
                        "Give it, or name another folder.",
                    )
                )  # fmt: skip
            for name in self.left_over():
                aside = self.path / name
                with suppress(FileNotFoundError):  # another process was the quicker one
                    if time.time() - aside.lstat().st_mtime > _LEFT_SECONDS:
                        aside.unlink()

    def names(self) -> list[str]:
        """Names of all that lies there, sorted.

        Raises
        ------
        InputError
            There is no such folder, or it can't be read.
        """
        with self._failures():
            self._check()
            return sorted(os.listdir(self.path))

    def left_over(self) -> list[str]:
        """Names of files that a killed process has left, or that another one writes right now."""
        return [name for name in self.names() if _ASIDE.fullmatch(name)]

    def has(self, name: str) -> bool:
        """Whether there is anything of this name, a dangling link included."""
        return os.path.lexists(self.path / name)

    def mode(self, name: str) -> int:
        """The permissions of a file.

        Raises
        ------
        InputError
            It is no file, or out of reach.
        """
        with self._failures():
            return stat.S_IMODE(self._status(name).st_mode)

    def read(self, name: str, mode: int) -> bytes | None:
        """The content of a file; None where there is none.

        Parameters
        ----------
        name : str
        mode : PRIVATE or PUBLIC
            A private file must be closed to all others, a public one must not be open to their writing.

        Raises
        ------
        InputError
            It is no file, can't be read, or others have rights that they must not have.
        """
        if not self.has(name):
            return None
        path = self.path / name
        found = self.mode(name)
        if wrong(found, mode):
            rule = (
                "a private key must be open to its owner alone" if mode == PRIVATE
                else "others must not be able to change it"
            )  # fmt: skip
            raise InputError(f"{path} has mode {found:04o}: {rule}. Run: chmod {mode:o} {shlex.quote(str(path))}")
        with self._failures(), open(path, "rb") as file:
            return file.read(_LARGEST)

    def add(self, name: str, content: bytes, mode: int) -> None:
        """Make a file, on disk when this returns; one that is there already stays as it is.

        Raises
        ------
        InputError
            It can't be written; nothing of that name is then there, or all of it.
        """
        with self._failures():
            aside = self.path / f".fedhead-{os.urandom(8).hex()}.part"
            handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
            try:
                with open(handle, "wb") as file:
                    os.fchmod(handle, mode)  # whatever the umask
                    file.write(content)
                    file.flush()
                    os.fsync(handle)
                reach("keys.written")
                try:
                    os.link(aside, self.path / name)
                except FileExistsError:
                    return
                self.made.append(name)
                reach("keys.linked")
            finally:
                aside.unlink(missing_ok=True)
            _sync(self.path)

    def _status(self, name: str) -> os.stat_result:
        """The status of a file; a pipe in its place would be waited for without end, and a folder is no key."""
        found = (self.path / name).stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{self.path / name} is no file: it must be one. Move it away.")
        return found

    def _check(self) -> None:
        if not self.path.is_dir():
            there = os.path.lexists(self.path)
            rule = "it must be a folder" if there else "there is no such folder"
            raise InputError(fault("DIR", str(self.path), rule, "Name the folder of the keys."))

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn a fault of the operating system into one line."""
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL
            text = getattr(error, "strerror", None) or str(error)
            raise InputError(
                fault(
                    "DIR", str(self.path), f"it must be a folder that can be read and written ({text})",
                    "Check the rights and the space left, or name another folder on a local disk.",
                )
            ) from error  # fmt: skip


def wrong(mode: int, wanted: int) -> bool:
    """Whether others have rights that a private, or a public, file must not give them."""
    return bool(mode & (0o077 if wanted == PRIVATE else 0o022))


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
