"""What taking part would take is what a deployed holder then does: same limits, same cost, same features."""

import json
import re
from dataclasses import replace
from pathlib import Path
from runpy import run_path

import pytest
from sklearn.datasets import load_digits

from fedhead.client import foresight
from fedhead.client.checking import check_holder
from fedhead.client.deployed import deploy
from fedhead.client.foresight import LOOK_SECONDS, _request, _seconds
from fedhead.client.holder import load_holder
from fedhead.common import features as extracting
from fedhead.common.config import to_json
from fedhead.common.config.schema import FeatureSettings
from fedhead.common.data.records import Records
from fedhead.common.errors import DataError
from fedhead.common.planned import most_participations
from fedhead.common.privacy.events import CountEvent, GaussianEvent, PoissonEvent
from fedhead.common.privacy.filters import left
from fedhead.common.privacy.ledger import Granted, Ledger, Plan, Reservation
from fedhead.server.requests import make_plan

change = run_path(str(Path(__file__).with_name("holder_files.py")))["change"]
DIGITS = ", ".join(f'"{digit}"' for digit in range(10))
HOLDER = f"""
name = "st-mary"
[data]
source = "sklearn:digits"
labels = [{DIGITS}]
[budget]
domain = "wards"
epsilon = 3.0
delta = 1e-5
[limits]
modules = ["torch.nn:Identity"]
"""
DIGEST = "0" * 64


@pytest.fixture
def here(tmp_path):
    (tmp_path / "holder.toml").write_text(HOLDER)
    return tmp_path


def found(here, recipe=None):
    report = check_holder(here / "holder.toml", recipe=recipe)
    return {one.name: one for one in report.findings if one.name in ("recipe", "cost", "features")}


def states(findings):
    return {name: one.state for name, one in findings.items()}


def test_with_a_recipe_all_is_foreseen_and_nothing_is_written(here, tiny):
    findings = found(here, tiny())
    assert states(findings) == {"recipe": "ok", "cost": "ok", "features": "ok"}
    assert "epsilon 3.000 at delta 1e-5, in 8 steps; 0.0" in findings["cost"].text
    assert re.search("computed when the run begins: .* for 1,797 records", findings["features"].text)
    assert sorted(path.name for path in (here / "state").iterdir()) == ["domains"]


def test_features_that_a_run_has_left_are_found_again(here, tiny):
    assert found(here)["features"].text.startswith("none cached yet")
    deploy(here / "holder.toml", to_json(tiny())).admission.close()
    assert found(here)["features"].text.startswith("1 set cached of as many records")
    assert found(here, tiny())["features"].text == "cached for this recipe, of all 1,797 records"
    assert "computed" in found(here, tiny({"model.features.cache": "float16"}))["features"].text
    (values,) = (here / "state" / "features").glob("*/values.bin")
    content = bytearray(values.read_bytes())
    content[0] ^= 1
    values.write_bytes(content)
    assert "computed" in found(here, tiny())["features"].text  # as the run will notice


def test_a_cache_of_other_records_or_of_nonsense_is_not_counted(here, tiny):
    deploy(here / "holder.toml", to_json(tiny())).admission.close()
    (manifest,) = (here / "state" / "features").glob("*/manifest.json")
    manifest.write_text(manifest.read_text().replace("1797", "1796"))
    assert found(here)["features"].text.startswith("none cached")
    for nonsense in ("", "[]", '{"files": {}}', '{"files": {"values.bin": {"shape": []}}}'):
        manifest.write_text(nonsense)
        assert found(here)["features"].text.startswith("none cached")


@pytest.mark.parametrize(
    ("old", "new", "recipe", "words"),
    [
        ("labels = [", 'labels = ["x", ', {}, "data.labels is not the list of labels"),
        ('modules = ["torch.nn:Identity"]', "", {}, "limits.modules lacks it"),
        ("[limits]", "[limits]", {"model.head": {"kind": "mlp"}}, "limits.heads lacks it"),
        ("[limits]", "[limits]", {"model.weights": "/etc/passwd"}, "not for a server to name"),
        ("[limits]", f'[limits]\nbackbones = ["{DIGEST}"]', {}, "limits.backbones lacks its backbone, sha256:"),
        ("[limits]", "[limits]\nclipping_norm_max = 0.5", {"privacy.clipping_norm": 0.6}, "clipping norm is larger"),
        ("[limits]", "[limits]\nnoise_multiplier_min = 50.0", {}, "noise is less"),
        ("[limits]", '[limits]\nunits = ["holder"]', {}, "does not accept this privacy unit"),
        ("[limits]", '[limits]\ntasks = ["regression"]', {}, "does not allow this kind of task"),
        ("[limits]", "[limits]", {"privacy.mechanism": "none", "privacy.epsilon": None}, "without privacy"),
        ("[limits]", "[limits]", {"privacy.unit": "person"}, "person"),
    ],
)
def test_a_recipe_beyond_the_limits_is_a_remedy(here, tiny, old, new, recipe, words):
    change(here, old, new)
    if "person" in str(recipe):
        recipe = {**recipe, "privacy.person": "whose"}
    findings = found(here, tiny(recipe))
    assert findings["recipe"].state == "remedy"
    assert findings["recipe"].remedy
    assert words in findings["recipe"].text
    assert "cost" not in findings


def test_images_for_a_backbone_of_texts_are_a_remedy(here, tiny):
    (here / "notes.csv").write_text("text,label\n" + "".join(f"x{i},{i % 10}\n" for i in range(20)))
    change(here, "sklearn:digits", "csv:notes.csv")
    assert found(here, tiny())["recipe"].state == "remedy"


SHAPES = [
    {},
    {"training.local_steps": 3},
    {"privacy.epsilon": None, "privacy.noise_multiplier": 7.0},
    {"holders.per_round": 2, "training.rounds": 13},
    {"privacy.metrics": {"every": 3, "noise_multiplier": 20.0}},
    {"privacy.metrics": {"every": 1, "noise_multiplier": 20.0}, "holders.per_round": 3},
    {"privacy.metrics": {"every": 8, "noise_multiplier": 20.0}},
    {
        "privacy.mechanism": "poisson",
        "privacy.sample_rate": 0.1,
        "privacy.epsilon": None,
        "privacy.noise_multiplier": 2.0,
    },
    {"privacy.unit": "holder", "training.local_steps": 4, "holders.count": 50},
    {"privacy.unit": "person", "privacy.person": "whose", "privacy.records_per_person": 3},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_foreseen_request_is_the_servers(tiny, shape):
    config = tiny(shape)
    rounds, count = config.training.rounds, config.holders.count
    asked = most_participations(rounds, count, config.holders.per_round or count)
    real = make_plan(config, "foresight", DIGEST, 300, asked).request(1)
    mine = _request(config, DIGEST)
    own = {"learning_rate": real.learning_rate, "seed": real.seed, "proximal_mu": real.proximal_mu, "chunk": real.chunk}
    assert mine.model_copy(update=own) == real


def carry_out(here, config) -> float:
    """Reserve every round of a run, as the holder does; the epsilon that is left."""
    holder, request = load_holder(here / "holder.toml"), _request(config, DIGEST)
    metrics = config.privacy.metrics
    with Ledger(holder.ledger) as ledger:
        ledger.declare(holder.name, holder.budget.domain, holder.budget.terms())
        for number in range(1, config.training.rounds + 1):
            event = GaussianEvent(request.noise_multiplier, request.clipping_norm, request.local_steps)
            counted = metrics is not None and (number % metrics.every == 0 or number == config.training.rounds)
            count = CountEvent(metrics.noise_multiplier, 1.0, 1) if counted else None
            one = Reservation("st-mary", "wards", "r", number, str(number), event, "record", "f", "n", metrics=count)
            ledger.reserve([one])
        (domain,) = ledger.summary("st-mary")
    return left(holder.budget.terms(), domain.shared).epsilon


@pytest.mark.parametrize("shape", [{"privacy.epsilon": 1.0}, {"privacy.epsilon": 1.0, **SHAPES[4]}])
def test_what_is_left_then_is_what_a_run_leaves(here, tiny, shape):
    config = tiny(shape)
    change(here, "[limits]", "[limits]\nrelease = { metrics = true }")
    (said,) = re.findall(r"; ([0-9.]+) is left then", found(here, config)["cost"].text)
    assert not (here / "state" / "ledger.sqlite").exists()
    real = carry_out(here, config)
    assert float(said) == pytest.approx(real, abs=1.1e-3)
    assert float(said) <= real


def test_a_budget_that_does_not_allow_the_whole_run_is_told_and_nothing_is_spent(here, tiny):
    whole = tiny({"privacy.epsilon": 3.0})
    assert found(here, whole)["cost"].state == "ok"
    carry_out(here, tiny({"privacy.epsilon": 1.0}))
    before = (here / "state" / "ledger.sqlite").read_bytes()
    findings = found(here, whole)
    assert states(findings) == {"recipe": "ok", "cost": "remedy", "features": "ok"}
    assert "the holder's privacy budget does not allow it" in findings["cost"].text
    assert found(here, tiny({"privacy.epsilon": 1.0}))["cost"].state == "ok"
    assert (here / "state" / "ledger.sqlite").read_bytes() == before
    change(here, "delta = 1e-5", "delta = 1e-5\nper_run = { epsilon = 0.5 }")
    assert "allows one run to spend" in found(here, tiny({"privacy.epsilon": 1.0}))["cost"].text


@pytest.mark.slow
def test_poisson_plans_are_paid_from_their_share(here, tiny):
    config = tiny({"privacy.mechanism": "poisson", "privacy.sample_rate": 0.1, "privacy.epsilon": 1.0})
    assert found(here, config)["cost"].state == "remedy"
    change(here, "delta = 1e-5", "delta = 2e-5\npoisson_share = 0.5")
    findings = found(here, config)
    assert findings["cost"].state == "ok"
    assert re.search(r"; 0\.(4[0-9]{2}|5[0-9]{2}) is left then", findings["cost"].text)  # of half of 3


def test_under_the_unit_holder_the_server_pays(here, tiny):
    change(here, "[limits]", '[limits]\nunits = ["holder"]')
    findings = found(here, tiny(SHAPES[8]))
    assert states(findings) == {"recipe": "ok", "cost": "ok", "features": "ok"}
    assert "none of the budget" in findings["cost"].text


def test_a_damaged_ledger_leaves_the_cost_open(here, tiny):
    carry_out(here, tiny())
    path = here / "state" / "ledger.sqlite"
    content = bytearray(path.read_bytes())
    content[content.rfind(b'"steps"')] ^= 1
    path.write_bytes(content)
    assert found(here, tiny())["cost"].state == "unknown"


def test_a_ledger_that_is_gone_is_not_taken_for_a_new_one(here, tiny):
    deploy(here / "holder.toml", to_json(tiny())).admission.close()
    (here / "state" / "ledger.sqlite").unlink()
    report = check_holder(here / "holder.toml", recipe=tiny())
    (ledger,) = [one for one in report.findings if one.name == "ledger"]
    assert (ledger.state, "is gone: what it held is spent" in ledger.text) == ("remedy", True)
    assert found(here, tiny())["cost"].state == "unknown"
    assert not (here / "state" / "ledger.sqlite").exists()


def test_without_records_nothing_is_foreseen(here, tiny):
    change(here, "sklearn:digits", "csv:none.csv")
    assert states(found(here, tiny())) == {"features": "unknown"}
    assert states(found(here)) == {"features": "unknown"}


class Clock:
    """Time that passes only in a made-up extraction: some for every call, and some for every record."""

    def __init__(self, call, record, corrupt=()):
        self.now, self.call, self.record, self.corrupt, self.looks = 0.0, call, record, set(corrupt), []

    def extract(self, backbone, records, cache, settings):
        assert cache is None  # nothing is stored by a look
        self.looks.append(len(records))
        self.now += self.call + self.record * len(records)
        if set(records.rows.tolist()) <= self.corrupt:
            raise DataError("none can be decoded. Check.")


@pytest.fixture
def measured(monkeypatch):
    """The estimate for some records under such a clock."""
    records = Records.from_memory("vector", load_digits().data)

    def measure(number, clock):
        monkeypatch.setattr(extracting, "extract", clock.extract)
        monkeypatch.setattr(foresight.time, "perf_counter", lambda: clock.now)
        some = records.select(slice(0, number))
        return _seconds(None, some, FeatureSettings())

    return measure


@pytest.mark.parametrize("record", [1e-5, 1e-3, 0.1])
def test_the_time_is_extrapolated_from_some_seconds_at_most(measured, record):
    clock = Clock(call=0.01, record=record)
    assert measured(1797, clock) == pytest.approx(1797 * record, rel=0.5, abs=0.5)
    assert clock.now <= 1.01 * LOOK_SECONDS
    assert clock.looks == sorted(clock.looks) or sum(clock.looks) == 1797


def test_a_very_slow_backbone_is_looked_at_once(measured):
    clock = Clock(call=0.0, record=20.0)
    assert measured(1000, clock) == pytest.approx(20_000)
    assert clock.looks == [1]


def test_images_that_can_not_be_decoded_do_not_end_the_look(measured):
    assert measured(3, Clock(0.1, 0.1, corrupt=range(3))) is None
    assert measured(100, Clock(0.1, 0.1, corrupt=range(50))) is not None


def test_a_look_is_told_in_words(here, tiny, monkeypatch):
    monkeypatch.setattr(foresight, "_seconds", lambda *_: 7260.0)
    assert "about 2 h 1 min here for 1,797 records" in found(here, tiny())["features"].text
    monkeypatch.setattr(foresight, "_seconds", lambda *_: None)
    assert found(here, tiny())["features"].state == "remedy"


def test_a_second_unit_in_a_domain_is_told_as_what_it_is(here, tiny):
    carry_out(here, tiny({"privacy.epsilon": 1.0}))  # under the unit record
    digits = load_digits()
    (here / "ward.json").write_text(
        "\n".join(
            json.dumps({"vector": (image / 16).tolist(), "label": str(label), "whose": f"p{number // 4}"})
            for number, (image, label) in enumerate(zip(digits.data[:200], digits.target[:200], strict=True))
        )
    )
    change(here, 'source = "sklearn:digits"', 'source = "json:ward.json"\nperson = "whose"')
    persons = tiny({"privacy.unit": "person", "privacy.person": "whose", "privacy.epsilon": 1.0})
    told = found(here, persons)["recipe"]
    assert told.state == "remedy"
    assert 'its unit is person, but the budget of domain "wards" was begun with the unit record' in told.text
    assert "budget.domain" in told.remedy
    assert "limit" not in told.text + told.remedy
    change(here, 'domain = "wards"', 'domain = "clinic"')  # not declared disjoint: both are one budget
    assert 'the budget of domain "wards" was begun' in found(here, persons)["recipe"].text
    change(here, 'domain = "clinic"', 'domain = "clinic"\ndisjoint_from = ["wards"]')
    holder = load_holder(here / "holder.toml")
    with Ledger(holder.ledger) as ledger:  # as the other file would
        ledger.declare("st-mary", "wards", holder.budget.terms(), ("clinic",))
    assert states(found(here, persons))["recipe"] == "ok"


POISSON = {
    "privacy.mechanism": "poisson",
    "privacy.sample_rate": 0.1,
    "privacy.epsilon": None,
    "privacy.noise_multiplier": 20.0,
}


@pytest.mark.parametrize(
    ("budget", "most"),
    [
        ("poisson_share = 0.3", 3e-6),
        ("poisson_share = 1.0\nper_run = { epsilon = 3.0, delta = 2e-6 }", 2e-6),
    ],
)
def test_a_poisson_plan_whose_delta_does_not_fit_is_told_the_delta_that_does(here, tiny, budget, most):
    change(here, "delta = 1e-5", f"delta = 1e-5\n{budget}")
    told = found(here, tiny({**POISSON, "privacy.delta": 1e-5}))["cost"]
    assert told.state == "remedy"
    delta = float(re.search(r"Set privacy.delta to at most (\S+) ", told.remedy)[1])
    assert delta <= most
    assert delta == pytest.approx(most, rel=0.01)
    assert "more noise" not in told.remedy
    assert found(here, tiny({**POISSON, "privacy.delta": delta}))["cost"].state == "ok"


def test_a_poisson_plan_without_a_share_is_told_so_and_one_that_costs_too_much_to_cost_less(here, tiny):
    assert 'privacy.mechanism = "full-batch"' in found(here, tiny(POISSON))["cost"].remedy
    change(here, "delta = 1e-5", "delta = 1e-5\npoisson_share = 1.0")
    dear = tiny({**POISSON, "privacy.noise_multiplier": 0.5, "privacy.delta": 1e-6})
    assert "more noise" in found(here, dear)["cost"].remedy


def test_a_share_that_was_lowered_below_what_was_charged_leaves_nothing_and_no_noise_helps(here, tiny):
    """Poisson plans were charged under other terms; what is free of the full-batch part can't be used any more."""
    holder, plan = load_holder(here / "holder.toml"), PoissonEvent(4.0, 1.0, 0.01, 5)
    once = Reservation(
        "st-mary", "wards", "r", 1, "1", replace(plan, steps=1), "record", "f", "n", plan=Plan(plan, 2e-6)
    )
    with Ledger(holder.ledger) as ledger:
        ledger.declare("st-mary", "wards", replace(holder.budget.terms(), poisson_share=0.5))
        assert isinstance(ledger.reserve([once])[0], Granted)
    cheap = tiny({"privacy.epsilon": 0.01})
    assert "Nothing is left" in found(here, cheap)["cost"].remedy
    (budget,) = [one for one in check_holder(here / "holder.toml").findings if one.name == "budget"]
    assert (budget.state, "left 0.000" in budget.text) == ("remedy", True)
    change(here, "delta = 1e-5", "delta = 1e-5\npoisson_share = 0.5")
    assert found(here, cheap)["cost"].state == "ok"
