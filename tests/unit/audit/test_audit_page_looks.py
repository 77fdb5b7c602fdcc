"""The page of an audit: that it is safe to open, needs nothing from elsewhere, and how it looks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from fedhead.simulations.audit import page
from fedhead.simulations.audit.page import render_page, write_page

PAGES = run_path(str(Path(__file__).with_name("audit_pages.py")))
Page, look, reading, samples, text_of = (PAGES[name] for name in ("Page", "look", "reading", "samples", "text_of"))
XSS = reading.XSS


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
    reading.assert_no_markup(text)


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
    assert "://" not in text
    reading.assert_nothing_from_elsewhere(text)


def test_pictures_have_words_own_ids_and_the_colours_of_the_page() -> None:
    reading.assert_pictures(text_of("failing"), 4)


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


@pytest.mark.slow
@pytest.mark.skipif(reading.CHROMIUM is None, reason="no Chromium on this machine to draw the page with")
@pytest.mark.parametrize(("width", "height", "make"), [(500, 9000, samples.failing), (1200, 4000, samples.passing)])
def test_a_browser_draws_the_page_without_sideways_scrolling(
    tmp_path: Path, width: int, height: int, make: Callable[[], dict[str, Any]]
) -> None:
    found = make()
    found["ledger"]["holders"][0]["holder"] = found["name"] = "a" * 90
    look(write_page(found, tmp_path / "audit.html"), width, height, make is samples.passing)


@pytest.mark.slow
@pytest.mark.skipif(reading.CHROMIUM is None, reason="no Chromium on this machine to print the page with")
def test_on_paper_all_but_the_single_releases_is_printed(tmp_path: Path) -> None:
    """Sections that are closed on the screen are printed all the same, save a row for each release unless open."""
    found = {**samples.passing(), "ledger": samples.ledger(40, 10)}
    closed = render_page(found)
    tag = "<details(?![^>]* open)"
    texts = {
        "closed": closed,
        "others": re.sub(tag + '(?! class="releases")', "<details open", closed),
        "all": re.sub(tag, "<details open", closed),
        "none": re.sub("<details.*?</details>", "", closed, flags=re.DOTALL),
    }
    assert len(set(texts.values())) == 4
    sheets = {}
    for name, text in texts.items():
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
        sheets[name] = reading.printed(tmp_path / f"{name}.html")
    assert sheets["closed"] == sheets["others"] > sheets["none"], sheets
    assert sheets["all"] > sheets["closed"] + 5, sheets
    assert "On paper, single releases are left out" in Page(closed).text
