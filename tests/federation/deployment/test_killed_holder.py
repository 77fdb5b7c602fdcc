"""A data holder that is killed in every phase of a round, or hangs: the run ends, and the ledger is right."""

import os
import signal
import time
from collections import Counter

import pytest
from deployment_processes import descendants, until

pytestmark = pytest.mark.slow
# where it dies -> what its ledger then has of the round: the server gives such a round up, and what was reserved stays
# spent, whether or not a release was made
PHASES = {
    "ledger.reserve.committed": {"reserve": 1},
    "round.admitted": {"reserve": 1},
    "round.trained": {"reserve": 1},
    "ledger.release.committed": {"reserve": 1, "release": 1},
    "round.sending": {"reserve": 1, "release": 1},
}


def test_a_holder_that_is_killed_in_any_phase_comes_back_and_pays_what_the_crash_costs(federation):
    ours = federation(
        recipe={"training": {"rounds": 20}}, server={"least_holders": 2},
        holder={"limits": {"reply_at": 1.0}},
    )  # fmt: skip
    ours.up()
    submit = ours.submit()
    killed = {}
    for point in PHASES:
        order = ours.order("south", "executor", point)
        until(lambda order=order: not (order.exists() and submit.alive), what=point)
        assert submit.alive, submit.text()
        killed[point] = max(ours.charges("south"))
        ours.after_round(submit, killed[point] + 1)  # it is back: a run ends where too few answer for three rounds
    # then the node alone
    supervisor = next(one for one in ours.processes if one.name == "south")
    executor, node = supervisor.child("executor"), supervisor.child("node")
    os.kill(node, signal.SIGKILL)
    until(lambda: supervisor.child("node") not in (None, node), what="the node is started again")
    assert supervisor.child("executor") == executor  # it stays warm
    ours.after_round(submit, ours.rounds_done(submit) + 2)
    # then the whole holder, by its supervisor: the children end with it, and a new one takes their place
    children = descendants(supervisor.popen.pid)
    assert len(children) >= 2
    supervisor.kill()
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children), what="children end with the supervisor")
    ours.join("south")
    assert submit.wait() == 0, submit.text()

    rounds = ours.result()["rounds"]
    assert rounds[-1]["holders"] == 2
    charges = ours.charges("south")
    assert {point: dict(charges[number]) for point, number in killed.items()} == PHASES
    for number in killed.values():
        assert [row["holder"] for row in rounds[number - 1]["refused"]] == ["south"]
    entries = ours.entries("south")
    # a reserve has at most one release: never other bytes under the same charge
    assert max(Counter(one.of for one in entries if one.kind == "release").values()) == 1
    assert all(count["reserve"] == 1 for count in charges.values())
    # what a crash costs is the round that it broke; all of it together is within the plan
    planned = sum(one.kind == "reserve" for one in ours.entries("north"))
    assert sum(one.kind == "reserve" for one in entries) <= planned
    spent = {row["holder"]: row["epsilon"] for row in ours.result()["privacy"]}
    assert ours.spent("south") <= spent["south"] * 1.001 <= 3.003  # the server counts what may have been spent
    ours.audited()


ON_THE_WAY = ("node.received", "node.announced", "node.uploading")


def test_a_holder_that_hangs_or_dies_on_the_way_costs_one_deadline_and_comes_back(federation):
    ours = federation(recipe={"training": {"rounds": 32}}, server={"round_deadline": 6.0})
    joined = ours.up()
    opening = ours.order("north", "executor", "holder.opened")
    submit = ours.submit()
    ours.after_round(submit, 2)
    assert not opening.exists()  # it died as it opened its records; started anew, it is taken in
    until(lambda: ours.ledger("north").exists() and ours.charges("north"), what="north is taken in")
    broken = {}
    for point in ON_THE_WAY:
        order = ours.order("north", "node", point)
        until(lambda order=order: not (order.exists() and submit.alive), what=point)
        # what it got by then is not charged yet; what it sends is
        broken[point] = max(ours.charges("north")) + (point == "node.received")
        ours.after_round(submit, broken[point] + 1)
        until(lambda point=point: max(ours.charges("north")) > broken[point], what=f"it is back after {point}")
    hanging = [joined["south"].popen.pid, *descendants(joined["south"].popen.pid)]
    for pid in hanging:
        os.kill(pid, signal.SIGSTOP)
    began, number = time.monotonic(), ours.rounds_done(submit)
    ours.after_round(submit, number + 4)
    taken = time.monotonic() - began
    for pid in hanging:
        os.kill(pid, signal.SIGCONT)
    assert submit.wait() == 0, submit.text()
    rounds = ours.result()["rounds"]
    for point, number in broken.items():
        assert [row["holder"] for row in rounds[number - 1]["refused"]] == ["north"], (point, number)
        assert ours.charges("north").get(number, Counter())["reserve"] <= 1
    holders = [row["holders"] for row in rounds]
    assert 1 in holders
    assert holders[-1] == 2, holders
    assert taken < 6.0 + 4 * 10
    assert all(process.alive for process in joined.values())
    ours.audited()
