"""The training process of a joined holder: imports everything once, then answers one message after the other.

Started by the supervisor as `python -m fedhead.client.joining.executor`; settings come over stdin (pipe.py). It lives
on when the node process is started again, and is told where the new one is.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

from fedhead.client.joining import pipe

if TYPE_CHECKING:
    from flwr.app import Context, Message

    from fedhead.client.joining.tasks import Task, Tasks

log = logging.getLogger("fedhead.client")

_LOOK: Final = 0.5  # seconds; the node says when there is something, so this is only for what was missed


@dataclass
class Desk:
    """What other threads and signal handlers leave for the executor."""

    node: tuple[str, bytes] | None = None
    leaving: bool = False
    bell: threading.Event = field(default_factory=threading.Event)

    def heard(self, said: dict[str, Any]) -> None:
        """The supervisor says where the node is, or that a message has arrived."""
        if "node" in said:
            self.node = (said["node"], bytes.fromhex(said["secret"]))
        self.bell.set()

    def leave(self, *_: object) -> None:
        """SIGTERM: no further task. Only a flag: an event's lock must not be taken in a signal handler."""
        self.leaving = True


def main() -> NoReturn:
    """Answer messages until the supervisor ends it."""
    settings = pipe.begin()
    desk = Desk()
    signal.signal(signal.SIGTERM, desk.leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Flower raises it in its own process where a task was dropped
    pipe.follow(desk.heard)
    status = 1
    try:
        gc.disable()  # importing makes millions of objects that stay: looking for cycles among them takes a sixth of it
        import torch

        from fedhead.client.app import app

        gc.freeze()
        gc.enable()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads())
        pipe.emit("ready")
        serve(desk, settings["holder"], app)
        status = 0
    except BaseException:
        log.exception("the training process failed")
    finally:
        logging.shutdown()
        sys.stderr.flush()
        os._exit(status)


def threads() -> int:
    """Threads for training: every core, but one for the node where there are more than two."""
    cores = len(os.sched_getaffinity(0))
    return cores - 1 if cores > 2 else cores


def serve(desk: Desk, holder: str, app: Callable[[Message, Context], Message]) -> None:
    """Take one task after the other until SIGTERM.

    Parameters
    ----------
    desk : Desk
    holder : str
        Path of the holder's file.
    app : callable
        (message, context) -> reply.
    """
    from fedhead.client.joining.tasks import Task, Tasks

    tasks: Tasks | None = None
    at: tuple[str, bytes] | None = None
    while not desk.leaving:
        if desk.node != at:
            at = desk.node
            if tasks is not None:
                tasks.close()
            tasks = None if at is None else Tasks(*at)
        token = None if tasks is None else tasks.take()
        if tasks is None or token is None:
            desk.bell.wait(_LOOK)
            desk.bell.clear()
            continue
        try:
            with Task(tasks.address, token) as task:
                context = one(task, holder, app)
        except Exception as error:
            log.error("a message could not be taken, or its reply not handed over: %s", type(error).__name__)
            # The node waits for a reply that won't come; it is started again, and the server hears that it was gone.
            pipe.emit("stuck", node=tasks.address)
            time.sleep(_LOOK)
            continue
        if context is not None:
            report_budget(context)


def one(task: Task, holder: str, app: Callable[[Message, Context], Message]) -> Context | None:
    """Answer the message of a task.

    Returns
    -------
    context : Context or None
        None where nothing was charged.

    Raises
    ------
    Exception
        The message didn't come, or the reply couldn't be handed over.
    """
    from flwr.app import MessageType

    from fedhead.client.timing import without_times
    from fedhead.common.refusals import TRAINING_FAILED

    try:
        pulled = task.pull(holder)
    except Exception:  # whatever it was: the node is told that the task is over, and the caller gets it
        task.finish(False)
        raise
    if pulled is None:
        task.finish(False)
        return None
    message, context = pulled
    number = _round_of(message)
    started = time.monotonic()
    try:
        reply = app(message, context)
    except Exception:  # a kind of message that the app doesn't know; its text stays here
        from fedhead.client.app import failed

        log.exception("a message could not be answered")
        reply = failed(message, context)
    seconds = time.monotonic() - started
    without_times(reply, message)
    try:
        task.push(reply)
    except Exception:  # as above
        task.finish(False)
        raise
    task.finish(True)
    refused = reply.has_error()
    if message.metadata.message_type == MessageType.QUERY:
        pipe.emit("prepared", seconds=round(seconds, 3), good=not refused)
        return None
    code = reply.error.code if refused else None
    outcome = "refused" if refused else "released"
    pipe.emit("round", round=number, outcome=outcome, code=code, seconds=round(seconds, 3))
    return context if code in (None, TRAINING_FAILED) else None  # other refusals charge nothing


def report_budget(context: Context) -> None:
    """Say what is spent and left of the file's own domain, by the ledger, after the reply has left."""
    from fedhead.client.workplace import workplace_of
    from fedhead.common.privacy.filters import Totals, left, spent

    try:
        workplace, name, _ = workplace_of(context)
        admission = workplace.admission
        if admission.ledger is None or admission.budget is None:
            return
        terms, domain = admission.budget.terms(), admission.budget.domain
        found = next((one for one in admission.ledger.summary(name) if one.domain == domain), None)
        totals = Totals() if found is None else found.totals
        rest = left(terms, totals) if found is None else found.left_by(terms)
        cost = spent(terms, totals)
        # the most that any kind of run has left, as `fedhead check` judges it
        pipe.emit(
            "budget",
            domain=domain,
            # noise from a seed that arrived can be taken off by whoever sent it
            spent="inf" if found is not None and found.given_away else _finite(cost.epsilon),
            delta=cost.delta,
            left=_finite(max(rest.epsilon, rest.poisson_epsilon)),
        )
    except Exception as error:  # a round that couldn't open the holder's records was refused, and said so
        log.warning("the budget could not be read: %s", type(error).__name__)


def _round_of(message: Message) -> int | None:
    """The round that a message is about, as the server numbers it; for the log alone."""
    from fedhead.common import protocol

    config = message.content.config_records.get(protocol.CONFIG) if message.has_content() else None
    number = None if config is None else config.get("server-round")
    return number if type(number) is int else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main()
