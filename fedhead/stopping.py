"""Ctrl-C and SIGTERM end a command like any other failure, so that a run cleans up behind itself; never in an import.

Code in C++ runs Python's imports too: PyTorch's first optimizer brings hundreds of modules. What is raised within them
may end the process with SIGABRT, come out as some other error, or not come out at all. A signal that comes then is
raised when the import is over.
"""

from __future__ import annotations

import _thread
import signal
import threading
import time
from contextlib import AbstractContextManager
from types import CodeType, FrameType
from typing import Final, NoReturn

from fedhead.common.errors import Terminated

LONGEST: Final = 30.0  # seconds that an import is waited for: a recipe's own module may never end
_PAUSE: Final = 0.02
_IMPORTS: Final = "<frozen importlib._bootstrap>"


class Stopping(AbstractContextManager["Stopping"]):
    """Handles both signals from here on, for a command that runs within the block; in the main thread.

    Parameters
    ----------
    command : code
        Of the function that runs the command: imports that lead up to it don't count.
    """

    def __init__(self, command: CodeType) -> None:
        self._command = command
        self._number = 0  # of the signal that waits
        self._until = 0.0
        self._lock, self._closed = threading.Lock(), False

    def __enter__(self) -> Stopping:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True

    def settle(self) -> None:
        """Raise what still waits: what the command did, or failed at, in between doesn't count.

        Raises
        ------
        Terminated, KeyboardInterrupt
        """
        if self._number:
            _end(self._number)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self._closed or not self._importing(frame) or (self._number and time.monotonic() >= self._until):
            _end(number)
        if not self._number:
            self._number, self._until = number, time.monotonic() + LONGEST
        # not a threading.Thread, whose start takes a lock that the code underneath may hold
        _thread.start_new_thread(self._again, (number,))

    def _again(self, number: int) -> None:
        time.sleep(_PAUSE)
        with self._lock:
            if not self._closed:
                signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _importing(self, frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code is not self._command:
            if frame.f_code.co_filename == _IMPORTS:
                return True
            frame = frame.f_back
        return False


def _end(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(143)
