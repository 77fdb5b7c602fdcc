"""What went wrong in a run, in one line that says what to do; the details stay in the holders' log."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from fedhead.common.config import RunConfig
from fedhead.common.errors import ConfigError, FedheadError, RunError, Terminated
from fedhead.simulations.logs import HoldersLog


@contextmanager
def plainly(config: RunConfig, log: HoldersLog) -> Iterator[None]:
    """Turn what fails inside the block into errors that a user can act on.

    Raises
    ------
    ConfigError
        When code of the user's own (`module:`) raised: names the setting, the exception's type and the line, never
        the exception's text, which may show a record.
    FedheadError
        What a holder met, when that is what stopped the run.
    RunError
        When files can't be written, or memory is short.
    """
    try:
        yield
    except RunError as error:
        if log.fault is None:
            raise
        if isinstance(log.fault, FedheadError):
            raise log.fault from error
        own = _own_code(log.fault, config)
        if own is not None:
            raise own from log.fault
        raise RunError(f"{error} See {log.path}.") from log.fault
    except (FedheadError, Terminated):
        raise
    except (Exception, SystemExit) as error:
        own = _own_code(error, config)
        if own is not None:
            raise own from error
        if isinstance(error, MemoryError):
            raise RunError(
                "the memory is not enough for this run. Lower model.features.batch_size or training.chunk."
            ) from error
        if isinstance(error, OSError) and error.strerror:
            where = f"{error.filename}: " if error.filename else ""
            raise RunError(
                f"{where}{error.strerror}. Free some space or correct the permissions, or choose other folders with "
                "--out and --state."
            ) from error
        raise


def _own_code(error: BaseException, config: RunConfig) -> ConfigError | None:
    """The error for the innermost frame that belongs to a module named in the recipe; None when there is none."""
    settings = {
        "task.kind": config.task.kind,
        "model.backbone": config.model.backbone,
        "model.head.kind": config.model.head.kind,
        "holders.partition.kind": config.holders.partition.kind,
    }
    modules = {
        reference.split(":")[1]: (setting, reference)
        for setting, reference in settings.items()
        if reference.startswith("module:")
    }
    frames = reversed(list(traceback.walk_tb(error.__traceback__)))
    for frame, line in frames:
        name = frame.f_globals.get("__name__", "")
        if name in modules:
            # Several settings may name one module: the one whose function is in the trace is meant.
            named = {found.f_code.co_name for found, _ in traceback.walk_tb(error.__traceback__)}
            setting, reference = next(
                (pair for pair in settings.items() if pair[1].endswith(tuple(f":{one}" for one in named))),
                modules[name],
            )
            return ConfigError(
                [
                    f'{setting} is "{reference}": it raised {type(error).__name__} in line {line} of '
                    f"{frame.f_code.co_filename}. Correct it; FEDHEAD_DEBUG=1 shows the details."
                ]
            )
    return None
