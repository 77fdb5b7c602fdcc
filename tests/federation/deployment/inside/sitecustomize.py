"""Python imports this at the start of every process under test: it ends, stops or misleads the process on demand.

The test owns a folder, which FEDHEAD_UNDER_TEST names. A file `ROLE.POINT` there has the process of that role do what
the file says (`kill` or `stop`) when it comes to that failpoint, once: the file is renamed as it happens. A file
`ROLE.clock` holds seconds by which the clock of that process is wrong from its start. `executor.light` has the executor
do without PyTorch (light_executor.py). A holder starts its processes again after a second, however often they have
ended: how the waits grow is for tests of the supervisor alone.
"""

import builtins
import datetime
import os
import signal
import sys
import time
import types
from pathlib import Path

MODULES = {"fedhead.client.joining.executor": "executor", "fedhead.client.joining.node": "node"}


def role() -> str:
    """What this process is: serve, submit, join, executor, node, or nothing of ours."""
    given = sys.orig_argv
    if "-m" not in given:
        return ""
    module, *rest = given[given.index("-m") + 1 :]
    return rest[0] if module == "fedhead" and rest else MODULES.get(module, "")


def watch(folder: Path, mine: str) -> None:
    """Do what the folder says at each failpoint."""
    from fedhead.common import failpoints

    def hook(point: str) -> None:
        order = folder / f"{mine}.{point}"
        try:
            what = order.read_text()
            order.rename(order.with_name(order.name + ".done"))  # of several processes one has won
        except FileNotFoundError:
            return
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])

    failpoints._hook = hook
    if mine == "join":
        from fedhead.client.joining import supervisor

        supervisor.LONGEST_WAIT = supervisor.FIRST_WAIT


def shift(seconds: float) -> None:
    """Have the clock be wrong by so many seconds, for fedhead and Flower; pandas breaks with another datetime class."""
    right, real, find = time.time, datetime.datetime, builtins.__import__

    class Kind(type):
        def __instancecheck__(cls, one: object) -> bool:
            return isinstance(one, real)

    class Shifted(real, metaclass=Kind):
        @classmethod
        def now(cls, tz=None):
            return real.now(tz) + datetime.timedelta(seconds=seconds)

    shifted = types.ModuleType("datetime")
    shifted.__dict__.update({**vars(datetime), "datetime": Shifted})

    def found(name, globals=None, *rest, **named):
        importer = str((globals or {}).get("__name__", ""))
        if name == "datetime" and importer.startswith(("fedhead", "flwr")):
            return shifted
        return find(name, globals, *rest, **named)

    builtins.__import__ = found
    time.time = lambda: right() + seconds


_folder, _role = os.environ.get("FEDHEAD_UNDER_TEST"), role()
if _folder and _role:
    _clock = Path(_folder) / f"{_role}.clock"
    if _clock.exists():
        shift(float(_clock.read_text()))
    if _role == "executor" and (Path(_folder) / "executor.light").exists():
        import light_executor

        light_executor.install()
    else:
        watch(Path(_folder), _role)
