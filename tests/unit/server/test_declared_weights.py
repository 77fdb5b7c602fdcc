"""Data holders of different size: each divides by its own constant, and weighs what the coordinator's file says."""

import logging
from types import SimpleNamespace

import pytest
import torch
from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from fedhead.common import protocol
from fedhead.common.privacy.events import GaussianEvent
from fedhead.common.round_request import RoundRequest
from fedhead.server.cohorts import Cohorts
from fedhead.server.rounds import Rounds, around

NODES = {"st-jude": 11, "st-mary": 12}
LIKE = {"weight": torch.zeros(2, 2)}
SUMS = {"st-jude": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "st-mary": torch.tensor([[-8.0, 8.0], [0.5, 40.0]])}
EVENT = GaussianEvent(1.0, 1.0, 1).to_json()


def request(number):
    return RoundRequest(
        run="r", round=number, task="classification", backbone="b", mechanism="full-batch", noise_multiplier=1.0,
        clipping_norm=1.0, local_steps=1, declared_records=1000, optimizer={"kind": "sgd"}, learning_rate=1.0,
    )  # fmt: skip


def held(divisors, declared, *, weights=None, number=1, **changes):
    """One or more rounds in which each holder releases its sum over its divisor; gives the rounds and the last head."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
    roster = SimpleNamespace(
        present=lambda names: {name: NODES[name] for name in names}, missed=lambda _: None, marks=dict
    )
    rounds = Rounds(Cohorts(list(NODES), 2, 0), roster, request, LIKE, declared=declared, **changes)
    strategy = around(FedAvg, {}, rounds)
    names = {node: name for name, node in NODES.items()}

    def release(message: Message) -> Message:
        name = names[message.metadata.dst_node_id]
        weight = (weights or divisors)[name]
        content = protocol.released({"weight": SUMS[name] / divisors[name]}, weight, name, EVENT)
        return protocol.release(message, content, None)

    for one in range(1, number + 1):
        messages = list(strategy.configure_train(one, protocol.to_arrays(LIKE), None, SimpleNamespace()))
        arrays, _ = strategy.aggregate_train(one, [release(message) for message in messages])
    return rounds, protocol.from_arrays(arrays, LIKE)["weight"]


SAME = dict.fromkeys(NODES, 1000)
OWN = {"st-jude": 1000, "st-mary": 4000}
COMMON = dict.fromkeys(NODES, 2500)  # the mean of the two: the sum over all records is divided alike


def test_own_constants_give_the_head_of_one_common_divisor():
    rounds, head = held(OWN, {"st-mary": 4000})
    assert torch.allclose(head, held(COMMON, None)[1], rtol=1e-5)
    assert torch.allclose(head, sum(SUMS.values()) / 5000, rtol=1e-5)
    assert rounds.notes == {}


def test_without_the_setting_a_record_counts_a_quarter_and_the_run_says_so_once(caplog):
    with caplog.at_level(logging.WARNING, "fedhead.server"):
        rounds, head = held(OWN, {}, number=3)
    assert torch.allclose(head, (SUMS["st-jude"] + SUMS["st-mary"] / 4) / 2000, rtol=1e-5)
    assert list(rounds.notes) == ["st-mary"]
    note = rounds.notes["st-mary"]
    for text in ("divides by 4000", "weigh 1000", "0.25 times", "declared_records.st-mary = 4000 in server.toml"):
        assert text in note
    assert [one.getMessage() for one in caplog.records if one.name == "fedhead.server"] == [note]


def test_a_setting_that_the_holder_does_not_follow_is_said_too():
    rounds, _ = held(SAME, {"st-mary": 4000})
    assert "divides by 1000 records and its updates weigh 4000" in rounds.notes["st-mary"]
    assert "4 times" in rounds.notes["st-mary"]
    assert "limits.release.declared_records = 4000" in rounds.notes["st-mary"]


@pytest.mark.parametrize("weight", [0, -3, 2**60, 1e300, 2.5])
def test_a_weight_that_is_no_number_of_records_is_neither_used_nor_shown(weight):
    rounds, head = held(SAME, {}, weights={**SAME, "st-mary": weight})
    assert torch.allclose(head, sum(SUMS.values()) / 2000, rtol=1e-5)
    assert rounds.notes["st-mary"] == "st-mary sent a weight that is no number of records; its updates weigh 1000."


def test_neither_a_simulation_nor_uniform_weights_have_notes():
    assert held(OWN, None)[0].notes == {}
    rounds, head = held(OWN, {"st-mary": 4000}, uniform=True)
    assert rounds.notes == {}
    assert torch.allclose(head, (SUMS["st-jude"] / 1000 + SUMS["st-mary"] / 4000) / 2, rtol=1e-5)
