"""The holders' own log in a simulation: `holders.log` in the run's folder, written only when there is something to say.

A deployed holder's log lies at the holder. Here one file stands for all of them: which images were skipped, and the
traceback of what failed at a holder. Its lines may show what only a holder may see, so none of it goes to the terminal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

FILE: Final = "holders.log"
LOGGERS: Final = ("fedhead.client", "fedhead.records")


class HoldersLog(logging.Handler):
    """Writes records to a file that is made, for its owner only, when the first one comes.

    Attributes
    ----------
    path : Path
    fault : BaseException or None
        The first exception that was logged: why a holder could not train.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self.path = path
        self.fault: BaseException | None = None
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Append one record."""
        if record.exc_info and self.fault is None:
            self.fault = record.exc_info[1]
        text = self.format(record)
        try:
            self.path.touch(mode=0o600)
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text + "\n")
        except OSError:  # a log that can't be written must not end the run, nor reach the terminal
            return


@contextmanager
def holders_log(folder: Path) -> Iterator[HoldersLog]:
    """Send what the holders log inside the block to `holders.log` in a folder, and nowhere else."""
    handler = HoldersLog(folder / FILE)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield handler
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
