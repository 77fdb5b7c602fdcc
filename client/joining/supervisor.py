"""The supervisor of a joined holder: starts the executor and the node, keeps them going, ends them in order.

    the executor is ready         the node is started; so a server never sees a holder that can't train yet
    the node ends                 it is started again; the executor stays warm, and is told where the new one is
    the executor ends             so does the node, which would wait for its reply; then both again
    a reply can't be handed over  the node is started again: it waits for nothing else
    the server doesn't know us    the end, with what to do

Waits before a start: 1, 2, 4, ... 30 s, from the beginning after a minute of good work.
"""

from __future__ import annotations

import logging
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol

from fedhead.client.findings import delta_as
from fedhead.client.joining.process import Child, Said
from fedhead.client.joining.retry import REMEDIES
from fedhead.common.refusals import TEXTS

log = logging.getLogger("fedhead.client")

NODE: Final = "node"
EXECUTOR: Final = "executor"

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds before a process is started again
GOOD_SECONDS: Final = 60.0  # a process that lived so long starts again after the first wait
MOST_TRIES: Final = 5  # starts of an executor that never was ready
ROUND_SECONDS: Final = 20.0  # a round under way has so long when join is told to end
END_SECONDS: Final = 5.0  # a process has so long to end by itself
LAST_SECONDS: Final = 2.0  # what an executor said before it ended is waited for so long


class Figures(Protocol):
    """What counts the events; `fedhead.client.joining.figures.HolderFigures`, or nothing."""

    def event(self, event: Mapping[str, Any]) -> None:
        """An event of a child."""

    def restarted(self, process: str) -> None:
        """A process was started again."""

    def up(self, process: str, running: bool) -> None:
        """A process runs, or doesn't any more."""


@dataclass
class _Place:
    """One of the two processes: the child that runs, or when the next one starts."""

    child: Child | None = None
    start: float | None = None  # monotonic seconds; None: not before something else has happened
    starts: int = 0
    failures: int = 0  # in a row
    good: bool = False  # whether this child was ready or online


@dataclass
class Supervisor:
    """Runs a holder's two processes.

    Parameters
    ----------
    commands : mapping
        `node` and `executor` -> how each is started.
    settings : mapping
        `node` and `executor` -> what each is told first. The node gets a fresh secret with each start.
    environment : mapping
    figures : Figures
    server : str
        For the log.
    round_seconds : float, seconds
        A round that is under way at a `stop` has so long.
    end_seconds : float, seconds
        A process has so long to end by itself.
    first_wait : float, seconds
        Before a process is started again for the first time.
    """

    commands: Mapping[str, Sequence[str]]
    settings: Mapping[str, Mapping[str, Any]]
    environment: Mapping[str, str]
    figures: Figures
    server: str = ""
    round_seconds: float = ROUND_SECONDS
    end_seconds: float = END_SECONDS
    first_wait: float = FIRST_WAIT
    _heard: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    _places: dict[str, _Place] = field(default_factory=lambda: {NODE: _Place(), EXECUTOR: _Place()})
    _secret: str = ""
    _at: str = ""
    _stops: int = 0
    _given_up: str = ""

    def stop(self) -> None:
        """End in order; said twice, at once. May be called by a signal handler and by any thread."""
        self._stops += 1
        self._heard.put(None)  # a SimpleQueue may be filled by a signal handler

    def run(self) -> int:
        """Keep both going until `stop`, or until there is no use in it.

        Returns
        -------
        status : int
            0 after `stop`, 1 after giving up; the log says what to do.
        """
        self._places[EXECUTOR].start = time.monotonic()
        try:
            while not self._stops and not self._given_up:
                self._start_what_is_due()
                self._hear()
        finally:
            self._end_all()
        if self._given_up:
            log.error("%s", self._given_up)
        return 1 if self._given_up else 0

    def _start_what_is_due(self) -> None:
        for name, place in self._places.items():
            if place.start is not None and place.start <= time.monotonic():
                place.start = None
                self._start(name, place)

    def _start(self, name: str, place: _Place) -> None:
        settings = dict(self.settings[name])
        if name == NODE:
            self._secret, self._at = secrets.token_hex(32), ""
            settings["secret"] = self._secret
        if place.starts:
            self.figures.restarted(name)
        place.starts, place.good = place.starts + 1, False
        try:
            place.child = Child(name, self.commands[name], settings, self.environment, self._heard)
        except OSError as error:  # no memory or no process left on this machine: that passes
            log.error("the %s process can't be started (%s)", _WORDS[name], error.strerror)
            self._plan(place)
            return
        self.figures.up(name, True)

    def _hear(self) -> None:
        due = [place.start for place in self._places.values() if place.start is not None]
        wait = max(0.0, min(due) - time.monotonic()) if due else None
        try:
            said: Said | None = self._heard.get(timeout=wait)
        except Empty:
            return
        if said is None or self._places[said.child.name].child is not said.child:
            return  # a stop, or of a child that was ended
        if said.event is None:
            self._ended(said.child)
        else:
            self._event(said.child, said.event)

    def _event(self, child: Child, event: dict[str, Any]) -> None:
        self.figures.event(event)
        place, kind = self._places[child.name], event.get("event")
        executor, node = self._places[EXECUTOR].child, self._places[NODE].child
        match child.name, kind:
            case ("executor", "ready"):
                place.good = True
                log.info("the training process is ready", extra={"event": kind})
                self._places[NODE].start = time.monotonic()
            case ("executor", "stuck"):
                if node is not None and event.get("node") == self._at:
                    log.warning("a reply could not be handed over; the node is started again", extra={"event": kind})
                    self._end(NODE)
            case ("node", "listening"):
                self._at = f"127.0.0.1:{event['port']}"
                if executor is not None:
                    executor.say({"node": self._at, "secret": self._secret})
            case ("node", "arrived"):
                if executor is not None:
                    executor.say({})
            case ("node", "online"):
                place.good = True
                log.info("connected to %s", self.server, extra={"event": kind})
            case ("node", "offline"):
                log.warning("not connected: %s; join goes on trying", event.get("why"), extra={"event": kind})
            case ("node", "fatal"):
                why = str(event.get("why"))
                self._given_up = f"{self.server} can't be joined: {why}. {REMEDIES.get(why, '')}".rstrip()
            case _:
                _tell(event)

    def _ended(self, child: Child) -> None:
        status = child.process.returncode
        log.warning("the %s process has ended (status %s)", _WORDS[child.name], status, extra={"event": "ended"})
        if child.name == EXECUTOR:
            self._end(NODE)
            self._places[NODE].start = None  # when the executor is ready again
        self._gone(child.name)

    def _end(self, name: str) -> None:
        """End a child at once, and plan its next start."""
        child = self._places[name].child
        if child is not None:
            child.end(signal.SIGINT if name == NODE else signal.SIGTERM, self.end_seconds, lambda: self._stops > 1)
            self._gone(name)

    def _gone(self, name: str) -> None:
        place = self._places[name]
        child, place.child = place.child, None
        assert child is not None
        self.figures.up(name, False)
        if place.good and time.monotonic() - child.started >= GOOD_SECONDS:
            place.failures = 0
        self._plan(place)
        if name == EXECUTOR and not place.good and place.failures >= MOST_TRIES:
            self._given_up = (
                f"the training process ended {MOST_TRIES} times before it was ready: the lines above say why. Correct "
                "that, and join again."
            )

    def _plan(self, place: _Place) -> None:
        """When the next child of a place starts: the wait doubles with each failure in a row."""
        place.failures += 1
        place.start = time.monotonic() + min(LONGEST_WAIT, self.first_wait * 2 ** min(place.failures - 1, 30))

    def _end_all(self) -> None:
        """The node first, which waits for the reply to a message under way; then the executor."""
        node, executor = self._places[NODE].child, self._places[EXECUTOR].child
        stopped = self._stops

        def hurry() -> bool:
            return self._stops > max(1, stopped)

        if node is not None:
            if self._given_up:
                node.end(signal.SIGINT, self.end_seconds, hurry)
            else:
                node.end(signal.SIGTERM, self.round_seconds, hurry)
            self.figures.up(NODE, False)
        if executor is not None:
            executor.end(signal.SIGTERM, self.end_seconds, hurry)
            self.figures.up(EXECUTOR, False)
            self._hear_last(executor)

    def _hear_last(self, executor: Child) -> None:
        """Count and log what the executor said before its end: a round may be among it that was charged."""
        until = time.monotonic() + LAST_SECONDS
        while (wait := until - time.monotonic()) > 0:
            try:
                said: Said | None = self._heard.get(timeout=wait)
            except Empty:
                return
            if said is None or said.child is not executor:
                continue
            if said.event is None:
                return
            self.figures.event(said.event)
            _tell(said.event)


_WORDS: Final = {NODE: "node", EXECUTOR: "training"}


def _tell(event: Mapping[str, Any]) -> None:
    """One line of the log for what the executor did."""
    fields = {name: value for name, value in event.items() if name in _FIELDS}
    number, seconds, code = event.get("round"), _figure(event.get("seconds"), 2), event.get("code")
    which = "a round" if number is None else f"round {number}"
    match event.get("event"):
        case "round" if event.get("outcome") == "released":
            log.info("%s released after %s s", which, seconds, extra=fields)
        case "round":
            text = TEXTS.get(code, "") if isinstance(code, int) else ""
            log.warning("%s refused: %s %s", which, code, text, extra=fields)
        case "prepared" if event.get("good"):
            log.info("the coordinator asked who is here: records and features ready in %s s", seconds, extra=fields)
        case "prepared":
            log.warning("the coordinator asked who is here; the records can't be used", extra=fields)
        case "budget":
            spent, left = _figure(event.get("spent"), 3), _figure(event.get("left"), 3)
            delta = event.get("delta")
            at = f" at delta {delta_as(delta)}" if isinstance(delta, float) else ""
            log.info("budget %s: epsilon %s spent%s, %s left", event.get("domain"), spent, at, left, extra=fields)
        case _:
            pass


def _figure(value: Any, digits: int) -> str:
    """A number as people read it; one that isn't known, such as an epsilon without a bound, is a dash."""
    if value == "inf":
        return "infinite"
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


_FIELDS: Final = frozenset({"event", "round", "outcome", "code", "seconds", "good", "domain", "spent", "delta", "left"})
