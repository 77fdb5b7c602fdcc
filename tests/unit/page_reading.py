"""What tests of written pages share: the page as a reader has it, and what must be true of every page."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

XSS = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x$"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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


def assert_no_markup(text: str) -> None:
    """A page with `XSS` in it shows that as text."""
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "link"} & {tag for tag, _ in page.tags}
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert "<script" not in text
    assert "<script>alert(1)</script>" in page.text  # it is there, as text


def assert_nothing_from_elsewhere(text: str) -> None:
    """No file, address or script that a browser would fetch."""
    page = Page(text)
    for _, attributes in page.tags:
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(key) or "#").startswith("#")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def assert_pictures(text: str, number: int) -> None:
    """So many pictures, each with words for who can't see it, ids of its own, and the colours of the page."""
    page = Page(text)
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawn) == number
    assert all(len(attributes["aria-label"] or "") > 40 and attributes["role"] == "img" for attributes in drawn)
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for reference in re.findall(r"url\(#([^)]+)\)", text):
        assert reference in ids
    assert "#0102" not in text[text.index("<body>") :]
    for variable in set(re.findall(r"var\(--([\w-]+)\)", text)):
        assert text.count(f"--{variable}:") >= 2, f"{variable} needs a light and a dark colour"


def draw(path: Path, width: int, height: int) -> np.ndarray:
    """The page as Chromium draws it, shape (height, width, 3); it is not blank, and nothing reaches the right edge."""
    from PIL import Image

    shot = path.with_suffix(".png")
    _browse(path, f"--screenshot={shot}", f"--window-size={width},{height}")
    image = Image.open(shot).convert("RGB")
    assert image.getcolors(50) is None, "the page is blank"
    drawn = np.asarray(image).astype(int)
    edge = drawn[:, -3:]
    assert np.abs(edge - edge[0, 0]).max() <= 2, "something reaches the right edge"
    return drawn


def printed(path: Path) -> int:
    """Sheets that Chromium prints the page on."""
    sheets = path.with_suffix(".pdf")
    _browse(path, f"--print-to-pdf={sheets}", "--no-pdf-header-footer")
    return len(re.findall(rb"/Type\s*/Page\b", sheets.read_bytes()))


def _browse(path: Path, *wanted: str) -> None:
    """Let Chromium open the page; one that can't start is a failure where there is one."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={path.parent / 'profile'}", *wanted, path.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=180)
