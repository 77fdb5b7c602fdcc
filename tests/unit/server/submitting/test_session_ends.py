"""A session against a server that refuses, is gone, or is another one: one line each, and nothing left behind."""

import os
import re
import subprocess
import sys
import threading
import time

import pytest
from flwr.proto.control_pb2 import (
    ListNodesResponse,
    ListRunsResponse,
    StartRunResponse,
    StopRunRequest,
    StopRunResponse,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run, RunStatus
from flwr.proto.runtime_pb2 import (
    AcquireTaskResponse,
    GetNodesResponse,
    PullTaskInputResponse,
    PushTaskOutputRequest,
    PushTaskOutputResponse,
    SendTaskHeartbeatResponse,
)
from flwr.proto.task_pb2 import Task

from fedhead.common.errors import FedheadError, InputError, RunError
from fedhead.server.submitting import session as module
from fedhead.server.submitting.lock import SubmitLock, held
from fedhead.server.submitting.session import Away, LinkLost, Session, Stopped

OUTPUT, BEAT = "/v1/runtime/push-task-output", "/v1/runtime/send-task-heartbeat"
NODES = "/v1/runtime/get-nodes"


class FakeControl:
    """As much of Flower's server as a session needs: runs, and the task of ours."""

    def __init__(self, link):
        self.link = link
        self.state = ("running", "")
        self.others: dict[int, tuple[str, str]] = {}
        self.tasks = [5]  # runs whose tasks are offered, in turn
        self.ended: list[str] = []
        self.nodes: list[NodeInfo] = []
        link.answers.update(
            {
                "/v1/control/list-runs": self.list_runs,
                "/v1/control/list-nodes": lambda _: ListNodesResponse(nodes_info=self.nodes).SerializeToString(),
                "/v1/control/start-run": StartRunResponse(run_id=5).SerializeToString(),
                "/v1/control/stop-run": self.stop_run,
                "/v1/runtime/acquire-task": self.acquire,
                "/v1/runtime/pull-task-input": self.pull_input,
                OUTPUT: self.push_output,
                NODES: GetNodesResponse().SerializeToString(),
                BEAT: SendTaskHeartbeatResponse(success=True).SerializeToString(),
            }
        )

    def list_runs(self, _):
        runs = {5: self.state, **self.others}
        return ListRunsResponse(
            run_dict={
                number: Run(run_id=number, status=RunStatus(status=status, sub_status=sub, details=""))
                for number, (status, sub) in runs.items()
            }
        ).SerializeToString()

    def stop_run(self, body):
        number = StopRunRequest.FromString(body).run_id
        if number == 5:
            self.state = ("finished", "stopped")
        else:
            self.others[number] = ("finished", "stopped")
        return StopRunResponse(success=True).SerializeToString()

    def acquire(self, _):
        if not self.tasks:
            return AcquireTaskResponse().SerializeToString()
        return AcquireTaskResponse(task=Task(run_id=self.tasks.pop(0)), token="a" * 8).SerializeToString()

    def pull_input(self, _):
        return PullTaskInputResponse(task_id=9, run=Run(run_id=5)).SerializeToString()

    def push_output(self, body):
        self.ended.append(PushTaskOutputRequest.FromString(body).sub_status)
        return PushTaskOutputResponse().SerializeToString()


@pytest.fixture
def control(link, server_file):
    return FakeControl(link)


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


def one_line(error, kind):
    assert type(error) is kind or issubclass(type(error), kind)
    assert "\n" not in str(error)
    assert len(str(error)) < 300


def test_a_server_that_does_not_run(link, server_file):
    link.stop()
    with pytest.raises(RunError, match=r'Start it first: "fedhead serve SERVER.toml"') as caught:
        Session(server_file, "{}")
    one_line(caught.value, RunError)
    assert not held(server_file.submit_lock)


def test_a_server_that_was_seen_before_is_waited_for_from_the_start(control, link, server_file):
    link.stop()
    back = threading.Timer(0.7, link.start)
    back.start()
    try:
        with Session(server_file, "{}", seen=True) as session:
            assert session.flower_run == 5
    finally:
        back.join()


def test_a_server_that_was_seen_before_is_waited_for_by_the_sessions_patience(control, link, server_file):
    link.stop()
    began = time.monotonic()
    with pytest.raises(Away, match="gave no answer for 1 s"):
        Session(server_file, "{}", patience=1.0, seen=True)
    assert time.monotonic() - began >= 1
    assert not held(server_file.submit_lock)


@pytest.mark.parametrize("missing", ["token_file", "secret_file", "folder"])
def test_a_server_that_was_never_started(control, server_file, missing):
    path = getattr(server_file, missing)
    if missing == "folder":
        for one in path.iterdir():
            one.unlink()
        path.rmdir()
    else:
        path.unlink()
    with pytest.raises(RunError, match="Start it first"):
        Session(server_file, "{}")


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, b"g" * 64])
def test_a_token_that_is_none(control, server_file, content):
    server_file.token_file.write_bytes(content)
    with pytest.raises(InputError, match="holds no secret") as caught:
        Session(server_file, "{}")
    one_line(caught.value, InputError)


def test_a_token_that_others_can_read(control, server_file):
    server_file.token_file.chmod(0o644)
    with pytest.raises(InputError, match="mode 0644"):
        Session(server_file, "{}")


def test_a_token_of_another_server(control, link, server_file):
    link.answers["/v1/control/list-runs"] = 401
    with pytest.raises(InputError, match=re.escape(f'control is "{link.address}"')) as caught:
        Session(server_file, "{}")
    one_line(caught.value, InputError)
    assert "55555" not in str(caught.value)


def test_a_secret_of_another_server(control, link, server_file):
    link.answers["/v1/runtime/acquire-task"] = 401
    with pytest.raises(InputError, match=r"superexec\.secret") as caught:
        Session(server_file, "{}")
    one_line(caught.value, InputError)
    assert control.state == ("finished", "stopped")  # the run that was started is not left behind
    assert not held(server_file.submit_lock)


@pytest.mark.parametrize("answer", [404, b"<html>hello</html>"])
def test_another_program_at_the_address(link, server_file, answer):
    link.answers["/v1/control/list-runs"] = answer
    with pytest.raises(FedheadError) as caught:
        Session(server_file, "{}")
    one_line(caught.value, FedheadError)


def test_a_run_that_is_not_offered(control, server_file, monkeypatch):
    monkeypatch.setattr(module, "START_SECONDS", 0.5)
    control.tasks = []
    with pytest.raises(LinkLost, match="has not offered"):
        Session(server_file, "{}")
    assert control.state == ("finished", "stopped")


def test_a_run_that_is_stopped_before_it_is_offered(control, server_file):
    control.tasks = []
    control.state = ("finished", "stopped")
    began = time.monotonic()
    with pytest.raises(Stopped, match="was stopped"):
        Session(server_file, "{}")
    assert time.monotonic() - began < 30  # long before the server has had its time to offer it


@pytest.mark.parametrize(("state", "error", "words"), [
    (("running", ""), LinkLost, "in an answer that was lost"), (("finished", "stopped"), Stopped, "was stopped"),
])  # fmt: skip
def test_a_task_whose_handing_over_was_lost_is_begun_anew(control, link, server_file, state, error, words):
    """The server hands a task over once; asked again, it says 412 for ever."""
    answers = [503, 412]

    def pull(_):
        control.state = state
        return answers.pop(0)

    link.answers["/v1/runtime/pull-task-input"] = pull
    with pytest.raises(error, match=words) as caught:
        Session(server_file, "{}")
    assert type(caught.value) is error
    assert answers == []
    assert control.state == ("finished", "stopped")
    assert not held(server_file.submit_lock)
