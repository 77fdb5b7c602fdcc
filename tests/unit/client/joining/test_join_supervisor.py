"""The supervisor with children that are small scripts: order, secrets, restarts, waits, giving up."""

import logging
import signal
import time
from types import SimpleNamespace

import pytest
from supervised import LISTENING, READY, Figures

from fedhead.client.joining import retry, supervisor
from fedhead.client.joining.process import Child
from fedhead.client.joining.supervisor import EXECUTOR, NODE, Supervisor


def test_the_node_starts_when_the_executor_is_ready_and_both_know_one_secret(bench):
    found = bench(node=LISTENING + "; say('arrived')")
    found.until(lambda: len(found.found(EXECUTOR, "heard")) == 2)
    (executor,), (node,) = found.found(EXECUTOR, "started"), found.found(NODE, "started")
    secret = node[1]
    assert len(bytes.fromhex(secret)) == 32
    assert found.found(EXECUTOR, "heard") == [[{"node": "127.0.0.1:1234", "secret": secret}], [{}]]
    for _, _, arguments, environment in (executor, node):
        assert arguments == []
        assert "a-folder" in environment
        assert not any(secret in value for value in environment)
    assert found.figures.running == {NODE: True, EXECUTOR: True}
    found.supervisor.stop()
    assert found.ended() == 0
    order = [line for line in found.notes.read_text().splitlines() if "told to end" in line]
    assert [found.loads(line)[0] for line in order] == [NODE, EXECUTOR]
    assert found.figures.running == {NODE: False, EXECUTOR: False}
    assert "online" in found.figures.events


def test_nothing_starts_the_node_before_the_executor_is_ready(bench):
    found = bench(executor="pass")
    found.until(lambda: found.found(EXECUTOR, "started"))
    time.sleep(0.3)  # nothing may happen
    assert found.found(NODE, "started") == []
    found.supervisor.stop()
    assert found.ended() == 0


def test_a_process_that_cannot_be_started_is_tried_again(bench, monkeypatch, caplog):
    tries = []

    def child(*args):
        tries.append(args[0])
        if len(tries) <= 2:
            raise OSError(12, "Cannot allocate memory")
        return Child(*args)

    monkeypatch.setattr(supervisor, "Child", child)
    found = bench()
    found.until(lambda: found.found(EXECUTOR, "heard"))
    assert tries == [EXECUTOR, EXECUTOR, EXECUTOR, NODE]
    assert caplog.messages[:2] == ["the training process can't be started (Cannot allocate memory)"] * 2


def test_a_node_that_ends_comes_back_with_a_fresh_secret_and_the_executor_stays(bench):
    found = bench(node=f"{LISTENING}\nif number == 1: time.sleep(0.2); os._exit(7)")
    found.until(lambda: len(found.found(EXECUTOR, "heard")) == 2)
    first, second = (started[1] for started in found.found(NODE, "started"))
    assert first != second
    assert [heard["secret"] for (heard,) in found.found(EXECUTOR, "heard")] == [first, second]
    assert len(found.found(EXECUTOR, "started")) == 1
    assert found.figures.restarts == [NODE]


def test_when_the_executor_ends_the_node_does_too_and_both_come_back(bench):
    found = bench(executor=f"{READY}\nif number == 1: time.sleep(0.5); os.kill(os.getpid(), 9)")
    found.until(lambda: len(found.found(NODE, "started")) == 2)
    assert found.found(NODE, "told to end") == [[signal.SIGINT]]
    assert len(found.found(EXECUTOR, "started")) == 2
    assert sorted(found.figures.restarts) == [EXECUTOR, NODE]


def test_a_reply_that_nobody_took_starts_the_node_again_and_an_old_one_does_not(bench):
    code = f"""{READY}
while not [line for line in open(notes) if '"heard"' in line]: time.sleep(0.02)
say("stuck", node="127.0.0.1:9")
say("stuck", node="127.0.0.1:1234")"""
    found = bench(executor=code)
    found.until(lambda: len(found.found(NODE, "started")) == 2)
    found.until(lambda: len(found.found(EXECUTOR, "heard")) == 2)
    assert found.found(NODE, "told to end") == [[signal.SIGINT]]
    assert len(found.found(EXECUTOR, "started")) == 1


@pytest.mark.parametrize("why", list(retry.REMEDIES))
def test_what_no_waiting_mends_ends_with_a_remedy(bench, caplog, why):
    with caplog.at_level(logging.ERROR, "fedhead.client"):
        found = bench(node=f"say('fatal', why={why!r}); time.sleep(0.5); os._exit(1)")
        assert found.ended() == 1
    assert caplog.messages[-1] == f"localhost:1 can't be joined: {why}. {retry.REMEDIES[why]}"
    assert len(found.found(NODE, "started")) == 1


def test_an_executor_that_never_gets_ready_is_given_up(bench, caplog):
    with caplog.at_level(logging.ERROR, "fedhead.client"):
        found = bench(executor="os._exit(1)", first_wait=0.01)
        assert found.ended() == 1
    assert "ended 5 times before it was ready" in caplog.messages[-1]
    assert len(found.found(EXECUTOR, "started")) == 5
    assert found.found(NODE, "started") == []


def test_waits_double_and_begin_anew_after_a_minute_of_good_work(monkeypatch):
    made = Supervisor({}, {}, {}, Figures())
    place = made._places[NODE]

    def wait(lived, good):
        place.child = SimpleNamespace(started=time.monotonic() - lived)
        place.good = good
        made._gone(NODE)
        return round(place.start - time.monotonic(), 1)

    assert [wait(1, True) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert wait(supervisor.GOOD_SECONDS - 1, True) == 30
    assert wait(supervisor.GOOD_SECONDS + 1, False) == 30  # it lived, and did nothing
    assert wait(supervisor.GOOD_SECONDS + 1, True) == 1
    assert wait(1, True) == 2
