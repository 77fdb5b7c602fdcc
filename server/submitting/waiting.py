"""How the submit side waits for a server that may be away: the one rule for every request, and how waiting can end.

    answered             the request's own result
    refused (401, 403)   Stopped or LinkLost, as the server's list of runs tells them apart
    away, or HTTP 5xx    again, with pauses of at most a second, until
        `until`          TimeUp: the caller's own deadline; not an error
        `seconds`        Away
        leave()          Leaving: this process is going
    any other answer     Rejected

Flower's own rule can't be used here: it ends the process with SIGINT at a 401, and gives up at any HTTP 500 and at a
connection that is cut within its handshake.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import httpx

from fedhead.common.errors import FedheadError, RunError

REQUEST_SECONDS: Final = 30.0  # a request that isn't answered for as long is tried again
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0
_LEAST_SECONDS: Final = 0.5  # of a request near its deadline: it should have a chance
_BUSY: Final = (408, 429)  # these ask for another try

_Item = TypeVar("_Item")


class LinkLost(RunError):
    """The server has given the run up, and nobody stopped it; a new one can go on."""


class Away(LinkLost):
    """The server was away for as long as it was waited for; waiting again would be more of the same."""


class Stopped(RunError):
    """Somebody stopped the run."""


class Rejected(RunError):
    """An answer that another try won't change.

    Attributes
    ----------
    status : int
        HTTP's.
    """

    def __init__(self, status: int) -> None:
        # Only the status: the text of an answer is the server's own.
        super().__init__(f"the server answered a request with HTTP {status}. See the server's log.")
        self.status = status


class TimeUp(Exception):
    """The caller's deadline has passed while the server was away."""


class Leaving(Exception):
    """A request was given up because this process is going."""


class Waiting:
    """The rule for the requests of one client; Flower's clients call `invoke` for each.

    Parameters
    ----------
    seconds : float, >= 0
        How long the server may be away within one request; 0 tries once.
    refused : callable
        Makes the error for a request that was refused (HTTP 401, 403).
    lost : callable
        Makes the error for a server that was away for too long.

    Attributes
    ----------
    failures : int
        Requests so far that had no answer, or HTTP 5xx; what the server did with them isn't known.
    """

    def __init__(self, seconds: float, refused: Callable[[], FedheadError], lost: Callable[[], FedheadError]) -> None:
        self.seconds = seconds
        self._refused, self._lost = refused, lost
        self.failures = 0
        self._until: float | None = None
        self._leaving = threading.Event()

    @property
    def over(self) -> bool:
        """Whether the caller's deadline has passed."""
        return self._until is not None and time.monotonic() >= self._until

    @contextmanager
    def within(self, seconds: float | None) -> Iterator[None]:
        """Requests inside raise `TimeUp` when the server is away at the end of so many seconds; None: no deadline.

        Inside of another one the sooner deadline counts.
        """
        before, deadlines = self._until, [] if self._until is None else [self._until]
        if seconds is not None:
            deadlines.append(time.monotonic() + seconds)
        self._until = min(deadlines, default=None)
        try:
            yield
        finally:
            self._until = before

    def request_seconds(self) -> float:
        """How long the next request may wait for an answer, so that a server that hangs can't outlast the deadline."""
        if self._until is None:
            return REQUEST_SECONDS
        return min(REQUEST_SECONDS, max(_LEAST_SECONDS, self._until - time.monotonic()))

    def pause(self, seconds: float) -> None:
        """Do nothing for so long, or until the deadline or `leave`."""
        left = seconds if self._until is None else min(seconds, self._until - time.monotonic())
        self._leaving.wait(max(0.0, left))

    def leave(self) -> None:
        """Have every request under way, in whatever thread, give up at its next failure."""
        self._leaving.set()

    def invoke(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `target` until it succeeds.

        Raises
        ------
        FedheadError
            What `refused` and `lost` make, or `Rejected`.
        TimeUp, Leaving
            See the head of this file.
        """
        began, wait = time.monotonic(), _FIRST_PAUSE
        while True:
            try:
                return target(*args, **kwargs)
            except httpx.HTTPStatusError as error:
                code = error.response.status_code
                if code in (401, 403):
                    raise self._refused() from None
                if code < 500 and code not in _BUSY:
                    raise Rejected(code) from None
            except httpx.RequestError:
                pass
            self.failures += 1
            if self._leaving.is_set():
                raise Leaving
            if self.over:
                raise TimeUp
            if time.monotonic() - began >= self.seconds:
                raise self._lost() from None
            self.pause(wait)
            wait = min(2 * wait, _LONGEST_PAUSE)


def each(work: Callable[[_Item], None], items: Iterable[_Item], workers: int = 2) -> None:
    """Do the work for every item, in a few threads; the first failure ends it and is raised here.

    The threads are daemons, unlike those of an executor: one that waits for a server must not keep a process from
    ending.
    """
    left, failures = deque(items), list[BaseException]()

    def go() -> None:
        while not failures:
            try:
                item = left.popleft()
            except IndexError:
                return
            try:
                work(item)
            except BaseException as error:
                failures.append(error)

    if len(left) < 2:
        go()
    else:
        threads = [threading.Thread(target=go, daemon=True) for _ in range(min(workers, len(left)))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # a signal's exception: the others are to stop, too
            failures.append(error)
            raise
    if failures:
        raise failures[0]
