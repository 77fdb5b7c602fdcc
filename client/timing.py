"""When a deployed holder answers: not a round that is over, not sooner than its own file says, and not without end."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from flwr.app import Message

log = logging.getLogger("fedhead.client")


def over(message: Message) -> bool:
    """Whether the time that the server gave for an answer has passed, by this machine's clock.

    An answer would not count any more, so that training, and the budget it takes, would be for nothing. Times that are
    no numbers have passed.
    """
    return not time.time() <= message.metadata.created_at + message.metadata.ttl


def without_times(reply: Message, message: Message) -> None:
    """Give a reply the times of its request, as they arrived.

    Flower writes when a reply was made, in microseconds by this machine's clock, and what is left of the request's
    time: both would say how long the work took. What is due when the request is due stays so.
    """
    reply.metadata.created_at, reply.metadata.ttl = message.metadata.created_at, message.metadata.ttl


def wait_until(arrived: float, reply_at: float) -> None:
    """Return `reply_at` seconds after `arrived`, or at once where they have passed.

    How long an answer takes then says nothing about the records, as long as the training is done by that time.

    Parameters
    ----------
    arrived : float
        What `time.monotonic` said when the request came.
    reply_at : float
        Seconds; 0 for no wait.
    """
    left = arrived + reply_at - time.monotonic()
    if left > 0:
        time.sleep(left)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End this process when the block takes longer: a request can ask for work without end at next to no charge.

    Nothing else ends a step under way. Whoever started the process starts it anew; what was reserved stays spent.
    """
    timer = threading.Timer(seconds, _end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end() -> NoReturn:
    log.error("a round took longer than limits.round_seconds: this process ends, and the round stays spent")
    logging.shutdown()
    os._exit(1)
