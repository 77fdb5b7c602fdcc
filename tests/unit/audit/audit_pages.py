"""Pages of made-up audits, and how tests read them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedhead.simulations.audit.page import render_page

samples = SimpleNamespace(**run_path(str(Path(__file__).with_name("audit_samples.py"))))
reading = SimpleNamespace(**run_path(str(Path(__file__).parents[1] / "page_reading.py")))
Page = reading.Page


def read(found: dict[str, Any]) -> Any:
    """The page of these results."""
    return Page(render_page(found))


def look(path: Path, width: int, height: int, passed: bool) -> None:
    """Have Chromium draw a page, and hold it to its verdict, which stands at the top in its colour."""
    drawn = reading.draw(path, width, height)
    colour = np.array([0xE6, 0xF5, 0xEE] if passed else [0xFD, 0xEC, 0xEA])
    share = (np.abs(drawn[:400] - colour).max(-1) <= 2).mean()
    assert share > 0.1, "the verdict does not stand at the top in its colour"


@cache
def text_of(name: str) -> str:
    """The HTML of a sample, made once."""
    return render_page(getattr(samples, name)())
