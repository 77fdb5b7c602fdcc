"""When a deployed holder answers: not a round that is over, not sooner than its own file says, and not without end."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

from flwr.app import Message

from fedhead.common import progress
from fedhead.common.config.limits import Limits
from fedhead.common.errors import InputError

log = logging.getLogger("fedhead.client")

CLOCKS: Final = 30.0  # seconds that the coordinator's clock may be behind this one
HUNG: Final = 60.0  # seconds beyond limits.prepare_seconds: what hasn't come back by then hangs


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


def round_limit(message: Message, limits: Limits, arrived: float) -> float:
    """How long the training of a round may take, in seconds: as long as the holder says and the server waits.

    Parameters
    ----------
    message : Message
        Whose time is not over.
    limits : Limits
    arrived : float
        What `time.monotonic` said when the request came.

    Notes
    -----
    Guarantee: however short the server waits, training is not ended before the reply would leave (limits.reply_at):
    by a process that ends, it could else see how long the work takes. Clocks may differ by `CLOCKS`.
    """
    waits = message.metadata.created_at + message.metadata.ttl + CLOCKS - time.time()
    return min(limits.round_seconds, max(waits, arrived + limits.reply_at - time.monotonic()))


@contextmanager
def limited(seconds: float, what: str = "a round took longer than limits.round_seconds") -> Iterator[None]:
    """End this process when the block takes longer: a request can ask for work without end at next to no charge.

    Nothing else ends a step under way. Whoever started the process starts it anew; what was reserved stays spent.
    """
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), _end, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(what: str) -> NoReturn:
    log.error("%s, or than anybody waits for: this process ends, and what was reserved stays spent", what)
    logging.shutdown()
    os._exit(1)


@contextmanager
def preparing(seconds: float) -> Iterator[None]:
    """Give up features that aren't ready in time, between two batches; where even that takes long, end this process.

    Parameters
    ----------
    seconds : float, > 0

    Raises
    ------
    InputError
        The time is over.
    """
    until, others = time.monotonic() + seconds, progress.current()

    def listen(stage: str, done: int, total: int, note: str) -> None:
        if others is not None:
            others(stage, done, total, note)
        if done < total and time.monotonic() > until:
            raise InputError(
                f"limits.prepare_seconds is {seconds:g}: the features of a recipe take longer. Raise it, or agree with "
                "the coordinator on smaller images or shorter texts."
            )

    hung = "opening the records took longer than limits.prepare_seconds"
    with limited(seconds + HUNG, hung), progress.listening(listen):
        yield
