"""The grid against a server that loses answers, holds objects back, and passes on what a node made up."""

import threading
import time

import numpy as np
import pytest
from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run

from fedhead.common.errors import RunError
from fedhead.server.submitting import flower
from fedhead.server.submitting import grid as module
from fedhead.server.submitting.grid import DeployedGrid
from fedhead.server.submitting.waiting import LinkLost, Stopped, TimeUp, Waiting

RUN = 7
PUSH, PULL = "/v1/runtime/push-messages", "/v1/runtime/pull-messages"
PUSH_OBJECT, PULL_OBJECT = "/v1/runtime/push-object", "/v1/runtime/pull-object"
CONFIRM = "/v1/runtime/confirm-message-received"


class FakeRuntime:
    """Stores messages and objects as Flower's server does, and answers each message as told."""

    def __init__(self, link):
        self.link = link
        self.stored: dict[str, bytes] = {}
        self.messages: dict[str, Message] = {}
        self.replies: dict[str, tuple] = {}
        self.held: set[str] = set()  # objects of replies that are not uploaded yet
        self.replies_of: dict[int, set[str]] = {}  # node -> objects of its last reply
        self.refused_pushes = 0
        self.answer = self.plain
        link.answers.update(
            {PUSH: self.push, PUSH_OBJECT: self.push_object, PULL: self.pull, PULL_OBJECT: self.pull_object}
        )
        link.answers[CONFIRM] = ConfirmMessageReceivedResponse().SerializeToString()

    def push(self, body):
        request = PushAppMessagesRequest.FromString(body)
        wanted, ids = {}, []
        for proto, tree in zip(request.messages_list, request.message_object_trees, strict=True):
            names = flower.object_ids(tree)
            wanted |= {name: None for name in names if name not in self.stored}
            message = message_from_proto(proto)
            if message.metadata.message_id not in self.messages:
                self.messages[message.metadata.message_id] = message
                self.answer(message)
            ids.append(message.metadata.message_id)
        return PushAppMessagesResponse(message_ids=ids, objects_to_push=wanted, session_id="s").SerializeToString()

    def push_object(self, body):
        request = PushObjectRequest.FromString(body)
        if self.refused_pushes:
            self.refused_pushes -= 1
            return PushObjectResponse(stored=False).SerializeToString()
        self.stored[request.object_id] = request.object_content
        return PushObjectResponse(stored=True).SerializeToString()

    def plain(self, message):
        self.reply(message, made(message))

    def reply(self, message, reply, envelope=None):
        proto = message_to_proto(remove_content_from_message(envelope or reply))
        proto.metadata.message_id = reply.object_id
        for name, part in get_all_nested_objects(reply).items():
            self.stored[name] = part.deflate()
        self.replies_of[message.metadata.dst_node_id] = set(get_all_nested_objects(reply))
        self.replies[message.metadata.message_id] = (proto, get_object_tree(reply))

    def pull(self, body):
        asked = PullAppMessagesRequest.FromString(body).message_ids
        found = [self.replies.pop(name) for name in asked if name in self.replies]
        return PullAppMessagesResponse(
            messages_list=[proto for proto, _ in found], message_object_trees=[tree for _, tree in found]
        ).SerializeToString()

    def pull_object(self, body):
        name = PullObjectRequest.FromString(body).object_id
        here = name in self.stored
        there = here and name not in self.held
        return PullObjectResponse(
            object_found=here, object_available=there, object_content=self.stored[name] if there else b""
        ).SerializeToString()


def made(message, size=8):
    array = np.random.default_rng().standard_normal(size).astype(np.float32)
    return Message(RecordDict({"arrays": ArrayRecord([array])}), reply_to=message)


@pytest.fixture
def runtime(link):
    return FakeRuntime(link)


@pytest.fixture
def grid(link):
    flower.enter(3, RUN, flower.SUPERLINK_NODE_ID)
    waiting = Waiting(20.0, lambda: Stopped("stopped"), lambda: LinkLost("lost"))
    found = DeployedGrid(flower.runtime(link.address, "token", waiting), waiting, 1)
    found.set_run(Run.create_empty(RUN))
    yield found
    waiting.leave()


def instructions(count=2, size=8, ttl=60.0):
    array = np.arange(size, dtype=np.float32)
    return [
        Message(RecordDict({"arrays": ArrayRecord([array])}), node, "train", ttl=ttl) for node in range(11, 11 + count)
    ]


def test_every_message_is_answered(grid, runtime):
    replies = grid.send_and_receive(instructions(3), timeout=20)
    assert sorted(reply.metadata.src_node_id for reply in replies) == [11, 12, 13]
    assert all(reply.has_content() for reply in replies)
    assert runtime.link.asked(CONFIRM) == 3


def test_messages_that_expire_while_the_server_is_away_are_given_up(grid, link):
    """It answers 500 to an expired message, for ever: that is not the server being away."""
    link.answers[PUSH] = 500
    began = time.monotonic()
    assert grid.push_messages(instructions(2, ttl=1.0)) == ["", ""]
    assert 0.9 < time.monotonic() - began < 10
    with grid._waiting.within(0.5), pytest.raises(TimeUp):  # the caller's own deadline is told as such
        grid.push_messages(instructions(2, ttl=60.0))


def test_no_messages_are_no_requests(grid, runtime):
    assert grid.send_and_receive([], timeout=20) == []
    assert not runtime.link.requests


def test_what_messages_share_travels_once(grid, runtime):
    grid.push_messages(instructions(20, size=50_000))
    assert sum(len(body) for _, _, body in runtime.link.requests) < 1.2 * 50_000 * 4


def test_pushing_again_names_the_messages_alike(grid, runtime):
    messages = instructions()
    assert grid.push_messages(messages) == grid.push_messages(messages)
    assert len(runtime.messages) == 2


def test_a_push_that_was_refused_half_way_is_repeated(grid, runtime):
    runtime.refused_pushes = 3
    assert len(grid.send_and_receive(instructions(), timeout=20)) == 2
    assert runtime.link.asked(PUSH) > 1


def test_a_server_that_can_not_store_ends_the_run(grid, runtime, monkeypatch):
    monkeypatch.setattr(module, "_PUSHES", 5)
    runtime.refused_pushes = 10_000
    with pytest.raises(RunError, match="can't store"):
        grid.push_messages(instructions())


def test_a_node_that_is_not_registered_is_not_waited_for(grid, runtime):
    whole = runtime.push

    def push(body):
        answer = PushAppMessagesResponse.FromString(whole(body))
        answer.message_ids[0] = ""
        return answer.SerializeToString()

    runtime.link.answers[PUSH] = push
    assert len(grid.send_and_receive(instructions(), timeout=20)) == 1


def test_the_timeout_gives_what_has_come(grid, runtime):
    runtime.answer = lambda message: runtime.plain(message) if message.metadata.dst_node_id == 11 else None
    began = time.monotonic()
    replies = grid.send_and_receive(instructions(), timeout=1.0)
    assert [reply.metadata.src_node_id for reply in replies] == [11]
    assert 0.9 < time.monotonic() - began < 10


def test_the_timeout_is_kept_while_the_server_is_away(grid, runtime):
    runtime.answer = lambda message: runtime.plain(message) if message.metadata.dst_node_id == 11 else None
    threading.Timer(1.0, runtime.link.stop).start()
    began = time.monotonic()
    replies = grid.send_and_receive(instructions(), timeout=2.5)
    assert [reply.metadata.src_node_id for reply in replies] == [11]
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("path", [CONFIRM, PULL_OBJECT])
def test_what_is_complete_at_the_deadline_counts(grid, runtime, path):
    """The server goes away while it is told of the first reply, or while the second is fetched."""
    whole, asked = runtime.link.answers[path], []

    def away(body):
        asked.append(body)
        if path == CONFIRM:
            return -1
        name = PullObjectRequest.FromString(body).object_id
        return -1 if name == min(runtime.replies_of[12] - runtime.replies_of[11]) else whole(body)

    runtime.link.answers[path] = away
    replies = grid.send_and_receive(instructions(), timeout=2.0)
    expected = [11, 12] if path == CONFIRM else [11]
    assert sorted(reply.metadata.src_node_id for reply in replies) == expected
    assert all(reply.has_content() for reply in replies)
    assert asked


def test_an_upload_that_takes_long_holds_up_no_other(grid, runtime):
    slow = []

    def answer(message):
        runtime.plain(message)
        if message.metadata.dst_node_id == 11:
            name = runtime.replies[message.metadata.message_id][0].metadata.message_id
            runtime.held.add(name)
            slow.append(name)

    runtime.answer = answer
    ids = grid.push_messages(instructions())
    early = []
    while not early:
        early += grid.pull_messages(ids)
    assert [reply.metadata.src_node_id for reply in early] == [12]
    runtime.held.clear()
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(ids)] == [11]


def test_a_reply_that_never_comes_whole_is_an_error_with_a_fixed_text(grid, runtime):
    def answer(message):
        runtime.plain(message)
        del runtime.stored[runtime.replies[message.metadata.message_id][0].metadata.message_id]

    runtime.answer = answer
    (reply,) = grid.send_and_receive(instructions(1), timeout=20)
    assert reply.error.code == flower.ErrorCode.REPLY_MESSAGE_UNAVAILABLE
    assert reply.error.reason == "the reply was never uploaded as a whole"
    assert reply.metadata.src_node_id == 11


def test_a_reply_larger_than_allowed_is_an_error(grid, runtime):
    runtime.answer = lambda message: runtime.reply(message, made(message, size=400_000))
    (reply,) = grid.send_and_receive(instructions(1), timeout=20)
    assert reply.error.reason == "the reply is larger than message_megabytes"


@pytest.mark.parametrize("field", ["_src_node_id", "_reply_to_message_id", "_run_id", "_dst_node_id", "_message_type"])
def test_a_reply_that_names_another_sender_than_its_envelope_is_an_error(grid, runtime, field):
    def answer(message):
        lie = made(message)
        honest = lie.metadata.__dict__[field]
        lie.metadata.__dict__[field] = "other" if isinstance(honest, str) else 12
        runtime.reply(message, lie, envelope=made(message))

    runtime.answer = answer
    (reply,) = grid.send_and_receive(instructions(1), timeout=20)
    assert reply.error.reason == "the reply is not what its envelope says"
    assert reply.metadata.src_node_id == 11


def test_bytes_that_are_no_message_are_an_error(grid, runtime):
    def answer(message):
        runtime.plain(message)
        runtime.stored[runtime.replies[message.metadata.message_id][0].metadata.message_id] = b"\x00" * 64

    runtime.answer = answer
    (reply,) = grid.send_and_receive(instructions(1), timeout=20)
    assert reply.error.reason == "the reply is not what its envelope says"


def test_a_reply_that_the_server_lost_with_its_answer_is_asked_for_again(grid, runtime):
    """A server hands an envelope out once; when it dies before its answer arrives, the next one knows of no reply."""
    whole, lost = runtime.pull, []

    def pull(body):
        if not lost and runtime.replies:
            lost.extend(runtime.replies)
            runtime.replies.clear()
            return -1
        found = PullAppMessagesResponse.FromString(whole(body))
        for name in PullAppMessagesRequest.FromString(body).message_ids:
            if name in lost:
                runtime.reply(runtime.messages[name], Message(error=unavailable(), reply_to=runtime.messages[name]))
        again = PullAppMessagesResponse.FromString(whole(body))
        found.MergeFrom(again)
        return found.SerializeToString()

    runtime.link.answers[PULL] = pull
    replies = grid.send_and_receive(instructions(1), timeout=20)
    assert lost
    assert [reply.has_content() for reply in replies] == [True]
    assert len(runtime.messages) == 2


def test_an_error_of_the_server_is_taken_at_its_word_where_no_answer_was_lost(grid, runtime):
    runtime.answer = lambda message: runtime.reply(message, Message(error=unavailable(), reply_to=message))
    (reply,) = grid.send_and_receive(instructions(1), timeout=20)
    assert reply.error.code == flower.ErrorCode.MESSAGE_UNAVAILABLE
    assert len(runtime.messages) == 1


def unavailable():
    return Error(code=flower.ErrorCode.MESSAGE_UNAVAILABLE, reason="unavailable")


@pytest.mark.parametrize("path", [PUSH, PUSH_OBJECT, PULL, PULL_OBJECT, CONFIRM])
def test_a_run_that_was_stopped_ends_every_step(grid, runtime, path):
    runtime.link.answers[path] = 401
    with pytest.raises(Stopped):
        grid.send_and_receive(instructions(), timeout=20)


@pytest.mark.parametrize("path", [PUSH, PUSH_OBJECT, PULL, PULL_OBJECT, CONFIRM])
def test_every_step_outlives_a_lost_answer(grid, runtime, path):
    whole, times = runtime.link.answers[path], []

    def once(body):
        times.append(1)
        if len(times) == 1:
            return -1
        return whole(body) if callable(whole) else whole

    runtime.link.answers[path] = once
    replies = grid.send_and_receive(instructions(), timeout=30)
    assert [reply.has_content() for reply in replies] == [True, True]


def test_a_message_without_a_time_to_live_is_refused(grid, runtime):
    message = instructions(1)[0]
    message.metadata.__dict__["_ttl"] = 0.0
    with pytest.raises(ValueError, match="ttl"):
        grid.push_messages([message])
