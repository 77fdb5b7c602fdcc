"""The child's end of the pipes to its supervisor: settings in, events out, and an end with the supervisor's.

Down (stdin), JSON lines: first the settings, among them secrets, which so are neither on disk nor among arguments or in
the environment; then whatever the supervisor has to say. Up (stdout), JSON lines: events. When stdin closes, the
supervisor is gone, even by SIGKILL, and the child ends at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

ORPHANED: Final = 3
"""Exit status of a child whose supervisor is gone."""

_events_lock = threading.Lock()
_events = -1


def begin() -> dict[str, Any]:
    """Take stdout for events alone, set the log up, and read the settings.

    What anything prints goes to stderr from now on.
    """
    global _events
    _events = os.dup(1)
    os.set_inheritable(_events, False)
    os.dup2(2, 1)
    line = sys.stdin.buffer.readline()
    if not line:
        os._exit(ORPHANED)
    settings: dict[str, Any] = json.loads(line)
    from fedhead.common.operations.logs import set_up_logs

    set_up_logs("client", as_json=bool(settings.get("json_logs")), level=logging.INFO)
    return settings


def follow(heard: Callable[[dict[str, Any]], None]) -> None:
    """Hear what the supervisor says, in a thread of its own, until stdin closes; then the process ends at once."""

    def listen() -> None:
        with suppress(Exception):  # whatever is wrong with the pipe, its other end is of no use any more
            for line in sys.stdin.buffer:
                heard(json.loads(line))
        os._exit(ORPHANED)

    threading.Thread(target=listen, name="supervisor", daemon=True).start()


def emit(event: str, **fields: Any) -> None:
    """Tell the supervisor what happened; from any thread."""
    line = json.dumps({"event": event, **fields}).encode() + b"\n"
    with _events_lock, suppress(OSError):  # a supervisor that is gone is noticed by stdin
        os.write(_events, line)
