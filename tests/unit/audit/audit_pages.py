"""Pages of made-up audits, and how tests read them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

from fedhead.simulations.audit.page import render_page

samples = SimpleNamespace(**run_path(str(Path(__file__).with_name("audit_samples.py"))))
reading = SimpleNamespace(**run_path(str(Path(__file__).parents[1] / "page_reading.py")))
Page = reading.Page


def read(found: dict[str, Any]) -> Any:
    """The page of these results."""
    return Page(render_page(found))


@cache
def text_of(name: str) -> str:
    """The HTML of a sample, made once."""
    return render_page(getattr(samples, name)())
