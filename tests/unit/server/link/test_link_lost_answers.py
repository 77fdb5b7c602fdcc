"""What a node asks once more, because the server was ended, or the network cut, between a commit and its answer."""

import asyncio
import hashlib
from itertools import count
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from starlette.middleware import Middleware

from fedhead.client.joining.uploading import Upload
from fedhead.server.link import public
from fedhead.server.link.bell import Bell
from fedhead.server.link.flower import ProtobufTranslationMiddleware, tree_of
from fedhead.server.link.post import Post

BENCH = SimpleNamespace(**run_path(str(Path(__file__).with_name("link_bench.py"))))
NUMBERS = count(700)
MOST = 10_000


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return BENCH.make_state(tmp_path_factory.mktemp("lost"))


@pytest.fixture
def run(state):
    found = BENCH.make_run(state)
    for task in state.get_tasks(run_ids=[found]):  # somebody carries it out
        assert state.claim_task(task.task_id)
        assert state.activate_task(task.task_id)
    return found


class Door:
    """The routes of the public port for one node; `restart` forgets what the process knew, as a kill does."""

    def __init__(self, state, node):
        self.state, self.node = state, Node(node_id=node)
        self.restart()

    def restart(self):
        app = FastAPI(middleware=[Middleware(ProtobufTranslationMiddleware)])
        app.include_router(public._routes(self.state, Bell(), Post(self.state, MOST)))
        self.app = app

    def ask(self, route, request, answer):
        async def post():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://server") as client:
                return await client.post(
                    public.PREFIX + route, content=request.SerializeToString(),
                    headers={"content-type": "application/protobuf", "accept": "application/protobuf"},
                )  # fmt: skip

        found = asyncio.run(post())
        found.raise_for_status()
        return answer.FromString(found.content)

    def announce(self, reply):
        envelope = message_to_proto(remove_content_from_message(reply))
        envelope.metadata.message_id = reply.object_id
        request = PushMessagesRequest(
            node=self.node, messages_list=[envelope], message_object_trees=[get_object_tree(reply)]
        )
        found = self.ask("push-messages", request, PushMessagesResponse)
        return set(found.objects_to_push), found.session_id

    def bring(self, run, session, name, content):
        request = PushObjectRequest(
            node=self.node, run_id=run, object_id=name, session_id=session, object_content=content
        )
        return self.ask("push-object", request, PushObjectResponse).stored

    def confirm(self, run, name):
        request = ConfirmMessageReceivedRequest(node=self.node, run_id=run, message_object_id=name)
        self.ask("confirm-message-received", request, ConfirmMessageReceivedResponse)


@pytest.fixture
def door(state):
    return Door(state, BENCH.make_node(state, next(NUMBERS)))


@pytest.fixture
def message(state, run, door):
    """A message that the node has in full."""
    found = BENCH.send(state, run, door.node.node_id)
    assert len(state.get_message_ins(door.node.node_id, limit=1)) == 1
    door.confirm(run, found.metadata.message_id)
    return found


@pytest.fixture
def reply(message):
    found = Message(RecordDict({"arrays": ArrayRecord([np.random.default_rng().random(8)])}), reply_to=message)
    found.metadata.__dict__["_message_id"] = found.object_id
    return found


def contents(reply):
    return {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}


def take_envelope(state, run, message):
    """As the coordinator does as soon as a reply is announced; Flower forgets message and reply then."""
    (envelope,) = state.get_message_res({message.metadata.message_id}, run)
    state.delete_messages(message_ins_ids={message.metadata.message_id})
    return envelope.metadata.message_id


def is_whole(state, run, reply):
    """Whether the coordinator can have all of the reply."""
    return all(state.get_object(run, name) == content for name, content in contents(reply).items())


@pytest.fixture(params=[False, True], ids=["waiting", "taken"])
def after(request, state, run, message, reply):
    """Called once the reply is announced; in half of the tests the coordinator takes the envelope at once."""
    return lambda: request.param and take_envelope(state, run, message) == reply.object_id


def test_an_object_that_is_brought_again_is_taken_again(state, run, door, reply, after):
    missing, session = door.announce(reply)
    assert missing == set(contents(reply))
    after()
    for name, content in contents(reply).items():  # the last one ends the session
        assert door.bring(run, session, name, content)
        assert door.bring(run, session, name, content)
    assert is_whole(state, run, reply)


def test_one_that_was_taken_by_a_server_that_was_ended_is_taken_again(state, run, door, reply, after):
    _, session = door.announce(reply)
    after()
    *others, last = contents(reply).items()
    for name, content in others:
        assert door.bring(run, session, name, content)
        door.restart()
        assert door.bring(run, session, name, content)
    assert door.bring(run, session, *last)
    door.restart()
    door.bring(run, session, *last)
    assert door.announce(reply)[0] == set()  # the node asks what is missing then
    assert is_whole(state, run, reply)


def test_an_announcement_that_comes_again_goes_on_where_the_first_was(state, run, door, reply, after):
    missing, session = door.announce(reply)
    after()
    door.restart()  # before its answer
    assert door.announce(reply) == (missing, session)
    first = min(missing)
    assert door.bring(run, session, first, contents(reply)[first])
    assert door.announce(reply) == (missing - {first}, session)
    for name in missing - {first}:
        assert door.bring(run, session, name, contents(reply)[name])
    assert is_whole(state, run, reply)


def test_what_the_coordinator_has_had_is_not_brought_again(state, run, door, message, reply):
    _, session = door.announce(reply)
    take_envelope(state, run, message)
    for name, content in contents(reply).items():
        door.bring(run, session, name, content)
    state.object_store.delete(reply.object_id)  # as it confirms that it has all
    assert door.bring(run, session, name, content)
    assert door.announce(reply)[0] == set()
    assert not [name for name in contents(reply) if name in state.object_store]


def test_only_the_nodes_own_objects_are_taken_again(state, run, door, reply):
    """Nobody can find out whether somebody else has sent some bytes."""
    _, session = door.announce(reply)
    name, content = next(iter(contents(reply).items()))
    assert door.bring(run, session, name, content)
    other = Door(state, BENCH.make_node(state, next(NUMBERS)))
    assert not other.bring(run, "", name, content)
    assert not door.bring(run, session, name, content + b"x")
    assert hashlib.sha256(content).hexdigest() == name


def test_a_message_may_be_confirmed_again_by_its_node_alone(state, run, door, message):
    name = message.metadata.message_id
    assert tree_of(state, name) is None
    door.restart()
    door.confirm(run, name)
    other = Door(state, BENCH.make_node(state, next(NUMBERS)))
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        other.confirm(run, name)
    BENCH.reply(state, run, message)
    with pytest.raises(httpx.HTTPStatusError, match="403"):  # it isn't open any more
        door.confirm(run, name)


@pytest.fixture
def upload(door, reply, monkeypatch):
    """The node's own way to the routes."""
    monkeypatch.setattr("fedhead.client.joining.uploading.time.sleep", lambda _: None)

    def push(run, session, name, content):
        if not door.bring(run, session, name, content):
            raise ObjectPushError(name, run, session)

    return Upload(contents(reply), lambda again, *_: door.announce(again), push)


def test_a_reply_arrives_although_the_server_is_ended_after_every_object(state, run, door, reply, upload, after):
    missing, session = upload.send(reply, get_object_tree(reply), 0.0)
    after()
    for name in sorted(missing):
        door.bring(run, session, name, contents(reply)[name])  # its answer is lost
        door.restart()
        upload.push_object(run, session, name, contents(reply)[name])
    assert is_whole(state, run, reply)


def test_a_reply_arrives_although_the_server_drops_what_it_has(state, run, door, reply, upload):
    """As it does with an upload that takes three minutes."""
    missing, session = upload.send(reply, get_object_tree(reply), 0.0)
    first, *others = sorted(missing)
    upload.push_object(run, session, first, contents(reply)[first])
    state._cleanup_push_session(session, cleanup_messages=True)
    assert first not in state.object_store
    for name in others:
        upload.push_object(run, session, name, contents(reply)[name])
    assert is_whole(state, run, reply)
