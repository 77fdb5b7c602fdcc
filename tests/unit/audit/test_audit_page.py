"""The page of an audit: its verdict, its sections, and what it says of releases and of what was not audited."""

from __future__ import annotations

import re
from pathlib import Path
from runpy import run_path

import pytest

from fedhead.simulations.audit import page
from fedhead.simulations.audit.page import passed

PAGES = run_path(str(Path(__file__).with_name("audit_pages.py")))
Page, read, samples, text_of = (PAGES[name] for name in ("Page", "read", "samples", "text_of"))

SECTIONS = [
    "What was released",
    "Budget spent and left",
    "Claimed ε against measured lower bounds",
    "Every check",
    "The noise that was found",
    "Membership attack",
    "What this audit does not show",
    "Words",
    "Who can verify this",
]


def test_a_passing_audit_says_so_first_and_in_words() -> None:
    page = Page(text_of("passing"))
    assert page.text.index("Passed") < page.text.index("No data holder spent more than ε = 2.41 at δ = 1e-5")
    assert "for one record, and nothing that was measured contradicts the mechanism's claim." in page.text
    assert "Failed" not in page.text
    assert "✗" not in page.text
    assert passed(samples.passing()) is True


def test_the_sections_stand_in_their_order() -> None:
    for name in ("passing", "failing", "empty"):
        text = text_of(name)
        headings = [heading for heading in re.findall(r"<h2>(.*?)</h2>", text) if heading != "Notes of the audits"]
        assert headings == SECTIONS


def test_a_failing_audit_names_the_faults_and_the_first_bad_row() -> None:
    page = Page(text_of("failing"))
    assert "Faults were found in the ledger, the mechanism and the membership attack" in page.text
    assert "No data holder spent more than" not in page.text
    assert "1 of 4 checks failed: Hash chain." in page.text
    assert "Entry 9 has a hash that does not fit: the row was changed" in page.text
    assert "✗ hospital-001" in page.text
    assert "A measured bound is above the claim" in page.text
    assert "exceeded" in page.after("Membership attack")
    assert passed(samples.failing()) is False
    checks = page.after("Every check")
    assert checks.index("Total variance") < checks.index("Variance of each number")  # what failed comes first
    assert "p < 1e-99, fails at 0.0025" in checks


@pytest.mark.parametrize(
    ("unit", "word"),
    [("record", "No privacy was promised"), ("holder", "The server's noise is not audited here")],
)
def test_an_infinite_epsilon_is_no_green_verdict(unit: str, word: str) -> None:
    found = {**samples.empty(), "ledger": samples.ledger(1)}
    one = found["ledger"]["holders"][0]
    one["domains"][0]["unit"], one["together"] = [unit], []
    one["domains"][0]["epsilon"] = {"first": samples.figures("inf", "none"), "second": None, "ledger": None}
    found["ledger"]["checks"][-1]["passed"] = None
    assert passed(found) is True
    text = read(found).text
    assert word in text
    assert text.index(word) < text.index("Passed")
    checks = len(found["ledger"]["checks"]) - 1
    assert f"All {checks} checks passed." in text
    assert f"{checks} of {checks} passed" in text


@pytest.mark.parametrize("part", ["ledger", "mechanism", "membership"])
def test_one_part_that_fails_fails_the_page(part: str) -> None:
    found = samples.passing()
    found[part] = samples.failing()[part]
    assert passed(found) is False
    assert "Failed" in read(found).text


@pytest.mark.parametrize("part", ["ledger", "mechanism"])
def test_a_failed_check_counts_more_than_a_result_that_says_passed(part: str) -> None:
    found = samples.passing()
    found[part]["checks"][-1]["passed"] = False
    assert found[part]["passed"] is True
    assert passed(found) is False
    found = samples.passing()
    found[part]["passed"] = False
    assert passed(found) is False
    assert "did not pass" in read(found).text


def test_what_was_not_audited_is_said_to_be_so() -> None:
    page = Page(text_of("empty"))
    assert passed(samples.empty()) is None
    assert "Nothing was audited, so this page shows nothing about privacy." in page.text
    assert "Passed" not in page.text
    assert page.text.count("Not audited:") == 6  # one line a section that lacks its part
    assert not [tag for tag, _ in page.tags if tag == "svg"]
    for part in ("ledger", "mechanism", "membership"):
        found = {**samples.passing(), part: None}
        assert passed(found) is True
        assert f"Not audited: {page_name(part)}." in read(found).text
    only = read({"name": "x", "created": None, "mechanism": samples.mechanism()})
    assert "Nothing that was measured contradicts the claim of ε = 3.00 at δ = 1e-5 for one record." in only.text


def page_name(part: str) -> str:
    return page.PARTS[part].lower()


def test_a_file_that_is_no_ledger_and_a_rate_that_could_not_be_stated() -> None:
    found = samples.passing()
    lost = {"holder": "", "ledger": "x.sqlite", "entries": 0, "mark": None, "passed": False, "domains": []}
    lost["first_bad"] = {"sequence": None, "what": "is no ledger of this version", "check": "file"}
    found["ledger"]["holders"].append(lost)
    found["membership"]["rates"][0].update(tpr=None, low=None, high=None)
    found["ledger"]["passed"] = False
    text = read(found).text
    assert "A file that is no ledger is no ledger of this version. Nothing that this ledger says" in text
    assert "0.1% — — 1.992%" in text
    only = {**samples.empty(), "ledger": {**samples.ledger(0), "passed": False, "holders": [lost]}}
    assert "No ledger that passed holds a release." in read(only).text


def test_what_is_left_of_each_budget_is_said() -> None:
    found = samples.passing()
    found["ledger"]["holders"][0]["domains"][0]["left"]["epsilon"] = 0.4567
    text = read(found).after("Budget spent and left", "Claimed ε against measured lower bounds")
    assert "ε 0.45 at δ = 1e-5 left" in text  # rounded down
    assert "3.00 0.45" in text  # and in the table of accountants


def test_every_check_comes_with_what_it_means() -> None:
    for name in ("passing", "failing"):
        found, text = getattr(samples, name)(), Page(text_of(name)).after("Every check", "The noise that was found")
        checks = [check for part in ("ledger", "mechanism") for check in found[part]["checks"]]
        assert len(checks) > 6
        for check in checks:
            assert " ".join(check["meaning"].split()) in text
            assert check["title"] in text


def test_as_many_canaries_as_there_could_be_are_said() -> None:
    found = samples.passing()
    found["mechanism"].update(canaries=380, most_canaries=384)
    assert "380 canaries of at most 384" in read(found).after("Claimed ε against measured lower bounds", "Every check")


def test_releases_are_counted_by_run_and_state() -> None:
    text = Page(text_of("passing")).after("What was released", "Budget spent and left")
    assert "To the server of each run, and whoever it passes the model on to: count it as public" in text
    assert "Run it went to" in text
    assert "3 data holders in 2 runs" in text
    assert "36 charged: 30 left the holder, 3 may have, 3 did not." in text
    assert "2026-11-20 08:07:00 UTC to 2026-11-21 05:24:00 UTC" in text
    assert "full-batch, noise multiplier 13.17, clipping norm 1, all records in each step; 36 steps in all" in text
    assert "hospital-001 radiology 77b1a0c3e962-second 2026-11-21 04:49:00 2026-11-21 05:24:00 6 4 1 1" in text
    assert text.count("released") == 30  # one row each, in the list of all
    assert text.count("abandoned") == 3


def test_kinds_of_release_are_told_apart() -> None:
    found = {**samples.empty(), "ledger": samples.ledger(2)}
    releases = found["ledger"]["holders"][1]["domains"][0]["releases"]
    releases[0]["event"] = {**samples.EVENT, "mechanism": "poisson", "sample_rate": 0.05, "steps": 40}
    releases[1]["event"] = {"mechanism": "count", "noise_multiplier": 20.0, "sensitivity": 1.0, "steps": 1}
    text = read(found).text
    assert "poisson, noise multiplier 13.17, clipping norm 1, each record with probability 0.05: 1 release of" in text
    assert "40 steps in all" in text
    assert "noised count, noise multiplier 20, sensitivity 1" in text


def test_a_seed_makes_epsilon_infinite_for_who_knows_it() -> None:
    assert "For whoever knows the seed, ε is infinite" not in Page(text_of("passing")).text
    for found in (
        {**samples.empty(), "ledger": samples.ledger(seeded=True)},
        {**samples.empty(), "mechanism": samples.mechanism(seeded=True)},
    ):
        assert "For whoever knows the seed, ε is infinite" in read(found).text


def test_same_people_pay_the_sum() -> None:
    found = samples.passing()
    assert "Whoever has data at several holders pays their sum" in Page(text_of("passing")).text
    found["ledger"]["across"]["same-people"] = {"epsilon": 5.117, "delta": 3e-5}
    assert "at all of them: ε = 5.12 at δ = 3e-5" in read(found).text


def test_the_commands_to_repeat_are_quoted() -> None:
    found = samples.passing()
    found["mechanism"]["recipe"] = "my recipe;rm.toml"
    text = read(found).text
    assert "fedhead audit ledger holders/hospital-000/ledger.sqlite" in text
    assert "fedhead audit mechanism 'my recipe;rm.toml'" in text
    assert "fedhead audit membership quickstart" in text
    assert "fedhead audit ledger LEDGER..." in Page(text_of("empty")).text
    assert samples.ledger()["holders"][2]["mark"]["hash"] in text


def test_empty_ledgers_and_audits_without_pictures() -> None:
    found = samples.passing()
    found["ledger"] = {**samples.ledger(0), "checks": [], "across": {}}
    found["mechanism"] = {**samples.mechanism(), "bounds": [], "checks": [], "residuals": None}
    found["membership"] = {**samples.membership(), "roc": [], "rates": [], "claim": None}
    text = read(found).text
    assert "hold no release" in text
    assert "had nothing to check" in text
    assert "Not audited: the noise" in text
    bare = {**samples.empty(), "ledger": samples.ledger(1, 12)}
    bare["ledger"]["holders"][0]["domains"] = []
    assert "The ledger of 1 data holder holds no release." in read(bare).text
