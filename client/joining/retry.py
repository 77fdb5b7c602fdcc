"""When a node asks its server again, when it gives a thing up, and when there is no use in going on.

Flower's own rule gives up for ever where a connection is cut within the TLS handshake, or at any HTTP 500, and ends its
own process at a 401. Here only what nobody on this side can wait out is given up:

    no answer, a cut, a timeout      again, until it works: the server is down, or the network is
    408, 425, 429, 5xx               again, for `patience` seconds a request
    403                              that run is over; the request was about nothing that is left
    certificate                      fatal: the server is not the one whose certificate `ca` is, or the clock is wrong;
                                     again, once this server has answered: whoever sits between could end every join
    401, 404, 412 to activate-node   fatal: the server doesn't know this key, or not this way of asking
    anything else                    given up; the node's loop decides what that means
"""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal

import httpx

Verdict = Literal["again", "busy", "over", "fatal", "failed"]

PATIENCE: Final = 600.0  # seconds; what a server answers with a 500 for so long, it will not take at all
LONGEST_WAIT: Final = 5.0  # seconds between two tries: a server that is back is found within that

NO_ANSWER: Final = "the server does not answer"
BUSY: Final = "the server answers with errors"
EXPIRED: Final = "the server's certificate has expired"
EARLY: Final = "the server's certificate is not valid yet"
OTHER_HOST: Final = "the server's certificate is for another address"
OTHER_CA: Final = "the server's certificate is not signed by the one in ca"
UNKNOWN_KEY: Final = "the server does not know this holder's key"
WRONG_CLOCK: Final = "the clock here and the server's differ"
NO_SERVER: Final = "what answers at this address is no fedhead server"

REMEDIES: Final[Mapping[str, str]] = {
    EXPIRED: "Ask the coordinator for a new one; if the clock of this machine is wrong, set it.",
    EARLY: "Set the clock of this machine, or ask the coordinator.",
    OTHER_HOST: "Set server to the address that the coordinator gave; the certificate must have it.",
    OTHER_CA: "Ask the coordinator for its ca.crt again, by a way that you trust, and set ca.",
    UNKNOWN_KEY: "Send the coordinator this holder's public key; one that was taken away needs a new pair.",
    WRONG_CLOCK: "Set the clock of this machine, best by NTP, or ask the coordinator to set the server's.",
    NO_SERVER: "Set server to the address that the coordinator gave.",
}
"""Reasons that are fatal, and what to do. Fixed texts: nothing that the server sent is in them."""

CERTIFICATES: Final = frozenset({EXPIRED, EARLY, OTHER_HOST, OTHER_CA})
"""Reasons that anybody on the way to the server can bring about, without any key."""

# OpenSSL's numbers of what was wrong with a certificate (x509_vfy.h).
_VERIFICATION: Final[Mapping[int, str]] = {9: EARLY, 10: EXPIRED, 62: OTHER_HOST, 64: OTHER_HOST}
_BUSY: Final = frozenset({408, 425, 429})
_ACTIVATE: Final = "/activate-node"
_OBJECTS: Final = ("/pull-object", "/confirm-message-received")


def judge(error: Exception) -> tuple[Verdict, str]:
    """What to do about a request that failed, and why, as a fixed text.

    Parameters
    ----------
    error : Exception
        As httpx raises it.

    Returns
    -------
    verdict : str
        ``again``, ``busy`` (again, but not for ever), ``over``, ``fatal`` or ``failed``.
    why : str
        One of this module's texts; empty for ``over`` and ``failed``.
    """
    if isinstance(error, httpx.HTTPStatusError):
        return _status(error)
    certificate = _certificate(error)
    if certificate is not None:
        return "fatal", _VERIFICATION.get(certificate.verify_code, OTHER_CA)
    if isinstance(error, httpx.TransportError):
        return "again", NO_ANSWER
    return "failed", ""


def _status(error: httpx.HTTPStatusError) -> tuple[Verdict, str]:
    code, path = error.response.status_code, error.request.url.path
    if code in _BUSY or code >= 500:
        return "busy", BUSY
    if path.endswith(_ACTIVATE):
        if code == 401 and _said(error.response) == "clock":
            return "fatal", WRONG_CLOCK
        return "fatal", UNKNOWN_KEY if code in (401, 412) else NO_SERVER
    # A 403 to what belongs to one message must stay an ordinary error: Flower's loop then clears the message away, and
    # otherwise keeps a task without objects for ever.
    if code == 403 and not path.endswith(_OBJECTS):
        return "over", ""
    return "failed", ""


def _certificate(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """The fault of a certificate that an error comes from. A cut within the handshake is none."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None


def _said(response: httpx.Response) -> object:
    """What fedhead's server says to a 401 (server/link/proof.py); compared with what is known, and not passed on."""
    try:
        found = response.json()
    except (ValueError, RecursionError):
        return None
    return found.get("detail") if isinstance(found, dict) else None


class Retry:
    """Carries requests out, again where that helps; Flower calls it from several threads.

    Parameters
    ----------
    told : callable
        Called with None when the server answers after it didn't (the first time included), with the reason, a fixed
        text, when it stops answering.
    fatal : callable
        Called with the reason, a fixed text, before an error is raised that no waiting mends.
    over : type
        What Flower's loop takes for "that run is not running any more".
    patience : float, > 0, seconds
        How long a request is tried again that the server answers with errors.
    sleep, clock : callables
        As in `time`.

    Attributes
    ----------
    max_tries, max_time
        Flower sets them when its caller limits tries; join doesn't.
    """

    def __init__(
        self,
        told: Callable[[str | None], None],
        fatal: Callable[[str], None],
        over: type[BaseException],
        *,
        patience: float = PATIENCE,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_tries: int | None = None
        self.max_time: float | None = None
        self._told, self._fatal, self._over = told, fatal, over
        self._patience, self._sleep, self._clock = patience, sleep, clock
        self._lock = threading.Lock()
        self._down: str | None = ""  # why the server doesn't answer; None: it does; "": not asked yet
        self._answered = False

    def invoke(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `target` until it returns, or fails for good.

        Raises
        ------
        Exception
            As `target` raised it, where trying again is of no use.
        BaseException
            `over`, when the run of the request has ended.
        """
        started, waits = self._clock(), _waits()
        while True:
            try:
                found = target(*args, **kwargs)
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                verdict, why = judge(error)
                if self._answered and why in CERTIFICATES:
                    verdict = "again"
                if verdict == "over":
                    self._tell(None)
                    raise self._over from None
                if verdict == "fatal":
                    self._fatal(why)
                    raise
                if verdict == "failed" or (verdict == "busy" and self._clock() - started >= self._patience):
                    raise
                self._tell(why)
                self._sleep(next(waits))
            else:
                self._tell(None)
                return found

    def _tell(self, why: str | None) -> None:
        with self._lock:
            self._answered = self._answered or why is None
            if why == self._down:
                return
            self._down = why
            self._told(why)


def _waits() -> Iterator[float]:
    """Seconds between tries: doubling up to `LONGEST_WAIT`, spread so that holders don't come back all at once."""
    wait = 0.5
    while True:
        yield wait * random.uniform(0.5, 1.0)
        wait = min(2 * wait, LONGEST_WAIT)
