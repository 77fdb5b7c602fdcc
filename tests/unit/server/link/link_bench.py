"""A state as a server has it, with a run, nodes and messages; for the tests of this folder, by runpy."""

from unittest.mock import patch

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from fedhead.server.link import flower, nodes


def pem(number):
    """A public key of its own for every number."""
    public = ec.derive_private_key(number, ec.SECP256R1()).public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def make_state(folder):
    """A state on disk."""
    inner = flower.make_inner(str(folder / "link.sqlite"), "127.0.0.1", 1, "token", b"secret")
    return inner.state.linkstate_factory.state()


def make_run(state):
    """A run that is under way."""
    run = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, flower.NOOP_FLWR_AID, TaskType.SERVER_APP)
    assert run
    return run


def make_node(state, number):
    """A node that is connected."""
    node = nodes.create_node(state, pem(number))
    assert state.activate_node(node, 30)
    return node


def send(state, run, node, ttl=60.0, text="x"):
    """A message to a node, with its objects, as the coordinator brings it; returns it."""
    with patch.multiple(TaskIdentity, _run_id=run, _node_id=SUPERLINK_NODE_ID, _task_id=1):
        message = Message(RecordDict({"config": ConfigRecord({"text": text})}), node, "train", ttl=ttl)
    message.metadata.__dict__["_message_id"] = message.object_id
    session = state.start_session(run)
    stored, missing = state.store_message_and_object_tree(message, get_object_tree(message), session)
    assert stored
    objects = get_all_nested_objects(message)
    for name in missing:
        assert state.store_object(run, session, name, objects[name].deflate())
    return message


def reply(state, run, message):
    """A node's answer to a message, without its objects."""
    answer = Message(RecordDict(), reply_to=message)
    answer.metadata.__dict__["_message_id"] = answer.object_id
    assert state.store_message_res(answer)
    return answer
