"""How a session begins: with a server that is away, refuses, hangs or is another one; one line each, nothing left."""

import re
import threading
import time

import pytest

from fedhead.common.errors import FedheadError, InputError, RunError
from fedhead.server.submitting import session as module
from fedhead.server.submitting.lock import held
from fedhead.server.submitting.session import Away, LinkLost, Session, Stopped


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
