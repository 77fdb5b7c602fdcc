"""A malicious server against the executor: a small message that would become a large one."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_and_inflate_object_from_tree,
    validate_object_content,
)
from flwr.supercore.task_identity import TaskIdentity

from fedhead.client.joining import weighing
from fedhead.client.joining.bounds import LARGEST_ANSWER
from fedhead.client.joining.weighing import TOO_LARGE, Scales


def message_with(*arrays):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    made = [one if isinstance(one, Array) else Array(one) for one in arrays]
    record = ArrayRecord({f"w{number}": one for number, one in enumerate(made)})
    message = Message(RecordDict({"arrays": record}), 2, MessageType.TRAIN)
    message.metadata.__dict__["_message_id"] = message.object_id
    contents = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
    return get_object_tree(message), contents


def weighed(tree, contents, largest):
    confirmed = []
    scales = Scales(contents.__getitem__, confirmed.append, largest)
    found = pull_and_inflate_object_from_tree(tree, scales.pull, scales.confirm, return_type=Message)
    assert confirmed == [tree.object_id]
    return found


def repeated(times):
    """An array of one chunk of 1,000 bytes, which it names so many times; as Flower itself would take it."""
    array = Array(np.arange(250, dtype=np.float32))
    parts = {name: one.deflate() for name, one in get_all_nested_objects(array).items()}
    whole = parts.pop(array.object_id)
    head, _, body = whole.partition(b"\x00")
    changed = json.loads(body)
    changed["arraychunk_ids"] = [0] * times
    body = json.dumps(changed).encode()
    whole = b" ".join([*head.split(b" ")[:2], str(len(body)).encode()]) + b"\x00" + body
    validate_object_content(whole)
    name = get_object_id(whole)
    return name, {**parts, name: whole}


def test_a_small_array_that_would_become_a_large_one_is_not_put_together():
    name, contents = repeated(times=3)
    assert len(inflate_object_from_contents(name, dict(contents)).data) > 3000  # what Flower makes of it
    name, contents = repeated(times=1_000_000)
    assert sum(map(len, contents.values())) < LARGEST_ANSWER / 100
    scales = Scales(contents.__getitem__, lambda _: pytest.fail("confirmed"), LARGEST_ANSWER)
    for one in contents:
        scales.pull(one)
    with pytest.raises(ValueError, match=TOO_LARGE):
        scales.confirm(name)


def test_so_is_one_chunk_of_many_arrays():
    data = np.zeros(1000, np.float32).tobytes()
    shapes = ((1000,), (1, 1000), (10, 100), (100, 10))
    tree, contents = message_with(*(Array("float32", shape, "numpy.ndarray", data) for shape in shapes))
    assert sum(map(len, contents.values())) < 8000  # the chunk travels once
    with pytest.raises(ValueError, match=TOO_LARGE):
        weighed(tree, contents, 15_000)
    assert len(weighed(tree, contents, 17_000).content["arrays"]) == 4


def test_names_and_places_are_bounded_before_they_are_read(monkeypatch):
    monkeypatch.setattr(weighing, "LARGEST_PART", 500)
    name, contents = repeated(times=1000)
    with pytest.raises(ValueError, match=TOO_LARGE):
        Scales(contents.__getitem__, None, LARGEST_ANSWER).pull(name)


@pytest.mark.parametrize("values", [np.ones((10, 64), np.float32), np.zeros((3000, 2000), np.float32), np.zeros(0)])
def test_an_honest_message_is_what_it_was(values):
    tree, contents = message_with(values)
    found = weighed(tree, contents, LARGEST_ANSWER)
    assert np.array_equal(found.content["arrays"]["w0"].numpy(), values)
