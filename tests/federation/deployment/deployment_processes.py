"""Commands of fedhead as processes of a test: each in a session of its own, found again by a mark, ended by its id."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).parent
PATIENCE = 180.0  # seconds for anything that takes a few on a machine with nothing else to do
Found = TypeVar("Found")


def until(condition: Callable[[], Found], seconds: float = PATIENCE, what: str = "") -> Found:
    """What `condition` gives as soon as it is true; the test fails when that takes longer than `seconds`."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:.0f} s: {what or condition}")
        time.sleep(0.05)
    return found


def _end_with_parent() -> None:
    """Have Linux end this process when the tests' own process is gone, however it ended (prctl, PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Process:
    """A command that runs.

    Parameters
    ----------
    arguments : list of str
        What follows `fedhead` on the command line.
    folder : Path
        Of the logs, and of what the process is told to do at failpoints (inside/sitecustomize.py).
    mark : str
        In the environment of the process and all that it starts.
    """

    def __init__(self, name: str, arguments: list[str], folder: Path, mark: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.folder, self.mark = name, folder, mark
        self.out, self.log = folder / f"{name}.out", folder / f"{name}.log"
        environment = {
            **os.environ, "FEDHEAD_UNDER_TEST": str(folder), "FEDHEAD_TEST_MARK": mark, "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE / "inside"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "FLWR_TELEMETRY_ENABLED": "0", "COLUMNS": "200",
        }  # fmt: skip
        with self.out.open("a") as out, self.log.open("a") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "fedhead", *arguments], stdout=out, stderr=log, stdin=subprocess.DEVNULL,
                env=environment, start_new_session=True, preexec_fn=_end_with_parent,  # noqa: PLW1509 (a single call, which takes no lock)
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def text(self) -> str:
        """All that it wrote, its children included."""
        return self.log.read_text(errors="replace") + self.out.read_text(errors="replace")

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit status."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} runs after {seconds:.0f} s:\n{self.text()[-3000:]}") from None

    def kill(self) -> None:
        """SIGKILL to this process alone; what it started is left to itself."""
        self.popen.kill()
        self.popen.wait(30)

    def terminate(self, seconds: float = PATIENCE) -> int:
        self.popen.send_signal(signal.SIGTERM)
        return self.wait(seconds)

    def child(self, module: str) -> int | None:
        """Id of the child that runs a module, such as `executor`."""
        return next((pid for pid in descendants(self.popen.pid) if f"joining.{module}" in command_of(pid)), None)


def command_of(pid: int) -> str:
    """The command line; empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """Ids of the processes that a process has started, and those that these have."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def marked(mark: str) -> Iterator[int]:
    """Ids of all processes with a mark of ours, orphans included."""
    wanted = f"FEDHEAD_TEST_MARK={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)


def end_all(mark: str) -> None:
    """End every process with a mark."""
    for _ in range(5):
        pids = list(marked(mark))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            return
        time.sleep(0.1)


def figures_at(port: int) -> dict[str, float]:
    """Name and labels of each figure -> its value; empty where nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }
