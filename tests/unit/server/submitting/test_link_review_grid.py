"""Replies made to take the memory of submit."""

import json
import time
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_id,
    get_object_tree,
)
from flwr.supercore.run import Run

from fedhead.server.submitting import flower
from fedhead.server.submitting.grid import DeployedGrid
from fedhead.server.submitting.waiting import LinkLost, Stopped, Waiting

RUN = 7
CHUNK = 1 << 20


@pytest.fixture
def message():
    flower.enter(3, RUN, flower.SUPERLINK_NODE_ID)
    found = Message(RecordDict(), 11, "train", ttl=60.0)
    found.metadata.__dict__["_message_id"] = "m" * 64
    return found


def reply_to(message):
    array = Array(np.zeros(CHUNK // 4, dtype=np.float32))
    return Message(RecordDict({"arrays": ArrayRecord({"w": array})}), reply_to=message)


def swollen(message, times):
    """A reply whose one array names its one chunk so many times; its objects fit together in every other way."""
    reply = reply_to(message)
    contents = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
    renamed: dict[str, str] = {}

    def replaced(name, content):
        for old, new in renamed.items():
            content = content.replace(old.encode(), new.encode())
        new = get_object_id(content)
        renamed[name] = new
        del contents[name]
        contents[new] = content

    kinds = {name: get_object_head_values_from_object_content(content)[0] for name, content in contents.items()}
    for kind in ("Array", "ArrayRecord", "RecordDict", "Message"):
        (name,) = [name for name, found in kinds.items() if found == kind]
        content = contents[name]
        if kind == "Array":
            body = get_object_body(content, Array)
            fields = json.loads(body)
            fields["arraychunk_ids"] = [0] * times
            head = content[: -len(body)].split(b"\x00")[0].decode()
            new = json.dumps(fields).encode()
            words = head.split(" ")
            words[-1] = str(len(new))
            content = " ".join(words).encode() + b"\x00" + new
        replaced(name, content)
    return renamed[reply.object_id], contents


def test_a_chunk_that_is_named_many_times_counts_as_often(message):
    reply = reply_to(message)
    for times in (1, 3, 4096):  # of 4 GiB
        name, contents = swollen(message, times)
        envelope = message_to_proto(remove_content_from_message(reply))
        envelope.metadata.message_id = name
        tracemalloc.start()
        found = flower.unpacked(envelope, contents, 2 * CHUNK)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 * CHUNK
        assert (found is not None) is (times == 1)


def test_replies_that_nobody_asks_for_take_no_more_than_one(link, message, monkeypatch):
    """A holder that goes away in the middle of a large answer to its greeting, again and again."""
    arriving = {}

    def pull(body):
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest

        found = PullAppMessagesResponse()
        for name in PullAppMessagesRequest.FromString(body).message_ids:
            ask = Message(RecordDict(), 11, "query", ttl=60.0)
            ask.metadata.__dict__["_message_id"] = name
            reply = Message(
                RecordDict({"a": ArrayRecord([np.full(CHUNK // 8, float(len(arriving)), dtype=np.float32)])}),
                reply_to=ask,
            )
            objects = get_all_nested_objects(reply)
            arriving.update({one: part.deflate() for one, part in objects.items() if one != reply.object_id})
            proto = message_to_proto(remove_content_from_message(reply))
            proto.metadata.message_id = reply.object_id
            found.messages_list.append(proto)
            found.message_object_trees.append(get_object_tree(reply))
        return found.SerializeToString()

    def pull_object(body):
        name = PullObjectRequest.FromString(body).object_id
        return PullObjectResponse(
            object_found=True, object_available=name in arriving, object_content=arriving.get(name, b"")
        ).SerializeToString()

    link.answers.update({
        "/v1/runtime/pull-messages": pull, "/v1/runtime/pull-object": pull_object,
        "/v1/runtime/confirm-message-received": ConfirmMessageReceivedResponse().SerializeToString(),
    })  # fmt: skip
    waiting = Waiting(20.0, lambda: Stopped("stopped"), lambda: LinkLost("lost"))
    grid = DeployedGrid(flower.runtime(link.address, "token", waiting), waiting, 1)
    grid.set_run(Run.create_empty(RUN))
    for number in range(6):
        until = time.monotonic() + 20
        name = f"{number:064x}"
        while sum(one.size for key, one in grid._arriving.items() if key == name) < CHUNK // 2:
            assert grid.pull_messages([name]) == []
            assert time.monotonic() < until
    grid.pull_messages(["f" * 64])
    assert sum(one.size for one in grid._arriving.values()) < 2.5 * CHUNK
    waiting.leave()
