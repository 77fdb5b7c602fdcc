"""What a round counts as spent, and when a run ends that gets nowhere, by messages that a link makes up itself."""

import time
from types import SimpleNamespace

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from fedhead.common import protocol
from fedhead.common.errors import RunError
from fedhead.common.privacy.events import GaussianEvent, NoPrivacyEvent, PoissonEvent
from fedhead.common.privacy.ledger import Mark
from fedhead.common.refusals import BEYOND_BUDGET, LITTLE_NOISE, NOT_READY, OLD_LEDGER, refusal
from fedhead.common.round_request import RoundRequest
from fedhead.server.cohorts import Cohorts
from fedhead.server.rounds import Rounds, around

NODES = {"north": 11, "south": 12, "west": 13}
LIKE = {"weight": torch.zeros(2, 2)}
EVENT = GaussianEvent(1.0, 1.0, 1).to_json()


class Roster:
    def __init__(self, there):
        self.there, self.gone, self.told = there, [], {}

    def marks(self):
        return self.told

    def present(self, wanted):
        return {name: NODES[name] for name in wanted if name in self.there}

    def missed(self, names):
        self.gone += names


def request(number, **changes):
    settings = {
        "run": "r", "round": number, "task": "classification", "backbone": "b", "mechanism": "full-batch",
        "noise_multiplier": 1.0, "clipping_norm": 1.0, "local_steps": 1, "declared_records": 10,
        "optimizer": {"kind": "sgd"}, "learning_rate": 1.0,
    }  # fmt: skip
    return RoundRequest(**{**settings, **changes})


def held(answers, *, there=tuple(NODES), least=1, done=0, again=None, rounds=1, marks=(), told=None, **changes):
    """Hold rounds with these answers, name -> function of the message; gives the rounds."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
    found = Rounds(Cohorts(list(NODES), 3, 0), Roster(there), lambda number: request(number, **changes), LIKE)
    found.least, found.deadline, found.done, found.again = least, 60.0, done, again
    found.marks.update(marks)
    found.roster.told = told or {}
    strategy = around(FedAvg, {}, found)
    for number in range(1, rounds + 1):
        messages = strategy.configure_train(number, protocol.to_arrays(LIKE), None, SimpleNamespace())
        names = {node: name for name, node in NODES.items()}
        replies = [answers[names[one.metadata.dst_node_id]](one) for one in messages]
        strategy.aggregate_train(number, [reply for reply in replies if reply is not None])
    return found


def released(name, event=EVENT, mark=None):
    def answer(message):
        return protocol.release(message, protocol.released(LIKE, 10, name, event), mark)

    return answer


def refused(code):
    return lambda message: protocol.refuse(message, refusal(code), "south")


def of_the_link(message):
    """As Flower's server makes it: from itself, and to the message of a node."""
    reply = Message(Error(3, "Message Unavailable"), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
    return reply


def restarted(message):
    return Message(Error(5, "the node was restarted"), reply_to=message)


def silent(_):
    return None


GOOD = {name: released(name) for name in NODES}


def test_the_links_own_word_is_no_holder():
    found = held({**GOOD, "south": of_the_link})
    record = found.history[0]
    assert set(record.events) == set(NODES)
    assert [row["holder"] for row in record.refused] == ["south"]
    assert found.roster.gone == ["south"]


def test_a_node_that_was_restarted_opens_its_records_before_it_is_asked_again():
    found = held({**GOOD, "south": restarted})
    assert found.roster.gone == ["south"]
    assert found.history[0].events["south"] == [EVENT]  # it may have been charged


def test_a_holder_that_refuses_is_asked_again():
    assert held({**GOOD, "south": refused(LITTLE_NOISE)}).roster.gone == []


def test_who_is_away_in_a_repeated_round_may_have_spent_it():
    whole = held(GOOD, there=("north", "west"))
    assert set(whole.history[0].events) == {"north", "west"}
    again = held(GOOD, there=("north", "west"), done=4, again=5, rounds=2)
    assert [set(record.events) for record in again.history] == [set(NODES), {"north", "west"}]


@pytest.mark.parametrize(
    ("code", "spent"), [(NOT_READY, True), (OLD_LEDGER, True), (BEYOND_BUDGET, False), (LITTLE_NOISE, False)]
)
def test_a_refusal_in_a_repeated_round_says_what_it_says(code, spent):
    found = held({**GOOD, "south": refused(code)}, again=1)
    assert ("south" in found.history[0].events) is spent
    assert "south" not in held({**GOOD, "south": refused(code)}).history[0].events


def test_too_few_updates_again_and_again_end_the_run():
    answers = {**GOOD, "south": silent, "west": silent}
    with pytest.raises(RunError, match="round 3 got 1 of at least 2 updates"):
        held(answers, least=2, rounds=5)
    with pytest.raises(RunError, match="round 1 got 1 of at least 2 updates"):  # nobody will come back
        held({**GOOD, "south": refused(LITTLE_NOISE), "west": refused(LITTLE_NOISE)}, least=2, rounds=5)
    assert len(held({**answers, "west": GOOD["west"]}, least=2, rounds=5).history) == 5


@pytest.mark.parametrize("times", [1, 2])
def test_a_node_that_is_restarted_in_the_first_round_does_not_end_the_run(times):
    """All holders are needed; in the first round the node process of one of them is ended, and comes back."""
    left = [restarted] * times

    def south(message):
        return (left.pop() if left else GOOD["south"])(message)

    found = held({**GOOD, "south": south}, least=3, rounds=3)
    assert [record.holders for record in found.history] == [2] * times + [3] * (3 - times)
    with pytest.raises(RunError, match="round 3 got 2 of at least 3 updates"):
        held({**GOOD, "south": restarted}, least=3, rounds=5)


def test_an_update_that_can_not_be_used_ends_the_run_in_the_first_round():
    with pytest.raises(RunError, match="round 1 got 2 of at least 3 updates"):
        held({**GOOD, "south": lambda message: protocol.hello(message, "south")}, least=3, rounds=5)


def test_an_older_mark_does_not_replace_a_newer_one():
    seen = {"north": Mark(7, "a" * 64)}
    older = {**GOOD, "north": released("north", mark=Mark(3, "b" * 64))}
    assert held(older, marks=seen).marks == seen
    newer = {**GOOD, "north": released("north", mark=Mark(9, "c" * 64))}
    assert held(newer, marks=seen).marks == {"north": Mark(9, "c" * 64)}


def test_a_mark_of_a_greeting_goes_with_the_next_request():
    told, asked = Mark(9, "c" * 64), []

    def north(message):
        asked.append(protocol.read_request(message).seen)
        return GOOD["north"](message)

    seen = {"north": Mark(7, "a" * 64), "south": Mark(2, "b" * 64)}
    found = held({**GOOD, "north": north}, marks=seen, told={"north": told, "south": Mark(1, "d" * 64)})
    assert asked == [told]
    assert found.marks == {"north": told, "south": seen["south"]}


def test_other_sampling_than_was_asked_for_has_no_bound():
    asked = {"mechanism": "poisson", "sample_rate": 0.1}
    said = PoissonEvent(0.5, 1.0, 0.2, 2)
    found = held({**GOOD, "north": released("north", said.to_json())}, **asked)
    assert found.history[0].events["north"] == [NoPrivacyEvent(2).to_json()]
    assert found.history[0].events["south"] == [PoissonEvent(1.0, 1.0, 0.1, 1).to_json()]


@pytest.mark.parametrize(
    "event",
    ["[" * 100_000, '{"schema": 1, "schema": 1}', "9" * 5000, '{"schema":1,"mechanism":"full-batch","steps":1e400}'],
)
def test_odd_events_count_as_what_was_asked(event):
    began = time.monotonic()
    assert held({**GOOD, "north": released("north", event)}).history[0].events["north"] == [EVENT]
    assert time.monotonic() - began < 20


def test_a_greeting_as_an_update_is_none():
    found = held({**GOOD, "south": lambda message: protocol.hello(message, "south")})
    assert found.history[0].holders == 2
    assert found.history[0].events["south"] == [EVENT]


def test_an_update_without_arrays_is_none():
    found = held({**GOOD, "south": lambda m: Message(RecordDict({"arrays": ArrayRecord()}), reply_to=m)})
    assert found.history[0].holders == 2
