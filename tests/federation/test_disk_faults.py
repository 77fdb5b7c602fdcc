"""Faults of the disk under a deployed holder's ledger: a fixed code, no training, and a log that says what to do."""

import errno
import logging
import os
import shutil
import stat

import pytest

from fedhead.client.training import Trainer
from fedhead.common import protocol, refusals
from fedhead.common.failpoints import FAILPOINTS, installed
from fedhead.common.privacy.ledger import Ledger
from fedhead.common.refusals import TEXTS

LOG = "fedhead.client"


@pytest.fixture
def trained(monkeypatch):
    """Every round that is trained, whatever becomes of it."""
    real, calls = Trainer.round, []

    def watched(self, *args):
        calls.append(args)
        return real(self, *args)

    monkeypatch.setattr(Trainer, "round", watched)
    return calls


def refused(holder, caplog, codes, **changes):
    """Ask for a round that must be refused with one of the codes, with one line and a remedy in the holder's log."""
    caplog.clear()
    with caplog.at_level(logging.ERROR, LOG):
        reply = holder.ask(**changes)
    assert reply.has_error()
    _, code, text = protocol.read_refusal(reply)
    assert code in codes
    assert text == TEXTS[code]
    assert str(holder.folder) not in reply.error.reason
    lines = [record for record in caplog.records if record.name == LOG]
    assert lines
    told = lines[0].getMessage()
    assert "\n" not in told
    assert str(holder.ledger) in told
    assert any(remedy in told for remedy in (". Free", ". Give", ". Restore", ". Check", ". Install", ": start anew"))
    assert not any(record.exc_info for record in lines)  # the message is all: no traceback to read through
    return told


def rows(holder):
    """The kinds of all entries, of a chain that verifies."""
    ledger = Ledger(holder.ledger)
    try:
        assert ledger.verify() > 0
        return [entry.kind for entry in ledger.entries()]
    finally:
        ledger.close()


def failing(point, number):
    """A hook that fails like a disk at one point, and how often it did."""
    met = []

    def hook(name):
        if name == point:
            met.append(name)
            raise OSError(number, os.strerror(number))

    return hook, met


def after_crash(holder):
    """The file alone, as after a clean stop: everything is in it, nothing in a log beside it."""
    holder.restart()
    assert not list(holder.ledger.parent.glob("ledger.sqlite-*"))
    return holder.ledger.read_bytes()


REMEDIES = {errno.ENOSPC: "Free some space", errno.EROFS: "right to write", errno.EACCES: "right to write"}
BEFORE = ["ledger.reserve.begin", "ledger.reserve.locked", "ledger.reserve.written"]


@pytest.mark.parametrize("number", REMEDIES)
@pytest.mark.parametrize("point", BEFORE)
def test_a_charge_that_can_not_be_written_is_no_round(deployed, trained, caplog, point, number):
    holder = deployed()
    assert not holder.ask().has_error()
    before, calls = rows(holder), len(trained)
    hook, met = failing(point, number)
    with installed(hook):
        told = refused(holder, caplog, {refusals.NO_LEDGER}, round=2)
        refused(holder, caplog, {refusals.NO_LEDGER}, round=2)  # it is no better for being asked again
    assert met == [point] * 2
    assert REMEDIES[number] in told
    assert len(trained) == calls
    assert rows(holder) == before
    assert not holder.ask(round=2).has_error()  # the fault is gone
    assert rows(holder) == [*before, "reserve", "release"]


def test_a_charge_that_may_have_been_written_is_spent_and_no_round(deployed, trained, caplog):
    holder = deployed()
    assert not holder.ask().has_error()
    before, calls = rows(holder), len(trained)
    hook, _ = failing("ledger.reserve.committed", errno.EIO)
    with installed(hook):
        refused(holder, caplog, {refusals.NO_LEDGER}, round=2)
    assert len(trained) == calls
    assert rows(holder) == [*before, "reserve"]
    assert not holder.ask(round=2).has_error()
    assert rows(holder) == [*before, "reserve", "abandon", "reserve", "release"]  # a new spend: noise may be drawn once


@pytest.mark.parametrize("stage", ["begin", "locked", "written", "committed"])
def test_a_release_that_can_not_be_kept_does_not_leave(deployed, trained, caplog, stage):
    holder = deployed()
    assert not holder.ask().has_error()
    before = rows(holder)
    hook, met = failing(f"ledger.release.{stage}", errno.ENOSPC)
    with installed(hook):
        refused(holder, caplog, {refusals.NO_LEDGER}, round=2)
    assert len(met) == 1
    assert rows(holder)[: len(before) + 1] == [*before, "reserve"]  # spent all the same
    assert not holder.ask(round=2).has_error()
    calls = len(trained)
    assert calls == (2 if stage == "committed" else 3)  # what was kept leaves as it is, nothing else is drawn
    rows(holder)


@pytest.mark.parametrize("point", [point for point in FAILPOINTS if point.startswith("ledger.abandon")])
def test_a_failed_round_on_a_full_disk_is_spent(deployed, monkeypatch, caplog, point):
    holder = deployed()
    assert not holder.ask().has_error()
    before = rows(holder)

    def broken(*_):
        raise ValueError("patient 4711")

    monkeypatch.setattr(Trainer, "round", broken)
    hook, met = failing(point, errno.ENOSPC)
    with installed(hook), caplog.at_level(logging.ERROR, LOG):
        reply = holder.ask(round=2)
    assert met == [point]
    assert reply.error.code == refusals.TRAINING_FAILED
    assert "4711" not in reply.error.reason
    assert any("Free some space" in record.getMessage() for record in caplog.records)
    assert rows(holder)[: len(before) + 1] == [*before, "reserve"]
    monkeypatch.undo()
    assert not holder.ask(round=2).has_error()
    assert rows(holder).count("reserve") == 3


@pytest.mark.parametrize(
    "point", ["ledger.create.written", "ledger.create.linked", "ledger.declare.begin", "ledger.declare.written"]
)
def test_a_ledger_that_can_not_be_made_is_no_holder(deployed, trained, caplog, point):
    holder = deployed()
    hook, met = failing(point, errno.ENOSPC)
    with installed(hook):
        told = refused(holder, caplog, {refusals.NO_LEDGER})
    assert met == [point]
    assert "Free some space" in told
    assert not trained
    assert not holder.ask().has_error()
    assert rows(holder)[-2:] == ["reserve", "release"]


@pytest.mark.parametrize("number", REMEDIES)
def test_a_holder_that_starts_on_a_bad_disk_is_refused_until_it_is_mended(deployed, trained, caplog, number):
    holder = deployed()
    assert not holder.ask().has_error()
    before, calls = rows(holder), len(trained)
    holder.restart()
    hook, met = failing("ledger.declare.begin", number)
    with installed(hook):
        told = refused(holder, caplog, {refusals.NO_LEDGER}, round=2)
    assert met
    assert REMEDIES[number] in told
    assert len(trained) == calls
    assert rows(holder) == before
    assert not holder.ask(round=2).has_error()


def test_a_folder_that_can_not_be_written_is_no_holder(deployed, trained, caplog, unprivileged):
    holder = deployed()
    assert not holder.ask().has_error()
    data = after_crash(holder)
    calls, folder = len(trained), holder.ledger.parent
    os.chmod(holder.ledger, stat.S_IRUSR)
    os.chmod(folder, stat.S_IRUSR | stat.S_IXUSR)
    try:
        with unprivileged():
            told = refused(holder, caplog, {refusals.NO_LEDGER, refusals.NOT_READY}, round=2)
        assert "right to write" in told
        assert holder.ledger.read_bytes() == data
    finally:
        os.chmod(folder, stat.S_IRWXU)
        os.chmod(holder.ledger, stat.S_IRUSR | stat.S_IWUSR)
    assert len(trained) == calls
    assert not holder.ask(round=2).has_error()


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.6, 0.99])
def test_a_truncated_ledger_is_no_ledger(deployed, trained, caplog, keep):
    holder = deployed()
    assert not holder.ask().has_error()
    data = after_crash(holder)
    calls = len(trained)
    cut = data[: int(len(data) * keep)]
    holder.ledger.write_bytes(cut)
    told = refused(holder, caplog, {refusals.NO_LEDGER}, round=2)
    assert "Restore it from a copy" in told or "Check the path" in told
    refused(holder, caplog, {refusals.NO_LEDGER}, round=2, run="another")
    assert len(trained) == calls
    assert holder.ledger.read_bytes() == cut  # it is evidence: nothing is made new in its place
    holder.ledger.write_bytes(data)  # the copy
    assert not holder.ask(round=2).has_error()
    rows(holder)


def test_a_flipped_bit_stops_all_training_or_changes_nothing(deployed, trained, caplog):
    holder = deployed()
    for number in (1, 2):
        assert not holder.ask(round=number).has_error()
    good = after_crash(holder)
    kinds = rows(holder)
    spots = {*range(0, 100, 9), *range(0, len(good), len(good) // 24)}
    for text in (b'"mechanism":"full-batch"', b'"noise_multiplier":20', b'"epsilon":3.0', b"CREATE TABLE entries"):
        assert text in good
        spots.add(good.index(text) + len(text) - 1)
    stopped = 0
    for spot in sorted(spots):
        for path in holder.ledger.parent.glob("ledger.sqlite-*"):
            path.unlink()
        data = bytearray(good)
        data[spot] ^= 1 << spot % 8
        holder.ledger.write_bytes(bytes(data))
        calls = len(trained)
        reply = holder.ask(round=3)
        if reply.has_error():
            stopped += 1
            assert reply.error.code == refusals.NO_LEDGER
            assert len(trained) == calls
            refused(holder, caplog, {refusals.NO_LEDGER}, round=3)
            assert len(trained) == calls
        else:  # a spare byte of the file: no row is other than it was written
            assert rows(holder) == [*kinds, "reserve", "release"]
        holder.restart()
    assert stopped >= 4  # at least where it counts


def test_a_ledger_that_is_replaced_while_it_is_open_is_noticed(deployed, trained, caplog):
    holder = deployed()
    assert not holder.ask().has_error()
    calls = len(trained)
    shutil.copy(holder.ledger, holder.folder / "copy")
    os.replace(holder.folder / "copy", holder.ledger)
    refused(holder, caplog, {refusals.NO_LEDGER}, round=2)
    assert len(trained) == calls


def test_a_holder_that_trains_before_it_charges_is_caught(deployed, trained, monkeypatch, caplog):
    """The wrong twin of this file: its properties must not hold for an admission that charges afterwards."""
    from fedhead.client.admission import Admission, Admitted

    holder = deployed()
    assert not holder.ask().has_error()
    real_admit, real_release = Admission.admit, Admission.release
    monkeypatch.setattr(Admission, "admit", lambda *_: Admitted())
    monkeypatch.setattr(
        Admission,
        "release",
        lambda self, name, _, content: real_release(self, name, real_admit(self, name, asked, "system"), content),
    )
    asked = protocol.read_request(holder.message(holder.request(round=2)))
    calls = len(trained)
    hook, _ = failing("ledger.reserve.written", errno.ENOSPC)
    with installed(hook):
        refused(holder, caplog, {refusals.NO_LEDGER}, round=2)
    assert len(trained) == calls + 1  # what every test above forbids
