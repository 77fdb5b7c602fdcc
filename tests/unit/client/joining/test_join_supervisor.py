"""The supervisor with children that are small scripts: order, secrets, restarts, waits, giving up, limits."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest

from fedhead.client.joining import retry, supervisor
from fedhead.client.joining.process import Child, command_of
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


@pytest.fixture
def bench(tmp_path):
    made = []

    def make(**settings):
        made.append(Bench(tmp_path, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_node_starts_when_the_executor_is_ready_and_both_know_one_secret(bench):
    found = bench(node=LISTENING + "; say('arrived')")
    found.until(lambda: len(found.found(EXECUTOR, "heard")) == 2)
    (executor,), (node,) = found.found(EXECUTOR, "started"), found.found(NODE, "started")
    secret = node[1]
    assert len(bytes.fromhex(secret)) == 32
    assert found.found(EXECUTOR, "heard") == [[{"node": "127.0.0.1:1234", "secret": secret}], [{}]]
    for _, _, arguments, environment in (executor, node):
        assert arguments == []
        assert "a-folder" in environment
        assert not any(secret in value for value in environment)
    assert found.figures.running == {NODE: True, EXECUTOR: True}
    found.supervisor.stop()
    assert found.ended() == 0
    order = [line for line in found.notes.read_text().splitlines() if "told to end" in line]
    assert [found.loads(line)[0] for line in order] == [NODE, EXECUTOR]
    assert found.figures.running == {NODE: False, EXECUTOR: False}
    assert "online" in found.figures.events


def test_nothing_starts_the_node_before_the_executor_is_ready(bench):
    found = bench(executor="pass")
    found.until(lambda: found.found(EXECUTOR, "started"))
    time.sleep(0.3)  # nothing may happen
    assert found.found(NODE, "started") == []
    found.supervisor.stop()
    assert found.ended() == 0


def test_a_process_that_cannot_be_started_is_tried_again(bench, monkeypatch, caplog):
    tries = []

    def child(*args):
        tries.append(args[0])
        if len(tries) <= 2:
            raise OSError(12, "Cannot allocate memory")
        return Child(*args)

    monkeypatch.setattr(supervisor, "Child", child)
    found = bench()
    found.until(lambda: found.found(EXECUTOR, "heard"))
    assert tries == [EXECUTOR, EXECUTOR, EXECUTOR, NODE]
    assert caplog.messages[:2] == ["the training process can't be started (Cannot allocate memory)"] * 2


def test_a_node_that_ends_comes_back_with_a_fresh_secret_and_the_executor_stays(bench):
    found = bench(node=f"{LISTENING}\nif number == 1: time.sleep(0.2); os._exit(7)")
    found.until(lambda: len(found.found(EXECUTOR, "heard")) == 2)
    first, second = (started[1] for started in found.found(NODE, "started"))
    assert first != second
    assert [heard["secret"] for (heard,) in found.found(EXECUTOR, "heard")] == [first, second]
    assert len(found.found(EXECUTOR, "started")) == 1
    assert found.figures.restarts == [NODE]


def test_when_the_executor_ends_the_node_does_too_and_both_come_back(bench):
    found = bench(executor=f"{READY}\nif number == 1: time.sleep(0.5); os.kill(os.getpid(), 9)")
    found.until(lambda: len(found.found(NODE, "started")) == 2)
    assert found.found(NODE, "told to end") == [[signal.SIGINT]]
    assert len(found.found(EXECUTOR, "started")) == 2
    assert sorted(found.figures.restarts) == [EXECUTOR, NODE]


def test_a_reply_that_nobody_took_starts_the_node_again_and_an_old_one_does_not(bench):
    code = f"""{READY}
while not [line for line in open(notes) if '"heard"' in line]: time.sleep(0.02)
say("stuck", node="127.0.0.1:9")
say("stuck", node="127.0.0.1:1234")"""
    found = bench(executor=code)
    found.until(lambda: len(found.found(NODE, "started")) == 2)
    found.until(lambda: len(found.found(EXECUTOR, "heard")) == 2)
    assert found.found(NODE, "told to end") == [[signal.SIGINT]]
    assert len(found.found(EXECUTOR, "started")) == 1


@pytest.mark.parametrize("why", list(retry.REMEDIES))
def test_what_no_waiting_mends_ends_with_a_remedy(bench, caplog, why):
    with caplog.at_level(logging.ERROR, "fedhead.client"):
        found = bench(node=f"say('fatal', why={why!r}); time.sleep(0.5); os._exit(1)")
        assert found.ended() == 1
    assert caplog.messages[-1] == f"localhost:1 can't be joined: {why}. {retry.REMEDIES[why]}"
    assert len(found.found(NODE, "started")) == 1


def test_an_executor_that_never_gets_ready_is_given_up(bench, caplog):
    with caplog.at_level(logging.ERROR, "fedhead.client"):
        found = bench(executor="os._exit(1)", first_wait=0.01)
        assert found.ended() == 1
    assert "ended 5 times before it was ready" in caplog.messages[-1]
    assert len(found.found(EXECUTOR, "started")) == 5
    assert found.found(NODE, "started") == []


DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)\n"


def test_a_child_that_does_not_listen_is_killed_at_its_limit(bench):
    found = bench(executor=DEAF + READY, node=DEAF + LISTENING, round_seconds=0.5, end_seconds=0.5)
    found.until(lambda: found.found(EXECUTOR, "heard"))
    started = time.monotonic()
    found.supervisor.stop()
    assert found.ended() == 0
    assert 1.0 <= time.monotonic() - started < 30
    assert found.found(NODE, "told to end") == []


def test_a_second_stop_does_not_wait(bench):
    found = bench(executor=DEAF + READY, node=DEAF + LISTENING, round_seconds=600.0, end_seconds=600.0)
    found.until(lambda: found.found(EXECUTOR, "heard"))
    found.supervisor.stop()
    time.sleep(0.2)
    assert found.thread.is_alive()
    found.supervisor.stop()
    assert found.ended() == 0


LAST = """
def leave(number, _):
    time.sleep(0.3)
    say("round", round=7, outcome="released", code=None, seconds=1.5)
    say("budget", domain="wards", spent=1.0, left=2.0)
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
say("ready")
"""


def test_what_the_executor_says_last_is_heard_before_the_end(bench, caplog):
    caplog.set_level(logging.INFO, "fedhead.client")
    found = bench(executor=LAST)
    found.until(lambda: "online" in found.figures.events)
    found.supervisor.stop()
    assert found.ended() == 0
    assert caplog.messages[-2:] == ["round 7 released after 1.50 s", "budget wards: epsilon 1.000 spent, 2.000 left"]
    assert found.figures.events[-2:] == ["round", "budget"]
    assert found.figures.running == {NODE: False, EXECUTOR: False}


def test_an_end_that_is_never_heard_is_waited_for_within_bounds(bench, monkeypatch):
    monkeypatch.setattr(supervisor, "LAST_SECONDS", 0.3)
    # a process of the executor's own holds its output open
    found = bench(
        executor="import subprocess; held = subprocess.Popen(['sleep', '20']); note('held', held.pid); " + READY
    )
    found.until(lambda: "online" in found.figures.events)
    started = time.monotonic()
    found.supervisor.stop()
    assert found.ended() == 0
    assert time.monotonic() - started < 10
    ((held,),) = found.found(EXECUTOR, "held")
    os.kill(held, signal.SIGKILL)


def test_lines_that_are_no_events_are_passed_over(bench):
    found = bench(executor="os.write(1, b'no json\\n[1]\\n{}\\n\\xff\\n' + b'x' * 200000 + b'\\n')\n" + READY)
    found.until(lambda: found.found(EXECUTOR, "heard"))
    found.supervisor.stop()
    assert found.ended() == 0


def test_waits_double_and_begin_anew_after_a_minute_of_good_work(monkeypatch):
    made = Supervisor({}, {}, {}, Figures())
    place = made._places[NODE]

    def wait(lived, good):
        place.child = SimpleNamespace(started=time.monotonic() - lived)
        place.good = good
        made._gone(NODE)
        return round(place.start - time.monotonic(), 1)

    assert [wait(1, True) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert wait(supervisor.GOOD_SECONDS - 1, True) == 30
    assert wait(supervisor.GOOD_SECONDS + 1, False) == 30  # it lived, and did nothing
    assert wait(supervisor.GOOD_SECONDS + 1, True) == 1
    assert wait(1, True) == 2


def test_events_are_lines_of_the_log_without_anything_else_of_theirs(caplog):
    with caplog.at_level(logging.INFO, "fedhead.client"):
        for event in (
            {"event": "round", "round": 7, "outcome": "released", "code": None, "seconds": 1.504, "more": "secret"},
            {"event": "round", "round": None, "outcome": "refused", "code": 1020, "seconds": 0.1},
            {"event": "budget", "domain": "wards", "spent": 1.0, "left": None},
            {"event": "unknown"},
        ):
            supervisor._tell(event)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO"]
    assert caplog.messages == [
        "round 7 released after 1.50 s", "a round refused: 1020 the round is over",
        "budget wards: epsilon 1.000 spent, - left",
    ]  # fmt: skip
    assert (caplog.records[0].round, caplog.records[1].code) == (7, 1020)
    assert not any(hasattr(record, "more") for record in caplog.records)


# ----------------------------------------------------------------------------------------------- the pipe to a child


def piped(code, tmp_path):
    script = "import json, os, time\nfrom fedhead.client.joining import pipe\n" + code
    heard = SimpleQueue()
    child = Child("node", (sys.executable, "-P", "-c", script), {"secret": "none"}, {}, heard)
    return child, heard


def test_a_child_ends_at_once_when_its_supervisor_is_gone(tmp_path):
    code = "pipe.begin(); pipe.follow(lambda _: None); pipe.emit('ready'); time.sleep(600)"
    child, heard = piped(code, tmp_path)
    try:
        assert heard.get(timeout=SECONDS).event == {"event": "ready"}
        child.process.stdin.close()
        assert child.process.wait(SECONDS) == 3
    finally:
        child.process.kill()


def test_a_child_without_settings_ends(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from fedhead.client.joining import pipe; pipe.begin(); print('on')"],
        stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, b"")


def test_what_is_printed_is_no_event(tmp_path, capfd):
    code = """
settings = pipe.begin()
print("printed", flush=True)
os.system("echo by a process of its own")
pipe.follow(lambda said: pipe.emit("heard", said=said))
pipe.emit("settings", secret=settings["secret"])
time.sleep(600)
"""
    child, heard = piped(code, tmp_path)
    try:
        assert heard.get(timeout=SECONDS).event == {"event": "settings", "secret": "none"}
        child.say({"node": "here"})
        assert heard.get(timeout=SECONDS).event == {"event": "heard", "said": {"node": "here"}}
        assert child.end(signal.SIGTERM, SECONDS) == -signal.SIGTERM
        assert heard.get(timeout=SECONDS).event is None
    finally:
        child.process.kill()
    assert "printed\nby a process of its own" in capfd.readouterr().err


def test_children_run_this_python_and_nothing_of_the_folder_they_start_in(tmp_path):
    (tmp_path / "fedhead").mkdir()
    (tmp_path / "fedhead" / "__init__.py").write_text("raise SystemExit(9)")
    assert command_of("executor")[0] == sys.executable
    done = subprocess.run(
        command_of("node"), stdin=subprocess.DEVNULL, cwd=tmp_path, check=False, timeout=SECONDS,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 3
