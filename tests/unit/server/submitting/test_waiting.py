"""The rule for a server that is away: what is tried again, for how long, and how each kind of waiting ends."""

import signal
import socket
import threading
import time

import pytest
from flwr.proto.runtime_pb2 import GetNodesRequest, GetNodesResponse

from fedhead.common.errors import InputError, RunError
from fedhead.server.submitting import flower
from fedhead.server.submitting.waiting import Leaving, LinkLost, Stopped, TimeUp, Waiting, each

NODES = "/v1/runtime/get-nodes"
GOOD = GetNodesResponse().SerializeToString()


def waiting(seconds=30.0, refused=lambda: Stopped("refused"), lost=lambda: LinkLost("lost")):
    return Waiting(seconds, refused, lost)


def ask(link, rule):
    return flower.runtime(link.address, "token", rule).GetNodes(GetNodesRequest())


def in_turn(*answers):
    left = list(answers)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def test_a_server_that_comes_back_is_found(away):
    away.answers[NODES] = GOOD
    threading.Timer(0.7, away.start).start()
    began = time.monotonic()
    ask(away, waiting())
    assert 0.6 < time.monotonic() - began < 10


@pytest.mark.parametrize("fault", [500, 502, 503, 504, 429, 408, -1], ids=str)
def test_what_passes_is_tried_again(link, fault):
    link.answers[NODES] = in_turn(fault, fault, GOOD)
    rule = waiting()
    ask(link, rule)
    assert link.asked(NODES) == 3
    assert rule.failures == 2


@pytest.mark.parametrize("fault", [400, 404, 405, 412, 413, 422])
def test_what_another_try_will_not_change_is_not_tried_again(link, fault):
    link.answers[NODES] = fault
    with pytest.raises(RunError, match=f"HTTP {fault}"):
        ask(link, waiting())
    assert link.asked(NODES) == 1


@pytest.mark.parametrize("code", [401, 403])
def test_a_refusal_is_the_callers_error_and_no_signal(link, code):
    link.answers[NODES] = code
    raised = []
    before = signal.signal(signal.SIGINT, lambda *_: raised.append("SIGINT"))
    try:
        with pytest.raises(Stopped, match="refused"):
            ask(link, waiting())
    finally:
        signal.signal(signal.SIGINT, before)
    assert not raised
    assert link.asked(NODES) == 1


def test_patience_ends(away):
    began = time.monotonic()
    with pytest.raises(LinkLost):
        ask(away, waiting(0.5))
    assert 0.5 <= time.monotonic() - began < 5


def test_no_patience_is_one_try(link):
    link.answers[NODES] = 503
    with pytest.raises(LinkLost):
        ask(link, waiting(0.0))
    assert link.asked(NODES) == 1


def test_a_deadline_ends_waiting_without_an_error(away):
    rule = waiting()
    began = time.monotonic()
    with rule.within(0.5), pytest.raises(TimeUp):
        ask(away, rule)
    assert 0.4 < time.monotonic() - began < 5
    assert not rule.over


@pytest.mark.parametrize(("outer", "inner"), [(30.0, 0.3), (0.3, 30.0), (0.3, None)])
def test_the_sooner_of_two_deadlines_counts(outer, inner):
    rule = waiting()
    with rule.within(outer):
        with rule.within(inner):
            rule.pause(5.0)
            assert rule.over
        assert rule.over == (outer == 0.3)
    assert not rule.over


def test_a_deadline_that_is_past_does_not_keep_a_request_from_being_sent(link):
    link.answers[NODES] = GOOD
    rule = waiting()
    with rule.within(0.0):
        ask(link, rule)
        assert rule.over


def test_a_server_that_hangs_can_not_outlast_the_deadline():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        rule = waiting()
        client = flower.runtime(f"127.0.0.1:{silent.getsockname()[1]}", "token", rule)
        began = time.monotonic()
        with rule.within(1.0), pytest.raises(TimeUp):
            client.GetNodes(GetNodesRequest())
        assert time.monotonic() - began < 5


def test_leaving_ends_requests_of_other_threads(away):
    rule, ended = waiting(), []

    def request():
        try:
            ask(away, rule)
        except Leaving:
            ended.append(True)

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    time.sleep(0.3)
    rule.leave()
    thread.join(5)
    assert ended


def test_a_signal_leaves_at_once(away):
    class Interrupt(Exception):
        pass

    def raises(*_):
        raise Interrupt

    before = signal.signal(signal.SIGALRM, raises)
    began = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.6)
        with pytest.raises(Interrupt):
            ask(away, waiting())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 2


def test_a_proxy_of_the_environment_is_not_asked(link, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    link.answers[NODES] = GOOD
    ask(link, waiting(0.0))


def test_each_does_all():
    done = []
    each(done.append, range(50), workers=4)
    assert sorted(done) == list(range(50))


@pytest.mark.parametrize("count", [1, 20])
def test_each_raises_the_first_failure_and_does_no_more(count):
    seen = []

    def work(item):
        seen.append(item)
        raise InputError("no")

    with pytest.raises(InputError):
        each(work, range(count))
    assert len(seen) <= 2


def test_each_lets_its_other_threads_end_after_a_signal():
    class Interrupt(Exception):
        pass

    def raises(*_):
        raise Interrupt

    done = []

    def work(item):
        time.sleep(0.05)
        done.append(item)

    others = set(threading.enumerate())
    before = signal.signal(signal.SIGALRM, raises)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupt):
            each(work, range(2000))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    end = time.monotonic() + 40  # all of the work would take 50
    while set(threading.enumerate()) - others and time.monotonic() < end:
        time.sleep(0.02)
    assert not set(threading.enumerate()) - others
    assert len(done) < 2000
