"""What a terminal shows: what users typed, letter for letter."""

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from runpy import run_path

from fedhead.simulations import console

make_result = run_path(str(Path(__file__).with_name("test_results.py")))["make"]
ODD = "[lr=3] [/x] :heart:"


def test_names_and_paths_are_shown_as_they_were_typed(capsys):
    result = make_result()
    spend, holder = dict(result.privacy[0], holder=ODD), dict(result.holders[0], name=ODD)
    result = replace(result, name=ODD, notes=[f"a note on {ODD}"], privacy=[spend], holders=[holder])
    console.show_result(result, Path("runs") / ODD / "a")
    shown = capsys.readouterr().out
    assert f"note: a note on {ODD}\n" in shown
    assert f"results in runs/{ODD}/a\nreport  at runs/{ODD}/a/report.html\n" in shown
    unwrapped = " ".join(shown.split())
    assert f"{ODD}: test records" in unwrapped
    assert unwrapped.count(ODD) == 5
    found = {"values": [0.5, 1.0], "mean": 0.75, "deviation": 0.25}
    spends = [{"seed": seed, "epsilon": 2.9 + seed / 20, "delta": 1e-5, "unit": "record"} for seed in (0, 1)]
    console.show_seeds({"seeds": [0, 1], "metrics": {ODD: found}, "privacy": spends, "folder": f"runs/{ODD}"})
    shown = capsys.readouterr().out
    assert shown.count(ODD) == 2
    assert "each run spent epsilon 2.900 to 2.950 at delta 1e-5" in shown


def test_who_refused_all_rounds_is_shown_and_why(capsys):
    result = make_result()
    refused = {"holder": "st-mary", "code": 1010, "text": "the holder's privacy budget does not allow it"}
    rounds = [{**row, "refused": [refused]} for row in result.rounds]
    console.show_result(replace(result, rounds=rounds), Path("runs"))
    shown = capsys.readouterr().out
    assert re.search(r"st-mary .* 0\.000 .* no update", shown)
    assert f"no update: {len(rounds)} × {refused['text']} (code 1010), 1 data holder\n" in shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_are_drawn_in_a_terminal_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.progress_bars() as listen:
        assert listen is not None
        listen("features", 3, 8, "")
        listen("rounds", 1, 2, f"accuracy {ODD}")
        listen("rounds", 2, 2, f"accuracy {ODD}")
    last = terminal.getvalue().rpartition("features")[2]
    assert "3/8" in last
    assert "2/2" in last
    assert f"accuracy {ODD}" in last
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with console.progress_bars() as listen:
        assert listen is None
    assert sys.stderr.getvalue() == ""
