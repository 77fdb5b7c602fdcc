"""One child of the supervisor: started with its settings on stdin, heard on stdout, ended with a limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

LONGEST_LINE: Final = 1 << 16  # bytes of an event


class Said(NamedTuple):
    """What a child said, or that it has ended (`event` is None)."""

    child: Child
    event: dict[str, Any] | None


class Child:
    """A process that runs a module of this package.

    Parameters
    ----------
    name : str
        `node` or `executor`.
    command : sequence of str
    settings : mapping
        The first line on its stdin; may hold secrets.
    environment : mapping
        Beside this process's own.
    heard : SimpleQueue
        Gets what the child says, and its end, from a thread.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        settings: Mapping[str, Any],
        environment: Mapping[str, str],
        heard: SimpleQueue[Said],
    ) -> None:
        self.name, self._heard = name, heard
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            start_new_session=True,  # a terminal's Ctrl-C is for the supervisor, which ends the children in order
        )
        self.say(settings)
        threading.Thread(target=self._listen, name=f"{name}-{self.process.pid}", daemon=True).start()

    def say(self, what: Mapping[str, Any]) -> None:
        """Write a line to its stdin; a child that is gone is noticed elsewhere."""
        assert self.process.stdin is not None
        with suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(what).encode() + b"\n")
            self.process.stdin.flush()

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when it has ended."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def end(self, number: signal.Signals, seconds: float, hurry: Callable[[], bool] = lambda: False) -> int:
        """End it by a signal, and by SIGKILL after a limit, or as soon as `hurry` says so.

        Returns
        -------
        status : int
            As `subprocess` counts it; negative for a signal.
        """
        self.send(number)
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and not hurry():
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(min(0.1, seconds))
        self.process.kill()
        return self.process.wait()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with suppress(OSError, ValueError):
            while line := self.process.stdout.readline(LONGEST_LINE):
                with suppress(ValueError):
                    event = json.loads(line)
                    if isinstance(event, dict) and isinstance(event.get("event"), str):
                        self._heard.put(Said(self, event))
        self.process.wait()
        self._heard.put(Said(self, None))


def command_of(name: str) -> tuple[str, ...]:
    """How a child is started: this Python, and nothing of the folder that join was started in."""
    return (sys.executable, "-P", "-m", f"fedhead.client.joining.{name}")
