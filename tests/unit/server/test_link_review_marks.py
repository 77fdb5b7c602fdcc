"""What was seen of a ledger is never forgotten for an older one."""

import os
import stat
from pathlib import Path
from runpy import run_path

import pytest

from fedhead.common import protocol
from fedhead.common.privacy.ledger import Mark
from fedhead.common.refusals import BEYOND_BUDGET, LITTLE_NOISE, TRAINING_FAILED, refusal
from fedhead.server.marks import read_marks, write_marks

ROUNDS = run_path(str(Path(__file__).with_name("test_link_review_rounds.py")))


def test_a_run_that_goes_on_from_an_old_checkpoint_keeps_newer_marks(tmp_path):
    path = tmp_path / "marks.json"
    write_marks(path, {"north": Mark(30, "a" * 64), "south": Mark(2, "b" * 64)})
    write_marks(path, {"north": Mark(5, "c" * 64), "south": Mark(3, "d" * 64)})
    assert read_marks(path) == {"north": Mark(30, "a" * 64), "south": Mark(3, "d" * 64)}


def test_marks_survive_a_crash_right_after_they_are_written(tmp_path, monkeypatch):
    """What a holder showed must not be forgotten: the folder is flushed as well, after the new name is there."""
    flushed = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.append(os.fstat(handle).st_mode), sync(handle)))
    write_marks(tmp_path / "marks.json", {"north": Mark(1, "a" * 64)})
    assert [stat.S_ISDIR(mode) for mode in flushed] == [False, True]


@pytest.mark.parametrize("code", [BEYOND_BUDGET, TRAINING_FAILED])
def test_a_refusal_says_where_the_ledger_stands_too(code):
    mark = Mark(9, "c" * 64)
    answers = {
        **ROUNDS["GOOD"],
        "south": lambda message: protocol.refuse(message, refusal(code), "south", mark),
        "west": lambda message: protocol.refuse(message, refusal(LITTLE_NOISE), "west"),
    }
    assert ROUNDS["held"](answers).marks == {"south": mark}
    older = {"south": Mark(10, "d" * 64)}
    assert ROUNDS["held"](answers, marks=older).marks == older


@pytest.mark.parametrize("said", ["[]", "no JSON", '{"sequence": 0, "hash": "x"}', '{"sequence": true}', "[" * 100_000])
def test_what_is_no_mark_in_a_refusal_is_none(said):
    def answer(message):
        reply = protocol.refuse(message, refusal(BEYOND_BUDGET), "south")
        reply.error.__dict__["_reason"] = said
        return reply

    assert ROUNDS["held"]({**ROUNDS["GOOD"], "south": answer}).marks == {}
