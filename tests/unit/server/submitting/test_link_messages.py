"""What is used of Flower that is not public: a version that changes it is noticed here, or refused in one line."""

import importlib.metadata
import inspect
import io
import sys
import tomllib
import zipfile

import httpx
import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, Metadata, RecordDict
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.retry import RetryInvoker

from fedhead.common.errors import FedheadError
from fedhead.server.submitting import flower
from fedhead.server.submitting.waiting import LinkLost, Stopped, Waiting

NAME = "fedhead.server.submitting.flower"


@pytest.fixture
def fresh(monkeypatch):
    """Import the module anew; the one that others have stays."""
    monkeypatch.delitem(sys.modules, NAME)
    import fedhead.server.submitting as package

    monkeypatch.setattr(package, "flower", flower)
    return lambda: importlib.import_module(NAME)


@pytest.fixture
def task():
    flower.enter(3, 7, flower.SUPERLINK_NODE_ID)


@pytest.mark.parametrize("found", ["1.40.2", "1.42.0", "2.0.0", "1.4.1"])
def test_another_version_is_refused_in_one_line(fresh, monkeypatch, found):
    import fedhead.server.link.environment as environment

    monkeypatch.setattr(environment, "version", lambda _: found)
    with pytest.raises(FedheadError, match=r"1\.41") as caught:
        fresh()
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["flwr.supercore.control", "flwr.supercore.task_identity", "flwr.cli.build"])
def test_a_part_that_is_gone_is_refused_in_one_line(fresh, monkeypatch, part):
    monkeypatch.setitem(sys.modules, part, None)
    with pytest.raises(FedheadError, match="lacks a part") as caught:
        fresh()
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_bundle_is_settings_alone():
    with zipfile.ZipFile(io.BytesIO(flower.bundle())) as archive:
        names = archive.namelist()
        settings = tomllib.loads(archive.read("pyproject.toml").decode())
    assert not [name for name in names if name.endswith((".py", ".so", ".pyc"))]
    assert {name for name in names if not name.startswith(".info")} == {"pyproject.toml"}
    assert settings["tool"]["flwr"]["app"]["config"] == {"recipe": ""}


def test_a_run_brings_its_recipe():
    request = flower.start_request('{"training": {}}')
    assert request.override_config["recipe"].string == '{"training": {}}'
    assert len(request.fab.content) < 64 * 1024


def test_clients_ask_our_rule_and_no_proxy():
    """`invoke` alone is called of a retry invoker, and `_client` is what sends."""
    called = []

    class Rule(Waiting):
        def invoke(self, target, *args, **kwargs):
            called.append(target)
            raise Stopped("seen")

    rule = Rule(1.0, lambda: Stopped(""), lambda: LinkLost(""))
    client = flower.runtime("127.0.0.1:9", "token", rule)
    with pytest.raises(Stopped):
        client.GetNodes(flower.GetNodesRequest())
    assert len(called) == 1
    assert isinstance(client._client, httpx.Client)
    assert client._client.trust_env is False
    assert list(inspect.signature(RetryInvoker.invoke).parameters) == ["self", "target", "args", "kwargs"]
    assert "retry_invoker" in inspect.signature(ProtobufClient.__init__).parameters


def test_messages_carry_the_numbers_of_the_task(task):
    message = Message(RecordDict(), 11, "train", ttl=5.0)
    assert (message.metadata.run_id, message.metadata.src_node_id) == (7, flower.SUPERLINK_NODE_ID)


def test_the_id_of_a_message_is_its_content(task):
    message = Message(RecordDict(), 11, "train", ttl=5.0)
    flower.packed([message])
    assert message.metadata.message_id == message.object_id
    assert len(message.object_id) == 64
    assert isinstance(message.metadata, Metadata)


def test_what_messages_share_is_one_object(task):
    content = RecordDict({"arrays": ArrayRecord([np.ones(1000, np.float32)])})
    one = flower.packed([Message(content, 11, "train", ttl=5.0)])
    many = flower.packed([Message(content, node, "train", ttl=5.0) for node in range(11, 31)])
    assert len(many.objects) == len(one.objects) + 19  # each message is an object of its own


def test_a_message_comes_back_as_it_was(task):
    array = np.random.default_rng(0).standard_normal(2_000_000).astype(np.float32)  # more than one chunk
    message = Message(RecordDict({"arrays": ArrayRecord([array])}), 11, "train", ttl=5.0)
    packed = flower.packed([message])
    names = flower.object_ids(packed.trees[0])
    assert sorted(names) == sorted(packed.objects)
    envelope = packed.messages[0]
    found = flower.unpacked(envelope, {name: packed.objects[name].deflate() for name in names})
    assert found is not None
    assert found.metadata.message_id == message.metadata.message_id
    np.testing.assert_array_equal(found.content["arrays"].to_numpy_ndarrays()[0], array)


@pytest.mark.parametrize("content", [b"", b"\x00", b"Message,,0\x00", b"ArrayRecord,,2\x00{}", b"Nothing,,0\x00"])
def test_bytes_that_are_no_message_give_none(task, content):
    message = Message(RecordDict(), 11, "train", ttl=5.0)
    packed = flower.packed([message])
    assert flower.unpacked(packed.messages[0], {message.metadata.message_id: content}) is None
    assert flower.unpacked(packed.messages[0], {}) is None


def test_a_copy_is_valid_until_the_same_time(task):
    message = Message(RecordDict(), 11, "train", ttl=50.0, group_id="4")
    copy = flower.copied(message)
    assert copy is not None
    flower.packed([message, copy])
    assert copy.metadata.message_id != message.metadata.message_id
    end, same = (one.metadata.created_at + one.metadata.ttl for one in (message, copy))
    assert abs(end - same) < 0.1
    assert (copy.metadata.dst_node_id, copy.metadata.group_id, copy.metadata.message_type) == (11, "4", "train")
    message.metadata.__dict__["_created_at"] -= 60
    assert flower.copied(message) is None
