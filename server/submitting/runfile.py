"""What a run under way says of itself in the link's folder: for `fedhead status` and the metrics of `fedhead serve`."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from fedhead.common.writing import write_aside
from fedhead.server.submitting.session import Stopped

State = Literal["waiting", "running", "finished", "failed", "stopped"]


class RunFile:
    """The file run.json of one run; as a context manager it also says how the run ended.

    Parameters
    ----------
    path : Path
    name : str
        Of the recipe.
    out : Path
        Folder of the results.
    rounds : int
        Of the whole run.
    least : int
        Fewest holders.
    """

    def __init__(self, path: Path, name: str, out: Path, rounds: int, least: int) -> None:
        self.path, self.rounds = path, rounds
        self._said: dict[str, Any] = {
            "schema": 1, "name": name, "run": None, "flower_run": None, "out": str(out.absolute()), "pid": os.getpid(),
            "state": "waiting", "round": 0, "rounds": rounds, "holders": [], "least_holders": least, "updated": 0.0,
            "metrics": None,
        }  # fmt: skip

    @property
    def begun(self) -> bool:
        """Whether the run has told of itself, which it does from its first checkpoint on."""
        return self._said["run"] is not None

    def tell(
        self,
        state: State,
        number: int,
        holders: Sequence[str],
        metrics: Mapping[str, float],
        run: str,
        flower_run: int,
    ) -> None:
        """Replace the file: how the run stands after a round.

        Parameters
        ----------
        number : int
            Rounds that are finished.
        holders : sequence of str
            Names of those who are there.
        metrics : mapping
            The last that were measured; empty before the first.
        run : str
            Identifier of the run in the ledgers.
        flower_run : int
            Flower's own.
        """
        self._said |= {
            "state": state, "round": number, "holders": list(holders), "metrics": dict(metrics) or None, "run": run,
            "flower_run": flower_run,
        }  # fmt: skip
        self._write()

    def __enter__(self) -> RunFile:
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = isinstance(error, Stopped | KeyboardInterrupt | SystemExit)
        self._said["state"] = "finished" if error is None else "stopped" if stopped else "failed"
        self._write()

    def _write(self) -> None:
        self._said["updated"] = time.time()
        with contextlib.suppress(OSError):  # it is only shown; a full disk must not end the run here
            write_aside(self.path, json.dumps(self._said).encode())
