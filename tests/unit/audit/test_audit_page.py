"""The page of an audit: its verdict, figures on the safe side, that it is safe to open, and how it looks."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedhead.simulations.audit import page, pictures, spending
from fedhead.simulations.audit.page import passed, render_page, write_page
from fedhead.simulations.report import ceiling

_SPEC = importlib.util.spec_from_file_location("audit_samples", Path(__file__).with_name("audit_samples.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
samples: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(samples)

XSS = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x$"
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


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; refuses one whose tags don't nest."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())

    def after(self, heading: str, end: str | None = None) -> str:
        """What stands between two headings."""
        found = self.text.split(f" {heading} ", 1)[1]
        return found if end is None else found.split(f" {end} ", 1)[0]


def read(found: dict[str, Any]) -> Page:
    return Page(render_page(found))


@cache
def text_of(name: str) -> str:
    """The page of a sample, made once."""
    return render_page(getattr(samples, name)())


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


def test_releases_are_counted_by_run_and_state() -> None:
    text = Page(text_of("passing")).after("What was released", "Budget spent and left")
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


def test_hostile_names_are_never_markup() -> None:
    found = samples.failing()
    found["name"] = XSS

    def soil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item if key in ("mechanism", "name") else soil(item) for key, item in value.items()}
        if isinstance(value, list):
            return [soil(item) for item in value]
        return value + XSS if isinstance(value, str) and value not in ("inf", "released") else value

    dirty = {"name": XSS, "created": XSS, **{part: soil(found[part]) for part in page.PARTS}}
    dirty["ledger"]["notes"] = [XSS]
    text = render_page(dirty)
    seen = Page(text)
    assert not {"script", "img", "iframe", "object", "link"} & {tag for tag, _ in seen.tags}
    assert not [key for _, attributes in seen.tags for key in attributes if key.startswith("on")]
    assert "<script" not in text
    assert "<script>alert(1)</script>" in seen.text  # it is there, as text


def test_a_name_that_is_no_text_can_be_written(tmp_path: Path) -> None:
    found = samples.passing()
    found["ledger"]["holders"][0]["holder"] = "half a pair \ud800, a control \x00, right to left \u202e"
    found["mechanism"]["bounds"][0]["title"] = "a\x00b"
    path = write_page(found, tmp_path / "audit.html")
    assert path == tmp_path / "audit.html"
    assert "half a pair ?" in path.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["audit.html"]


@pytest.mark.parametrize("name", ["passing", "failing", "empty"])
def test_the_page_needs_nothing_from_elsewhere(name: str) -> None:
    text = text_of(name)
    seen = Page(text)
    for _, attributes in seen.tags:
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(key) or "#").startswith("#")
    assert "@import" not in text
    assert "://" not in text
    assert not re.search(r"url\((?!#)", text)
    policy = [a["content"] for tag, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_pictures_have_words_own_ids_and_the_colours_of_the_page() -> None:
    text = text_of("failing")
    seen = Page(text)
    drawn = [attributes for tag, attributes in seen.tags if tag == "svg"]
    assert len(drawn) == 4
    assert all(len(attributes["aria-label"] or "") > 40 and attributes["role"] == "img" for attributes in drawn)
    ids = [attributes["id"] for _, attributes in seen.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for reference in re.findall(r"url\(#([^)]+)\)", text):
        assert reference in ids
    assert "#0102" not in text[text.index("<body>") :]
    for variable in set(re.findall(r"var\(--([\w-]+)\)", text)):
        assert text.count(f"--{variable}:") >= 2, f"{variable} needs a light and a dark colour"


def test_the_same_findings_give_the_same_bytes() -> None:
    assert render_page(samples.failing()) == text_of("failing")


def test_a_thousand_holders_stay_readable() -> None:
    found = {**samples.passing(), "ledger": samples.ledger(1000, 4)}
    broken = found["ledger"]["holders"][700]
    broken.update(passed=False, domains=[], together=[], first_bad={"sequence": 3, "what": "was changed"})
    text = render_page(found)
    seen = Page(text)
    assert "999 data holders in 2 runs" in seen.text
    assert "3,996 charged" in seen.text
    assert "And 3,496 further releases" in seen.text
    assert "And 998 further rows" in seen.text
    assert seen.text.index("✗ hospital-700") < seen.text.index("hospital-001")  # what failed comes first
    assert [a for tag, a in seen.tags if tag == "details" and "open" in a] == []
    assert "Share of the budget that was spent, over 999 budgets" in text
    assert len(text) < 2_000_000


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


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to draw the page with")
@pytest.mark.parametrize(("width", "height", "make"), [(500, 9000, samples.failing), (1200, 4000, samples.passing)])
def test_a_browser_draws_the_page_without_sideways_scrolling(
    tmp_path: Path, width: int, height: int, make: Callable[[], dict[str, Any]]
) -> None:
    from PIL import Image

    found = make()
    found["ledger"]["holders"][0]["holder"] = found["name"] = "a" * 90
    written, shot = write_page(found, tmp_path / "audit.html"), tmp_path / "shot.png"
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", f"--window-size={width},{height}",
        written.as_uri(),
    ]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"Chromium does not start here ({type(error).__name__})")
    drawn = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50, "the page is blank"
    edge = drawn[:, -3:]
    assert np.abs(edge - edge[0, 0]).max() <= 2, "something reaches the right edge"
    verdict = np.array([0xE6, 0xF5, 0xEE] if make is samples.passing else [0xFD, 0xEC, 0xEA])
    share = (np.abs(drawn[:400] - verdict).max(-1) <= 2).mean()
    assert share > 0.1, "the verdict does not stand at the top in its colour"
