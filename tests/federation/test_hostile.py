"""Replies and requests that nobody should trust: the run goes on with the others, and nothing private leaves."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedhead.client import app as client_module
from fedhead.common import protocol, refusals
from fedhead.common.errors import Refused, RunError
from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.events import GaussianEvent, from_json
from fedhead.simulations import federation
from fedhead.simulations.simulate import simulate

BAD = "holder-00001"


def with_replies(monkeypatch, change, bad=(BAD,)):
    """Let the named holders' replies to training pass through `change(reply)`."""
    real = client_module.app

    def app(message, context):
        reply = real(message, context)
        if message.metadata.message_type != "train" or reply.has_error():
            return reply
        return change(message, reply) if protocol.read_release(reply)[0] in bad else reply

    monkeypatch.setattr(federation, "client_app", SimpleNamespace(app=app, expect=client_module.expect))


def nan(_, reply):
    arrays = reply.content.array_records[protocol.ARRAYS]
    for name in list(arrays):
        arrays[name] = Array(np.full_like(arrays[name].numpy(), np.nan))
    return reply


def wrong_shape(_, reply):
    arrays = reply.content.array_records[protocol.ARRAYS]
    name = next(iter(arrays))
    arrays[name] = Array(np.zeros((3, 3), dtype=np.float32))
    return reply


def other_names(_, reply):
    reply.content[protocol.ARRAYS] = ArrayRecord({"evil": Array(np.zeros(3, dtype=np.float32))})
    return reply


def float64(_, reply):
    arrays = reply.content.array_records[protocol.ARRAYS]
    for name in list(arrays):
        arrays[name] = Array(arrays[name].numpy().astype(np.float64))
    return reply


def empty(message, reply):
    return Message(RecordDict({"nothing": ConfigRecord()}), reply_to=message)


def no_metrics(message, reply):
    del reply.content[protocol.METRICS]
    return reply


def raises(message, reply):
    raise RuntimeError("patient 4711 has the flu")


@pytest.mark.parametrize("change", [nan, wrong_shape, other_names, float64, empty, no_metrics, raises])
def test_one_bad_holder_does_not_stop_the_others(tiny, tmp_path, monkeypatch, change):
    with_replies(monkeypatch, change)
    result = simulate(tiny({"training.rounds": 3}), tmp_path / "run")
    for row in result.rounds:
        assert row["holders"] == 4
        assert [item["holder"] for item in row["refused"]] == [BAD]
    assert result.final["accuracy"] > result.majority["accuracy"]
    assert "4711" not in (tmp_path / "run" / "result.json").read_text()


def test_an_unusable_release_was_spent_all_the_same(tiny, tmp_path, monkeypatch):
    with_replies(monkeypatch, nan)
    result = simulate(tiny({"training.rounds": 3}), tmp_path / "run")
    spent = {entry["holder"]: len(entry["events"]) for entry in result.privacy}
    assert spent == {f"holder-{i:05d}": 3 for i in range(5)}


def test_an_event_that_can_t_be_read_counts_as_the_one_that_was_asked(tiny, tmp_path, monkeypatch):
    def garbage(_, reply):
        reply.content.config_records[protocol.RELEASE]["event"] = '{"mechanism": "free lunch"}'
        return reply

    with_replies(monkeypatch, garbage)
    result = simulate(tiny({"training.rounds": 3}), tmp_path / "run")
    assert {entry["epsilon"] for entry in result.privacy} == {result.privacy[0]["epsilon"]}
    assert [row["holders"] for row in result.rounds] == [5, 5, 5]


def test_a_holder_can_t_raise_its_own_weight(tiny, tmp_path, monkeypatch):
    simulate(tiny({"training.rounds": 2}), tmp_path / "honest")

    def greedy(_, reply):
        reply.content.metric_records[protocol.METRICS][protocol.WEIGHT] = 10**9
        return reply

    with_replies(monkeypatch, greedy)
    simulate(tiny({"training.rounds": 2}), tmp_path / "greedy")
    honest, greedy_head = (
        (tmp_path / name / "model" / "head.safetensors").read_bytes() for name in ("honest", "greedy")
    )
    assert honest == greedy_head


def test_all_bad_holders_end_the_run_in_one_line(tiny, tmp_path, monkeypatch):
    with_replies(monkeypatch, nan, bad=tuple(f"holder-{i:05d}" for i in range(5)))
    with pytest.raises(RunError) as caught:
        simulate(tiny({"training.rounds": 3}), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_only_the_agreed_parts_leave_a_holder(tiny, tmp_path, monkeypatch):
    seen = []

    def look(_, reply):
        seen.append(reply)
        return reply

    with_replies(monkeypatch, look)
    simulate(tiny({"training.rounds": 2}), tmp_path / "run")
    for reply in seen:
        content = reply.content
        assert set(content) == {protocol.ARRAYS, protocol.METRICS, protocol.RELEASE, protocol.LEDGER}
        assert set(content.config_records[protocol.LEDGER]) == {"sequence", "hash"}
        assert dict(content.metric_records[protocol.METRICS]) == {protocol.WEIGHT: 300}
        assert set(content.config_records[protocol.RELEASE]) == {"holder", "event"}
        assert isinstance(from_json(content.config_records[protocol.RELEASE]["event"]), GaussianEvent)


def test_silent_holders_count_as_having_spent(tiny, tmp_path, monkeypatch):
    from fedhead.simulations import engine

    real = engine.InProcessGrid.pull_messages
    rounds = []

    def lossy(self, ids):
        replies = list(real(self, ids))
        if replies and replies[0].metadata.message_type == "train":
            rounds.append(len(replies))
            return replies[1:]  # the first holder's reply never arrives
        return replies

    monkeypatch.setattr(engine.InProcessGrid, "pull_messages", lossy)
    result = simulate(tiny({"training.rounds": 3}), tmp_path / "run")
    assert [row["holders"] for row in result.rounds] == [4, 4, 4]
    entry = next(entry for entry in result.privacy if entry["holder"] == "holder-00000")
    noise = entry["events"][0]["noise_multiplier"]
    assert entry["epsilon"] == pytest.approx(epsilon([GaussianEvent(noise, 0.3, 3)], 1e-5).epsilon)


GOOD = {
    "run": "r", "round": 1, "task": "classification", "backbone": "b", "mechanism": "full-batch",
    "noise_multiplier": 1.0, "clipping_norm": 1.0, "local_steps": 1, "declared_records": 10,
    "optimizer": {"kind": "sgd"}, "learning_rate": 1.0,
}  # fmt: skip


def message_with(request, arrays=True):
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    content = RecordDict({protocol.CONFIG: ConfigRecord({"request": request})})
    if arrays:
        content[protocol.ARRAYS] = protocol.to_arrays({"w": torch.zeros(2)})
    content["metrics"] = MetricRecord({"x": 1})
    return Message(content, dst_node_id=2, message_type="train")


def test_a_good_request_is_read():
    request, arrays, digest, seen = protocol.read_request(message_with(json.dumps(GOOD)))
    assert len(digest) == 64
    assert seen is None
    assert request.noise_multiplier == 1.0
    assert protocol.from_arrays(arrays, {"w": torch.zeros(2)})["w"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": -1.0}, {"noise_multiplier": float("nan")}, {"clipping_norm": 0}, {"clipping_norm": None},
        {"clipping_norm": float("inf")}, {"sample_rate": 1.5}, {"sample_rate": 0.0}, {"local_steps": 0},
        {"local_steps": 2.5}, {"declared_records": 0}, {"learning_rate": -1}, {"mechanism": "free"}, {"unit": "family"},
        {"surprise": 1}, {"round": 0}, {"seed": -1}, {"optimizer": {"kind": "evil"}}, {"version": 2}, {"run": ""},
        {"local_steps": 10**9}, {"chunk": 0},
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_with_a_code(change):
    with pytest.raises(Refused) as caught:
        protocol.read_request(message_with(json.dumps({**GOOD, **change})))
    assert caught.value.code == refusals.INVALID_REQUEST
    assert str(caught.value) == refusals.TEXTS[refusals.INVALID_REQUEST]


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "3", '{"run": 1}'])
def test_no_request_at_all_is_refused(text):
    with pytest.raises(Refused):
        protocol.read_request(message_with(text))
    with pytest.raises(Refused):
        protocol.read_request(message_with(json.dumps(GOOD), arrays=False))


@pytest.mark.parametrize("every", [1, 5])
def test_a_run_that_diverges_says_so(tiny, tmp_path, every):
    config = tiny({"strategy": {"kind": "fedadam", "learning_rate": 1e300}, "run.evaluate_every": every})
    with pytest.raises(RunError, match=r"diverged. Lower training.optimizer.learning_rate"):
        simulate(config, tmp_path / "run")
