"""A server that tries to learn or to spend more than a deployed holder allows."""

import pytest
import torch

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


def test_the_ledgers_hash_does_not_tell_when_its_rows_were_written(deployed):
    """The first answer carries the hash of the row of the budget, which is written when the records are open."""
    holder = deployed()
    mark = protocol.read_mark(holder.hello())
    with Ledger(holder.ledger) as ledger:
        (budget,) = ledger.entries()
    row = dict(zip(budget._fields[:-1], budget[:-1], strict=True))
    assert hash_of(list(row.values())) == mark.hash
    assert len(bytes.fromhex(row["fingerprint"])) == 16
    for guess in (None, "", "0" * 32):  # who knows all else, the very microsecond included, can't see it confirmed
        assert hash_of(list({**row, "fingerprint": guess}.values())) != mark.hash


def test_labels_are_not_for_a_server_to_find_out(deployed):
    """Every list of labels but the holder's own gets the same answer, whether or not a record has the label."""
    answers = set()
    for labels in (list("012345678"), [*"0123456789", "ten"], [*"012345678", "x"]):
        holder = deployed()
        holder.config = changed(holder.config, {"task.labels": labels})
        answers.add(holder.code_of(holder.ask()))
        holder.restart()
    assert answers == {refusals.NOT_READY}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model.head": {"kind": "mlp", "hidden": [8]}}, "mlp"),
        ({"model.features.normalize": False}, "unnormalized"),
        ({"model.unfreeze": 1}, "unfrozen"),
    ],
)
def test_heads_whose_bound_is_not_proved_need_the_holders_word(deployed, change, word):
    holder = deployed()
    holder.config = changed(holder.config, change)
    assert holder.code_of(holder.ask()) == refusals.NOT_READY
    assert not holder.ledger.exists()
    holder.file.write_text(holder.file.read_text().replace("[limits]", f'[limits]\nheads = ["linear", "{word}"]'))
    own = deployed_module.own_recipe(load_holder(holder.file), changed(holder.config, change))
    assert own.model == changed(holder.config, change).model.model_copy(update={"features": own.model.features})


@pytest.mark.parametrize(("limits", "times"), [("most_records = 1048576", 1), ("", 8), ("most_records = 2000", 524)])
def test_weights_beyond_the_proved_bound_are_refused_and_cost_nothing(deployed, limits, times):
    """10 labels, 64 features and C = 0.3: of 2^20 records proved for ||W|| up to about 6,470, of fewer for more."""
    holder = deployed(limits=limits)
    refused = holder.ask(head=torch.full((10, 64), 260.0 * times))
    assert holder.code_of(refused) == refusals.INVALID_REQUEST
    assert holder.spent() == 0
    assert not holder.ask(head=torch.full((10, 64), 250.0 * times)).has_error()


def test_more_records_than_were_promised_are_no_holder(deployed):
    holder = deployed(limits="most_records = 1000")
    assert holder.code_of(holder.ask()) == refusals.NOT_READY


@pytest.mark.parametrize(
    ("limits", "changes", "code"),
    [
        ("noise_multiplier_min = 25.0", {}, refusals.LITTLE_NOISE),
        (f'backbones = ["sha256:{"0" * 64}"]', {}, refusals.OTHER_BACKBONE),
        ("", {"metrics_noise": 20.0}, refusals.NO_METRICS),
    ],
)
def test_the_first_request_beyond_the_limits_opens_nothing(deployed, monkeypatch, limits, changes, code):
    holder = deployed(limits=limits)
    for name in ("own_records", "load_backbone", "load_backbone_for", "check_ledger"):
        monkeypatch.setattr(deployed_module, name, lambda *_, **__: pytest.fail("something was opened"))
    reply = holder.ask(**changes)
    assert holder.code_of(reply) == code
    assert protocol.read_refusal(reply)[0] == "st-mary"
    assert not holder.ledger.exists()


def test_a_backbone_that_is_not_allowed_opens_no_record(deployed, monkeypatch):
    """The first query of a run has no request: the recipe's backbone is looked at by itself."""
    holder = deployed(limits=f'backbones = ["{"0" * 64}"]')
    monkeypatch.setattr(deployed_module, "own_records", lambda *_: pytest.fail("a record was read"))
    assert holder.code_of(holder.hello()) == refusals.OTHER_BACKBONE
    claimed = holder.request(backbone="0" * 64)  # the digest that is allowed, with a recipe that names another
    assert holder.code_of(holder.send(holder.message(claimed))) == refusals.OTHER_BACKBONE
    assert not holder.ledger.exists()


ROWS = [{"vector": [(7 * i + j) % 11 / 11 for j in range(64)], "label": str(i % 10), "patient": i} for i in range(40)]


@pytest.mark.parametrize(
    "more",
    [{"label": "ten"}, {"label": None}, {"patient": ""}, {"patient": None}, {"vector": [1.0] * 63}, {"vector": None}],
)
def test_one_record_that_can_not_be_used_shows_in_no_reply(deployed, caplog, more):
    """Two neighbouring data sets, after joining: the file of one got a record with a fault."""
    replies = []
    for rows in (ROWS, [*ROWS, {**ROWS[0], **more}]):
        holder = deployed()
        holder.give(rows)
        holder.file.write_text(holder.file.read_text().replace("[data]", '[data]\nperson = "patient"'))
        caplog.clear()
        replies.append(holder.ask())
        holder.restart()
    assert ("1 of 41 records are left out" in caplog.text) == ("vector" not in more)
    shapes = [{name: array.shape for name, array in holder.head_of(reply).items()} for reply in replies]
    assert shapes[0] == shapes[1]
    assert [protocol.read_mark(reply).sequence for reply in replies] == [3, 3]


def test_a_holder_whose_records_are_all_left_out_releases_noise(deployed):
    holder = deployed()
    holder.give([{**row, "label": "ten"} for row in ROWS])
    assert not holder.ask().has_error()


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
