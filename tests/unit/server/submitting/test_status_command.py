"""What `fedhead status` and `fedhead stop` say: of a server that answers, that doesn't, of a run that broke off."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from flwr.proto.control_pb2 import ListNodesResponse, ListRunsResponse, StopRunRequest, StopRunResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run, RunStatus

from fedhead.common.errors import InputError, RunError
from fedhead.server.submitting.control import show_status, status_of, stop_run
from fedhead.server.submitting.lock import SubmitLock

LIST_RUNS, LIST_NODES, STOP = "/v1/control/list-runs", "/v1/control/list-nodes", "/v1/control/stop-run"


def runs(*rows):
    return ListRunsResponse(
        run_dict={
            number: Run(
                run_id=number, pending_at=f"2026-01-0{number}T00:00:00+00:00",
                status=RunStatus(status=status, sub_status=sub),
            )
            for number, status, sub in rows
        }
    ).SerializeToString()  # fmt: skip


@pytest.fixture
def answering(link, server_file):
    pems, now = server_file.public_pems(), time.time()
    nodes = [
        NodeInfo(node_id=11, status="online", public_key=pems["north"], online_until=now + 50, heartbeat_interval=30),
        NodeInfo(
            node_id=12, status="offline", public_key=pems["south"], last_deactivated_at="2026-01-01T00:00:00+00:00"
        ),
    ]
    link.answers[LIST_NODES] = ListNodesResponse(nodes_info=nodes).SerializeToString()
    link.answers[LIST_RUNS] = runs((1, "finished", "completed"), (2, "running", ""))
    return server_file


def write_run(server, **changes):
    found = {
        "schema": 1, "name": "wards", "run": "r", "flower_run": 2, "out": "/srv/runs/wards", "pid": os.getpid(),
        "state": "running", "round": 12, "rounds": 60, "holders": ["north", "south"], "least_holders": 2,
        "updated": time.time() - 3, "metrics": {"accuracy": 0.91234, "loss": 0.31},
    }  # fmt: skip
    server.run_file.write_text(json.dumps(found | changes))


def test_what_is_known_of_a_server(answering):
    write_run(answering)
    lock = SubmitLock(answering.submit_lock)
    try:
        found = status_of(answering)
    finally:
        lock.release()
    assert found["server"] == answering.address
    assert found["reachable"] is True
    north, south = found["holders"]
    assert (north["name"], north["online"]) == ("north", True)
    assert 0 < time.time() - north["last_seen"] < 60
    assert south == {"name": "south", "online": False, "last_seen": 1767225600.0}
    assert [(run["flower_run"], run["state"]) for run in found["runs"]] == [(2, "running"), (1, "completed")]
    assert found["run"]["state"] == "running"
    assert found["run"]["round"] == 12
    json.dumps(found)


def test_a_run_whose_process_is_gone_is_broken_off(answering):
    write_run(answering)
    assert status_of(answering)["run"]["state"] == "broken off"


@pytest.mark.parametrize("state", ["finished", "failed", "stopped"])
def test_a_run_that_has_ended_keeps_its_state(answering, state):
    write_run(answering, state=state)
    assert status_of(answering)["run"]["state"] == state


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 2}', "[" * 100_000])
def test_a_run_file_that_can_not_be_read_is_none(answering, text):
    answering.run_file.write_text(text)
    assert status_of(answering)["run"] is None


@pytest.mark.parametrize("gone", ["server", "token", "folder"])
def test_a_server_that_is_away(answering, link, gone):
    if gone == "server":
        link.stop()
    elif gone == "token":
        answering.token_file.unlink()
    else:
        for path in answering.folder.iterdir():
            path.unlink()
        answering.folder.rmdir()
    found = status_of(answering)
    assert found["reachable"] is False
    assert [holder["online"] for holder in found["holders"]] == [False, False]
    with pytest.raises(RunError, match="Start it first"):
        stop_run(answering)


def test_a_server_that_hangs_is_away_soon(answering, link, monkeypatch):
    import fedhead.server.submitting.control as module

    monkeypatch.setattr(module, "_SECONDS", 0.5)
    link.answers[LIST_NODES] = lambda _: time.sleep(20) or b""
    began = time.monotonic()
    assert status_of(answering)["reachable"] is False
    assert time.monotonic() - began < 5


def test_a_token_of_another_server_is_said(answering, link):
    link.answers[LIST_NODES] = link.answers[LIST_RUNS] = 401
    for command in (status_of, stop_run):
        with pytest.raises(InputError, match="doesn't take the token"):
            command(answering)


def test_stop_ends_what_is_open(answering, link):
    stopped = []

    def stop(body):
        stopped.append(StopRunRequest.FromString(body).run_id)
        return StopRunResponse(success=True).SerializeToString()

    link.answers[STOP] = stop
    assert stop_run(answering) == {"stopped": [2], "process": None}
    assert stopped == [2]


SUBMIT = """
import sys
from pathlib import Path
from fedhead.server.submitting.lock import SubmitLock
lock = SubmitLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def submitting(answering, link):
    """Another process that has the lock, as `submit` has it from its first second on; Flower knows of no run."""
    link.answers[LIST_RUNS] = runs((1, "finished", "completed"))
    process = subprocess.Popen(
        [sys.executable, "-c", SUBMIT, answering.submit_lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_stop_ends_a_run_that_is_being_prepared(answering, submitting):
    with pytest.raises(RunError, match="no run is under way"):  # it hasn't said that it is one
        stop_run(answering)
    write_run(answering, state="running", round=60)
    with pytest.raises(RunError, match="writes its results"):
        stop_run(answering)
    assert submitting.poll() is None
    write_run(answering, state="waiting", round=0)
    assert stop_run(answering) == {"stopped": [], "process": submitting.pid}
    assert submitting.wait(60) == -signal.SIGTERM
    with pytest.raises(RunError, match="no run is under way"):
        stop_run(answering)


@pytest.mark.parametrize("flower_run", [None, 1])
def test_stop_ends_a_run_that_is_prepared_while_the_server_lists_one_that_was_killed(
    answering, link, submitting, flower_run
):
    """For a minute after `submit` was killed its run is open at the server; `submit --resume` prepares meanwhile."""
    link.answers[LIST_RUNS] = runs((2, "running", ""))
    link.answers[STOP] = StopRunResponse(success=True).SerializeToString()
    write_run(answering, state="waiting", round=3, flower_run=flower_run)
    assert stop_run(answering) == {"stopped": [2], "process": submitting.pid}
    assert submitting.wait(60) == -signal.SIGTERM


def test_stop_sends_no_signal_where_the_server_stops_the_run(answering, link, submitting):
    link.answers[LIST_RUNS] = runs((2, "running", ""))
    link.answers[STOP] = StopRunResponse(success=True).SerializeToString()
    write_run(answering, state="running", round=3, flower_run=2)
    assert stop_run(answering) == {"stopped": [2], "process": None}
    assert submitting.poll() is None


def test_a_run_that_writes_its_results_is_not_stopped_at_the_server_either(answering, link, submitting):
    link.answers[LIST_RUNS] = runs((2, "running", ""))
    link.answers[STOP] = lambda _: pytest.fail("it was stopped")
    write_run(answering, state="running", round=60, flower_run=2)
    with pytest.raises(RunError, match="writes its results"):
        stop_run(answering)
    assert link.asked(STOP) == 0


def test_stop_ends_no_other_process(answering, submitting):
    """The number in the lock's file may be one of another container: here it is this process, which hasn't the lock."""
    write_run(answering, state="waiting", round=0)
    answering.submit_lock.write_text(f"{os.getpid()}\n")
    with pytest.raises(RunError, match="can't be seen from here"):
        stop_run(answering)


def test_there_may_be_nothing_to_stop(answering, link):
    link.answers[LIST_RUNS] = runs((1, "finished", "completed"))
    with pytest.raises(RunError, match="no run is under way"):
        stop_run(answering)


def test_a_run_that_ends_before_it_is_stopped_is_nothing_to_stop(answering, link):
    def stop(_):
        link.answers[LIST_RUNS] = runs((2, "finished", "completed"))
        return 412

    link.answers[STOP] = stop
    with pytest.raises(RunError, match="no run is under way"):
        stop_run(answering)


@pytest.fixture
def screen(capsys, monkeypatch):
    def shown(found, columns="80"):
        monkeypatch.setenv("COLUMNS", columns)
        show_status(found)
        return capsys.readouterr().out

    return shown


def test_the_screen_of_a_run(answering, screen):
    write_run(answering)
    lock = SubmitLock(answering.submit_lock)
    try:
        out = screen(status_of(answering))
    finally:
        lock.release()
    for text in ("wards", "running", "round 12 of 60", "north, south", "accuracy 0.9123", "/srv/runs/wards", "s ago"):
        assert text in out
    assert "connected" in out
    assert "away" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_screen_says_what_to_do(answering, link, screen):
    write_run(answering)
    assert "--resume" in screen(status_of(answering))
    link.stop()
    out = screen(status_of(answering))
    assert "fedhead serve SERVER.toml" in out
    assert "unknown" in out
    answering.run_file.unlink()
    assert "no run yet" in screen(status_of(answering))


def test_the_screen_survives_an_odd_run_file(answering, screen):
    write_run(answering, updated="?", holders=None, metrics={"a": None, "[red]": "[bold]"}, name="[green]x")
    out = screen(status_of(answering))
    assert "[green]x" in out
    assert "[red] [bold]" in out


def test_the_screen_where_only_ascii_can_be_shown(answering, tmp_path):
    found = status_of(answering)
    code = (
        "import json, sys; from fedhead.server.submitting.control import show_status; show_status(json.load(sys.stdin))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(found).encode(), capture_output=True, env=environment,
        timeout=120, check=True,
    )  # fmt: skip
    text = done.stdout.decode("ascii")
    assert "connected" in text
    assert max(map(len, text.splitlines())) <= 80


def test_asking_imports_no_torch():
    """Status is for a glance; PyTorch alone takes seconds."""
    code = "import sys, fedhead.server.submitting.control; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=True)
    assert done.stdout.strip() == b"False"
