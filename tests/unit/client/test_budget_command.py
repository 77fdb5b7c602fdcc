"""`fedhead budget`: what it shows is what the ledgers say, and what an independent recomputation says."""

import json
import math
import re
import shutil

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedhead.client.findings import delta_left_as
from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.events import CountEvent, GaussianEvent, NoPrivacyEvent, PoissonEvent, from_json
from fedhead.common.privacy.ledger import Ledger, LedgerError, Plan, Reservation, verify_statement
from fedhead.common.privacy.terms import Terms
from fedhead.simulations.budgets import read_budgets


def ledger(folder, name="ledger.sqlite"):
    folder.mkdir(parents=True, exist_ok=True)
    return Ledger(folder / name)


def rounds(opened, run, numbers, event, holder="a", domain="d", sent=True, **more):
    """Reserve rounds, and release them."""
    for number in numbers:
        fields = {"unit": "record", "noise": "aes-ctr-gaussian", **more}
        wanted = Reservation(holder, domain, run, number, f"{run} {number}", event, fingerprint="f", **fields)
        (outcome,) = opened.reserve([wanted])
        if sent:
            opened.release([(holder, outcome.sequence, b"bytes")])


def gdp(mu: float, delta: float) -> float:
    """Epsilon of Gaussian differential privacy, by scipy alone."""

    def excess(eps: float) -> float:
        return norm.cdf(-eps / mu + mu / 2) - math.exp(eps) * norm.cdf(-eps / mu - mu / 2) - delta

    return brentq(excess, 0.0, 60.0, xtol=1e-12)


@pytest.fixture
def two_runs(tmp_path):
    with ledger(tmp_path / "state") as opened:
        opened.declare("a", "d", Terms(4.0, 1e-6, run_epsilon=3.0))
        rounds(opened, "first", range(1, 5), GaussianEvent(8.0, 1.0, 2))
        rounds(opened, "second", range(1, 3), GaussianEvent(6.0, 1.0, 1), metrics=CountEvent(20.0, 1.0, 1))
        rounds(opened, "second", [3], GaussianEvent(6.0, 1.0, 1), sent=False)
        rounds(opened, "second", [3], GaussianEvent(6.0, 1.0, 1), sent=False)  # asked again: a new spend
    return tmp_path


def test_figures_are_those_of_a_recomputation(two_runs):
    (row,) = read_budgets([two_runs])["domains"]
    first, second = row["runs"]
    squared = [4 * 2 / 8**2, 2 * (1 / 6**2 + 1 / 20**2) + 2 / 6**2]
    for figures, expected in (
        (first["spent"], squared[0]),
        (second["spent"], squared[1]),
        (row["spent"], sum(squared)),
    ):
        assert figures["epsilon"] == pytest.approx(gdp(math.sqrt(expected), 1e-6), rel=1e-6)
        assert (figures["delta"], figures["accountant"]) == (1e-6, "gdp")
    assert row["left"]["mu_squared"] == pytest.approx(Terms(4.0, 1e-6).mu_squared - sum(squared))
    assert row["terms"]["run_epsilon"] == 3.0


def test_figures_agree_with_the_accountant_over_the_stored_events(two_runs):
    with Ledger(two_runs / "state" / "ledger.sqlite", create=False, read_only=True) as opened:
        events = [from_json(entry.event) for entry in opened.entries() if entry.kind == "reserve"]
    (row,) = read_budgets([two_runs])["domains"]
    assert len(events) == 4 + 2 * 2 + 2
    assert row["spent"]["epsilon"] == pytest.approx(epsilon(events, 1e-6).epsilon, rel=1e-9)


def test_rounds_are_counted_by_what_became_of_them(two_runs):
    (row,) = read_budgets([two_runs])["domains"]
    first, second = row["runs"]
    assert [(run["rounds"], run["released"]) for run in (first, second)] == [(4, 4), (3, 2)]
    assert (second["reserved"], second["abandoned"]) == (1, 1)
    assert (row["released"], row["reserved"], row["abandoned"]) == (6, 1, 1)


def test_the_table_says_the_same_as_the_json(fedhead, two_runs, monkeypatch):
    status, out, err = fedhead("budget", "state", "--json")
    assert (status, err) == (0, "")
    (row,) = json.loads(out)["domains"]
    for width, columns in (("80", True), ("200", True), ("40", False)):
        monkeypatch.setenv("COLUMNS", width)
        _, shown, _ = fedhead("budget", "state")
        assert max(map(len, shown.splitlines())) <= int(width)
        assert "…" not in shown
        assert ("│" in shown) is columns
        for figures in (row["spent"], *(run["spent"] for run in row["runs"])):
            assert f"{math.ceil(figures['epsilon'] * 1000) / 1000:.3f}" in shown
        assert f"{math.floor(row['left']['epsilon'] * 1000) / 1000:.3f}" in shown


def test_poisson_plans_are_charged_whole(fedhead, tmp_path, monkeypatch):
    plan = Plan(PoissonEvent(2.0, 1.0, 0.01, 50), 1e-6)
    with ledger(tmp_path) as opened:
        opened.declare("a", "d", Terms(4.0, 1e-5, poisson_share=0.5))
        rounds(opened, "p", [1], PoissonEvent(2.0, 1.0, 0.01, 5), plan=plan)
    (row,) = read_budgets([tmp_path])["domains"]
    whole = epsilon([plan.event], 1e-6).epsilon
    assert row["spent"]["epsilon"] == pytest.approx(whole, rel=1e-9)
    assert row["spent"]["accountant"] == "sum"
    assert row["left"]["poisson_epsilon"] == pytest.approx(2.0 - whole)
    for width in ("80", "72", "40"):
        monkeypatch.setenv("COLUMNS", width)
        shown = fedhead("budget", ".")[1]
        assert f"{math.floor(row['left']['poisson_epsilon'] * 1000) / 1000:.3f}" in shown
        assert f"at {delta_left_as(row['left']['poisson_delta'])}" in " ".join(shown.split())
        assert "…" not in shown
        assert "\n\n" not in shown
    assert row["left"]["poisson_delta"] == pytest.approx(4e-6)


def test_without_a_budget_delta_can_be_chosen(fedhead, tmp_path):
    with ledger(tmp_path) as opened:
        rounds(opened, "r", [1, 2], GaussianEvent(4.0, 1.0, 1))
        rounds(opened, "p", [1], PoissonEvent(2.0, 1.0, 0.01, 5), plan=Plan(PoissonEvent(2.0, 1.0, 0.01, 5), 1e-6))
    (row,) = read_budgets([tmp_path])["domains"]
    assert row["spent"]["delta"] == pytest.approx(1.1e-5)
    (row,) = read_budgets([tmp_path], 1e-4)["domains"]
    gaussian = next(run for run in row["runs"] if run["run"] == "r")["spent"]
    assert gaussian["delta"] == 1e-4
    assert gaussian["epsilon"] == pytest.approx(gdp(math.sqrt(2 / 16), 1e-4), rel=1e-6)
    assert row["terms"] is row["left"] is None
    for wrong in ("0", "1", "nan"):
        status, _, err = fedhead("budget", ".", "--delta", wrong)
        assert (status, err.count("\n")) == (2, 1)


def test_no_privacy_is_infinite_and_still_json(fedhead, tmp_path):
    with ledger(tmp_path) as opened:
        rounds(opened, "r", [1], NoPrivacyEvent(1))
    status, out, _ = fedhead("budget", ".", "--json")
    (row,) = json.loads(out, parse_constant=pytest.fail)["domains"]
    assert (status, row["spent"]["epsilon"], row["spent"]["accountant"]) == (0, "inf", "none")
    assert "infinite" in fedhead("budget", ".")[1]


def test_a_seed_that_arrived_is_no_privacy_and_a_simulated_one_is_told(tmp_path):
    for name, seeded in (("real", False), ("simulated", True)):
        with ledger(tmp_path / name) as opened:
            opened.declare("a", "d", Terms(4.0, 1e-6))
            rounds(opened, "r", [1], GaussianEvent(4.0, 1.0, 1), noise="mt19937-seeded", seeded=seeded)
    (real,) = read_budgets([tmp_path / "real"])["domains"]
    assert real["spent"]["epsilon"] == real["runs"][0]["spent"]["epsilon"] == "inf"
    (simulated,) = read_budgets([tmp_path / "simulated"])["domains"]
    assert simulated["spent"]["epsilon"] < 2
    assert "whoever knows the seed" in simulated["notes"][0]


def test_units_are_never_mixed_in_one_figure(fedhead, tmp_path):
    with ledger(tmp_path) as opened:
        rounds(opened, "r", [1], GaussianEvent(9.0, 1.0, 1))  # a budget would refuse the second unit
        rounds(opened, "s", [1], GaussianEvent(9.0, 1.0, 1), unit="person")
    (row,) = read_budgets([tmp_path])["domains"]
    assert row["spent"] is None
    assert "no epsilon in common" in row["notes"][0]
    assert fedhead("budget", ".")[0] == 0


def test_domains_that_are_not_disjoint_count_together(tmp_path):
    with ledger(tmp_path) as opened:
        for domain in ("d", "e"):
            opened.declare("a", domain, Terms(4.0, 1e-6))
        rounds(opened, "r", [1], GaussianEvent(2.0, 1.0, 1))
    d, e = read_budgets([tmp_path])["domains"]
    assert (d["counted_with"], e["counted_with"]) == (["e"], ["d"])
    assert e["spent"]["epsilon"] == 0
    assert e["left"] == d["left"]
    assert e["left"]["mu_squared"] < e["terms"]["epsilon"]


def test_a_copy_is_not_a_second_spend(tmp_path):
    with ledger(tmp_path / "holders", "ledgers.sqlite") as opened:
        for holder in ("a", "b"):
            rounds(opened, "r", [1], GaussianEvent(4.0, 1.0, 1), holder=holder)
        opened.export(tmp_path / "old")
        rounds(opened, "r", [2], GaussianEvent(4.0, 1.0, 1))
        opened.export(tmp_path / "holders")
    found = read_budgets([tmp_path])["domains"]
    assert [(row["holder"], row["runs"][0]["rounds"]) for row in found] == [("a", 2), ("b", 1)]
    assert read_budgets([tmp_path, tmp_path / "old", tmp_path / "old" / "a" / "ledger.sqlite"])["domains"] == found


def test_two_chains_of_one_name_are_both_shown(fedhead, tmp_path):
    for name in ("one", "two"):
        with ledger(tmp_path / name) as opened:
            rounds(opened, name, [1], GaussianEvent(4.0, 1.0, 1))
    assert len(read_budgets([tmp_path])["domains"]) == 2
    out = fedhead("budget", ".")[1]
    assert "one/ledger.sqlite" in out
    assert "two/ledger.sqlite" in out


def test_many_holders_are_cut_short_in_a_terminal_only(fedhead, tmp_path):
    with ledger(tmp_path) as opened:
        for number in range(60):
            rounds(opened, "r", [1], GaussianEvent(4.0, 1.0, 1), holder=f"h{number:02d}")
    _, out, _ = fedhead("budget", ".")
    assert "and 10 more" in out
    assert len(json.loads(fedhead("budget", ".", "--json")[1])["domains"]) == 60


def test_a_copy_that_went_on_by_itself_is_said(fedhead, two_runs):
    for name in ("copy", "old"):
        shutil.copytree(two_runs / "state", two_runs / name)
    note = "a copy of this ledger went on by itself: what both spent adds up; run fedhead audit ledger"
    with ledger(two_runs / "copy") as opened:
        rounds(opened, "third", [1], GaussianEvent(9.0, 1.0, 1))
    assert note not in fedhead("budget", ".")[1].replace("\n", " ")  # one only goes on from the others
    with ledger(two_runs / "state") as opened:
        rounds(opened, "fourth", [1], GaussianEvent(9.0, 1.0, 1))
    assert " ".join(fedhead("budget", ".")[1].split()).count(note) == 1
    rows = json.loads(fedhead("budget", ".", "--json")[1])["domains"]
    assert [row["notes"] for row in rows] == [[note]] * 2
    with ledger(two_runs / "other") as opened:  # the same holder's name, but no copy
        rounds(opened, "first", [1], GaussianEvent(9.0, 1.0, 1))
    rows = read_budgets([two_runs / "copy", two_runs / "other"])["domains"]
    assert not any(note in row["notes"] for row in rows)


def test_looking_changes_nothing(two_runs):
    path = two_runs / "state" / "ledger.sqlite"
    before = path.read_bytes()
    assert read_budgets([two_runs]) == read_budgets([two_runs])
    assert path.read_bytes() == before


def test_bad_input_is_one_line(fedhead, two_runs):
    (two_runs / "empty").mkdir()
    (two_runs / "text.sqlite").write_text("no ledger")
    path = two_runs / "state" / "ledger.sqlite"
    content = bytearray(path.read_bytes())
    content[content.rfind(b'"steps"')] ^= 1
    (two_runs / "broken").mkdir()
    (two_runs / "broken" / "ledger.sqlite").write_bytes(content)
    for name, expected in (("nowhere", 2), ("empty", 2), ("text.sqlite", 1), ("broken", 1)):
        status, out, err = fedhead("budget", name)
        assert (status, out) == (expected, ""), name
        assert re.fullmatch(r"fedhead: [^\n]+\n", err), err
    assert fedhead("budget")[0] == 2


def test_statements_are_signed_and_hold(fedhead, two_runs, tmp_path):
    status, out, _ = fedhead("budget", str(two_runs), "--sign", "said", "--json")
    assert status == 0
    (path,) = json.loads(out)["statements"]
    text = (tmp_path / path).read_text().strip()
    said = verify_statement(text)
    (file,) = {row["ledger"] for row in json.loads(out)["domains"]}
    with Ledger(tmp_path / file, create=False, read_only=True) as opened:
        assert said.mark == opened.mark(said.holder)
        assert said.domains == opened.standing(said.holder)[1]
    with pytest.raises(LedgerError):
        verify_statement(text.replace('"sequence":', '"sequence":1'))
    again = json.loads(fedhead("budget", str(two_runs), "--sign", "said", "--json")[1])["statements"]
    assert verify_statement((tmp_path / again[0]).read_text().strip()).public_key == said.public_key  # one key for good
