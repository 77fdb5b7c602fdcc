"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fedhead.common.failpoints import reach


def write_aside(path: Path, content: bytes, mode: int = 0o666, *, durable: bool = False) -> None:
    """Write a file so that a reader, or a crash, finds the old one or the whole new one: aside, fsync, rename.

    The permissions are `mode` less what the user's umask takes away. With `durable` the new name, too, survives a crash
    right afterwards: the folder is flushed as well. An OSError leaves the old file, or with `durable` the new one.
    """
    aside = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        # Not mkstemp: a result has the permissions of any other file of the user.
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        reach("file.written")
        os.replace(aside, path)
        reach("file.renamed")
        if durable:
            handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
