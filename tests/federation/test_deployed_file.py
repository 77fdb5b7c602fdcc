"""holder.toml edited while the holder is joined: the next message meets what it says now."""

import logging

import pytest

from fedhead.client import workplace
from fedhead.common import refusals

ANEW = "holder.toml has changed: read anew"


def edit(holder, old: str, new: str) -> None:
    text = holder.file.read_text()
    assert old in text
    holder.file.write_text(text.replace(old, new))


@pytest.mark.parametrize("further", [{"run": "run-2"}, {"round": 2}], ids=["next run", "next round"])
def test_a_budget_that_was_lowered_counts_from_the_next_message_on(deployed, caplog, further):
    caplog.set_level(logging.INFO, "fedhead.client")
    holder = deployed()
    assert not holder.ask(noise_multiplier=5.0).has_error()
    assert ANEW not in caplog.messages
    edit(holder, "epsilon = 3.0", "epsilon = 0.9")
    assert holder.code_of(holder.ask(noise_multiplier=5.0, **further)) == refusals.BEYOND_BUDGET
    assert holder.code_of(holder.ask(noise_multiplier=5.0, **further)) == refusals.BEYOND_BUDGET
    assert caplog.messages.count(ANEW) == 1
    assert holder.spent() == pytest.approx(1 / 25)
    edit(holder, "epsilon = 0.9", "epsilon = 3.0")  # as it was
    assert not holder.ask(noise_multiplier=5.0, **further).has_error()


@pytest.mark.parametrize("further", [{"run": "run-2"}, {"round": 2}], ids=["next run", "next round"])
def test_a_limit_that_was_set_counts_from_the_next_message_on(deployed, further):
    holder = deployed()
    assert not holder.ask().has_error()
    edit(holder, "[limits]", "[limits]\nnoise_multiplier_min = 25.0")
    assert holder.code_of(holder.ask(**further)) == refusals.LITTLE_NOISE
    assert holder.spent() == pytest.approx(1 / 400)


def test_the_old_ledger_is_closed_and_features_are_not_computed_again(deployed, monkeypatch):
    holder = deployed()
    assert not holder.ask().has_error()
    (old,) = workplace._WORKPLACES.values()
    (values,) = holder.folder.glob("state/features/*/values.bin")
    before, closed = values.stat(), []
    monkeypatch.setattr(old.admission.ledger, "close", lambda: closed.append(True))
    edit(holder, "epsilon = 3.0", "epsilon = 2.0")
    assert not holder.ask(round=2).has_error()
    (new,) = workplace._WORKPLACES.values()
    assert new is not old
    assert closed == [True]
    after = values.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not holder.ask(round=3).has_error()
    assert list(workplace._WORKPLACES.values()) == [new]  # the same file is not read anew


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_text(file.read_text() + "\nnonsense"),
        lambda file: file.write_text(file.read_text().replace("epsilon = 3.0", "epsilon = -3.0")),
        lambda file: file.unlink(),
    ],
    ids=["no TOML", "a fault", "gone"],
)
def test_a_file_that_has_faults_is_refused_until_it_is_mended(deployed, caplog, spoil):
    holder = deployed()
    text = holder.file.read_text()
    assert not holder.ask().has_error()
    spoil(holder.file)
    assert holder.code_of(holder.ask(round=2)) == refusals.NOT_READY
    assert holder.code_of(holder.hello()) == refusals.NOT_READY
    assert "the holder can't be opened: " in caplog.text
    assert holder.spent() == pytest.approx(1 / 400)
    holder.file.write_text(text)
    assert not holder.ask(round=2).has_error()
    assert holder.spent() == pytest.approx(2 / 400)
