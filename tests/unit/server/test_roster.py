"""Who is asked in a deployment: holders come late, go, hang, come back, and say that they can't."""

from types import SimpleNamespace

import pytest
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity

from fedhead.common import progress, protocol
from fedhead.common.errors import RunError
from fedhead.common.privacy.ledger import Mark
from fedhead.common.refusals import NOT_READY, refusal
from fedhead.server import roster as module
from fedhead.server.roster import Callers, Everybody, Registered

NODES = {"north": 11, "south": 12, "west": 13}


class Link:
    """A grid and a clock: time goes on only while somebody sleeps, and things happen at set times."""

    def __init__(self, monkeypatch, online=("north", "south")):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.now, self.online, self.sent, self.answers, self.plan = 0.0, set(online), {}, {}, []
        self.mute: set[str] = set()
        self.refusing: set[str] = set()
        self.called: dict[str, str] = {}
        self.ledgers: dict[str, Mark] = {}
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep)
        monkeypatch.setattr(module, "time", clock)

    def at(self, when, what):
        self.plan.append((when, what))

    def _sleep(self, seconds):
        self.now += seconds
        for one in [one for one in self.plan if one[0] <= self.now]:
            self.plan.remove(one)
            one[1]()

    def registered(self):
        return [Registered(node, name, name in self.online) for name, node in NODES.items()]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            name = next(name for name, node in NODES.items() if node == message.metadata.dst_node_id)
            ids.append(f"{name}-{len(self.sent)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            message.metadata.__dict__["_src_node_id"] = 1
            self.sent[ids[-1]] = (name, message)
        return ids

    def pull_messages(self, ids):
        found = []
        for one in ids:
            name, message = self.sent[one]
            if name in self.mute or one in self.answers:
                continue
            self.answers[one] = True
            if name in self.refusing:
                reply = protocol.refuse(message, refusal(NOT_READY), name, self.ledgers.get(name))
            else:
                reply = protocol.hello(message, self.called.get(name, name), self.ledgers.get(name))
            found.append(reply)
        return found

    def greetings(self, name):
        return sum(one == name for one, _ in self.sent.values())


@pytest.fixture
def link(monkeypatch):
    return Link(monkeypatch)


def callers(link, least=2, patience=100.0, greeting=50.0):
    return Callers(link, link.registered, least, patience, greeting)


def test_everybody_is_there_in_a_simulation():
    assert Everybody(NODES).present(["north", "west"]) == {"north": 11, "west": 13}


def test_those_who_answer_are_asked_and_are_greeted_once(link):
    roster = callers(link)
    for _ in range(3):
        assert roster.present(list(NODES)) == {"north": 11, "south": 12}
    assert [link.greetings(name) for name in NODES] == [1, 1, 0]
    assert roster.names() == ["north", "south"]


def test_only_those_of_the_cohort_are_asked(link):
    assert callers(link, least=1).present(["south", "west"]) == {"south": 12}


def test_the_beginning_waits_for_all_who_are_connected(link):
    link.online = set(NODES)
    link.mute.add("west")
    link.at(20, link.mute.clear)
    assert callers(link).present(list(NODES)) == NODES
    assert link.now >= 20


def test_a_late_joiner_is_taken_in_and_nobody_waits_for_it(link):
    roster = callers(link)
    roster.present(list(NODES))
    link.online.add("west")
    link.mute.add("west")
    assert roster.present(list(NODES)) == {"north": 11, "south": 12}  # it is still opening its records
    assert link.now < 1
    link.mute.clear()
    assert roster.present(list(NODES)) == NODES


def test_who_missed_a_round_is_asked_again_only_after_an_answer(link):
    roster = callers(link, least=1)
    roster.present(list(NODES))
    link.mute.add("south")
    roster.missed(["south"])
    before = link.now
    for _ in range(3):
        assert roster.present(list(NODES)) == {"north": 11}
    assert link.now == before
    assert link.greetings("south") == 2  # one more, not one a round
    link.mute.clear()
    assert roster.present(list(NODES)) == {"north": 11, "south": 12}


def test_a_greeting_that_got_lost_is_sent_again(link):
    roster = callers(link, least=1)
    roster.present(list(NODES))
    link.mute.add("south")
    roster.missed(["south"])
    roster.present(list(NODES))
    link.now += 51
    roster.present(list(NODES))
    assert link.greetings("south") == 3


def test_too_few_are_waited_for_until_they_are_back(link):
    roster = callers(link)
    roster.present(list(NODES))
    link.online.discard("south")
    link.at(30, lambda: link.online.add("south"))
    assert roster.present(list(NODES)) == {"north": 11, "south": 12}
    assert 30 <= link.now < 35


def test_too_few_for_too_long_end_the_run_in_one_line(link):
    link.online = {"north"}
    with pytest.raises(RunError, match=r"1 of at least 2 holders were there within 100 s\. Start the others"):
        callers(link).present(list(NODES))
    assert 100 <= link.now < 102


def test_a_holder_that_hangs_at_the_beginning_delays_it_by_the_patience_only(link):
    link.online = set(NODES)
    link.mute.add("west")
    assert callers(link).present(list(NODES)) == {"north": 11, "south": 12}
    assert 50 <= link.now <= 52  # its first greeting is void then; the next one is not waited for
    assert link.greetings("west") == 2


def test_a_holder_that_can_not_take_part_is_told_and_greeted_again_later(link):
    link.refusing.add("south")
    roster = callers(link, least=1)
    assert roster.present(list(NODES)) == {"north": 11}
    assert roster.turned_away == {"south": f"{NOT_READY} the holder's records can't be opened; its own log says why"}
    roster.present(list(NODES))
    assert link.greetings("south") == 1
    link.refusing.clear()
    link.now += module.AGAIN_SECONDS + 1
    roster.present(list(NODES))
    assert roster.present(list(NODES)) == {"north": 11, "south": 12}
    assert not roster.turned_away


def test_when_all_refuse_nobody_waits(link):
    link.online = set(NODES)
    link.refusing = set(NODES)
    with pytest.raises(RunError, match=r"no holder can take part \(north: 10\d\d "):
        callers(link).present(list(NODES))
    assert link.now < 2


def test_a_node_has_the_name_of_its_key_not_the_one_it_says(link):
    link.called["south"] = "north"
    roster = callers(link, least=1)
    assert roster.present(list(NODES)) == {"north": 11}
    assert "another name than its key file" in roster.turned_away["south"]


def test_an_error_of_the_link_itself_is_no_presence(link, monkeypatch):
    roster = callers(link, least=1)
    answer = link.pull_messages

    def unavailable(ids):
        return [
            Message(Error(5, "Node Unavailable"), reply_to=link.sent[one][1]) if one.startswith("south") else reply
            for one in ids
            for reply in (answer([one]) or [None])
            if reply is not None
        ]

    monkeypatch.setattr(link, "pull_messages", unavailable)
    assert roster.present(list(NODES)) == {"north": 11}


def test_the_bar_of_holders_is_full_when_the_run_begins(link):
    told = []
    with progress.listening(lambda *said: told.append(said)):
        ours = callers(link, least=2)
        assert len(ours.present(["north", "south"])) == 2
        assert told[-1][:3] == ("holders", 2, 2)
        seen = len(told)
        ours.present(["north", "south"])
    assert len(told) == seen  # nobody is waited for in later rounds


def test_where_a_ledger_stands_is_kept_from_every_answer(link, monkeypatch):
    north, older, south = Mark(9, "a" * 64), Mark(7, "b" * 64), Mark(4, "c" * 64)
    link.ledgers = {"north": north, "south": south}
    link.refusing = {"south"}
    roster = callers(link, least=1)
    roster.present(["north", "south"])
    assert roster.marks() == {"north": north, "south": south}
    link.ledgers = {"north": older}
    roster.missed(["north"])
    roster.present(["north"])
    assert roster.marks() == {"north": north, "south": south}  # what was seen is not forgotten for an older one
    assert Everybody(NODES).marks() == {}


def test_a_holder_with_anothers_key_does_not_say_where_anothers_ledger_is(link):
    link.called, link.ledgers = {"south": "north"}, {"south": Mark(40, "d" * 64)}
    roster = callers(link, least=1)
    roster.present(["north", "south"])
    assert roster.turned_away["south"]
    assert roster.marks() == {}
