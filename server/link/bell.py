"""Wakes data holders that wait for a message, once the coordinator has brought all that belongs to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_DELAY: Final = 0.1  # seconds; the objects of a message follow it in requests of their own


class Bell:
    """Rung once no delivery has been under way for a moment; belongs to one event loop.

    Attributes
    ----------
    stopping : bool
        The server ends: nobody should wait any more.
    """

    def __init__(self, delay: float = _DELAY) -> None:
        self.stopping = False
        self._delay = delay
        self._under_way = 0
        self._timer: asyncio.TimerHandle | None = None
        self._event = asyncio.Event()

    @contextmanager
    def delivery(self) -> Iterator[None]:
        """A request that brings a message, or an object of one."""
        self._under_way += 1
        self._cancel()
        try:
            yield
        finally:
            self._under_way -= 1
            if self._under_way == 0:
                self._timer = asyncio.get_running_loop().call_later(self._delay, self._ring)

    def stop(self) -> None:
        """Wake everybody, for the last time."""
        self.stopping = True
        self._cancel()
        self._ring()

    def ticket(self) -> asyncio.Event:
        """What the next ringing sets. Take it before looking for a message: a ringing in between is then not missed."""
        return self._event

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        event, self._event = self._event, asyncio.Event()
        event.set()
        if self.stopping:
            self._event.set()


async def heard(event: asyncio.Event, seconds: float) -> bool:
    """Whether the bell rang within some seconds."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return event.is_set()
    return True
