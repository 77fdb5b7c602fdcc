"""Where a deployed holder's ledger stands: it goes with every reply, and shows an older copy of the ledger."""

import shutil

from fedhead.common import protocol, refusals
from fedhead.common.privacy.ledger import Ledger, stored_mark


def test_every_reply_says_where_the_ledger_stands(deployed):
    holder = deployed()
    with_budget = protocol.read_mark(holder.hello())
    assert with_budget.sequence == 1
    assert not holder.ask().has_error()
    with Ledger(holder.ledger) as ledger:
        end = ledger.mark("st-mary")
        assert ledger.has("st-mary", with_budget)
        assert end.sequence > 1
    assert stored_mark(holder.ledger, "st-mary") == end
    assert protocol.read_mark(holder.hello()) == end
    for changes in ({"round": 1, "learning_rate": 9.0}, {"backbone": "0" * 64}, {"round": 2, "noise_multiplier": 0.0}):
        assert protocol.read_mark(holder.ask(**changes)) == end
    late = holder.message(holder.request(round=2))
    late.metadata.created_at -= 2 * late.metadata.ttl
    for _ in ("open", "closed"):
        reply = holder.send(late)
        assert holder.code_of(reply) == refusals.STALE_ROUND
        assert (protocol.read_holder(reply), protocol.read_mark(reply)) == ("st-mary", end)
        holder.restart()


def test_before_records_are_open_the_mark_is_that_of_the_file(deployed):
    holder = deployed(limits="noise_multiplier_min = 25.0")
    first = holder.ask()
    assert (holder.code_of(first), protocol.read_mark(first)) == (refusals.LITTLE_NOISE, None)
    assert not holder.ledger.exists()
    assert not holder.ask(noise_multiplier=25.0).has_error()
    with Ledger(holder.ledger) as ledger:
        end = ledger.mark("st-mary")
    holder.restart()
    assert protocol.read_mark(holder.ask(round=2)) == end
    holder.file.write_text(holder.file.read_text().replace("sklearn:digits", "csv:gone.csv"))
    for closed in (holder.hello(), holder.ask(noise_multiplier=25.0, round=2)):
        assert (holder.code_of(closed), protocol.read_mark(closed)) == (refusals.NOT_READY, end)
        assert protocol.read_holder(closed) == "st-mary"


def test_a_mark_that_can_not_be_read_is_left_out(deployed):
    holder = deployed()
    assert not holder.ask().has_error()
    holder.restart()
    holder.ledger.unlink()
    gone = holder.hello()
    assert (holder.code_of(gone), protocol.read_mark(gone)) == (refusals.NO_LEDGER, None)
    holder.file.write_text("name = ")
    broken = holder.hello()
    assert (holder.code_of(broken), protocol.read_mark(broken)) == (refusals.NOT_READY, None)


def test_an_older_copy_of_the_ledger_is_noticed(deployed, tmp_path):
    holder = deployed()
    first = holder.ask()
    holder.restart()
    shutil.copytree(holder.folder / "state", tmp_path / "backup")
    second = holder.ask(round=2, seen=protocol.read_mark(first))
    seen = protocol.read_mark(second)
    holder.restart()
    shutil.rmtree(holder.folder / "state")
    shutil.copytree(tmp_path / "backup", holder.folder / "state")
    assert holder.code_of(holder.ask(round=3, seen=seen)) == refusals.OLD_LEDGER
    assert holder.code_of(holder.ask(round=3, run="new", seen=seen)) == refusals.OLD_LEDGER
    assert not holder.ask(round=3, seen=protocol.read_mark(first)).has_error()
