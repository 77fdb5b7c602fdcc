"""The figures on the page of an audit: on the safe side, epsilon never without delta, and what its pictures draw."""

from __future__ import annotations

import math
import re
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest

from fedhead.simulations.audit import page, pictures, spending
from fedhead.simulations.report import ceiling

PAGES = run_path(str(Path(__file__).with_name("audit_pages.py")))
Page, read, samples, text_of = (PAGES[name] for name in ("Page", "read", "samples", "text_of"))


def test_every_figure_errs_to_the_safe_side() -> None:
    assert page.show_least(0.8299) == "0.82"
    assert page.show_least(2.0) == "2.00"
    assert page.show_least(0.29) == "0.29"  # 0.29 * 100 is below 29
    assert page.show_least(1e9) == page.show_least(math.inf) == "∞"
    found = samples.passing()
    found["mechanism"]["claim"]["epsilon"] = 2.9901
    found["mechanism"]["bounds"][0]["epsilon"] = 0.8299
    text = read(found).after("Claimed ε against measured lower bounds", "Every check")
    assert "ε = 3.00 at δ = 1e-5" in text
    assert "0.82" in text
    assert "0.83" not in text


def test_epsilon_never_stands_without_delta() -> None:
    for name in ("passing", "failing"):
        text = Page(text_of(name)).text
        for match in re.finditer(r"ε =? ?\d", text):
            assert "δ = " in text[match.start() : match.start() + 40], text[match.start() : match.start() + 60]
    heads = re.findall(r"<thead>(.*?)</thead>", text_of("passing"), re.DOTALL)
    assert len([head for head in heads if "ε" in head]) == 3
    assert all("δ" in head for head in heads if "ε" in head)


def test_of_several_accountants_the_largest_figure_counts() -> None:
    for name in ("first", "second", "ledger"):
        found = {**samples.empty(), "ledger": samples.ledger(1)}
        found["ledger"]["holders"][0]["domains"][0]["epsilon"][name]["epsilon"] = 2.5004
        found["ledger"]["holders"][0]["together"] = []
        assert "No data holder spent more than ε = 2.51 at δ = 1e-5" in read(found).text


def test_domains_that_overlap_are_composed_for_the_verdict() -> None:
    found = {**samples.empty(), "ledger": samples.ledger(1)}
    one = found["ledger"]["holders"][0]
    one["domains"][0]["counted_with"] = ["surgery"]
    one["together"][0]["epsilon"] = {"first": samples.figures(2.8001, "gdp"), "second": None, "ledger": None}
    text = read(found).text
    assert "No data holder spent more than ε = 2.81 at δ = 1e-5" in text
    assert "counted with surgery , which may hold the same records" in text


def test_over_budget_is_said_only_where_both_accountants_say_so() -> None:
    found = {**samples.empty(), "ledger": samples.ledger(1)}
    figures = found["ledger"]["holders"][0]["domains"][0]["epsilon"]
    figures["second"]["epsilon"] = 3.0002
    assert "over budget" not in read(found).text
    figures["first"]["epsilon"] = 3.0001
    assert "over budget" in read(found).text


def test_infinite_and_unknown_epsilons_are_no_numbers() -> None:
    found = {**samples.empty(), "ledger": samples.ledger(2)}
    domain = found["ledger"]["holders"][0]["domains"][0]
    domain["epsilon"] = {"first": samples.figures("inf", "none"), "second": None, "ledger": None}
    domain["terms"] = domain["left"] = None
    domain["releases"][0]["event"] = {"schema": 1, "mechanism": "none", "steps": 1}
    text = read(found).text
    assert "ε is infinite" in text
    assert "no budget was declared" in text
    assert "neither clipped nor noised" in text
    domain["unit"], domain["epsilon"] = ["person", "record"], {"first": None, "second": None, "ledger": None}
    assert "its units have none in common" in read(found).text
    mixed = samples.passing()
    mixed["mechanism"]["bounds"][1]["epsilon"] = 1e9
    mixed["mechanism"]["claim"]["epsilon"] = "inf"
    assert "ε = ∞ at δ = 1e-5" in read(mixed).text


def test_the_picture_of_the_attack_has_the_ceiling_of_the_table() -> None:
    """A point above the table's ceiling lies above the picture's line, too: both come from the audit."""
    found = samples.passing()
    before = page._roc_chart(found["membership"])
    found["membership"]["ceiling"] = [[rate, most / 3] for rate, most in found["membership"]["ceiling"]]
    after = page._roc_chart(found["membership"])
    found["membership"]["ceiling"] = None
    without = page._roc_chart(found["membership"])
    found["membership"]["claim"] = None
    assert page._roc_chart(found["membership"]) == without  # nothing but the audit's own curve is drawn
    assert len({before, after, without}) == 3


def test_one_figure_is_the_largest() -> None:
    """The headline and the list name the same epsilon, whatever the composition over holders leaves out."""
    found = samples.passing()
    found["ledger"]["holders"][0]["domains"][0]["epsilon"]["ledger"]["epsilon"] = 2.9004
    found["ledger"]["across"]["disjoint"] = {"epsilon": 1.5, "delta": 1e-5, "unit": "record"}
    text = read(found)
    assert "No data holder spent more than ε = 2.91 at δ = 1e-5" in text.text
    assert "Largest ε ε = 2.91 at δ = 1e-5" in text.after("What was released", "Budget spent and left")


def test_the_ceiling_is_the_least_that_both_directions_allow() -> None:
    """Against a search over all tests: (tpr, fpr) must satisfy both inequalities of the definition."""
    for epsilon, delta in ((0.5, 1e-5), (3.0, 1e-3), (8.0, 0.05)):
        for rate in (0.0, 1e-3, 0.01, 0.3, 0.99, 1.0):
            grid = np.linspace(0, 1, 200_001)
            allowed = (grid <= math.exp(epsilon) * rate + delta) & (1 - rate <= math.exp(epsilon) * (1 - grid) + delta)
            assert ceiling(epsilon, delta, rate) == pytest.approx(grid[allowed].max(), abs=6e-6)
    assert ceiling(math.inf, 1e-5, 0.01) is None


def test_the_curve_is_the_most_that_was_found_at_each_rate() -> None:
    draws = np.random.default_rng(1)
    found = draws.uniform(size=(50, 2))
    places, reached = pictures._stairs(found, 1e-3)
    assert len(places) == pictures.MOST_POINTS
    for place, most in zip(places, reached, strict=True):
        below = found[found[:, 0] <= place, 1]
        if len(below) and below.max() >= 1e-3:
            assert most == below.max()
        else:
            assert math.isnan(most)


def test_times_are_shown_in_utc_and_what_is_no_time_as_it_is() -> None:
    assert spending.moment("2026-11-22T16:00:00+02:00") == "2026-11-22 14:00:00"
    assert spending.moment("2026-11-22T16:00:00.123456Z") == "2026-11-22 16:00:00"
    assert spending.moment("yesterday") == "yesterday"
    assert spending.moment(None) == "None"
