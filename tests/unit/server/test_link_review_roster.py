"""Holders that keep silent, or whose node is lost, must not keep the others from beginning."""

from types import SimpleNamespace

import pytest
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity

from fedhead.common import protocol
from fedhead.common.errors import RunError
from fedhead.common.refusals import NOT_READY, refusal
from fedhead.server import roster as module
from fedhead.server.roster import Callers, Registered

NODES = {"north": 11, "south": 12, "west": 13}
PATIENCE = 100.0  # submit gives a greeting as long as it waits for holders


class Link:
    """A grid whose clock goes on only while somebody sleeps; `says` is what a holder's greeting is answered with."""

    def __init__(self, monkeypatch, **says):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.now, self.says, self.sent, self.coming = 0.0, says, {}, []
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep))

    def _sleep(self, seconds):
        self.now += seconds
        for when, what in [one for one in self.coming if one[0] <= self.now]:
            self.coming.remove((when, what))
            what()

    def registered(self):
        return [Registered(node, name, name in self.says) for name, node in NODES.items()]

    def push_messages(self, messages):
        self.now += 0.01  # a request takes its time
        ids = []
        for message in messages:
            ids.append(f"m-{len(self.sent)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            name = next(name for name, node in NODES.items() if node == message.metadata.dst_node_id)
            self.sent[ids[-1]] = (name, message)
        return ids

    def pull_messages(self, ids):
        found = []
        for one in ids:
            name, message = self.sent[one]
            said = self.says.get(name)
            if said is not None and said != "nothing":
                found.append(said(message))
        return found

    def greetings(self, name):
        return sum(one == name for one, _ in self.sent.values())


def good(name):
    return lambda message: protocol.hello(message, name)


def lost(message):
    return Message(Error(5, "Node Unavailable"), reply_to=message)


def callers(link, least=2):
    return Callers(link, link.registered, least, PATIENCE, PATIENCE)


def test_one_that_comes_late_and_keeps_silent_does_not_end_the_run(monkeypatch):
    link = Link(monkeypatch, north=good("north"))
    link.coming.append((59.0, lambda: link.says.update(west="nothing")))  # its greeting is void at 159
    link.coming.append((60.0, lambda: link.says.update(south=good("south"))))
    assert callers(link).present(list(NODES)) == {"north": 11, "south": 12}
    assert PATIENCE <= link.now <= PATIENCE + 1


def test_a_node_that_is_restarted_while_it_is_greeted_has_refused_nothing(monkeypatch):
    link = Link(monkeypatch, north=lost, south=lost, west=lambda m: protocol.refuse(m, refusal(NOT_READY), ""))
    roster = callers(link)
    link.coming.append((5.0, lambda: link.says.update(north=good("north"), south=good("south"))))
    assert roster.present(list(NODES)) == {"north": 11, "south": 12}
    assert link.now < 10
    assert set(roster.turned_away) == {"west"}


def test_a_node_that_is_always_lost_is_not_greeted_at_every_look(monkeypatch):
    link = Link(monkeypatch, north=good("north"), south=lost)
    with pytest.raises(RunError, match="1 of at least 2"):
        callers(link).present(list(NODES))
    assert link.greetings("south") <= PATIENCE / module.LOST_SECONDS + 1
