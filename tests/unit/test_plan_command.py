"""`fedhead plan`: one of epsilon, noise and rounds from the others; what a recipe's run would leave of each budget."""

import contextlib
import json
import math
import re
import sys
from dataclasses import replace

import pytest
from PIL import Image

from fedhead.cli import main
from fedhead.client.workplace import LEDGER
from fedhead.common.config import changed, make_config
from fedhead.common.errors import RunError
from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.events import CountEvent, GaussianEvent, PoissonEvent
from fedhead.common.privacy.ledger import Granted, Ledger, Plan, Reservation
from fedhead.common.privacy.terms import Terms
from fedhead.simulations import plans
from fedhead.simulations.afford import parts_of
from fedhead.simulations.simulate import simulate

RECIPE = """
[task]
labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
[model]
backbone = "module:torch.nn:Identity"
[data]
source = "sklearn:digits"
declared_records = 300
[holders]
count = 3
[holders.budget]
epsilon = 2.0
[privacy]
epsilon = 1.0
[training]
rounds = 6
[run]
baseline = false
"""


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """Run `fedhead plan ...` in a folder with a recipe: status, stdout, stderr."""
    (tmp_path / "r.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedhead", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def planned(plan):
    """The JSON that `fedhead plan ... --json` prints."""

    def run(*arguments):
        status, out, err = plan(*arguments, "--json")
        assert (status, err) == (0, "")
        return json.loads(out)

    return run


@pytest.mark.parametrize(
    "more", [[], ["--local-steps", "3"], pytest.param(["--sample-rate", "0.05"], marks=pytest.mark.slow)]
)
def test_each_number_follows_from_the_two_others(planned, more):
    first = planned("--epsilon", 2, "--rounds", 40, *more)
    assert first["solved"] == "noise_multiplier"
    assert 1.99 < first["epsilon"] <= 2
    noise = first["noise_multiplier"]
    second = planned("--noise-multiplier", noise, "--rounds", 40, *more)
    assert (second["solved"], second["epsilon"]) == ("epsilon", first["epsilon"])
    third = planned("--noise-multiplier", noise, "--epsilon", 2, *more)
    assert (third["solved"], third["rounds"]) == ("rounds", 40)
    assert [row["rounds"] for row in first["table"]] == [5, 10, 15, 20, 25, 30, 35, 40]
    values = [row["epsilon"] for row in first["table"]]
    assert values == sorted(values)
    assert values[-1] == first["epsilon"]


def test_delta_and_unit_are_said(plan):
    status, out, _ = plan("--epsilon", 2, "--rounds", 4, "--delta", "1e-6")
    assert status == 0
    assert "epsilon at delta 1e-6" in out
    assert "unit: record or person" in out
    assert max(map(len, out.splitlines())) <= 80
    status, out, _ = plan("r.toml", "--set", "privacy.unit=holder")
    assert "unit: holder; neighbours: add or remove one holder" in out
    assert "the server adds the noise and is trusted" in out


def test_a_plan_that_is_typed_in_again_as_shown_stays_within_epsilon(plan, planned):
    _, out, _ = plan("--epsilon", 2, "--rounds", 40)
    shown = re.search(r"noise multiplier ([\d.]+)", out).group(1)
    assert 1.99 < planned("--noise-multiplier", shown, "--rounds", 40)["epsilon"] <= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "RECIPE is missing: give one, or two of"),
        (["--epsilon", 3], "RECIPE is missing, --epsilon alone is too little"),
        (["--epsilon", 3, "--rounds", 5, "--noise-multiplier", 2], "each follows from the others"),
        (["--epsilon", 3, "--noise-multiplier", 0], "--noise-multiplier is 0.0"),
        (["--epsilon", 3, "--noise-multiplier", "nan"], "--noise-multiplier is nan"),
        (["--epsilon", 0.001, "--noise-multiplier", 1], "not even one round fits"),
        (["--epsilon", "inf", "--noise-multiplier", 1], "--epsilon is inf"),
        (["--epsilon", 3, "--rounds", 5, "--delta", 0], "--delta is 0.0"),
        (["--epsilon", 3, "--rounds", 5, "--sample-rate", 1.5], "--sample-rate is 1.5"),
        (["--noise-multiplier", 2, "--rounds", 10**9], "--rounds is 1000000000"),
        (["r.toml", "--rounds", 5], "--rounds is given together with RECIPE"),
        (["--epsilon", 3, "--rounds", 5, "--state", "s"], "--state goes with one"),
        (["r.toml", "--state", "s", "--ledger", "l"], "--ledger is given together with --state"),
        (["r.toml", "--ledger", "l"], "--ledger is .* no such file"),
        (["r.toml", "--plot", "p.pdf"], "must end in .png or .svg"),
        (["r.toml", "--plot", "no/such/p.png"], "in a folder that exists"),
        (["r.toml", "--set", "privacy.mechanism=none", "--set", "privacy.epsilon="], "there is nothing to plan"),
    ],
)
def test_bad_input_is_one_line_and_status_2(plan, arguments, words):
    status, out, err = plan(*arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"fedhead: .*{words}.*\n", err), err


def test_a_ledger_that_is_none_is_one_line(plan, tmp_path):
    (tmp_path / "l").write_text("no ledger at all")
    status, out, err = plan("r.toml", "--ledger", "l")
    assert status != 0
    assert out == ""
    assert err.count("\n") == 1


def config(**changes):
    import tomllib

    return changed(make_config(tomllib.loads(RECIPE)), {key.replace("__", "."): v for key, v in changes.items()})


def test_counts_of_metrics_are_planned_for_and_counted():
    metrics = {"every": 2, "noise_multiplier": 20.0, "fraction": 0.1}
    found = plans.of_recipe(config(privacy__metrics=metrics, training__rounds=7))
    assert found["counts"] == 4  # after rounds 2, 4, 6 and the last
    noise = found["noise_multiplier"]
    alone = epsilon([GaussianEvent(noise, 0.3, 7)], 1e-5).epsilon
    both = epsilon([GaussianEvent(noise, 0.3, 7), CountEvent(20.0, 1.0, 4)], 1e-5).epsilon
    assert found["epsilon"] == pytest.approx(both, rel=1e-9)
    assert alone < 0.99 < both <= 1.0
    sampled = {"privacy__mechanism": "poisson", "privacy__sample_rate": 0.1, "holders__budget": None}
    found = plans.of_recipe(config(privacy__metrics=metrics, training__rounds=7, **sampled))
    events = [PoissonEvent(found["noise_multiplier"], 0.3, 0.1, 7), CountEvent(20.0, 1.0, 4)]
    assert found["epsilon"] == pytest.approx(epsilon(events, 1e-5).epsilon, rel=1e-6)
    assert 0.998 < found["epsilon"] <= 1.0


def test_the_holder_unit_has_one_step_a_round():
    record = plans.of_recipe(config(training__local_steps=9))
    holder = plans.of_recipe(config(training__local_steps=9, privacy__unit="holder"))
    assert record["noise_multiplier"] == pytest.approx(3 * holder["noise_multiplier"], rel=1e-6)


def test_cohorts_share_the_rounds_out():
    parts = parts_of(config(holders__per_round=2, training__rounds=4))
    assert sorted(part.rounds for part in parts.values()) == [2, 3, 3]
    found = plans.of_recipe(config(holders__per_round=2, training__rounds=4))
    assert found["participations"] == 3
    assert sorted((entry["rounds"], len(entry["holders"])) for entry in found["holders"]) == [(2, 1), (3, 2)]
    assert max(entry["epsilon"] for entry in found["holders"]) == found["epsilon"]


def test_what_is_left_is_what_the_ledger_says_run_after_run(plan, planned, tmp_path):
    """Epsilon 1 out of 2, over and over: the plan says beforehand what each run then finds."""
    settings = config()
    outcomes, charged = [], 0
    for number in range(6):
        (entry,) = planned("r.toml", "--state", "s")["holders"]
        before, budget = outcomes[-1:], entry["budget"]
        if before:
            assert budget["spent_before"] == pytest.approx(before[0]["spent_after"], rel=1e-12)
        outcomes.append(budget)
        with contextlib.suppress(RunError):  # refused by all holders, a run ends after three rounds
            simulate(settings, tmp_path / f"o{number}", state=tmp_path / "s")
        with Ledger(tmp_path / "s" / LEDGER, create=False, read_only=True) as ledger:
            rounds = sum(run.rounds for one in ledger.summary("holder-00001") for run in one.runs)
        took_part, charged = rounds - charged, rounds
        assert took_part == (6 if budget["admitted"] else 0)  # all of a run or nothing
        assert (budget["rounds_that_fit"] == 6) == budget["admitted"]
        if not budget["admitted"]:
            break
    assert [budget["admitted"] for budget in outcomes] == [True] * (len(outcomes) - 1) + [False]
    assert 3 <= len(outcomes) <= 5  # epsilon adds up less than linearly
    assert all(budget["spent_after"] <= 2.0 for budget in outcomes)
    (entry,) = planned("r.toml", "--state", "s")["holders"]
    assert entry["budget"]["spent_before"] == pytest.approx(outcomes[-1]["spent_after"], rel=1e-12)
    assert entry["budget"]["rounds_that_fit"] == outcomes[-1]["rounds_that_fit"] < 6
    status, out, _ = plan("r.toml", "--state", "s")
    assert status == 0
    assert re.search(r"holder-00000 \+2 .* no ", out)
    assert "the budget allows" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_named_ledger_counts_with_its_own_terms_and_overlaps(planned, tmp_path):
    for name, other in (("wide", 5.0), ("tight", 1.8)):
        with Ledger(tmp_path / name) as ledger:
            ledger.declare("st-mary", "notes", Terms(3.0, 1e-5))
            ledger.declare("st-mary", "images", Terms(other, 1e-5))
            spent = Reservation("st-mary", "images", "old", 1, "d", GaussianEvent(2.5, 1.0, 1), "record", "f", "n")
            assert isinstance(ledger.reserve([spent])[0], Granted)
    wide, tight = (
        {one["budget"]["domain"]: one for one in planned("r.toml", "--ledger", name)["holders"]}
        for name in ("wide", "tight")
    )
    assert wide["notes"]["holders"] == ["st-mary"]
    # what the other domain has spent counts here too, until both declare that they share nobody
    assert wide["notes"]["budget"]["spent_before"] == pytest.approx(epsilon([GaussianEvent(2.5, 1, 1)], 1e-5).epsilon)
    assert wide["notes"]["budget"]["admitted"]
    assert not tight["notes"]["budget"]["admitted"]


def test_what_was_spent_is_stated_at_the_delta_that_it_was_charged_at(plan, planned, tmp_path):
    """A Poisson plan that was charged at delta 4e-6 can't be stated at 1e-6, which later terms ask for."""
    sampled = PoissonEvent(4.0, 1.0, 0.01, 5)
    with Ledger(tmp_path / "l") as ledger:
        ledger.declare("st-mary", "notes", Terms(6.0, 1e-5, 0.5))
        once = replace(sampled, steps=1)
        bought = Plan(sampled, 4e-6)
        wanted = Reservation("st-mary", "notes", "old", 1, "d", once, "record", "f", "n", plan=bought)
        assert isinstance(ledger.reserve([wanted])[0], Granted)
    (entry,) = planned("r.toml", "--ledger", "l")["holders"]
    assert entry["budget"]["spent_delta"] == entry["budget"]["delta"] == 1e-5
    with Ledger(tmp_path / "l") as ledger:
        ledger.declare("st-mary", "notes", Terms(6.0, 1e-6))
    (entry,) = planned("r.toml", "--ledger", "l")["holders"]
    budget = entry["budget"]
    assert budget["delta"] == 1e-6
    assert budget["spent_delta"] == 4e-6
    assert budget["spent_before"] >= epsilon([sampled], 4e-6).epsilon
    assert "domain notes at delta 4e-6" in plan("r.toml", "--ledger", "l")[1]


def test_a_ledger_that_was_begun_with_another_unit_is_no_fit(plan, planned, tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        ledger.declare("st-mary", "notes", Terms(3.0, 1e-5))
        ledger.declare("st-mary", "images", Terms(3.0, 1e-5), ["notes"])
        spent = Reservation("st-mary", "images", "old", 1, "d", GaussianEvent(9.0, 1.0, 1), "person", "f", "n")
        assert isinstance(ledger.reserve([spent])[0], Granted)
    for entry in planned("r.toml", "--ledger", "l")["holders"]:  # notes, too: only one side declares them disjoint
        budget = entry["budget"]
        assert (budget["admitted"], budget["limit"], budget["other_units"]) == (False, "unit", ["person"])
        assert budget["rounds_that_fit"] == 0
    assert "the unit person; one budget covers one unit" in " ".join(plan("r.toml", "--ledger", "l")[1].split())


BEFORE = [  # what an earlier run declared, what the run to come declares, and whether both share their persons
    ({"domain": "x", "epsilon": 1.2}, {"domain": "y", "epsilon": 5.0}, True),
    ({"domain": "x", "epsilon": 1.2}, {"domain": "y", "epsilon": 5.0, "disjoint_from": ["x"]}, True),
    ({"domain": "x", "epsilon": 1.2, "disjoint_from": ["y"]}, {"domain": "y", "epsilon": 5.0}, True),
    (
        {"domain": "x", "epsilon": 1.2, "disjoint_from": ["y"]},
        {"domain": "y", "epsilon": 1.2, "disjoint_from": ["x"]},
        False,
    ),
    ({"domain": "x", "epsilon": 1.2}, {"domain": "x", "epsilon": 2.0}, False),
    ({"domain": "x", "epsilon": 1.2}, {"domain": "x", "epsilon": 1.3}, True),
    ({"domain": "x", "epsilon": 1.2}, None, True),
    (None, {"domain": "y", "epsilon": 1.2}, True),
    (None, None, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "refused"), BEFORE)
def test_the_plan_says_what_the_run_does_whatever_was_declared_before(planned, tmp_path, first, second, refused):
    def run(number, budget):
        with contextlib.suppress(RunError):
            simulate(config(holders__budget=budget), tmp_path / f"o{number}", state=tmp_path / "s")

    run(1, first)
    if second is not None:
        (tmp_path / "r.toml").write_text(RECIPE.replace("epsilon = 2.0", _toml(second)))
    else:
        (tmp_path / "r.toml").write_text(RECIPE.replace("[holders.budget]\nepsilon = 2.0\n", ""))
    (entry,) = planned("r.toml", "--state", "s")["holders"]
    run(2, second)
    with Ledger(tmp_path / "s" / LEDGER, create=False, read_only=True) as ledger:
        found = ledger.summary("holder-00001")
        rounds = sum(one.rounds for domain in found for one in domain.runs)
    assert rounds == (6 if refused else 12)
    budget = entry["budget"]
    if budget is None:
        assert (first, second) == (None, None)
        return
    assert budget["admitted"] == (not refused)
    if not refused:
        (left,) = (one.left.epsilon for one in found if one.domain == second["domain"])
        assert budget["left_after"] == pytest.approx(left, rel=1e-9)


def _toml(budget):
    return "\n".join(f"{name} = {json.dumps(value)}" for name, value in budget.items())


def test_limits_of_one_run_and_of_requests_are_looked_at():
    (entry,) = plans.of_recipe(config(holders__budget={"epsilon": 2.0, "per_run": {"epsilon": 0.5}}))["holders"]
    assert (entry["budget"]["admitted"], entry["budget"]["limit"]) == (False, "run")
    assert 0 < entry["budget"]["rounds_that_fit"] < 6
    (entry,) = plans.of_recipe(config(holders__limits={"noise_multiplier_min": 1e4}))["holders"]
    assert entry["refused"] == "the noise is less than the holder allows"
    (entry,) = plans.of_recipe(config(holders__limits={"noise_multiplier_min": 0.1}))["holders"]
    assert entry["refused"] is None


def test_a_poisson_plan_is_admitted_whole_or_not_at_all():
    sampled = {"privacy__mechanism": "poisson", "privacy__sample_rate": 0.1}
    for share, good in ((1.0, True), (0.9, True), (0.3, False)):
        budget = {"epsilon": 1.2, "delta": 2e-5, "poisson_share": share}
        (entry,) = plans.of_recipe(config(holders__budget=budget, **sampled))["holders"]
        assert entry["budget"]["admitted"] == good
        assert entry["budget"]["rounds_that_fit"] == (6 if good else 0)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_shows_the_plan_among_other_noises(plan, tmp_path, suffix):
    status, _, err = plan("r.toml", "--plot", f"p.{suffix}")
    assert (status, err) == (0, "")
    path = tmp_path / f"p.{suffix}"
    if suffix == "png":
        with Image.open(path) as image:
            assert image.size[0] > 800
            assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    else:
        text = path.read_text()
        for words in ("rounds", "epsilon at delta 1e-5, per record", "the plan: 6 round(s), epsilon 1"):
            assert words in text
        assert text.count("noise ") >= 5


def test_the_lines_of_the_picture_are_the_accountants():
    found = plans.of_recipe(config())
    lines = plans.curves(found, config())
    assert len(lines) == 5
    assert dict(lines[found["noise_multiplier"]])[6] == pytest.approx(found["epsilon"])
    for noise, points in lines.items():
        for rounds, value in points:
            assert value == pytest.approx(epsilon([GaussianEvent(noise, 0.3, rounds)], 1e-5).epsilon)
    assert all(math.isfinite(value) for points in lines.values() for _, value in points)
