"""A real `fedhead serve`: its start, its end, what outlives a kill, and keys that come and go."""

import signal
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
)
from flwr.proto.message_pb2 import PullObjectRequest

from fedhead.server.keys.certificates import host_name, make_authority, make_server_certificate

BENCH = SimpleNamespace(**run_path(str(Path(__file__).with_name("serve_bench.py"))))


def pull(node):
    return node.client.PullMessages(PullMessagesRequest(node=node.node))


@pytest.fixture
def make(tmp_path):
    """Servers of a test's own."""
    made = []

    def one(**settings):
        made.append(BENCH.Serve(tmp_path / f"{len(made)}", **settings))
        return made[-1]

    yield one
    for server in made:
        server.close()


@pytest.mark.parametrize("index", [0, 1])
def test_a_port_that_is_taken_is_one_line(make, index):
    server = make()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", server.ports[index]))
        taken.listen()
        status, text = server.refused()
    assert status == 2
    assert f'{("address", "control")[index]} is "127.0.0.1:{server.ports[index]}": it can\'t be listened on' in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_it_ends_within_seconds_although_nodes_wait(make):
    server = make().start()
    node = server.node("north")
    node.activate()
    ended = []

    def wait():
        try:
            ended.append(pull(node))
        except httpx.TransportError:
            ended.append(None)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(1)  # long enough for the request to wait there; should it come later the server has gone
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(BENCH.PATIENCE) == 0
    assert time.monotonic() - start < 15
    thread.join(BENCH.PATIENCE)
    assert len(ended) == 1
    assert server.said("the server has ended") == 1
    assert server.said("Traceback") == 0


@pytest.mark.slow
def test_nodes_runs_and_messages_outlive_a_kill(make):
    server = make().start()
    node, run = server.node("north"), None
    number = node.activate()
    run = server.run()
    name = run.send(number)
    token = server.token
    server.kill()
    server.start()
    assert server.token == token
    assert server.said("registered") == 4  # twice at the first start, and once in each summary
    assert server.node("north").activate() == number
    assert pull(node).messages_list[0].metadata.message_id == name
    fetch = PullObjectRequest(node=node.node, run_id=run.id, object_id=name)
    assert node.client.PullObject(fetch).object_available
    assert run.answers(name) == []


@pytest.mark.slow
def test_sighup_takes_keys_in_and_out(make):
    server = make()
    BENCH.make_keys(server.folder / "keys", ["west"])
    server.start()
    north, west = server.node("north"), server.node("west")
    north.activate()
    assert BENCH.refusal(west.activate) == 401

    def hang_up(holders, text):
        server.list(holders)
        before = server.said(text)
        server.process.send_signal(signal.SIGHUP)
        BENCH.until(lambda: server.said(text) > before, text)

    hang_up(["north", "south", "west"], "keys and certificate were read again")
    west.activate()
    hang_up(["south", "west"], "keys and certificate were read again")
    assert BENCH.refusal(lambda: pull(north)) == 401
    hang_up(["north", "south", "west"], "data holder north: its key was taken away before")
    assert BENCH.refusal(north.activate) == 401
    hang_up(["nobody"], "nothing was taken in: holders[0]")
    west.activate()
    server.close()
    server.list(["north", "south", "west"])
    server.start()  # the key that was taken away doesn't keep the others out
    server.node("west").activate()
    assert server.said("Traceback") == 0


def test_a_certificate_that_has_ended_is_one_line(make):
    server, then = make(), datetime.now(UTC) - timedelta(days=3)
    keys = server.folder / "keys"
    authority_key = serialization.load_pem_private_key((keys / "ca.key").read_bytes(), None)
    server_key = serialization.load_pem_private_key((keys / "server.key").read_bytes(), None)
    authority = make_authority(authority_key, then, 1)
    ended = make_server_certificate(
        server_key.public_key(), [host_name("127.0.0.1")], authority, authority_key, then, 1
    )
    (keys / "server.crt").write_bytes(ended.public_bytes(serialization.Encoding.PEM))
    status, text = server.refused()
    assert status == 2
    assert "server.crt must be valid today, and it ended on" in text
    assert "Traceback" not in text
