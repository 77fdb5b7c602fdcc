"""What becomes of messages that a node lost, and what a node may fetch, confirm and answer."""

import time
from itertools import count
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest

from fedhead.server.link.flower import Open, open_messages, tree_of
from fedhead.server.link.post import Post, objects_of

BENCH = SimpleNamespace(**run_path(str(Path(__file__).with_name("link_bench.py"))))


NUMBERS = count(1)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return BENCH.make_state(tmp_path_factory.mktemp("link"))


@pytest.fixture
def run(state):
    return BENCH.make_run(state)


@pytest.fixture
def nodes(state):
    return BENCH.make_node(state, next(NUMBERS)), BENCH.make_node(state, next(NUMBERS))


def pull(state, node):
    """What the node is given, as ids."""
    return [message.metadata.message_id for message in state.get_message_ins(node, limit=1)]


def replies(state, run, *messages):
    found = state.get_message_res({message.metadata.message_id for message in messages}, run)
    return {message.metadata.reply_to_message_id: message for message in found}


def test_only_what_was_delivered_and_not_answered_is_open(state, run, nodes):
    waiting, delivered, answered = (BENCH.send(state, run, nodes[0], text=text) for text in "abc")
    BENCH.send(state, run, nodes[1])
    for message in (delivered, answered):
        with state.session() as session:
            model = session.get(_model(), _row(session, message.metadata.message_id))
            model.delivered_at = "2026-01-01T00:00:00+00:00"
    BENCH.reply(state, run, answered)
    assert [item.id for item in open_messages(state, nodes[0])] == [delivered.metadata.message_id]
    assert open_messages(state, nodes[1]) == []
    assert pull(state, nodes[0]) == [waiting.metadata.message_id]


def _model():
    from flwr.supercore.state.schema.linkstate_models import MessageIns

    return MessageIns


def _row(session, message_id):
    from sqlalchemy import inspect, select

    model = _model()
    key = inspect(model).primary_key[0]
    return session.scalar(select(getattr(model, key.name)).where(model.message_id == message_id))


def test_a_message_whose_delivery_was_cut_is_delivered_again_three_times(state, run, nodes):
    message, post = BENCH.send(state, run, nodes[0]), Post(state, 100)
    for _ in range(3):
        post.settle(nodes[0])
        assert pull(state, nodes[0]) == [message.metadata.message_id]
        assert replies(state, run, message) == {}
    post.settle(nodes[0])
    assert pull(state, nodes[0]) == []
    assert replies(state, run, message)[message.metadata.message_id].error.code == 5


def test_a_message_that_a_node_had_in_full_is_answered_in_its_place(state, run, nodes):
    message, other, post = BENCH.send(state, run, nodes[0]), BENCH.send(state, run, nodes[1]), Post(state, 100)
    assert pull(state, nodes[0])
    assert pull(state, nodes[1])
    state.object_store.delete(message.metadata.message_id)  # the node has confirmed it
    assert open_messages(state, nodes[0])[0].received
    post.settle(nodes[0])
    assert open_messages(state, nodes[0]) == []
    found = replies(state, run, message, other)
    assert list(found) == [message.metadata.message_id]
    error = found[message.metadata.message_id]
    assert (error.error.code, error.error.reason) == (5, "the node was restarted")
    assert error.metadata.src_node_id == nodes[0]
    assert tree_of(state, error.metadata.message_id) is not None  # the coordinator fetches it as any other answer


def test_a_late_answer_changes_nothing(state, run, nodes):
    message, post = BENCH.send(state, run, nodes[0]), Post(state, 100)
    pull(state, nodes[0])
    state.object_store.delete(message.metadata.message_id)
    post.settle(nodes[0])
    with pytest.raises(AssertionError):
        BENCH.reply(state, run, message)
    assert replies(state, run, message)[message.metadata.message_id].has_error()


def test_nothing_is_open_after_the_deadline(state, run, nodes):
    message = BENCH.send(state, run, nodes[0], ttl=0.5)
    pull(state, nodes[0])
    end = time.time() + 30
    while open_messages(state, nodes[0]) and time.time() < end:
        time.sleep(0.05)
    assert time.time() < end
    Post(state, 100).settle(nodes[0])
    assert pull(state, nodes[0]) == []
    assert replies(state, run, message)[message.metadata.message_id].error.code == 3


def test_a_node_may_fetch_what_it_was_sent_and_nothing_else(state, run, nodes):
    mine, other = BENCH.send(state, run, nodes[0], text="a"), BENCH.send(state, run, nodes[1], text="b")
    pull(state, nodes[0])
    pull(state, nodes[1])
    post, later = Post(state, 100), Post(state, 100)
    trees = {message: tree_of(state, message.metadata.message_id) for message in (mine, other)}
    own = set(objects_of(trees[mine])) - set(objects_of(trees[other]))
    foreign = set(objects_of(trees[other])) - set(objects_of(trees[mine]))
    assert own
    assert foreign
    post.delivered(nodes[0], [trees[mine]])
    for process in (post, later):  # the second one was started after the delivery
        assert all(process.may_fetch(nodes[0], name) for name in own)
        assert not any(process.may_fetch(nodes[0], name) for name in foreign)
        assert not process.may_fetch(nodes[0], "")


def test_an_answer_must_be_the_nodes_own_to_a_message_for_it(state, run, nodes):
    message, post = BENCH.send(state, run, nodes[0]), Post(state, 100)
    name = message.metadata.message_id

    def answer(source, to):
        return SimpleNamespace(src_node_id=source, reply_to_message_id=to)

    assert post.may_answer(nodes[0], answer(nodes[0], name))
    assert not post.may_answer(nodes[1], answer(nodes[0], name))  # says that it is somebody else
    assert not post.may_answer(nodes[1], answer(nodes[1], name))  # answers what was for somebody else
    assert not post.may_answer(nodes[0], answer(nodes[0], ""))  # no answer, but a message of its own
    assert post.may_answer(nodes[0], answer(nodes[0], "0" * 64))  # to nothing: Flower drops it


def test_an_answer_has_a_largest_size_in_all(state, run, nodes):
    post = Post(state, 100)
    (node, other), a, b, c = nodes, "a" * 64, "b" * 64, "c" * 64
    first, second = (BENCH.send(state, run, node, text=text).metadata.message_id for text in "12")
    post.answered(node, first)
    assert post.may_bring(node, a, 60)
    assert not post.may_bring(node, b, 41)
    assert post.may_bring(node, a, 60)  # brought again after a cut
    assert post.may_bring(node, b, 40)
    assert post.may_bring(other, a, 100)
    for message in (first, "0" * 64):  # said again, or of no message
        post.answered(node, message)
        assert not post.may_bring(node, c, 1)
    post.answered(node, second)
    assert post.may_bring(node, c, 100)
    post.answered(node, first)
    assert not post.may_bring(node, c, 1)


def test_an_open_message_shows_its_id(state, run, nodes):
    message = BENCH.send(state, run, nodes[0])
    assert Open(message, False).id == message.metadata.message_id
