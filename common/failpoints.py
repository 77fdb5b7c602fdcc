"""Named points at which a test may stop, kill or fail a process; in production each is a call that does nothing.

A point stands before and after every durable write, so that a test can show what a crash at that very moment leaves.
No environment variable, file or message reaches the hook: only code in the same process can install one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Final

Hook = Callable[[str], None]

_STAGES: Final = {
    "begin": "nothing has been written, no lock is held",
    "locked": "the write lock is held, nothing has been written",
    "written": "all rows are written, none is durable",
    "committed": "all rows are durable (fsync has returned), the caller does not know it yet",
}

FAILPOINTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ledger.create.written": "a new ledger is complete under a temporary name",
        "ledger.create.linked": "a new ledger has its name, its folder is not yet synchronised",
        **{
            f"ledger.{operation}.{stage}": meaning
            for operation in ("declare", "reserve", "release", "abandon")
            for stage, meaning in _STAGES.items()
        },
        "round.admitted": "a round is reserved, no noise has been drawn",
        "round.trained": "a round's release is made, nothing of it is stored",
        "round.sending": "a round's release is stored and about to leave",
        "holder.opened": "a holder's records are open and their features ready, nothing has been answered",
        "node.received": "a node has a whole message, its executor doesn't know of it",
        "node.announced": "a node has announced a reply, nothing of it was brought",
        "node.uploading": "a node has brought a part of a reply",
        "ledger.export.written": "a holder's file is complete under a temporary name",
        "ledger.key.written": "a new signing key is complete under a temporary name",
        "file.written": "a checkpoint, result, mark or the like is complete under a temporary name",
        "file.renamed": "such a file has its name, its folder is not yet synchronised",
        "keys.written": "a key or certificate for a deployment is complete under a temporary name",
        "keys.linked": "a key or certificate has its name, its folder is not yet synchronised",
    }
)
"""Every point and what has happened when it is reached. A new point is a row here."""

_hook: Hook | None = None


def reach(name: str) -> None:
    """Say that the process has come to a point; a hook may raise, or end the process.

    Parameters
    ----------
    name : str
        A key of FAILPOINTS.
    """
    if _hook is not None:
        assert name in FAILPOINTS, name
        _hook(name)


@contextmanager
def installed(hook: Hook) -> Iterator[None]:
    """Install a hook for the length of a ``with`` block; it is called with the name of every point reached.

    Parameters
    ----------
    hook : callable
        Returns to let the process go on. An OSError that it raises is taken as a failure of the disk.
    """
    global _hook
    before, _hook = _hook, hook
    try:
        yield
    finally:
        _hook = before
