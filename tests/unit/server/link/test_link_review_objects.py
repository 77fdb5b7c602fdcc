"""A data holder that announces objects with parts that they don't have: others send theirs all the same."""

from itertools import count
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedhead.server.link.flower import tree_of

BENCH = SimpleNamespace(**run_path(str(Path(__file__).with_name("link_bench.py"))))
NUMBERS = count(500)
BOGUS = "b" * 64


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return BENCH.make_state(tmp_path_factory.mktemp("objects"))


@pytest.fixture
def run(state):
    return BENCH.make_run(state)


@pytest.fixture
def two(state, run):
    """A message to each of two nodes."""
    return [BENCH.send(state, run, BENCH.make_node(state, next(NUMBERS))) for _ in range(2)]


def answer(message, text):
    content = {
        "metrics": MetricRecord({"num-examples": message.metadata.run_id % 10**9}),
        "release": ConfigRecord({"text": f"{text} {message.metadata.run_id}"}),
    }
    found = Message(RecordDict(content), reply_to=message)
    found.metadata.__dict__["_message_id"] = found.object_id
    return found


def lying(tree, names):
    """The tree with a part that doesn't exist below every object of these names."""
    children = [lying(child, names) for child in tree.children]
    if tree.object_id in names:
        children.append(ObjectTree(object_id=BOGUS))
    return ObjectTree(object_id=tree.object_id, children=children)


def announce(state, run, reply, tree=None):
    session = state.start_session(run)
    stored, missing = state.store_message_and_object_tree(reply, tree or get_object_tree(reply), session)
    assert stored
    return session, missing


def bring(state, run, reply, session, missing):
    objects = get_all_nested_objects(reply)
    for name in missing:
        if name in objects:
            assert state.store_object(run, session, name, objects[name].deflate())


def arrives(state, run, reply):
    """Whether the coordinator can fetch all of a reply."""
    tree, contents = tree_of(state, reply.object_id), {}

    def fetch(part):
        contents[part.object_id] = state.get_object(run, part.object_id)
        for child in part.children:
            fetch(child)

    fetch(tree)
    assert BOGUS not in contents
    assert all(contents.values())
    assert inflate_object_from_contents(reply.object_id, contents).content == reply.content


def shared(one, other):
    return set(get_all_nested_objects(one)) & set(get_all_nested_objects(other))


def test_what_is_announced_wrongly_before_does_not_hold_up_another(state, run, two):
    bad, good = (answer(message, text) for message, text in zip(two, "xy", strict=True))
    assert shared(bad, good)
    announce(state, run, bad, lying(get_object_tree(bad), shared(bad, good)))
    bring(state, run, good, *announce(state, run, good))
    arrives(state, run, good)


def test_nor_while_another_brings_it(state, run, two):
    bad, good = (answer(message, text) for message, text in zip(two, "xy", strict=True))
    session, missing = announce(state, run, good)
    announce(state, run, bad, lying(get_object_tree(bad), shared(bad, good)))
    bring(state, run, good, session, missing)
    arrives(state, run, good)


def test_nor_once_it_is_there(state, run, two):
    bad, good = (answer(message, text) for message, text in zip(two, "xy", strict=True))
    bring(state, run, good, *announce(state, run, good))
    with pytest.raises(ValueError, match="different children"):
        announce(state, run, bad, lying(get_object_tree(bad), shared(bad, good)))
    arrives(state, run, good)


def test_nor_what_the_coordinator_sends_next(state, run, two):
    """The settings of the next round are known before; here of a message to another node."""
    with patch.multiple(TaskIdentity, _run_id=run, _node_id=SUPERLINK_NODE_ID, _task_id=1):
        coming = Message(RecordDict({"config": ConfigRecord({"text": "next"})}), two[0].metadata.dst_node_id, "train")
    names = {name for name in get_all_nested_objects(coming) if name != coming.object_id}
    bad = answer(two[1], "x")
    tree = get_object_tree(bad)
    tree.children.extend(ObjectTree(object_id=name, children=[ObjectTree(object_id=BOGUS)]) for name in names)
    announce(state, run, bad, tree)
    sent = BENCH.send(state, run, two[0].metadata.dst_node_id, text="next")
    arrives(state, run, sent)


def test_objects_go_with_the_last_message_that_has_them(state, run, two):
    """Counts of who needs an object are right after a false announcement: it goes when nobody needs it."""
    bad, good = (answer(message, text) for message, text in zip(two, "xy", strict=True))
    announce(state, run, bad, lying(get_object_tree(bad), shared(bad, good)))
    bring(state, run, good, *announce(state, run, good))
    state.object_store.delete(bad.object_id)
    arrives(state, run, good)
    names = list(get_all_nested_objects(good))
    state.object_store.delete(good.object_id)
    assert not [name for name in names if name in state.object_store]
