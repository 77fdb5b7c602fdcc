"""Children of the supervisor: how they end, what they say, and the pipe to each of them."""

import logging
import os
import signal
import subprocess
import sys
import time
from queue import SimpleQueue

from supervised import LISTENING, READY, SECONDS

from fedhead.client.joining import supervisor
from fedhead.client.joining.process import Child, command_of
from fedhead.client.joining.supervisor import EXECUTOR, NODE

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
