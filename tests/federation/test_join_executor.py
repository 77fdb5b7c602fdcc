"""What the warm executor does with one message, and what it says about it; the node is a stand-in."""

import threading
import time

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedhead.client import app as client_app
from fedhead.client.checking import check_holder
from fedhead.client.joining import executor, pipe
from fedhead.common import protocol
from fedhead.common.errors import InputError
from fedhead.common.privacy.ledger import Ledger
from fedhead.common.refusals import STALE_ROUND, TEXTS, TRAINING_FAILED


class FakeTask:
    """A task whose message is at hand."""

    def __init__(self, message, context, push_error=None):
        self.message, self.context, self.push_error = message, context, push_error
        self.replies, self.finished = [], []

    def pull(self, holder):
        if isinstance(self.message, Exception):
            raise self.message
        return None if self.message is None else (self.message, self.context)

    def push(self, reply):
        if self.push_error is not None:
            raise self.push_error
        self.replies.append(reply)

    def finish(self, good):
        self.finished.append(good)


@pytest.fixture
def events(monkeypatch):
    said = []
    monkeypatch.setattr(pipe, "emit", lambda event, **fields: said.append({"event": event, **fields}))
    return said


@pytest.fixture
def holder(deployed):
    """A holder, and the context that join makes for it."""
    made = deployed()
    caught = []
    made.app = lambda message, context: caught.append(context) or client_app.app(message, context)
    made.caught = caught
    return made


def context_of(holder):
    from flwr.app import Context

    from fedhead.common.config import to_json

    return Context(
        run_id=1, node_id=2, node_config={"holder": str(holder.file)}, state=RecordDict(),
        run_config={"recipe": to_json(holder.config)},
    )  # fmt: skip


def test_a_round_is_told_with_what_it_cost_by_the_ledger(holder, events):
    task = FakeTask(holder.message(holder.request()), context_of(holder))
    context = executor.one(task, str(holder.file), holder.app)
    assert [task.finished, len(task.replies)] == [[True], 1]
    assert context is not None
    executor.report_budget(context)
    first, second = events
    assert (first["event"], first["outcome"], first["code"]) == ("round", "released", None)
    assert 0 < first["seconds"] < 600
    assert (second["event"], second["domain"]) == ("budget", "wards")
    assert 0 < second["spent"] < 3.0
    assert 0 < second["left"] < 3.0
    (found,) = [one.text for one in check_holder(holder.file, connect=False).findings if one.name == "budget"]
    assert f"left {int(second['left'] * 1000) / 1000:.3f}" in found  # what `fedhead check` says


def test_a_refused_round_is_told_with_its_code_and_no_budget(holder, events):
    message = holder.message(holder.request())
    message.metadata.created_at = time.time() - 1000
    message.metadata.ttl = 10.0
    task = FakeTask(message, context_of(holder))
    assert executor.one(task, str(holder.file), holder.app) is None
    assert [(one["event"], one["outcome"], one["code"]) for one in events] == [("round", "refused", STALE_ROUND)]


def test_a_hello_tells_that_the_records_are_ready(holder, events):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    task = FakeTask(Message(RecordDict(), 2, MessageType.QUERY), context_of(holder))
    assert executor.one(task, str(holder.file), holder.app) is None
    assert [(one["event"], one["good"]) for one in events] == [("prepared", True)]


def test_what_the_app_does_not_know_is_answered_with_a_fixed_text(holder, events):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    task = FakeTask(Message(RecordDict(), 2, "train.other"), context_of(holder))
    executor.one(task, str(holder.file), holder.app)
    (reply,) = task.replies
    assert reply.error.code == TRAINING_FAILED
    assert reply.error.reason == f'{{"holder": "st-mary", "text": "{TEXTS[TRAINING_FAILED]}"}}'


@pytest.mark.parametrize("records_open", [True, False])
def test_what_the_app_does_not_know_says_where_the_ledger_stands(holder, events, records_open):
    assert not holder.ask().has_error()
    with Ledger(holder.ledger) as ledger:
        end = ledger.mark("st-mary")
    if not records_open:
        holder.restart()
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    task = FakeTask(Message(RecordDict(), 2, "train.other"), context_of(holder))
    executor.one(task, str(holder.file), holder.app)
    (reply,) = task.replies
    assert (protocol.read_holder(reply), protocol.read_mark(reply)) == ("st-mary", end)


@pytest.mark.parametrize("error", [OSError("record 17"), InputError("/home/st-mary")])
def test_a_ledger_that_can_not_be_read_leaves_the_reply_without_a_mark(holder, events, monkeypatch, error):
    def unreadable(_):
        raise error

    monkeypatch.setattr(client_app, "load_holder", unreadable)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    task = FakeTask(Message(RecordDict(), 2, "train.other"), context_of(holder))
    executor.one(task, str(holder.file), holder.app)
    (reply,) = task.replies
    assert reply.error.reason == f'{{"holder": "", "text": "{TEXTS[TRAINING_FAILED]}"}}'


def test_an_exception_of_the_app_leaves_nothing_of_its_text(holder, events):
    def failing(message, context):
        raise ValueError("record 17 of /home/st-mary")

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    task = FakeTask(Message(RecordDict(), 2, MessageType.TRAIN), context_of(holder))
    executor.one(task, str(holder.file), failing)
    assert task.replies[0].error.reason == f'{{"holder": "st-mary", "text": "{TEXTS[TRAINING_FAILED]}"}}'
    assert events[0]["code"] == TRAINING_FAILED


@pytest.mark.parametrize(
    ("message", "push_error"), [(ConnectionError(), None), (None, None), ("own", ConnectionError())]
)
def test_a_task_that_goes_wrong_is_ended(holder, events, message, push_error):
    if message == "own":
        message = holder.message(holder.request())
    task = FakeTask(message, context_of(holder), push_error)
    if message is None:
        assert executor.one(task, str(holder.file), holder.app) is None
    else:
        with pytest.raises(ConnectionError):
            executor.one(task, str(holder.file), holder.app)
    assert task.finished == [False]
    assert events == []


def test_an_executor_ends_between_two_tasks(events):
    desk = executor.Desk()
    ended = threading.Thread(target=executor.serve, args=(desk, "holder.toml", None), daemon=True)
    ended.start()
    desk.leave()
    ended.join(60)
    assert not ended.is_alive()


def test_a_node_that_is_not_there_is_waited_for(events):
    desk = executor.Desk()
    desk.heard({"node": "127.0.0.1:9", "secret": "ab" * 32})
    waiting = threading.Thread(target=executor.serve, args=(desk, "holder.toml", None), daemon=True)
    waiting.start()
    waiting.join(1.5)
    assert waiting.is_alive()
    assert events == []
    desk.leave()
    waiting.join(60)
    assert not waiting.is_alive()


def test_one_core_is_left_for_the_node(monkeypatch):
    for cores, threads in ((1, 1), (2, 2), (3, 2), (16, 15)):
        monkeypatch.setattr(executor.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert executor.threads() == threads
