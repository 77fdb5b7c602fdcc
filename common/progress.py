"""Progress of long work, told to whoever listens.

The code that works calls `advance`; a command or a notebook puts a listener in with `listening`. Nobody listening costs
nothing. The listener lives in a context variable, so that two runs in two threads don't hear each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int, str], None]

_LISTENER: ContextVar[Listener | None] = ContextVar("fedhead_progress", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Tell `listener(stage, done, total, note)` of all progress made inside the block."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def current() -> Listener | None:
    """Who listens here, if anybody."""
    return _LISTENER.get()


def advance(stage: str, done: int, total: int, note: str = "") -> None:
    """Say that `done` of `total` units of a stage are finished; `note` is a short text such as the last accuracy."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(stage, done, total, note)
