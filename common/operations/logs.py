"""The log of a server or a data holder: lines for people, or one JSON object a line for a collector.

Everything that a process logs leaves through one handler, so a line of a library looks like one of ours. What came from
outside may be part of a message: characters that could move a terminal's cursor, turn the direction of text or begin a
second line are written as escapes, and lines of a traceback are marked, so that nobody can forge a record.

A log stays with its side. Tracebacks are part of it, and may quote what only that side may see.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

Side = Literal["server", "client"]

LONGEST_MESSAGE: Final = 8192  # characters; a peer that sends a large text must not fill a disk by it
LONGEST_EXCEPTION: Final = 65536  # characters, from the end: there a traceback says what happened

QUIET: Final = ("flwr", "uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
"""Loggers that bring handlers of their own: only their warnings and errors are wanted, in this log's form."""

# Every control character, line and paragraph separator, and what changes the direction of text (Unicode TR 36, 2.4).
_UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_SECRETS: Final = (
    (re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.S), "***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 ***"),
    (
        re.compile(r"""(?i)(\b[\w-]*(?:token|secret|password|passwd|signature)\b["']?\s*[:=]\s*["']?)[\w.~+/=-]{12,}"""),
        r"\1***",
    ),
    (re.compile(r"(\b[a-z][\w+.-]*://)[^\s/@]+@"), r"\1***@"),
)  # fmt: skip
_SECRET_FIELD: Final = re.compile(r"(?i)token|secret|passw|authorization|signature|private|credential")

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_OWN: Final = ("time", "side", "level", "logger", "message", "exception")


def set_up_logs(side: Side, *, as_json: bool, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send all that this process logs to one stream, in one form.

    Parameters
    ----------
    side : str
        ``server`` or ``client``; a field of each JSON object, for whoever collects both.
    as_json : bool
        One JSON object a line: ``time`` (ISO 8601, UTC, milliseconds), ``side``, ``level``, ``logger``, ``message``,
        ``exception`` when there is a traceback, and the fields given as ``extra``. Otherwise text: time, level and
        message.
    level : int
        From which level on fedhead's own records are written. Libraries' ones are from WARNING on.
    stream : text stream, optional
        None: stderr, as it is at the time of each record.

    Notes
    -----
    Guarantee: a record is one line of text, or one JSON object on one line; only a traceback has further lines, each
    beginning with spaces and a bar. No logging call raises, whatever the record or the stream is like. Bearer tokens,
    private keys, passwords in addresses, and fields that are called a token, secret, password or signature are blotted
    out; that is a net, not a licence to log one. A second call replaces the first.
    """
    handler = LogHandler(stream)
    handler.setFormatter(JsonLines(side) if as_json else TextLines())
    root = logging.getLogger()
    for other in root.handlers[:]:
        plain = type(other) is logging.StreamHandler and other.stream in (sys.stderr, sys.stdout)
        if isinstance(other, LogHandler) or plain:  # a library's basicConfig would write each record twice
            root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(max(level, logging.WARNING))
    logging.getLogger("fedhead").setLevel(level)
    for name in QUIET:
        logger = logging.getLogger(name)
        for old in logger.filters[:]:
            if isinstance(old, _Diverted):
                logger.removeFilter(old)
        logger.addFilter(_Diverted(handler))


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes lines to a stream, and gives up on a record rather than raise or print anything else.

    Parameters
    ----------
    stream : text stream, optional
        None: stderr, looked up for each record.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(sys.stderr if stream is None else stream)
        self._follows = stream is None

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if self._follows:
            self.stream = sys.stderr
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: a full disk or a closed pipe must not end a round, nor spoil lines of JSON."""


class _Diverted(logging.Filter):
    """Takes a library's records away from its own handlers, which may be added later than this."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._handler = handler

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            self._handler.handle(record)
        return False


class TextLines(logging.Formatter):
    """``2026-11-22T10:00:00Z INFO message field=value``; lines of a traceback follow, each marked.

    Numbers are rounded, and what is None is left out: JSON has all of it. The message of a record with a field
    ``event`` says all that people need; its fields are for programs, and only in JSON.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One record as text."""
        time = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        given = {} if hasattr(record, "event") else _fields(record)
        fields = "".join(f" {safe(name)}={safe(_short(value))}" for name, value in given.items() if value is not None)
        text = f"{time} {record.levelname} {safe(_message(record))}{fields}"
        exception = _exception(record)
        return text + "".join(f"\n    | {safe(line)}" for line in (exception or "").splitlines())


class JsonLines(logging.Formatter):
    """One JSON object a line, in ASCII.

    Parameters
    ----------
    side : str
        ``server`` or ``client``.
    """

    def __init__(self, side: Side) -> None:
        super().__init__()
        self._side = side

    def format(self, record: logging.LogRecord) -> str:
        """One record as JSON."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        found: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "side": self._side,
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        exception = _exception(record)
        if exception is not None:
            found["exception"] = exception
        found.update((name, value) for name, value in _fields(record).items() if name not in _OWN)
        return json.dumps(found, ensure_ascii=True, allow_nan=False)


def safe(text: str) -> str:
    """Text with every character escaped that could forge a line, move a cursor or turn the reading direction."""
    return _UNSAFE.sub(_escaped, text)


def without_secrets(text: str) -> str:
    """Text with what looks like a token, a password or a private key blotted out."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def _message(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except Exception:  # arguments that don't fit the text: say what there is, a log must not raise
        text = str(record.msg)
    return _cut(without_secrets(text))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}... ({len(text)} characters)"


def _exception(record: logging.LogRecord) -> str | None:
    if not record.exc_info or record.exc_info[0] is None:
        return without_secrets(record.exc_text) if record.exc_text else None
    text = without_secrets(logging.Formatter().formatException(record.exc_info))
    return text if len(text) <= LONGEST_EXCEPTION else "... " + text[-LONGEST_EXCEPTION:]


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as `extra`: plain values as they are, anything else as text."""
    return {
        name: "***" if _SECRET_FIELD.search(name) else _plain(value)
        for name, value in vars(record).items()
        if name not in _STANDARD
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    try:
        text = str(value)
    except Exception:  # a value's own __str__ may fail, and a log line must not
        text = f"<{type(value).__name__}>"
    return _cut(without_secrets(text))
