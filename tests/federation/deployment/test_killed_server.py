"""`fedhead serve` and `fedhead submit` killed in the phases of a round: runs end, and no round is charged twice."""

import contextlib
import math
import random
import sqlite3
import time

import pytest
from deployment_processes import until

from fedhead.server.server_file import load_server

pytestmark = pytest.mark.slow
REPLY_AT = 1.5  # seconds that a holder takes for its part of a round; a phase can then be hit
ROUNDS = 8


def ends_as_planned(ours, out: str) -> None:
    """Every round is there, used and charged once at every holder, and nothing costs more than was planned."""
    result = ours.result(out)
    assert [row["round"] for row in result["rounds"]] == list(range(1, ROUNDS + 1))
    assert [row["holders"] for row in result["rounds"]] == [2] * ROUNDS
    assert all(math.isfinite(value) for value in result["final"].values())
    assert all(row["epsilon"] <= 3.0 for row in result["privacy"])
    for name in ours.holders:
        once = {"reserve": 1, "release": 1}
        assert ours.charges(name) == dict.fromkeys(range(1, ROUNDS + 1), once)
    ours.audited()


def test_a_server_that_is_killed_and_started_again_goes_on_by_itself(federation):
    ours = federation(
        server={"least_holders": 2}, recipe={"training": {"rounds": ROUNDS}}, holder={"limits": {"reply_at": REPLY_AT}}
    )
    joined = ours.up("north")

    def restart(seconds: float = 0.0, *phases: str, away: float = 0.0) -> None:
        """Kill the server after so many seconds, or as soon as the round is in one of the phases.

        `away`: as if it had been for so many seconds more; nobody could send it a heartbeat.
        """
        time.sleep(seconds)
        if phases:
            until(lambda: ours.phase() in phases, what=" or ".join(phases))
        ours.server.kill()
        assert not phases or ours.phase() in phases
        assert submit.alive
        with contextlib.closing(sqlite3.connect(load_server(ours.server_file).link_database)) as database, database:
            database.execute("UPDATE node SET online_until = online_until - ?", (away,))
        ours.serve()

    submit = ours.submit()
    ours.until_state(submit, "waiting")
    restart()  # before the run has asked the server for anything, or just then
    restart(1.0, "between")  # while the run waits for a second holder
    joined["south"] = ours.join("south")[0]
    ours.after_round(submit, 1)
    restart(0.0, "training", away=55.0)
    ours.after_round(submit, 2)
    restart(0.0)  # while the next request is pushed
    ours.after_round(submit, 3)
    restart(REPLY_AT + 0.3)  # while replies come in
    chance = random.Random(5)
    ours.after_round(submit, 4)
    restart(chance.uniform(0, 2.5))
    assert submit.wait() == 0, submit.text()
    ends_as_planned(ours, "out")
    assert all(process.alive for process in joined.values())


def test_a_submit_that_is_killed_goes_on_from_its_checkpoint(federation):
    ours = federation(
        server={"least_holders": 2}, recipe={"training": {"rounds": ROUNDS}}, holder={"limits": {"reply_at": REPLY_AT}}
    )
    ours.up("north")
    chance = random.Random(6)
    submit = ours.submit()
    ours.until_state(submit, "waiting")
    time.sleep(0.5)
    submit.kill()  # before anything was asked
    assert not ours.ledger("north").exists()
    ours.join("south")
    for number, seconds in ((1, 0.8), (2, 0.0), (4, REPLY_AT + 0.2), (5, chance.uniform(0, 2.5))):
        submit = ours.submit("out", "--resume")
        ours.after_round(submit, number)
        time.sleep(seconds)
        if number == 1:  # asked to end, as a system that shuts down does
            assert submit.terminate() == 143, submit.text()
            assert ours.state()["state"] == "stopped"
        else:
            submit.kill()
        assert not (ours.folder / "out" / "result.json").exists()
    submit = ours.submit("out", "--resume")
    assert submit.wait() == 0, submit.text()
    ends_as_planned(ours, "out")
