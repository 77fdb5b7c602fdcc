"""Keys become nodes, and nodes whose key was taken away are gone for good."""

import logging
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
from flwr.supercore.date import now
from flwr.supercore.state.schema.linkstate_models import Node
from flwr.supercore.utils import uint64_to_int64
from sqlalchemy import update

from fedhead.server.link.nodes import await_heartbeats, registrations
from fedhead.server.link.registry import Registry

BENCH = SimpleNamespace(**run_path(str(Path(__file__).with_name("link_bench.py"))))
A, B, C = (BENCH.pem(number) for number in (1, 2, 3))


@pytest.fixture
def state(tmp_path):
    return BENCH.make_state(tmp_path)


def test_new_keys_are_registered_once(state):
    first = Registry(state)
    first.update({"north": A, "south": B})
    assert set(first.nodes) == {A, B}
    assert sorted(first.names.values()) == ["north", "south"]
    again = Registry(state)  # the server was restarted
    again.update({"north": A, "south": B})
    assert (again.nodes, again.names) == (first.nodes, first.names)
    assert len(registrations(state)) == 2


def test_a_key_that_is_added_and_one_that_is_taken_away(state):
    registry = Registry(state)
    registry.update({"north": A, "south": B})
    kept = registry.nodes[A]
    registry.update({"north": A, "west": C})
    assert set(registry.nodes) == {A, C}
    assert registry.nodes[A] == kept
    assert state.get_node_id_by_public_key(B) is None
    assert {found.key: found.deleted for found in registrations(state)} == {A: False, B: True, C: False}


def test_a_key_that_comes_back_is_one_line_with_the_remedy(state, caplog):
    registry = Registry(state)
    registry.update({"north": A, "south": B})
    registry.update({"north": A})
    with caplog.at_level(logging.ERROR, "fedhead"):
        registry.update({"north": A, "south": B})
    (record,) = caplog.records
    assert record.getMessage().startswith("data holder south: its key was taken away before")
    assert "Ask for a new key" in record.getMessage()
    assert (set(registry.nodes), list(registry.names.values())) == ({A}, ["north"])


def test_a_holder_that_is_renamed_keeps_its_node(state):
    registry = Registry(state)
    registry.update({"north": A})
    node = registry.nodes[A]
    registry.update({"st-mary": A})
    assert registry.names == {node: "st-mary"}


def test_who_is_connected(state):
    registry = Registry(state)
    registry.update({"north": A, "south": B})
    assert registry.online() == (0, 2)
    state.activate_node(registry.nodes[A], 30)
    assert registry.online() == (1, 2)


def test_who_comes_and_goes_is_told_once_by_name(state, caplog):
    registry = Registry(state)
    registry.update({"north": A, "south": B})

    def told():
        caplog.clear()
        with caplog.at_level(logging.INFO, "fedhead"):
            registry.tell()
        return [(one.levelname, one.getMessage()) for one in caplog.records]

    assert told() == []
    for key in (B, A):
        state.activate_node(registry.nodes[key], 30)
    assert told() == [("INFO", "data holder north: connected"), ("INFO", "data holder south: connected")]
    assert told() == []
    state.deactivate_node(registry.nodes[B])
    assert told() == [("WARNING", "data holder south: gone")]
    registry.update({"north": A})  # south's key is taken away; nothing more is said of it
    assert told() == []
    registry.update({})
    assert told() == []


def test_a_key_that_was_taken_away_is_refused_also_where_the_database_fails(state, monkeypatch):
    registry = Registry(state)
    registry.update({"north": A, "south": B})

    def broken(**_):
        raise OSError("disk")

    monkeypatch.setattr(state, "get_node_info", broken)
    with pytest.raises(OSError, match="disk"):
        registry.update({"north": A})
    assert set(registry.nodes) == {A}


def heard(state, node, seconds):
    """Have the state take a node for connected until so many seconds from now, whatever it said."""
    with state.session() as session:
        known = update(Node).where(Node.node_id == uint64_to_int64(node))
        session.execute(known.values(online_until=now().timestamp() + seconds))


def online(state):
    return {found.node for found in registrations(state) if found.online}


def test_after_a_restart_who_was_connected_has_time_for_a_heartbeat(state):
    nodes = {seconds: BENCH.make_node(state, number) for number, seconds in enumerate((50, 5, -20, -59, -300), 1)}
    left, new = BENCH.make_node(state, 8), BENCH.nodes.create_node(state, BENCH.pem(9))
    for seconds, node in nodes.items():
        heard(state, node, seconds)
    assert state.deactivate_node(left)  # in order, before the server ended
    await_heartbeats(state)
    assert online(state) == {nodes[seconds] for seconds in (50, 5, -20, -59)}
    until = {info.node_id: info.online_until for info in state.get_node_info()}
    assert all(58 < until[node] - now().timestamp() <= 60 for node in online(state))
    assert new not in online(state)


@pytest.mark.parametrize("arrived", [True, False])
def test_a_reply_is_not_lost_because_the_server_was_away(state, arrived):
    """Nobody could send a heartbeat meanwhile."""
    node = BENCH.make_node(state, 1)
    run = BENCH.make_run(state)
    message = BENCH.send(state, run, node)
    name = message.metadata.message_id
    if arrived:
        BENCH.reply(state, run, message)
    heard(state, node, -1)
    await_heartbeats(state)
    found = state.get_message_res({name}, run)
    assert [reply.has_error() for reply in found] == ([False] if arrived else [])
