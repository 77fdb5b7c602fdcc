"""A server that tries to learn or to spend more than a deployed holder allows."""

import pytest

from fedhead.client import deployed as deployed_module
from fedhead.client.holder import load_holder
from fedhead.client.workplace import fingerprint
from fedhead.common import protocol, refusals
from fedhead.common.config import changed
from fedhead.common.data.sources import load_records
from fedhead.common.privacy.filters import Totals
from fedhead.common.privacy.ledger import Ledger
from fedhead.common.privacy.ledger.chain import hash_of


def test_the_ledgers_hash_does_not_tell_one_set_of_records_from_another(deployed):
    """Whoever guesses the records, and knows all else in a row, still can't recompute what leaves with a reply."""
    holder = deployed()
    mark = protocol.read_mark(holder.ask())
    with Ledger(holder.ledger) as ledger:
        rows = list(ledger.entries())
    (reserve,) = [row for row in rows if row.kind == "reserve"]
    records = load_records("sklearn:digits", {}, holder.config.task.labels, holder.folder)
    guesses = {fingerprint(records.digests(), records.labels)}
    guesses.add(fingerprint(records.digests(), records.labels, b"\0" * 32))
    assert reserve.fingerprint not in guesses
    column = type(reserve)._fields.index("fingerprint")

    def chain(guess):
        values = list(reserve[:-1])
        values[column] = guess
        after = hash_of(tuple(values))
        release = rows[reserve.sequence]
        return hash_of((*release[:-2], after))

    assert chain(reserve.fingerprint) == mark.hash  # the attack works where the fingerprint is known
    assert all(chain(guess) != mark.hash for guess in guesses)
    other = deployed()
    holder.restart()
    other.ask()
    with Ledger(other.ledger) as ledger:  # the same records at another holder: another key
        assert reserve.fingerprint not in {row.fingerprint for row in ledger.entries()}


def test_labels_are_not_for_a_server_to_find_out(deployed):
    """Every list of labels but the holder's own gets the same answer, whether or not a record has the label."""
    answers = set()
    for labels in (list("012345678"), [*"0123456789", "ten"], [*"012345678", "x"]):
        holder = deployed()
        holder.config = changed(holder.config, {"task.labels": labels})
        answers.add(holder.code_of(holder.ask()))
        holder.restart()
    assert answers == {refusals.NOT_READY}


@pytest.mark.parametrize("head", [{"kind": "mlp", "hidden": [8]}])
def test_heads_whose_bound_is_not_proved_need_the_holders_word(deployed, head):
    holder = deployed()
    holder.config = changed(holder.config, {"model.head": head})
    assert holder.code_of(holder.ask()) == refusals.NOT_READY
    allowed = deployed(limits='heads = ["mlp"]')
    own = deployed_module.own_recipe(load_holder(allowed.file), changed(allowed.config, {"model.head": head}))
    assert own.model.head.kind == "mlp"


def test_one_budget_covers_one_unit(deployed):
    holder = deployed()
    assert not holder.ask().has_error()
    holder.restart()
    holder.give_persons()
    holder.config = changed(holder.config, {"privacy.unit": "person", "privacy.person": "patient"})
    assert holder.code_of(holder.ask(run="run-2", unit="person", records_per_person=10)) == refusals.OTHER_UNIT
    assert holder.spent() == pytest.approx(1 / 400)


def test_another_name_or_a_lost_ledger_is_no_new_budget(deployed):
    holder = deployed()
    assert not holder.ask().has_error()
    holder.restart()
    text = holder.file.read_text()
    holder.file.write_text(text.replace('name = "st-mary"', 'name = "st-mary-2"'))
    assert holder.code_of(holder.ask(run="run-2")) == refusals.NO_LEDGER
    holder.file.write_text(text)
    for path in holder.folder.glob("state/ledger.sqlite*"):
        path.unlink()
    assert holder.code_of(holder.ask(run="run-2")) == refusals.NO_LEDGER


def test_a_plan_that_takes_an_accountant_forever_is_refused_at_once(deployed):
    holder = deployed(
        budget="poisson_share = 1.0", changes={"mechanism": "poisson", "sample_rate": 0.1, "epsilon": 1.0}
    )
    assert holder.code_of(holder.ask(plan_steps=2**53)) == refusals.INVALID_REQUEST
    assert holder.code_of(holder.ask(noise_multiplier=2.0**24)) == refusals.INVALID_REQUEST
    assert not holder.ask(noise_multiplier=5.0, plan_steps=10, delta=1e-6).has_error()


def test_runs_under_the_unit_holder_count_in_no_budget(deployed):
    holder = deployed(limits='units = ["holder"]', changes={"unit": "holder"})
    assert not holder.ask(mechanism="none", unit="holder").has_error()
    with Ledger(holder.ledger) as ledger:
        found = {one.domain: one for one in ledger.summary("st-mary")}
    assert found["wards"].totals == Totals()
    assert found["wards.holder-unit"].units == ("holder",)
