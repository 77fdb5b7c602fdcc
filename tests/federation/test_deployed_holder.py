"""A deployed holder: its limits and its ledger have the last word, whatever arrives."""

import pytest
import torch

from fedhead.client import app
from fedhead.client import deployed as deployed_module
from fedhead.client.holder import load_holder
from fedhead.client.training import Trainer
from fedhead.common import protocol, refusals
from fedhead.common.config import changed
from fedhead.common.features import FeatureSet
from fedhead.common.privacy.ledger import Ledger, Mark
from fedhead.common.privacy.secure import SOURCES, choose_source


def test_a_round_is_charged_released_and_useful(deployed):
    holder = deployed()
    reply = holder.ask()
    head = holder.head_of(reply)
    assert head["head.weight"].dtype == "float32"
    assert abs(head["head.weight"]).max() > 0
    assert holder.spent() == pytest.approx(1 / 400)
    mark = protocol.read_mark(reply)
    ledger = Ledger(holder.ledger)
    assert ledger.mark("st-mary") == mark
    kinds = [one.kind for one in ledger.entries()]
    assert kinds[-2:] == ["reserve", "release"]
    ledger.close()


def test_noise_is_fresh_and_no_seed_that_arrives_is_used(deployed):
    first, second, third = deployed(), deployed(), deployed()
    one = first.head_of(first.ask(seed=7))
    first.restart()
    two = second.head_of(second.ask(seed=7))
    second.restart()
    for seeded in (torch.manual_seed,):
        seeded(7)
    three = third.head_of(third.ask(seed=None))
    for a, b in ((one, two), (one, three), (two, three)):
        assert (a["head.weight"] != b["head.weight"]).mean() > 0.99


def test_seeded_noise_is_used_only_where_the_holder_allows_it(deployed):
    first, second = (deployed(limits="allow_seeded_noise = true") for _ in range(2))
    one = first.head_of(first.ask(seed=7))
    first.restart()
    assert (second.head_of(second.ask(seed=7))["head.weight"] == one["head.weight"]).all()
    ledger = Ledger(second.ledger)
    assert {e.noise for e in ledger.entries() if e.kind == "reserve"} == {"mt19937-seeded"}
    ledger.close()


def test_a_repeated_request_gets_the_same_bytes_and_costs_nothing(deployed):
    holder = deployed()
    request = holder.request()
    one = holder.send(holder.message(request))
    holder.restart()  # also across processes
    two = holder.send(holder.message(request))
    assert protocol.pack(one.content) == protocol.pack(two.content)
    assert holder.spent() == pytest.approx(1 / 400)


def test_the_same_round_with_another_request_or_head_is_refused(deployed):
    holder = deployed()
    assert not holder.ask().has_error()
    assert holder.code_of(holder.ask(learning_rate=2.0)) == refusals.CHANGED_ROUND
    assert holder.code_of(holder.ask(head=torch.ones(10, 64))) == refusals.CHANGED_ROUND
    assert not holder.ask(round=2).has_error()
    assert holder.code_of(holder.ask(learning_rate=2.0)) in (refusals.STALE_ROUND, refusals.CHANGED_ROUND)
    assert holder.spent() == pytest.approx(2 / 400)


def test_an_older_round_is_refused(deployed):
    holder = deployed()
    assert not holder.ask(round=3).has_error()
    assert holder.code_of(holder.ask(round=2)) == refusals.STALE_ROUND
    assert holder.spent() == pytest.approx(1 / 400)


def test_the_budget_holds_across_runs_and_restarts(deployed):
    holder = deployed()
    codes = []
    for number in range(12):
        reply = holder.ask(run=f"run-{number}", noise_multiplier=3.0)
        codes.append(holder.code_of(reply) if reply.has_error() else 0)
        holder.restart()
    # epsilon 3 at delta 1e-5 is mu^2 = .516: four steps of 1/9 fit, five don't
    assert codes == [0] * 4 + [refusals.BEYOND_BUDGET] * 8
    with Ledger(holder.ledger) as ledger:  # a reply after admission says where the ledger stands
        assert protocol.read_mark(reply) == ledger.mark("st-mary")
    holder.restart()
    assert not holder.ask(run="cheap", noise_multiplier=100.0).has_error()


def test_a_run_has_a_limit_of_its_own(deployed):
    holder = deployed(budget="per_run = { epsilon = 1.0 }")
    found = [holder.ask(round=number, noise_multiplier=5.0) for number in (1, 2)]
    assert not found[0].has_error()
    assert holder.code_of(found[1]) == refusals.BEYOND_RUN
    assert not holder.ask(run="other", noise_multiplier=5.0).has_error()


def test_a_run_that_can_not_be_finished_is_refused_at_its_first_round(deployed):
    holder = deployed()
    # epsilon 3 at delta 1e-5 is mu^2 = .516: 51 steps of 1/100 fit
    assert holder.code_of(holder.ask(noise_multiplier=10.0, plan_steps=60)) == refusals.BEYOND_BUDGET
    assert holder.spent() == 0
    assert not holder.ask(noise_multiplier=10.0, plan_steps=50).has_error()
    counts = {"number": 4, "noise_multiplier": 1.0}
    assert holder.code_of(holder.ask(run="counts", noise_multiplier=10.0, plan_counts=counts)) == refusals.BEYOND_BUDGET
    assert holder.spent() == pytest.approx(1 / 100)


@pytest.mark.parametrize(
    ("limits", "changes", "code"),
    [
        ("noise_multiplier_min = 25.0", {}, refusals.LITTLE_NOISE),
        ("clipping_norm_max = 0.2", {}, refusals.LARGE_CLIPPING_NORM),
        ('units = ["holder"]', {}, refusals.OTHER_UNIT),
        ('tasks = ["segmentation"]', {}, refusals.OTHER_TASK),
        ("", {"mechanism": "none", "noise_multiplier": 0.0}, refusals.NO_PRIVACY),
        ("", {"metrics_noise": 20.0}, refusals.NO_METRICS),
        ("", {"noise_multiplier": 0.0}, refusals.INVALID_REQUEST),
        ("", {"plan_steps": 1, "local_steps": 3}, refusals.INVALID_REQUEST),
        ("", {"backbone": "0" * 64}, refusals.OTHER_MODEL),
        ("", {"noise_multiplier": 0.5}, refusals.BEYOND_BUDGET),
    ],
)
def test_what_goes_beyond_the_limits_is_refused_before_any_record_is_read(deployed, monkeypatch, limits, changes, code):
    holder = deployed(limits=limits)
    assert not holder.hello().has_error()  # opens the workplace

    def touched(*_):
        raise AssertionError("a record was read")

    monkeypatch.setattr(FeatureSet, "batch", touched)
    reply = holder.ask(round=2, **changes)
    assert holder.code_of(reply) == code
    with Ledger(holder.ledger) as ledger:
        assert protocol.read_mark(reply) == ledger.mark("st-mary") == Mark(1, ledger.mark("st-mary").hash)  # the budget
    assert holder.spent() == 0


def test_training_that_fails_stays_spent_and_says_nothing(deployed, monkeypatch):
    holder = deployed()
    assert not holder.ask().has_error()

    def broken(*_, **__):
        raise ValueError("patient 4711")

    monkeypatch.setattr(Trainer, "round", broken)
    reply = holder.ask(round=2)
    assert holder.code_of(reply) == refusals.TRAINING_FAILED
    assert "4711" not in str(reply.error)
    with Ledger(holder.ledger) as ledger:  # the charge, and that nothing was released: the server saw it
        assert protocol.read_mark(reply) == ledger.mark("st-mary") == Mark(5, ledger.mark("st-mary").hash)
    assert holder.spent() == pytest.approx(2 / 400)
    monkeypatch.undo()
    assert not holder.ask(round=2).has_error()  # the same round again is a new spend
    assert holder.spent() == pytest.approx(3 / 400)


def test_a_broken_ledger_stops_all_training(deployed, monkeypatch):
    holder = deployed()
    assert not holder.ask().has_error()
    holder.restart()
    data = bytearray(holder.ledger.read_bytes())
    data[len(data) // 2] ^= 1
    holder.ledger.write_bytes(bytes(data[: len(data) * 2 // 3]))
    for path in holder.folder.glob("state/ledger.sqlite-*"):
        path.unlink()
    assert holder.code_of(holder.ask(round=2)) in (refusals.NO_LEDGER, refusals.TRAINING_FAILED)


def test_the_holders_own_constant_goes_before_the_requests(deployed):
    holder = deployed(limits="release = { declared_records = 1400 }")
    reply = holder.ask()
    assert protocol.read_update(reply, {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}) == 1400


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"model.backbone": "module:os:getcwd"}, "limits.modules"),
        ({"model.head.kind": "module:os:getcwd"}, "limits.modules"),
        ({"task.kind": "module:os:getcwd"}, "limits.modules"),
        ({"model.weights": "/etc/passwd"}, "model.weights"),
    ],
)
def test_a_recipe_can_not_name_code_or_files_of_the_holders_machine(deployed, change, remedy):
    from fedhead.common.errors import InputError

    holder = deployed()
    with pytest.raises(InputError, match=remedy):
        deployed_module.own_recipe(load_holder(holder.file), changed(holder.config, change))


def test_without_labels_of_its_own_it_trains_for_no_recipe(deployed):
    """A server that may name the labels would learn from refusals which ones occur."""
    holder = deployed()
    text = holder.file.read_text()
    holder.file.write_text("\n".join(line for line in text.splitlines() if not line.startswith("labels")))
    assert holder.code_of(holder.ask()) == refusals.NOT_READY
    assert not holder.ledger.exists() or holder.spent() == 0
    holder.restart()
    holder.file.write_text(text)
    assert not holder.ask().has_error()


def test_a_false_declaration_of_disjointness_stops_everything(deployed):
    holder = deployed()
    assert not holder.ask().has_error()
    holder.restart()
    text = holder.file.read_text()
    other = text.replace('domain = "wards"', 'domain = "clinic"\ndisjoint_from = ["wards"]')
    holder.file.write_text(other)  # the same records under another name
    assert holder.code_of(holder.ask(run="run-2")) == refusals.NOT_READY
    assert holder.spent() == pytest.approx(1 / 400)


def test_two_domains_of_one_holder_add_up(deployed):
    holder = deployed()
    assert not holder.ask(noise_multiplier=1.5).has_error()  # .444 of .516
    holder.restart()
    holder.file.write_text(holder.file.read_text().replace('domain = "wards"', 'domain = "clinic"'))
    assert holder.code_of(holder.ask(run="run-2", noise_multiplier=1.5)) == refusals.BEYOND_BUDGET
    assert not holder.ask(run="run-2", noise_multiplier=20.0).has_error()


def test_persons_at_a_deployed_holder(deployed):
    holder = deployed(changes={"unit": "person", "person": "anything", "records_per_person": 3})
    holder.give_persons()
    assert not holder.ask(unit="person").has_error()
    with Ledger(holder.ledger) as ledger:
        assert [one.unit for one in ledger.entries() if one.kind == "reserve"] == ["person"]
    # another bound on records a person is another guarantee than the data were prepared for
    assert holder.code_of(holder.ask(unit="person", round=2, records_per_person=2)) == refusals.INVALID_REQUEST
    assert holder.code_of(holder.ask(unit="record", round=2)) == refusals.INVALID_REQUEST


ROWS = [{"vector": [(7 * i + j) % 11 / 11 for j in range(64)], "label": str(i % 10)} for i in range(40)]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([*ROWS, {**ROWS[0], "vector": [0.5] * 64}], id="appended"),
        pytest.param(ROWS[:-5], id="deleted"),
        pytest.param([{**row, "vector": [1 - x for x in row["vector"]]} for row in ROWS], id="edited"),
        pytest.param(ROWS[::-1], id="reordered"),
    ],
)
def test_data_that_changes_inherits_what_was_spent(deployed, rows):
    """The holder's own file, read anew: the budget is the domain's, whatever the records are now."""
    holder = deployed()
    holder.give(ROWS)
    assert not holder.ask(noise_multiplier=1.5).has_error()  # .444 of .516
    holder.restart()
    holder.give(rows)
    assert holder.code_of(holder.ask(run="run-2", noise_multiplier=1.5)) == refusals.BEYOND_BUDGET
    assert not holder.ask(run="run-2", noise_multiplier=20.0).has_error()
    with Ledger(holder.ledger) as ledger:
        prints = [one.fingerprint for one in ledger.entries() if one.kind == "reserve"]
    assert (len(set(prints)) == 1) == (sorted(map(str, rows)) == sorted(map(str, ROWS)))


@pytest.mark.parametrize(("seconds", "source"), [(0.0, "aes-ctr-gaussian"), (1000.0, "opendp-discrete-gaussian")])
def test_the_ledger_names_the_source_that_drew(deployed, monkeypatch, seconds, source):
    drew = []
    for name, kind in SOURCES.items():

        def integers(self, count, scale, name=name, usual=kind.integers):
            drew.append(name)
            return usual(self, count, scale)

        monkeypatch.setattr(kind, "integers", integers)
    holder = deployed(limits=f"exact_noise_seconds = {seconds}")
    holder.give(ROWS)
    choose_source(1, 1, seconds)  # measuring how long exact noise takes draws some, which is released nowhere
    drew.clear()
    assert not holder.ask().has_error()
    with Ledger(holder.ledger) as ledger:
        assert {one.noise for one in ledger.entries() if one.kind == "reserve"} == {source} == set(drew)


def test_what_is_kept_apart_to_count_on_is_never_trained_on(deployed, monkeypatch):
    trained, counted = [], []
    train, count = Trainer.round, app.noised_count

    def seen(self, features, targets, plan, streams):
        trained.append(features.values.clone())
        return train(self, features, targets, plan, streams)

    def asked(trainable, task, held, *rest):
        counted.append(held.features.values.clone())
        return count(trainable, task, held, *rest)

    monkeypatch.setattr(Trainer, "round", seen)
    monkeypatch.setattr(app, "noised_count", asked)
    metrics = {"noise_multiplier": 20.0, "fraction": 0.3, "every": 1}
    holder = deployed(limits="[limits.release]\nmetrics = true", changes={"metrics": metrics})
    assert not holder.ask(metrics_noise=20.0).has_error()
    used, held = ({tuple(row) for row in found[0].tolist()} for found in (trained, counted))
    assert not used & held
    assert len(trained[0]) + len(counted[0]) == 1797
    assert 0.2 < len(counted[0]) / 1797 < 0.4


def test_a_run_goes_on_when_records_fall_below_the_least(deployed):
    """`check` and `join` stop for it; a refusal within a run would tell how many records there are."""
    holder = deployed(limits="least_records = 40")
    holder.give(ROWS)
    assert not holder.ask().has_error()
    holder.restart()
    holder.give(ROWS[:7])
    assert not holder.ask(round=2).has_error()
    assert holder.spent() == pytest.approx(2 / 400)
