"""Sessions with a real `fedhead serve` and nodes over TLS: exchanges, crashes of the server, and every way to end."""

import importlib.util
import signal
import sqlite3
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict

from fedhead.common.errors import RunError
from fedhead.server.submitting.control import status_of, stop_run
from fedhead.server.submitting.session import LinkLost, Session, Stopped

pytestmark = pytest.mark.slow


def beside(name):
    """A module of this folder; pytest's import mode knows none but the tests."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


nodes = beside("scripted_nodes")
Node, until = nodes.ScriptedNode, nodes.until


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One server and two nodes for all tests here; a test that ends the server starts it again."""
    found = nodes.Served(tmp_path_factory.mktemp("session") / "link", ["north", "south"])
    try:
        found.start()
        found.node("north")
        found.node("south")
        yield found
    finally:
        found.close()


@pytest.fixture
def session(served):
    """A session with both nodes connected and answering at once."""
    for node in served.nodes:
        node.answer, node.losing = Node.reply, False
        node.received.clear()
    with Session(served.server, '{"training": {"rounds": 3}}') as found:
        until(lambda: [one.online for one in found.registered()] == [True, True], "both nodes are connected")
        yield found


def instructions(served, size=1000, ttl=120.0, times=1):
    array = np.random.default_rng().standard_normal(size).astype(np.float32)
    ids = [node.node.node_id for node in served.nodes] * times
    return [Message(RecordDict({"arrays": ArrayRecord([array])}), node, "train", ttl=ttl) for node in ids]


def good(replies):
    assert [str(reply.error) for reply in replies if reply.has_error()] == []
    return len(replies)


def test_an_exchange(served, session):
    assert [(one.name, one.online) for one in session.registered()] == [("north", True), ("south", True)]
    assert sorted(session.grid.get_node_ids()) == sorted(node.node.node_id for node in served.nodes)
    for losing in (False, True):  # answers to the uploads of a reply
        for node in served.nodes:
            node.losing = losing
        messages = instructions(served)
        replies = session.grid.send_and_receive(messages, timeout=90)
        assert good(replies) == 2
        assert [node.dropped for node in served.nodes] == [[], []]
        assert {reply.metadata.src_node_id for reply in replies} == {node.node.node_id for node in served.nodes}
    found = status_of(served.server)
    assert [(one["name"], one["online"]) for one in found["holders"]] == [("north", True), ("south", True)]
    assert (found["runs"][0]["flower_run"], found["runs"][0]["state"]) == (session.flower_run, "running")
    with pytest.raises(RunError, match="another run is under way"):
        Session(served.server, "{}")
    session.close("completed")
    assert status_of(served.server)["runs"][0]["state"] == "completed"


def test_twenty_messages_with_one_head_carry_it_once(served, session, monkeypatch):
    size, sent = 500_000, []
    whole = session.grid._client.PushObject

    def push(request):
        sent.append(len(request.object_content))
        return whole(request)

    monkeypatch.setattr(session.grid._client, "PushObject", push)
    assert len(session.grid.push_messages(instructions(served, size, times=10))) == 20
    assert 4 * size < sum(sent) < 4.05 * size


def test_messages_that_are_pushed_twice_are_delivered_once(served, session):
    messages = instructions(served)
    ids = session.grid.push_messages(messages)
    assert session.grid.push_messages(messages) == ids
    replies = []
    until(
        lambda: replies.extend(session.grid.pull_messages(set(ids) - answered(replies))) or len(replies) == 2,
        "both have answered",
    )
    assert good(replies) == 2
    assert [len(node.received) for node in served.nodes] == [1, 1]


def answered(replies):
    return {reply.metadata.reply_to_message_id for reply in replies}


@pytest.mark.parametrize("step", ["pushing", "delivered", "replied", "fetching"])
def test_an_exchange_outlives_a_crash_of_the_server(served, session, monkeypatch, step):
    """SIGKILL at one step of the exchange, and a start again; nobody else does anything."""
    now, client = threading.Event(), session.grid._client

    def at(name, method):
        whole = getattr(client, method)

        def wrapped(request):
            answer = whole(request)
            if step == name and (method != "PullObject" or answer.object_available):
                now.set()
            return answer

        monkeypatch.setattr(client, method, wrapped)

    at("pushing", "PushObject")
    at("fetching", "PullObject")

    def answer(node, message):
        if step == "delivered":
            now.set()
            until(lambda: restarted.is_set() or node.ended.is_set(), "the server is back")
        node.reply(message)
        if step == "replied":
            now.set()

    for node in served.nodes:
        node.answer = answer
    restarted, faults = threading.Event(), []

    def crash():
        try:
            assert now.wait(90)
            served.kill()
            served.start()
        except BaseException as error:
            faults.append(error)
        finally:
            restarted.set()

    thread = threading.Thread(target=crash, daemon=True)
    thread.start()
    replies = session.grid.send_and_receive(instructions(served, 200_000), timeout=110)
    thread.join(120)
    assert not faults
    assert good(replies) == 2


def test_a_reply_that_a_crash_took_is_asked_for_again(served, session, monkeypatch):
    """The server hands an envelope out and forgets it; here its answer is thrown away, as by a crash right then."""
    client, lost = session.grid._client, []
    whole = client.PullMessages

    def pull(request):
        answer = whole(request)
        if answer.messages_list and not lost:
            lost.extend(answer.messages_list)
            session.grid._waiting.failures += 1
            return type(answer)()
        return answer

    monkeypatch.setattr(client, "PullMessages", pull)
    replies = session.grid.send_and_receive(instructions(served), timeout=90)
    assert lost
    assert good(replies) == 2
    assert sum(len(node.received) for node in served.nodes) == 2 + len(lost)


def test_a_server_that_stays_away_ends_the_session_by_its_patience(served):
    try:
        with Session(served.server, "{}", patience=1.0) as session:
            served.kill()
            began = time.monotonic()
            with pytest.raises(LinkLost, match=r"Start \"fedhead serve\" again"):
                session.grid.send_and_receive(instructions(served), timeout=60)
            assert time.monotonic() - began < 15
            began = time.monotonic()
            session.close("failed")
            assert time.monotonic() - began < 6
    finally:
        served.start()


def test_the_timeout_is_kept_while_the_server_is_away(served, session):
    served.kill()
    try:
        began = time.monotonic()
        assert session.grid.send_and_receive(instructions(served), timeout=2.0) == []
        assert time.monotonic() - began < 15
    finally:
        served.start()
    assert good(session.grid.send_and_receive(instructions(served), timeout=90)) == 2


def test_a_run_that_is_stopped(served, session):
    for node in served.nodes:
        node.answer = Node.silent
    stopped = []
    timer = threading.Timer(1.0, lambda: stopped.append(stop_run(served.server)))
    timer.start()
    with pytest.raises(Stopped, match="was stopped"):
        session.grid.send_and_receive(instructions(served), timeout=90)
    timer.join(30)
    assert [found["stopped"] for found in stopped] == [[session.flower_run]]
    assert status_of(served.server)["runs"][0]["state"] == "stopped"
    with pytest.raises(RunError, match="no run is under way"):
        stop_run(served.server)


def test_a_run_that_the_server_has_given_up(served, session):
    """As after a minute without a heartbeat; here the clock of the task is turned back."""
    session._pulse.stop()
    session._pulse.join(30)
    with sqlite3.connect(served.server.link_database, timeout=60) as database:
        changed = database.execute("UPDATE task SET active_until = '2020-01-01 00:00:00' WHERE finished_at IS NULL")
        assert changed.rowcount == 1
    with pytest.raises(LinkLost, match="given the run up"):
        session.grid.send_and_receive(instructions(served), timeout=60)
    session.close("failed")
    end = time.monotonic() + 20
    while status_of(served.server)["runs"][0]["state"] != "failed":  # the server looks for such tasks once a second
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_signal_leaves_an_exchange_at_once(served, session):
    def interrupt(*_):
        raise KeyboardInterrupt

    for node in served.nodes:
        node.answer = Node.silent
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 3.0)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            session.grid.send_and_receive(instructions(served), timeout=90)
        assert time.monotonic() - began < 3.0 + 2.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    session.close("stopped")
    assert status_of(served.server)["runs"][0]["state"] == "stopped"


def test_a_node_that_answers_in_anothers_name_is_found_out(served, session):
    """Its envelope is honest, or the server refuses it; the objects it uploads say something else."""
    one, other = served.nodes

    def lie(node, message):
        false = node.made(message)
        false.metadata.__dict__["_src_node_id"] = other.node.node_id
        node.push(message, false, envelope=node.made(message))

    one.answer = lie
    replies = session.grid.send_and_receive(instructions(served), timeout=90)
    by_node = {reply.metadata.src_node_id: reply for reply in replies}
    assert by_node[one.node.node_id].error.reason == "the reply is not what its envelope says"
    assert by_node[other.node.node_id].has_content()


def test_an_upload_that_stops_half_way_holds_up_no_other(served, session):
    one, other = served.nodes
    one.answer = lambda node, message: node.push(message, node.made(message), most=1)
    replies = session.grid.send_and_receive(instructions(served), timeout=8.0)
    assert [reply.metadata.src_node_id for reply in replies] == [other.node.node_id]
