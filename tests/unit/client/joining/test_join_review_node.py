"""A malicious server against the node process: messages that would block it, and floods of objects."""

import os
import signal

import httpx
import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.nodestate import NodeStateFactory

from fedhead.client.joining import flower, retry
from fedhead.client.joining.guard import environment


def envelope(**metadata):
    """A message as it comes from the server, without its objects."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    message = Message(RecordDict(), 2, MessageType.TRAIN)
    message.metadata.__dict__["_run_id"] = 7
    message.metadata.__dict__["_message_id"] = "ab" * 32
    for name, value in metadata.items():
        message.metadata.__dict__[f"_{name}"] = value
    return message_to_proto(remove_content_from_message(message))


def test_flowers_node_waits_for_ever_for_the_reply_to_a_message_that_it_did_not_keep():
    """Why such messages are refused: stored nowhere, no executor ever gets it, and the node waits for its reply."""
    from flwr.supercore.run import Run

    inside = RecordDict({})
    tree, contents = get_object_tree(inside), {inside.object_id: inside.deflate()}
    stores = ObjectStoreFactory()
    state = NodeStateFactory(objectstore_factory=stores).state()
    state.set_node_id(2)
    state.store_run(Run.create_empty(7))
    run = start_client_internal._pull_and_store_message(
        state=state,
        object_store=stores.store(),
        node_config={},
        receive=lambda: (message_from_proto(envelope(message_id="")), tree),
        get_run=None,
        get_fab=None,
        pull_object=lambda run, name: contents[name],
        confirm_message_received=lambda run, name: None,
        trusted_entities=None,
    )
    assert run == 7  # the node goes on to wait for a reply, and nobody can make one
    assert not state.get_messages_legacy(run_ids=[7], is_reply=False)


@pytest.mark.parametrize("metadata", [{"message_id": ""}, {"message_id": "x"}, {"reply_to_message_id": "cd" * 32}])
def test_a_message_that_no_executor_would_get_is_refused(metadata):
    with pytest.raises(ValueError, match="no message for a holder") as found:
        flower.own_message(message_from_proto, envelope(**metadata))
    assert str(found.value) == "what arrived is no message for a holder"


def test_any_other_message_is_what_it_was():
    message = flower.own_message(message_from_proto, envelope())
    assert (message.metadata.run_id, message.metadata.message_type) == (7, "train")


def test_the_part_that_makes_messages_is_where_it_is_replaced():
    assert "message_from_proto" in vars(fleet_http_connection)


def answers(sizes):
    return lambda name: b"x" * sizes[name]


def pulled(names, sizes):
    def original(object_ids, pull_object_fn):
        return {name: pull_object_fn(name) for name in object_ids}

    return flower.bounded_pull(original, names, pull_object_fn=answers(sizes))


def test_the_objects_of_a_message_are_bounded_together(monkeypatch):
    monkeypatch.setattr(flower, "LARGEST_ANSWER", 100)
    assert len(pulled(["a", "b"], {"a": 50, "b": 50})) == 2
    with pytest.raises(ValueError, match="more than a message may have"):
        pulled(["a", "b", "c"], {"a": 50, "b": 50, "c": 1})


def test_so_is_their_number():
    names = [str(number) for number in range(flower.MOST_OBJECTS + 1)]
    with pytest.raises(ValueError, match="more than a message may have"):
        pulled(names, dict.fromkeys(names, 0))
    assert len(pulled(names[1:], dict.fromkeys(names, 0))) == flower.MOST_OBJECTS


def test_a_heartbeat_that_fails_in_a_new_way_starts_the_node_again(monkeypatch):
    """Its thread would be gone without a word, and the server would take the node for dead."""
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(number))
    for raised in (AttributeError(), RecursionError(), KeyError(), SystemExit(1)):

        def failing(raised=raised):
            raise raised

        killed.clear()
        assert flower.Heartbeat(failing).heartbeat_fn() is False
        assert killed == [signal.SIGINT]


def test_an_error_that_nests_too_deep_is_like_any_other():
    request = httpx.Request("POST", "https://fl.example.org/v1/fleet/activate-node")
    response = httpx.Response(401, request=request, content=b"[" * 60_000)
    error = httpx.HTTPStatusError("", request=request, response=response)
    assert retry.judge(error) == ("fatal", retry.UNKNOWN_KEY)


@pytest.mark.parametrize(("own", "offline"), [(None, "1"), ("0", "0"), ("1", "1")])
def test_a_server_can_not_name_what_is_then_downloaded(tmp_path, monkeypatch, own, offline):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if own is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", own)
    assert environment(tmp_path)["HF_HUB_OFFLINE"] == offline


@pytest.mark.parametrize("number", [10, 9, 62, 20])
def test_who_sits_between_does_not_end_a_node_that_was_connected(number):
    """One handshake with a stranger's certificate would else end every join for good."""
    import ssl

    certificate = ssl.SSLCertVerificationError("certificate verify failed")
    certificate.verify_code = number
    wrong = httpx.ConnectError("")
    wrong.__cause__ = certificate
    told, fatal, waits, outcomes = [], [], [], ["first", wrong, wrong, "back"]
    asking = retry.Retry(told.append, fatal.append, KeyboardInterrupt, sleep=waits.append)

    def target():
        one = outcomes.pop(0)
        if isinstance(one, Exception):
            raise one
        return one

    assert asking.invoke(target) == "first"
    assert asking.invoke(target) == "back"
    assert (fatal, len(waits)) == ([], 2)
    assert told == [None, retry.judge(wrong)[1], None]
