"""A deployed run whose coordinator ends at any instant goes on from its checkpoint: nothing is spent twice."""

import errno
import logging
import math
import os
import time
from types import SimpleNamespace

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedhead.client import app as client_app
from fedhead.common.config import changed, make_config, to_json
from fedhead.common.errors import InputError, RunError
from fedhead.common.privacy.ledger import Ledger
from fedhead.common.writing import write_aside
from fedhead.server import app as server_app
from fedhead.server import checkpoints, marks
from fedhead.server.app import Coordinator, Deployed
from fedhead.server.checkpoints import Checkpoint
from fedhead.server.desk import prepare_deployed
from fedhead.server.marks import read_marks
from fedhead.server.roster import Callers, Registered
from fedhead.simulations.engine import FIRST_NODE, SERVER_NODE, InProcessGrid

ROUNDS = 3


class Killed(BaseException):
    """The process ends here."""


class Link(InProcessGrid):
    """Delivers to deployed holders, and ends the coordinator at the n-th event."""

    def __init__(self, holders, recipe, die_at=math.inf):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SERVER_NODE
        self.names = {FIRST_NODE + i: name for i, name in enumerate(holders)}
        contexts = {
            FIRST_NODE + i: Context(
                run_id=1, node_id=FIRST_NODE + i, node_config={"holder": str(file)}, state=RecordDict(),
                run_config={"recipe": recipe},
            )
            for i, file in enumerate(holders.values())
        }  # fmt: skip
        super().__init__(client_app.app, contexts, 1)
        self.events, self.die_at, self.down = 0, die_at, set()
        self.trained = []

    def event(self):
        self.events += 1
        if self.events == self.die_at:
            raise Killed

    def registered(self):
        return [Registered(node, name, name not in self.down) for node, name in self.names.items()]

    def _deliver(self, message):
        self.event()
        if message.metadata.message_type == "train":
            self.trained.append((self.names[message.metadata.dst_node_id], message.metadata.ttl))
        reply = super()._deliver(message)
        self.event()
        return reply


@pytest.fixture
def federation(deployed, tmp_path, monkeypatch):
    """Two holders on the digits, and a maker of starts: run(folder, die_at) -> (link, outcome or None)."""
    made = {}
    for name in ("north", "south"):
        holder = deployed()
        holder.file.write_text(holder.file.read_text().replace("st-mary", name))
        made[name] = holder
    config = make_config(
        {
            "task": {"labels": [str(digit) for digit in range(10)]},
            "model": {"backbone": "module:torch.nn:Identity"},
            "data": {"source": "csv:nobody.csv", "test": {"source": "sklearn:digits"}, "declared_records": 1500},
            "privacy": {"epsilon": 1.0},
            "training": {"rounds": ROUNDS},
        },
        base=tmp_path,
    )
    config = changed(config, {"holders.count": 2, "run.baseline": False})
    key = to_json(config)
    desk = prepare_deployed(config, tmp_path / "cache")

    def run(folder, die_at=math.inf, resume=False, least=2, down=()):
        link = Link({name: holder.file for name, holder in made.items()}, key, die_at)
        link.down = set(down)
        write = checkpoints.write_aside

        def written(path, content):
            link.event()
            write(path, content)
            link.event()

        monkeypatch.setattr(checkpoints, "write_aside", written)
        roster = Callers(link, link.registered, least, 5.0, 5.0)
        told = []
        rules = Deployed(list(made), roster, least, 60.0, lambda rounds, metrics: told.append(len(rounds.history)))
        resumed = Checkpoint.read(folder, key) if resume else None
        coordinator = Coordinator(desk, link, key, folder, resumed, tmp_path / "marks.json", rules)
        try:
            return link, coordinator.run()
        except Killed:
            return link, None
        finally:
            monkeypatch.setattr(checkpoints, "write_aside", write)

    run.holders = made
    return run


def rows(holder):
    with Ledger(holder.ledger) as ledger:
        ledger.verify()
        return [(one.kind, one.run, one.round) for one in ledger.entries() if one.kind != "declare"]


def once(holder):
    """Every round of one run was reserved and released exactly once."""
    found = rows(holder)
    runs = {run for kind, run, _ in found if kind == "reserve"}
    reserved = [number for kind, _, number in found if kind == "reserve"]
    kinds = [kind for kind, *_ in found]
    return len(runs) == 1 and reserved == list(range(1, ROUNDS + 1)) and kinds.count("release") == ROUNDS


def test_a_deployed_run_has_checkpoints_deadlines_and_marks(federation, tmp_path):
    link, outcome = federation(tmp_path / "out")
    assert [row["holders"] for row in outcome.result.rounds] == [2] * ROUNDS
    assert {ttl for _, ttl in link.trained} == {60.0}
    assert all(map(once, federation.holders.values()))
    assert outcome.result.holders == []
    assert {row["holder"] for row in outcome.result.privacy} == {"north", "south"}
    assert max(row["epsilon"] for row in outcome.result.privacy) <= 1.0
    assert (tmp_path / "marks.json").exists()


def test_a_run_that_nobody_can_take_part_in_remembers_the_ledgers(federation, tmp_path):
    _, outcome = federation(tmp_path / "out")
    assert outcome is not None
    seen = read_marks(tmp_path / "marks.json")
    (tmp_path / "marks.json").unlink()
    for holder in federation.holders.values():
        holder.restart()
        holder.file.write_text(holder.file.read_text().replace("sklearn:digits", "csv:gone.csv"))
    with pytest.raises(RunError, match="no holder can take part"):
        federation(tmp_path / "again")
    assert read_marks(tmp_path / "marks.json") == seen
    assert set(seen) == {"north", "south"}


@pytest.mark.slow
def test_killed_at_any_instant_it_goes_on_and_nothing_is_spent_twice(federation, tmp_path):
    link, whole = federation(tmp_path / "whole")
    assert whole is not None
    # greetings and three rounds of two deliveries, with a checkpoint at the beginning and after each
    assert link.events >= 2 * (2 + 2 * ROUNDS) + 2 * (1 + ROUNDS)
    for die_at in range(1, link.events + 1):
        for holder in federation.holders.values():
            holder.restart()
            holder.ledger.unlink()
            (holder.ledger.parent / "ledger.made").unlink()
            for extra in holder.ledger.parent.glob("ledger.sqlite-*"):
                extra.unlink()
        (tmp_path / "marks.json").unlink(missing_ok=True)
        folder = tmp_path / f"killed-{die_at}"
        _, outcome = federation(folder, die_at)
        assert outcome is None
        _, outcome = federation(folder, resume=True)
        assert [row["holders"] for row in outcome.result.rounds] == [2] * ROUNDS, die_at
        first = {name: rows(holder) for name, holder in federation.holders.items()}
        assert all(map(once, federation.holders.values())), (die_at, first)
        assert all(torch.isfinite(value).all() for value in outcome.head.values())


def test_a_holder_that_is_gone_for_a_round_does_not_stop_the_run(federation, tmp_path):
    _, outcome = federation(tmp_path / "out", least=1, down=["south"])
    assert [row["holders"] for row in outcome.result.rounds] == [1] * ROUNDS
    assert {row["refused"][0]["text"] for row in outcome.result.rounds} == {"not connected when the round began"}
    assert {row["holder"] for row in outcome.result.privacy} == {"north"}  # nothing was asked of the other


def test_who_is_away_when_a_run_goes_on_may_have_spent_the_round_under_way(federation, tmp_path):
    link, outcome = federation(tmp_path / "out", die_at=16)  # both have answered the second round
    assert (len(link.trained), outcome) == (4, None)
    _, outcome = federation(tmp_path / "out", resume=True, least=1, down=["south"])
    said = {row["holder"]: [event["round"] for event in row["events"]] for row in outcome.result.privacy}
    assert said == {"north": [1, 2, 3], "south": [1, 2]}
    assert [number for kind, _, number in rows(federation.holders["south"]) if kind == "reserve"] == [1, 2]


def test_too_few_updates_leave_the_head_and_end_the_run_before_more_is_spent(federation, tmp_path, monkeypatch):
    south = federation.holders["south"]
    south.file.write_text(south.file.read_text().replace("[limits]", "[limits]\nclipping_norm_max = 0.001"))
    with pytest.raises(RunError, match="round 1 got 1 of at least 2 updates"):
        federation(tmp_path / "out", least=2)
    kinds = [kind for kind, *_ in rows(federation.holders["north"])]
    assert (kinds.count("reserve"), kinds.count("release")) == (1, 1)


def failing(number, times):
    """A `write_aside` that fails so many times."""
    left = [times]

    def write(*arguments, **options):
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        write_aside(*arguments, **options)

    return write


@pytest.fixture
def slept(monkeypatch):
    """The seconds that a coordinator waits, without waiting."""
    found = []
    monkeypatch.setattr(server_app, "time", SimpleNamespace(**{**vars(time), "sleep": found.append}))
    return found


def warnings(caplog):
    found = [
        record for record in caplog.records if record.name == "fedhead.server" and record.levelno >= logging.WARNING
    ]
    assert not any(record.exc_info or "\n" in record.getMessage() for record in found)
    return [record.getMessage() for record in found]


@pytest.mark.parametrize(("module", "number"), [(checkpoints, errno.ENOSPC), (marks, errno.EDQUOT)])
def test_a_disk_that_is_full_for_a_moment_does_not_end_a_run(
    federation, tmp_path, monkeypatch, caplog, slept, module, number
):
    monkeypatch.setattr(module, "write_aside", failing(number, 3))
    _, outcome = federation(tmp_path / "out")
    assert [row["holders"] for row in outcome.result.rounds] == [2] * ROUNDS
    assert all(map(once, federation.holders.values()))
    assert slept == [1.0] * 3
    (told,) = warnings(caplog)
    assert os.strerror(number) in told
    assert "Free some space" in told


@pytest.mark.parametrize(("number", "waits"), [(errno.ENOSPC, 60), (errno.EROFS, 0)])
@pytest.mark.parametrize("module", [checkpoints, marks])
def test_a_disk_that_stays_as_it_is_ends_a_run_before_anything_is_spent(
    federation, tmp_path, monkeypatch, slept, module, number, waits
):
    monkeypatch.setattr(module, "write_aside", failing(number, math.inf))
    with pytest.raises(OSError, match=os.strerror(number)):
        federation(tmp_path / "out")
    assert slept == [1.0] * waits
    assert not any(holder.ledger.exists() for holder in federation.holders.values())


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O"), InputError("no marks")]
)
def test_marks_that_can_not_be_written_do_not_hide_why_a_run_ended(
    federation, tmp_path, monkeypatch, caplog, slept, fault
):
    def unwritten(*_):
        raise fault

    monkeypatch.setattr(server_app, "write_marks", unwritten)
    _, outcome = federation(tmp_path / "out", die_at=1)
    assert outcome is None  # it was killed
    assert slept == []
    (told,) = warnings(caplog)
    assert str(fault) in told


def test_marks_that_can_not_be_written_at_the_end_are_told(federation, tmp_path, monkeypatch):
    real, written = server_app.write_marks, []

    def unwritten(path, seen):
        written.append(path)
        if len(written) == ROUNDS + 2:  # after the last round's own
            raise OSError(errno.EROFS, "read-only")
        real(path, seen)

    monkeypatch.setattr(server_app, "write_marks", unwritten)
    with pytest.raises(OSError, match="read-only"):
        federation(tmp_path / "out")
    assert len(written) == ROUNDS + 2
