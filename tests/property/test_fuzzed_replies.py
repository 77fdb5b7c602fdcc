"""Whatever holders reply: the round goes on with the good ones, all that may have left counts, nothing crashes."""

import json
import math
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedhead.common import protocol
from fedhead.common.config import make_config
from fedhead.common.errors import RunError
from fedhead.common.npy import read_npy
from fedhead.common.privacy.events import CountEvent, NoPrivacyEvent, from_json
from fedhead.common.privacy.ledger import Mark
from fedhead.common.refusals import (
    BEYOND_BUDGET,
    CHANGED_ROUND,
    NO_LEDGER,
    STALE_ROUND,
    TEXTS,
    TRAINING_FAILED,
)
from fedhead.common.round_request import RoundRequest
from fedhead.server import rounds as rounds_module
from fedhead.server.cohorts import Cohorts
from fedhead.server.metrics import estimate
from fedhead.server.roster import Everybody
from fedhead.server.rounds import Rounds, around
from fedhead.server.spending import account

MAYBE_SPENT = {NO_LEDGER, TRAINING_FAILED, STALE_ROUND, CHANGED_ROUND}  # nobody knows better at the server

ODD = run_path(str(Path(__file__).with_name("odd_replies.py")))
ARRAYS, ASKED, CODES, EVENTS, MARKS, REASONS, RECORDS, USABLE, VALUES, WEIGHTS = (
    ODD[name]
    for name in (
        "ARRAYS", "ASKED", "CODES", "EVENTS", "MARKS", "REASONS", "RECORDS", "USABLE", "VALUES", "WEIGHTS",
    )
)  # fmt: skip
NAMES = ["a", "b", "c", "d"]
NODES = {name: 10 + number for number, name in enumerate(NAMES)}
LIKE = {"w": torch.zeros(3, 2), "b": torch.zeros(3)}
NOISE, DECLARED = 20.0, 300
COUNTED = CountEvent(20.0, 1.0, 1)
FIXED = {*TEXTS.values(), "no update arrived", "the update can't be used", "no reply arrived"}


class Reply(NamedTuple):
    """A holder's reply: what of it differs from a good one."""

    kind: str = "good"  # or "silent", "error", "odd"
    arrays: str = "good"
    notes: Any = None  # changes of the release's notes
    metrics: Any = None
    mark: Any = None
    records: str = "all"
    code: int = 0
    reason: str = ""


def request_of(number):
    return RoundRequest(
        run="r", round=number, task="classification", backbone="b", mechanism="full-batch", noise_multiplier=NOISE,
        clipping_norm=0.3, local_steps=2, declared_records=DECLARED, optimizer={"kind": "sgd"}, learning_rate=1.0,
        plan_steps=100, metrics_noise=20.0,
    )  # fmt: skip


@st.composite
def replies(draw):
    """One holder's reply, good in most respects."""
    kind = draw(st.sampled_from(["good", "good", "silent", "error", "odd", "odd", "odd"]))
    if kind == "error":
        return Reply(kind, code=draw(st.sampled_from(CODES)), reason=draw(st.sampled_from(REASONS) | st.text()))
    if kind != "odd":
        return Reply(kind)
    part = draw(st.sampled_from(["arrays", "event", "count", "holder", "weight", "mark", "records"]))
    return {
        "arrays": lambda: Reply(kind, arrays=draw(st.sampled_from(sorted(ARRAYS)))),
        "event": lambda: Reply(kind, notes={"event": draw(st.sampled_from(EVENTS) | st.text())}),
        "count": lambda: Reply(kind, notes={"correct": draw(st.sampled_from(VALUES) | st.floats())}),
        "holder": lambda: Reply(kind, notes={"holder": draw(st.sampled_from(["b", "", 7]))}),
        "weight": lambda: Reply(kind, metrics=draw(st.sampled_from(WEIGHTS) | st.integers() | st.floats())),
        "mark": lambda: Reply(kind, mark=draw(st.sampled_from(MARKS))),
        "records": lambda: Reply(kind, records=draw(st.sampled_from(RECORDS))),
    }[part]()


def content_of(reply):
    notes = {"holder": "a", "event": ASKED.to_json(), "correct": 5.0, **(reply.notes or {})}
    records = {
        protocol.ARRAYS: ArrayRecord(ARRAYS[reply.arrays]),
        protocol.METRICS: MetricRecord({protocol.WEIGHT: DECLARED if reply.metrics is None else reply.metrics}),
        protocol.RELEASE: ConfigRecord(notes),
    }
    if reply.mark is not None:
        records[protocol.LEDGER] = ConfigRecord({"sequence": reply.mark[0], "hash": reply.mark[1]})
    numbers, arrays = MetricRecord({"x": 1}), ArrayRecord({"x": Array(np.ones(3, np.float32))})
    odd = {
        "extra": {"more": ConfigRecord({"x": 1})}, "extra arrays": {"more": arrays}, "extra metrics": {"more": numbers},
        "release is metrics": {protocol.RELEASE: numbers}, "release is arrays": {protocol.RELEASE: arrays},
        "mark is arrays": {protocol.LEDGER: arrays}, "mark is metrics": {protocol.LEDGER: numbers},
        "mark is empty": {protocol.LEDGER: ConfigRecord()}, "arrays are config": {protocol.ARRAYS: ConfigRecord()},
    }  # fmt: skip
    records.update(odd.get(reply.records, {}))
    records.pop(reply.records.removeprefix("no "), None)
    return RecordDict({} if reply.records == "nothing" else records)


def usable(reply):
    """Whether a reply counts in the round: the rules once more."""
    if reply.kind in ("silent", "error"):
        return False
    weight = reply.metrics
    return reply.arrays in USABLE and reply.records in ("all", "mark is empty") and not isinstance(weight, list)


def costs(texts):
    """The sum of steps / noise^2 of some events; infinite without privacy."""
    events = [from_json(text) for text in texts]
    if any(isinstance(event, NoPrivacyEvent) for event in events):
        return math.inf
    return math.fsum(event.steps / max(event.noise_multiplier, 1e-150) ** 2 for event in events)


def play(holders):
    """One round with these replies, and everything that must be true of it."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    rounds = Rounds(Cohorts(NAMES, len(NAMES), 0), Everybody(NODES), request_of, LIKE)
    rounds.marks = {name: Mark(1, "f" * 64) for name in NAMES}
    strategy = around(FedAvg, {}, rounds)
    sent = protocol.to_arrays(LIKE)
    messages = list(strategy.configure_train(1, sent, ConfigRecord(), SimpleNamespace()))
    arrived = []
    for message, reply in zip(messages, holders, strict=True):
        if reply.kind == "error":
            arrived.append(Message(Error(reply.code, reply.reason), reply_to=message))
        elif reply.kind != "silent":
            arrived.append(Message(content_of(reply), reply_to=message))
    good = [reply for reply in holders if usable(reply)]
    arrays, told = None, ""
    try:
        arrays, _ = strategy.aggregate_train(1, reversed(arrived))
    except RunError as error:
        told = str(error)
    except Exception as error:
        raise AssertionError(f"the round crashed: {type(error).__name__}") from error
    if arrays is None:  # in one line, and only where there was nothing to go on with
        assert told
        assert "\n" not in told
        assert "4711" not in told
        assert len(told) < 1000
        assert not good or sum(reply.arrays == "large" for reply in good) > 1
    else:
        mean = np.mean([ARRAYS[reply.arrays]["w"].numpy().astype(np.float64) for reply in good], axis=0)
        assert list(arrays) == ["w", "b"]
        assert np.isfinite(arrays["w"].numpy()).all()
        np.testing.assert_allclose(arrays["w"].numpy(), mean, rtol=1e-5)
    (record,) = rounds.history
    assert record.holders == len(good)
    written_down(record, rounds, holders)
    return record


def written_down(record, rounds, holders):
    """The accounts of a round: nobody's release is left out, and none costs less than what was asked."""
    least = costs([ASKED.to_json(), COUNTED.to_json()])
    for name, reply in zip(NAMES, holders, strict=True):
        unspent = reply.kind == "error" and reply.code in set(TEXTS) - MAYBE_SPENT
        assert (name not in record.events) == unspent
        if not unspent:
            assert costs(record.events[name]) >= least
        assert sum(item["holder"] == name for item in record.refused) == (not usable(reply))
        assert usable(reply) or name in {item["holder"] for item in record.refused}
    assert {item["text"] for item in record.refused} <= FIXED
    assert set(record.counts) <= set(NAMES)
    assert all(type(value) is float and math.isfinite(value) for value in record.counts.values())
    for mark in rounds.marks.values():
        assert type(mark.sequence) is int
        assert len(mark.hash) == 64
    json.dumps([record.refused, record.events, record.counts], allow_nan=False)
    estimate(list(record.counts.values()), DECLARED, 0.1, 20.0)
    config = make_config(
        {"task": {"labels": ["0", "1"]}, "model": {"backbone": "module:torch.nn:Identity"},
         "data": {"source": "sklearn:digits", "declared_records": DECLARED}, "privacy": {"epsilon": 1.0}},
    )  # fmt: skip
    path, entries = account([record], config, {1})
    assert {entry["holder"] for entry in entries} == set(record.events)
    assert path[0] is not None
    assert not math.isnan(path[0])


FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(holders=st.lists(replies(), min_size=4, max_size=4))
def test_whatever_is_replied(holders):
    play(holders)


SINGLE = [
    *(Reply("odd", arrays=name) for name in ARRAYS),
    *(Reply("odd", notes={"event": event}) for event in EVENTS),
    *(Reply("odd", notes={"correct": value}) for value in VALUES),
    *(Reply("odd", metrics=weight) for weight in WEIGHTS),
    *(Reply("odd", mark=mark) for mark in MARKS),
    *(Reply("odd", records=name) for name in RECORDS),
    *(Reply("error", code=code, reason=reason) for code in (TRAINING_FAILED, BEYOND_BUDGET, 0) for reason in REASONS),
    *(Reply("error", code=code, reason='{"holder": "a", "text": "x"}') for code in CODES),
    Reply("silent"),
]


def test_one_bad_reply_among_good_ones():
    for number, reply in enumerate(SINGLE):
        holders = [Reply()] * 4
        holders[number % 4] = reply
        record = play(holders)
        assert record.holders >= 3


def test_only_bad_replies_end_in_one_line():
    for start in range(0, len(SINGLE), 4):
        play((SINGLE * 2)[start : start + 4])


# The wrong twins: what the server would be without one of its rules.


def believe(monkeypatch):
    monkeypatch.setattr(rounds_module, "_spends_more", lambda *_: True)


def forget_the_unusable(monkeypatch):
    monkeypatch.setattr(rounds_module, "UNSPENT", frozenset(TEXTS))


def trust_headers(monkeypatch):
    monkeypatch.setattr(protocol, "_values", read_npy)


def trust_kinds(monkeypatch):
    real = protocol._record
    loose = {protocol.RELEASE, protocol.LEDGER}

    def record(message, name, kind):
        return message.content[name] if name in loose else real(message, name, kind)

    monkeypatch.setattr(protocol, "_record", record)


def trust_texts(monkeypatch):
    def read(message):
        reason = json.loads(message.error.reason)
        return reason["holder"], message.error.code, reason["text"]

    monkeypatch.setattr(protocol, "read_refusal", read)


def keep_what_is_not_finite(monkeypatch):
    monkeypatch.setattr(protocol, "from_arrays", lambda arrays, like: dict(arrays))


@pytest.mark.parametrize(
    ("twin", "reply"),
    [
        (believe, Reply("odd", notes={"event": EVENTS[1]})),
        (forget_the_unusable, Reply("error", code=TRAINING_FAILED)),
        (trust_headers, Reply("odd", arrays="brackets")),
        (trust_kinds, Reply("odd", records="release is arrays")),
        (trust_texts, Reply("error", code=BEYOND_BUDGET, reason=REASONS[9])),
        (keep_what_is_not_finite, Reply("odd", arrays="nan")),
    ],
)
def test_a_wrong_server_is_caught(monkeypatch, twin, reply):
    twin(monkeypatch)
    with pytest.raises(AssertionError):
        play([reply, Reply(), Reply(), Reply()])


def test_nobody_spends_in_another_holders_name():
    stolen = Reply("error", code=TRAINING_FAILED, reason='{"holder": "b", "text": "x"}')
    record = play([stolen, Reply("odd", notes={"event": EVENTS[3]}), Reply(), Reply()])
    assert record.events["a"] == [ASKED.to_json(), COUNTED.to_json()]
    assert record.events["b"][0] == EVENTS[3]
    assert [item["holder"] for item in record.refused] == ["a"]
