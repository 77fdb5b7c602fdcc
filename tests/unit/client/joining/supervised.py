"""A supervisor in a thread of a test, with children that are small scripts."""

import sys
import threading
import time
from pathlib import Path

from fedhead.client.joining.supervisor import EXECUTOR, NODE, Supervisor

SECONDS = 60.0
SCRIPT = """
import json, os, signal, sys, threading, time
settings = json.loads(sys.stdin.readline())
notes = settings["notes"]
def note(*what):
    with open(notes, "a") as file:
        file.write(json.dumps([settings["who"], *what]) + "\\n")
def say(event, **fields):
    os.write(1, json.dumps({"event": event, **fields}).encode() + b"\\n")
def follow():
    for line in sys.stdin:
        note("heard", json.loads(line))
    os._exit(3)
open(f"{notes}.{os.getpid()}", "w").close()
note("started", os.getpid(), settings.get("secret"), sys.argv[1:], sorted(os.environ.values()))
threading.Thread(target=follow, daemon=True).start()
def leave(number, _):
    note("told to end", number)
    os._exit(0)
signal.signal(signal.SIGTERM, leave); signal.signal(signal.SIGINT, leave)
number = sum(1 for line in open(notes) if json.loads(line)[:2] == [settings["who"], "started"])
exec(settings["code"])
while True:
    time.sleep(60)
"""
READY, LISTENING = "say('ready')", "say('listening', port=1234); say('online')"


class Figures:
    def __init__(self):
        self.events, self.restarts, self.running = [], [], {}

    def event(self, event):
        self.events.append(event["event"])

    def restarted(self, process):
        self.restarts.append(process)

    def up(self, process, running):
        self.running[process] = running


class Bench:
    """A supervisor in a thread of the test, and what its children noted."""

    def __init__(self, folder, executor=READY, node=LISTENING, **limits):
        import json

        self.loads, self.notes, self.figures = json.loads, folder / "notes", Figures()
        self.notes.touch()
        (folder / "child.py").write_text(SCRIPT)
        self.supervisor = Supervisor(
            commands={name: (sys.executable, str(folder / "child.py")) for name in (NODE, EXECUTOR)},
            settings={
                name: {"code": code, "who": name, "notes": str(self.notes)}
                for name, code in ((NODE, node), (EXECUTOR, executor))
            },
            environment={"FLWR_HOME": "a-folder"},
            figures=self.figures,
            server="localhost:1",
            **{"first_wait": 0.05, "round_seconds": 10.0, "end_seconds": 10.0, **limits},
        )
        self.status = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        self.status = self.supervisor.run()

    def found(self, who, what):
        notes = [self.loads(line) for line in self.notes.read_text().splitlines()]
        return [note[2:] for note in notes if note[:2] == [who, what]]

    def until(self, condition):
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, self.notes.read_text()
            time.sleep(0.02)

    def ended(self):
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        for path in self.notes.parent.glob("notes.*"):
            assert not Path(f"/proc/{path.suffix[1:]}").exists()
        return self.status

    def close(self):
        self.supervisor.stop()
        self.supervisor.stop()
        self.thread.join(SECONDS)
