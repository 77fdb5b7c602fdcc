import threading

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.supercore.task_identity import TaskIdentity
from threadpoolctl import threadpool_info, threadpool_limits

from fedhead.common import protocol
from fedhead.common.errors import Refused
from fedhead.simulations.engine import SERVER_NODE, InProcessGrid, run_in_process
from fedhead.simulations.simulate import threads


@pytest.fixture(autouse=True)
def identity():
    # Flower wants to know which task makes a message; `run_in_process` tells it, tests of the grid alone do so here
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, SERVER_NODE


def grid_of(train, nodes=(1000, 1001, 1002)):
    app = ClientApp()
    app.train()(train)
    contexts = {
        node: Context(run_id=7, node_id=node, node_config={"partition-id": i}, state=RecordDict(), run_config={})
        for i, node in enumerate(nodes)
    }
    return InProcessGrid(app, contexts, 7)


def content():
    return RecordDict(
        {
            "arrays": protocol.to_arrays({"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}),
            "config": ConfigRecord({"server-round": 1}),
        }
    )


def messages(record, nodes=(1000, 1001, 1002)):
    return [Message(record, node, MessageType.TRAIN) for node in nodes]


def echo(message, context):
    return Message(RecordDict({"config": ConfigRecord({"node": context.node_id})}), reply_to=message)


def test_replies_answer_their_messages():
    sent = messages(content())
    replies = grid_of(echo).send_and_receive(sent)
    assert [reply.content["config"]["node"] for reply in replies] == [1000, 1001, 1002]
    assert [reply.metadata.reply_to_message_id for reply in replies] == [one.metadata.message_id for one in sent]
    assert [reply.metadata.src_node_id for reply in replies] == [1000, 1001, 1002]
    assert {reply.metadata.dst_node_id for reply in replies} == {SERVER_NODE}
    assert len({reply.metadata.message_id for reply in replies}) == 3


def test_each_client_gets_content_of_its_own():
    seen = []

    def greedy(message, context):
        seen.append((sorted(message.content), list(message.content["arrays"]), dict(message.content["config"])))
        message.content["config"]["server-round"] = 99
        del message.content["arrays"]["bias"]
        del message.content["arrays"]
        return echo(message, context)

    shared = content()
    grid_of(greedy).send_and_receive(messages(shared))
    assert seen == [(["arrays", "config"], ["weight", "bias"], {"server-round": 1})] * 3
    assert list(shared["arrays"]) == ["weight", "bias"]
    assert shared["config"]["server-round"] == 1


def test_state_stays_with_its_holder():
    def count(message, context):
        before = context.state["count"]["seen"] if "count" in context.state else 0
        context.state["count"] = ConfigRecord({"seen": before + context.node_id})
        return Message(RecordDict({"config": context.state["count"]}), reply_to=message)

    grid = grid_of(count)
    grid.send_and_receive(messages(content()))
    again = grid.send_and_receive(messages(content()))
    assert [reply.content["config"]["seen"] for reply in again] == [2000, 2002, 2004]


def test_an_exception_becomes_an_error_with_a_fixed_text():
    def train(message, context):
        if context.node_id == 1001:
            raise ValueError("a record's own words")
        return echo(message, context)

    replies = grid_of(train).send_and_receive(messages(content()))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.reason == "the client app raised an exception"
    assert "words" not in repr(replies[1])
    assert "ValueError" not in repr(replies[1])
    assert protocol.read_refusal(replies[1]) == ("", replies[1].error.code, "no update arrived")


def test_a_client_may_refuse():
    replies = grid_of(lambda message, _: Message(Error(1001, "no"), reply_to=message)).send_and_receive(
        messages(content())
    )
    assert [reply.error.code for reply in replies] == [1001] * 3


def test_replies_are_pulled_once():
    grid = grid_of(echo)
    ids = list(grid.push_messages(messages(content())))
    assert len(list(grid.pull_messages(ids[:1]))) == 1
    assert len(list(grid.pull_messages(ids))) == 2
    assert list(grid.pull_messages([*ids, "unknown"])) == []


def test_the_private_parts_of_flower_are_where_we_touch_them():
    message = Message(RecordDict(), 1000, MessageType.QUERY)
    assert {"_message_id", "_run_id", "_src_node_id"} <= set(message.metadata.__dict__)
    assert message.metadata.run_id == 7  # from TaskIdentity
    message.metadata.__dict__["_message_id"] = "mine"
    assert message.metadata.message_id == "mine"


def test_both_apps_run_unmodified_in_one_thread():
    client, server = ClientApp(), ServerApp()
    found = {}

    @client.query()
    def hello(message, context):
        found.setdefault("threads", set()).add(threading.get_ident())
        return Message(RecordDict({"config": ConfigRecord(dict(context.node_config))}), reply_to=message)

    @server.main()
    def main(grid, context):
        asked = [Message(RecordDict(), node, MessageType.QUERY) for node in grid.get_node_ids()]
        found["parts"] = [dict(reply.content["config"]) for reply in grid.send_and_receive(asked)]
        found["config"] = dict(context.run_config)

    run_in_process(server, client, 3, {"recipe": "x"})
    assert found["parts"] == [{"partition-id": i, "num-partitions": 3} for i in range(3)]
    assert found["config"] == {"recipe": "x"}
    assert found["threads"] == {threading.get_ident()}


@pytest.mark.parametrize("shape", [(2, 3), (5,), (1,), (3, 0), ()])
def test_arrays_travel_as_flower_writes_them(shape):
    state = {"a": torch.randn(shape), "b": torch.randn(4, 7)}
    assert protocol.to_arrays(state) == ArrayRecord(state)
    state["b"] = torch.randn(7, 4).t()  # Flower writes this one column by column
    for record in (protocol.to_arrays(state), ArrayRecord(state)):
        back = protocol.from_arrays(record, state)
        assert all(torch.equal(back[name], value) for name, value in state.items())


def test_arrays_that_are_not_what_they_say_are_refused():
    like = {"a": torch.zeros(2, 3)}
    good = protocol.to_arrays({"a": torch.ones(2, 3)})["a"].data
    huge = protocol.to_arrays({"a": torch.ones(1)})["a"].data.replace(b"(1,), }      ", b"(9999999,), }")
    other = protocol.to_arrays({"a": torch.ones(3, 2)})["a"].data
    for data in (good[:-1], good + b"x", good[10:], b"", other, huge, b"PK\x03\x04" + good):
        record = protocol.to_arrays(like)
        record["a"].data = data
        with pytest.raises(Refused):
            protocol.from_arrays(record, like)


def test_values_that_are_not_finite_are_refused():
    for value in (float("nan"), float("inf")):
        with pytest.raises(Refused):
            protocol.from_arrays(protocol.to_arrays({"a": torch.tensor([1.0, value])}), {"a": torch.zeros(2)})


@pytest.mark.parametrize("exact", [True, False])
def test_one_thread_inside_when_the_same_bits_are_asked_for(exact):
    def counts():
        return [one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"], torch.get_num_threads()

    try:
        torch.set_num_threads(2)
        with threadpool_limits(2, user_api="blas"):
            before = counts()
            assert set(before[0]) == {2}
            with threads(exact):
                assert counts() == (([1] * len(before[0]), 1) if exact else before)
            assert counts() == before
    finally:
        torch.set_num_threads(1)
