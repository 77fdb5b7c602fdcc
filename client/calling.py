"""One question to the coordinator's server and its answer, with the reason where there is none. Nothing waits for long.

    resolve   the name becomes addresses
    connect   TCP
    secure    TLS, with exactly the holder's authority and the host's own name
    ask       one HTTP request, over that

Each step that fails raises a `Silence` that says which one it was, in words for the holder's own terminal. The standard
library alone, without a proxy.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, Literal

from cryptography import x509

MOST_BYTES: Final = 65_536  # of an answer that are looked at

Reason = Literal[
    "name", "refused", "slow", "network", "silent", "cut", "no-tls", "authority", "host", "time", "tls", "http"
]
PASSING: Final = frozenset[Reason]({"name", "refused", "slow", "network", "silent", "cut"})
"""Reasons that may pass by themselves: a server that is started later, a network that comes back."""

# Of OpenSSL's x509_vfy.h: what makes a certificate another one than was expected
_FAULTS: Final[tuple[tuple[Reason, frozenset[int]], ...]] = (
    ("authority", frozenset({2, 18, 19, 20, 21, 24})),
    ("time", frozenset({9, 10})),
    ("host", frozenset({62, 64})),
)


class Silence(Exception):
    """The server can't be asked.

    Parameters
    ----------
    reason : Reason
    detail : str
        What was found, in the system's own words; for the holder's terminal.
    certificate : Certificate, optional
        What the server showed, though it wasn't accepted.
    """

    def __init__(self, reason: Reason, detail: str = "", certificate: x509.Certificate | None = None) -> None:
        super().__init__(reason)
        self.reason: Reason = reason
        self.detail = detail
        self.certificate = certificate


@dataclass(frozen=True)
class Answer:
    """What the server answered.

    Attributes
    ----------
    certificate : Certificate
        The server's own, which was accepted.
    status : int
        Of HTTP.
    body : bytes
        At most `MOST_BYTES` of it.
    ahead : float or None
        Seconds that the clock here is ahead of the server's, negative where it is behind. None: the server doesn't say.
    within : float
        What `ahead` may be wrong by: a server says whole seconds, and may say them a second late.
    """

    certificate: x509.Certificate
    status: int
    body: bytes
    ahead: float | None
    within: float


def ask(
    address: tuple[str, int],
    authority: str,
    method: str,
    path: str,
    headers: Mapping[str, str],
    patience: float,
) -> Answer:
    """Ask the server at an address once, without a body.

    Parameters
    ----------
    address : (host, port)
    authority : str
        Certificates in PEM; the server's must be signed by one of them, and be for the host. Nothing else is trusted.
    method, path, headers
        The request; besides them the host and that the connection ends are sent, and nothing else.
    patience : float
        Seconds that each step may take: the name, each of at most four addresses, TLS, the answer.

    Raises
    ------
    Silence
        Why there is no answer.
    """
    host, port = address
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority)
    where = _resolve(host, port, patience)
    try:
        link = _secure(_connect(where, patience), context, host, patience)
    except ssl.SSLCertVerificationError as error:
        raise _not_accepted(error, where, patience) from error
    with link:
        shown = link.getpeercert(binary_form=True)
        assert shown is not None  # the context demands one
        certificate = x509.load_der_x509_certificate(shown)
        try:
            connection = http.client.HTTPConnection(host, port, timeout=patience)
            connection.sock, connection.auto_open = link, 0  # never another connection: that would not be TLS
            with _limited(link, patience):
                before = time.time()
                connection.putrequest(method, path, skip_accept_encoding=True)
                for name, value in {"Connection": "close", **headers}.items():
                    connection.putheader(name, value)
                connection.endheaders()
                response = connection.getresponse()
                after = time.time()
                content = response.read(MOST_BYTES)
        except (http.client.HTTPException, OSError, ValueError) as error:
            reason: Reason = "silent" if isinstance(error, TimeoutError) else "cut" if _is_cut(error) else "http"
            raise Silence(reason, type(error).__name__, certificate) from error
    ahead, within = _clock(before, after, _date(response.getheader("Date")))
    return Answer(certificate, response.status, content, ahead, within)


_Places = list[tuple[int, tuple[str, int]]]


def _resolve(host: str, port: int, patience: float) -> _Places:
    """Where a name leads to; looked up in a thread of its own, because the system's own limit is half a minute."""
    found: _Places = []
    faults: list[str] = []

    def look() -> None:
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend((family, place) for family, _, _, _, place in infos)  # type: ignore[misc]
        except (OSError, UnicodeError) as error:
            faults.append(getattr(error, "strerror", None) or type(error).__name__)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(patience)
    if not found:
        raise Silence("name", faults[0] if faults else "no name server answers")
    return found[:4]


def _connect(where: _Places, patience: float) -> socket.socket:
    """A connection to the first of some addresses that answers."""
    silence = Silence("network")
    for family, place in where:
        link = socket.socket(family, socket.SOCK_STREAM)
        link.settimeout(patience)
        try:
            link.connect(place)
        except TimeoutError:
            silence = Silence("slow")
        except ConnectionRefusedError:
            silence = Silence("refused")
        except OSError as error:
            silence = Silence("network", error.strerror or type(error).__name__)
        else:
            return link
        link.close()
    raise silence


def _secure(link: socket.socket, context: ssl.SSLContext, host: str | None, patience: float) -> ssl.SSLSocket:
    """TLS over a connection; closes the connection where it fails.

    Raises
    ------
    ssl.SSLCertVerificationError
        The server's certificate isn't accepted.
    Silence
    """
    try:
        secure = context.wrap_socket(link, server_hostname=host, do_handshake_on_connect=False)
    except (OSError, ValueError) as error:  # gone already, or a name that TLS can't carry
        link.close()
        raise Silence("cut" if _is_cut(error) else "tls", type(error).__name__) from error
    try:
        with _limited(secure, patience):
            secure.do_handshake()
    except ssl.SSLCertVerificationError:
        secure.close()
        raise
    except (OSError, ValueError) as error:
        secure.close()
        if isinstance(error, TimeoutError):
            raise Silence("silent") from error
        if _is_cut(error):
            raise Silence("cut") from error
        # what isn't TLS at all has no version, or a record that is too long or of no known kind
        words = (getattr(error, "reason", None) or type(error).__name__).replace("_", " ").lower()
        foreign = any(part in words for part in ("wrong version", "unknown protocol", "packet length", "record layer"))
        raise Silence("no-tls" if foreign else "tls", words) from error
    return secure


def _is_cut(error: Exception) -> bool:
    """Whether a fault on a connection is that it ended: as where a server ends between TCP, TLS and its answer."""
    if isinstance(error, ssl.SSLError):
        return isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    return isinstance(error, OSError | http.client.IncompleteRead)  # RemoteDisconnected is an OSError, too


def _not_accepted(error: ssl.SSLCertVerificationError, where: _Places, patience: float) -> Silence:
    """Why a certificate was not accepted; it is fetched once more to say what it is, and nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    shown: x509.Certificate | None = None
    with (
        contextlib.suppress(Silence, OSError, ValueError),
        _secure(_connect(where, patience), context, None, patience) as link,
    ):
        shown = x509.load_der_x509_certificate(link.getpeercert(binary_form=True) or b"")
    reason: Reason = next((reason for reason, codes in _FAULTS if error.verify_code in codes), "tls")
    return Silence(reason, error.verify_message, shown)


def _clock(before: float, after: float, there: datetime | None) -> tuple[float | None, float]:
    """How much the clock here is ahead of a date that was said between two moments of it, and how wrong that may be."""
    if there is None:
        return None, 0.0
    # a server says whole seconds, and may say them up to a second late: it was between 0 and 2 s after its date
    return (before + after) / 2 - (there.timestamp() + 1), 1 + (after - before) / 2


def _date(text: str | None) -> datetime | None:
    try:
        found = None if text is None else parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return found if found is None or found.tzinfo is not None else found.replace(tzinfo=UTC)


@contextlib.contextmanager
def _limited(link: ssl.SSLSocket, seconds: float) -> Iterator[None]:
    """End a connection after some seconds, however slowly its other side goes on; TimeoutError then."""
    over = threading.Event()

    def end() -> None:
        over.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(link, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
        ended = over.is_set()
    except (OSError, ValueError, http.client.HTTPException) as error:
        if over.is_set() or isinstance(error, TimeoutError):
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()
    if ended:  # what was read until then looks as if the other side had ended it
        raise TimeoutError
