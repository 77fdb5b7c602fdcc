"""The inner parts of Flower that join replaces: that they are there, and what stands in their place."""

import importlib.metadata
import inspect
import io
import os
import re
import signal
import subprocess
import sys
import zipfile

import httpx
import pytest
from flwr.common import config as flower_config
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.supercore.run import Run
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.runtime import run_clientapp

from fedhead.client.joining import flower
from fedhead.client.joining.guard import check_flower, environment
from fedhead.common.errors import RunError

REPLACED = {
    fleet_http_connection: (
        "make_simple_http_retry_invoker", "FleetHttpClient", "HeartbeatSender", "run_from_proto"
    ),
    start_client_internal: (
        "get_fused_config_from_fab", "pull_objects", "register_signal_handlers", "time", "_pull_and_store_message",
        "_push_messages",
    ),
}  # fmt: skip


def make_run(**fields):
    run = Run.create_empty(7)
    for name, value in fields.items():
        setattr(run, name, value)
    return run


def test_another_flower_is_refused_in_one_line(monkeypatch):
    check_flower()
    for version in ("1.40.9", "1.42.0", "2.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, version=version: version)
        with pytest.raises(RunError, match=rf"flwr {version} is installed: .* Run: pip install") as found:
            check_flower()
        assert "\n" not in str(found.value)


def test_the_parts_are_still_where_they_are_replaced():
    for module, names in REPLACED.items():
        for name in names:
            assert name in vars(module), f"{module.__name__}.{name} is gone: look at client/joining/flower.py again"
    node = inspect.getsource(start_client_internal)
    # what Loop.sleep stands in for
    assert node.count("time.sleep(3)") == 1
    assert node.count("time.sleep(0.5)") == 2
    assert set(re.findall(r"\btime\.\w+", node)) == {"time.sleep"}
    # all are called by name, with keywords, in the one loop
    for name in ("_pull_and_store_message", "_push_messages"):
        assert len(re.findall(rf"\b{name}\b", node)) == 2  # its definition and its one call
    parameters = inspect.signature(start_client_internal._push_messages).parameters
    assert {"object_store", "send", "push_object"} <= set(parameters)
    parameters = inspect.signature(start_client_internal._pull_and_store_message).parameters
    assert {"receive", "get_fab", "get_run"} <= set(parameters)
    assert "max_time" in inspect.signature(start_client_internal.pull_objects).parameters
    connection = inspect.getsource(fleet_http_connection.http_request_response)
    for use in ("make_simple_http_retry_invoker()", "FleetHttpClient.from_server_address(", "client.GetFab"):
        assert use in connection
    assert "HeartbeatSender(send_node_heartbeat)" in connection
    # nothing of these reads the bundle but the function that is replaced
    assert node.count("fab.content") == 2  # one of them where bundles are signed, which join doesn't ask for
    assert "get_message_processing_duration" in vars(type(NodeStateFactory(None or _stores()).state()))


def _stores():
    from flwr.supercore.object_store import ObjectStoreFactory

    return ObjectStoreFactory()


def test_the_executor_still_needs_what_tasks_does_of_flowers_client():
    source = inspect.getsource(run_clientapp.pull_task_input)
    assert 'message.metadata.__dict__["_message_id"] = object_tree.object_id' in source
    assert list(inspect.signature(run_clientapp.push_message).parameters) == ["client", "message", "context"]


def test_a_node_that_was_patched_has_every_part_in_place():
    """In a process of its own: the parts stay replaced."""
    code = """
from fedhead.client.joining import flower
from flwr.supernode import fleet_http_connection as connection, start_client_internal as node
loop = flower.Loop(lambda: None)
flower.install(lambda: "own retry", loop)
assert connection.make_simple_http_retry_invoker() == "own retry"
assert connection.FleetHttpClient is flower.Client and connection.HeartbeatSender is flower.Heartbeat
assert node.get_fused_config_from_fab is flower.own_config
assert node.time.sleep == loop.sleep
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "fine\n", done.stderr


def hostile_bundles():
    bomb, package = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("pyproject.toml", b"\0" * (1 << 26))
    with zipfile.ZipFile(package, "w") as file:
        file.writestr("pyproject.toml", '[tool.flwr.app.config]\nrecipe = "of the bundle"\nother = 1\n')
        file.writestr("fedhead/__init__.py", "raise SystemExit(9)")
    return [bomb.getvalue(), package.getvalue(), b"no zip", b"", None]


@pytest.mark.parametrize("bundle", hostile_bundles())
def test_a_bundle_is_never_opened(bundle, monkeypatch):
    def opened(*_):
        raise AssertionError("a bundle was opened")

    monkeypatch.setattr(zipfile, "ZipFile", opened)
    monkeypatch.setattr(flower_config, "get_fab_config", opened)
    assert flower.own_config(bundle, make_run(override_config={"recipe": "{}"})) == {"recipe": "{}"}
    assert flower.own_config(bundle, make_run(override_config={})) == {}


@pytest.mark.parametrize("recipe", [1, True, 0.5, b"{}", None, "x" * (flower.LONGEST_RECIPE + 1)])
def test_of_a_run_only_a_text_named_recipe_counts(recipe):
    assert flower.own_config(b"", make_run(override_config={"recipe": recipe, "holder": "/etc"})) == {}


def test_a_run_has_no_bundle_and_is_for_the_warm_executor():
    sent = make_run(
        fab_hash="ab" * 32, primary_task_type="flwr-agentapp", override_config={"recipe": "{}", "cache": "x"}
    )
    run = flower.own_run(lambda proto: proto, sent)
    client = flower.Client("https://localhost:1", verify=False)
    fab = client.GetFab(GetFabRequest(hash_str=run.fab_hash)).fab  # asks nobody
    state = NodeStateFactory(objectstore_factory=_stores()).state()
    state.store_fab(fab)
    assert fab.content == b""
    assert state.get_fab(run.fab_hash).content == b""  # what the node gives its executor
    assert run.override_config == {"recipe": "{}"}
    assert run.primary_task_type == "flwr-serverapp"


def test_the_client_follows_no_redirect_and_takes_no_answer_without_bounds():
    client = flower.Client("https://localhost:1", verify=False)
    assert client._client.follow_redirects is False
    sizes = {
        "0": True,
        "1000": True,
        str(flower.LARGEST_ANSWER): True,
        str(flower.LARGEST_ANSWER + 1): False,
        "": False,
    }
    for length, good in {**sizes, "-1": False, "1e3": False, "²": False}.items():
        answer = httpx.Response(200, headers=[(b"content-length", length.encode())])
        if good:
            flower.check_answer(answer)
        else:
            with pytest.raises(ValueError, match="too long, or of no stated length"):
                flower.check_answer(answer)
    with pytest.raises(ValueError, match="compressed"):
        flower.check_answer(httpx.Response(200, headers={"content-length": "3", "content-encoding": "gzip"}))


def test_answers_are_looked_at_before_they_are_read():
    read = []

    def body():
        read.append(1)
        yield b"x"

    def answer(_):
        return httpx.Response(200, headers={"content-length": str(1 << 40)}, content=body())

    client = flower.Client("https://localhost:1", verify=False)
    asking = httpx.Client(transport=httpx.MockTransport(answer), event_hooks=client._client.event_hooks)
    with asking, pytest.raises(ValueError, match="too long"):
        asking.post("https://localhost:1/")
    assert read == []


def test_a_heartbeat_outlives_unexpected_answers(monkeypatch):
    request = httpx.Request("POST", "https://localhost:1/v1/fleet/send-node-heartbeat")
    error = httpx.HTTPStatusError("", request=request, response=httpx.Response(500, request=request))
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    for raised in (error, httpx.ReadTimeout(""), ValueError("no protobuf")):

        def failing(raised=raised):
            raise raised

        assert flower.Heartbeat(failing).heartbeat_fn() is False
    assert killed == []

    def unknown():
        raise RuntimeError("not recognized")

    assert flower.Heartbeat(unknown).heartbeat_fn() is False
    assert killed == [(os.getpid(), signal.SIGINT)]
    assert flower.Heartbeat(lambda: True).heartbeat_fn() is True


def test_a_node_ends_after_the_reply_to_the_message_under_way():
    calls = []
    loop = flower.Loop(lambda: calls.append("arrived"))

    def original(receive):
        return 7 if receive() is not None else None

    assert loop.pull(original, receive=lambda: None) is None
    assert loop.pull(original, receive=lambda: "message") == 7
    assert calls == ["arrived"]
    loop.interrupt(signal.SIGTERM, None)  # a message is under way
    loop.push(lambda **_: calls.append("pushed"), object_store={}, send=None, push_object=None)
    with pytest.raises(SystemExit):
        loop.pull(original, receive=lambda: calls.append("asked again"))
    assert calls == ["arrived", "pushed"]


@pytest.mark.parametrize("first", [(), (signal.SIGTERM,)])
def test_a_node_ends_at_once_without_a_message_or_at_a_second_signal(first):
    loop = flower.Loop(lambda: None)
    if first:
        loop.pull(lambda receive: receive(), receive=lambda: 7)
        loop.interrupt(*first, None)
    with pytest.raises(SystemExit):
        loop.interrupt(signal.SIGTERM, None)


def test_interrupt_by_sigint_does_not_wait_for_the_reply():
    loop = flower.Loop(lambda: None)
    loop.pull(lambda receive: receive(), receive=lambda: 7)
    with pytest.raises(SystemExit):
        loop.interrupt(signal.SIGINT, None)


def test_a_node_waits_only_where_the_server_did_not(monkeypatch):
    slept, now = [], [0.0]
    monkeypatch.setattr(flower.time, "sleep", slept.append)
    monkeypatch.setattr(flower.time, "monotonic", lambda: now[0])
    loop = flower.Loop(lambda: None)

    def held():
        now[0] += 20

    loop.pull(lambda receive: receive(), receive=lambda: None)
    loop.sleep(3)
    assert slept == [3]
    loop.pull(lambda receive: receive(), receive=held)
    loop.sleep(3)
    assert slept == [3]
    loop.sleep(0.5)
    assert slept == [3, 0.05]


def test_flower_keeps_its_files_in_the_storage_folder_closed_to_others(tmp_path):
    found = environment(tmp_path / "state")
    assert found["FLWR_HOME"] == str(tmp_path / "state" / "flower")
    assert (tmp_path / "state" / "flower").stat().st_mode & 0o777 == 0o700
    assert (found["FLWR_TELEMETRY_ENABLED"], found["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
