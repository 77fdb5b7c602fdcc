"""How a session ends: told, refused, given up, or with a server that is gone."""

import os
import subprocess
import sys
import time

import pytest
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    SendTaskHeartbeatResponse,
)

from fedhead.common.errors import RunError
from fedhead.server.submitting import session as module
from fedhead.server.submitting.lock import SubmitLock, held
from fedhead.server.submitting.session import LinkLost, Session, Stopped

OUTPUT, BEAT = "/v1/runtime/push-task-output", "/v1/runtime/send-task-heartbeat"
NODES = "/v1/runtime/get-nodes"


def test_a_session_tells_how_it_ended(control, server_file):
    for outcome in ("completed", "failed", "stopped"):
        control.tasks = [5]
        with Session(server_file, "{}") as session:
            session.close(outcome)
            session.close("failed")  # says nothing more
    assert control.ended == ["completed", "failed", "stopped"]


@pytest.mark.parametrize(
    ("error", "told"), [(KeyboardInterrupt, "stopped"), (SystemExit, "stopped"), (ValueError, "failed")]
)
def test_an_exception_ends_it_as_what_it_is(control, server_file, error, told):
    with pytest.raises(error), Session(server_file, "{}"):
        raise error
    assert control.ended == [told]
    assert not held(server_file.submit_lock)


def test_tasks_of_other_runs_are_ended_as_failed(control, server_file):
    control.tasks = [1, 2, 5]
    with Session(server_file, "{}") as session:
        assert session.flower_run == 5
        assert control.ended == ["failed", "failed"]


def test_runs_whose_process_is_gone_are_stopped(control, server_file):
    control.others = {1: ("running", ""), 2: ("finished", "completed"), 3: ("pending", "")}
    with Session(server_file, "{}"):
        assert control.others == {
            1: ("finished", "stopped"), 2: ("finished", "completed"), 3: ("finished", "stopped"),
        }  # fmt: skip


def test_a_stopped_run_and_one_that_was_given_up_are_told_apart(control, link, server_file):
    link.answers[NODES] = 401
    with Session(server_file, "{}") as session:
        control.state = ("finished", "failed")
        with pytest.raises(LinkLost, match="given the run up"):
            session.grid.get_node_ids()
        control.state = ("finished", "stopped")
        with pytest.raises(Stopped):
            session.grid.get_node_ids()


def test_a_refused_heartbeat_ends_quietly(control, link, server_file, monkeypatch):
    link.answers[BEAT] = SendTaskHeartbeatResponse(success=False).SerializeToString()
    with Session(server_file, "{}") as session:
        session._pulse.join(20)
        assert not session._pulse.is_alive()
        assert link.asked(BEAT) == 1


def test_the_heartbeat_goes_on_while_the_server_is_away(control, link, server_file, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "_AGAIN_SECONDS", 0.1)
    with Session(server_file, "{}") as session:
        link.stop()
        time.sleep(0.5)
        before = link.asked(BEAT)
        link.start()
        end = time.monotonic() + 20
        while link.asked(BEAT) < before + 3 and time.monotonic() < end:
            time.sleep(0.05)
        assert link.asked(BEAT) >= before + 3
        assert session._pulse.is_alive()


def test_nodes_have_the_names_of_their_key_files(control, server_file):
    pems = server_file.public_pems()
    north = pems["north"].replace(b"\n", b"\r\n")  # the same key, written another way
    control.nodes = [
        NodeInfo(node_id=11, status="online", public_key=north, name="south"),
        NodeInfo(node_id=12, status="offline", public_key=pems["south"]),
        NodeInfo(node_id=13, status="online", public_key=b"no key"),
        NodeInfo(node_id=14, status="unregistered", public_key=pems["south"]),
    ]
    with Session(server_file, "{}") as session:
        assert [(one.node, one.name, one.online) for one in session.registered()] == [
            (11, "north", True), (12, "south", False),
        ]  # fmt: skip


def test_close_does_not_wait_for_a_server_that_is_gone(control, link, server_file):
    session = Session(server_file, "{}")
    link.stop()
    began = time.monotonic()
    session.close("completed")
    assert time.monotonic() - began < 6
    assert not held(server_file.submit_lock)


def test_close_does_not_wait_for_a_server_that_hangs(control, link, server_file):
    session = Session(server_file, "{}")
    link.answers[OUTPUT] = lambda _: time.sleep(20) or b""
    began = time.monotonic()
    session.close("completed")
    assert time.monotonic() - began < 7


def test_close_is_quiet_about_a_refusal(control, link, server_file):
    session = Session(server_file, "{}")
    link.answers[OUTPUT] = 401
    began = time.monotonic()
    session.close("completed")
    assert time.monotonic() - began < 5


def test_two_at_once_are_refused(control, server_file):
    with Session(server_file, "{}"), pytest.raises(RunError, match=rf"under way \(process {os.getpid()}\)"):
        Session(server_file, "{}")
    control.tasks = [5]
    Session(server_file, "{}").close("completed")


HOLD = """
import sys
from pathlib import Path
from fedhead.server.submitting.lock import SubmitLock
kept = SubmitLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_dies_with_its_process(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(RunError, match=f"process {process.pid}"):
                SubmitLock(tmp_path / "lock")
        finally:
            process.kill()  # as a crash: nothing is given back
        process.wait(60)
    SubmitLock(tmp_path / "lock").release()


def test_looking_at_the_lock_takes_nothing(tmp_path):
    assert not held(tmp_path / "lock")
    lock = SubmitLock(tmp_path / "lock")
    assert held(tmp_path / "lock")
    lock.release()
    lock.release()
    assert not held(tmp_path / "lock")
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
