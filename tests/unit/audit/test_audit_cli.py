"""`fedhead audit`: exit status, what goes to stdout and stderr, pages, and findings."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest

PAGES = run_path(str(Path(__file__).with_name("audit_pages.py")))
COMMANDS = run_path(str(Path(__file__).with_name("audit_commands.py")))
HEAD, refused, sound, strict, write_recipe = (
    COMMANDS[name] for name in ("HEAD", "refused", "sound", "strict", "write_recipe")
)


def flip(path, bit=0):
    """Change one bit of the second row's hash, and return the row's number and holder."""
    query = "SELECT holder, sequence, hash FROM entries ORDER BY holder, sequence LIMIT 1 OFFSET 1"
    with closing(sqlite3.connect(path)) as opened:
        holder, sequence, before = opened.execute(query).fetchone()
        opened.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = path.read_bytes()
    for found in re.finditer(before.encode(), whole):  # the next row has that hash too
        changed = bytearray(whole)
        changed[found.start()] ^= 1 << bit
        path.write_bytes(changed)
        with closing(sqlite3.connect(path)) as opened:
            if opened.execute(query).fetchone()[2] != before:
                return sequence, holder
    raise AssertionError("the row is nowhere in the file")


def contents(path):
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as opened:
        opened.text_factory = bytes
        return [opened.execute(f"SELECT * FROM {name}").fetchall() for name in ("entries", "heads", "payloads")]


# ---------------------------------------------------------------------------------------------------------------- sound


def test_a_sound_run_passes_and_gets_its_page(audit, here):
    status, out, err = sound(audit, "report", "run")
    assert (status, out, err) == (0, "run/audit.html\n", "")
    page = (here / "run/audit.html").read_text()
    assert "Passed" in page
    assert "Failed" not in page
    status, out, err = audit("report", "run", "--out", "page.html", "--recipe", "r.toml", "--seed", "1", "--json")
    found = strict(out)
    assert (status, err) == (0, "")
    assert found["page"] == "page.html"
    assert found["passed"] is found["ledger"]["passed"] is found["mechanism"]["passed"] is True
    assert found["mechanism"]["seeded"]
    assert found["membership"] is None
    assert (here / "page.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["ledger", "run"], {"holders", "across", "checks", "passed"}),
        (["mechanism", "r.toml", "--set", "training.rounds=1"], {"claim", "bounds", "checks", "passed", "residuals"}),
        (["membership", "r.toml", "--models", "4"], {"rates", "roc", "claim", "auc"}),
    ],
)
def test_each_command_prints_for_people_and_one_json_object_for_programs(audit, here, arguments, keys):
    status, out, err = sound(audit, *arguments, "--page", "page.html")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert out.count("\n") > 3
    assert (here / "page.html").read_text().startswith("<!doctype html>")
    status, out, err = sound(audit, *arguments, "--json")
    assert (status, err) == (0, "")
    assert keys <= set(strict(out))


def test_statements_are_signed_and_verified(audit, here, statement):
    path, key = statement
    for arguments in (["statement", path], ["statement", path, "--key", key.upper()]):
        assert audit(*arguments)[0] == 0
    status, out, _ = audit("statement", path, "--key", key, "--json")
    assert (status, strict(out)["public_key"]) == (0, key)
    for given in (key, f"holder-00000={key}"):
        status, out, _ = audit("ledger", "run", "--statement", path, "--key", given, "--json")
        assert (status, strict(out)["passed"]) == (0, True)


def test_a_page_of_a_run_may_be_held_to_statements(audit, here, statement):
    path, key = statement
    given = ["--statement", path, "--key", key]
    status, out, _ = audit("report", "run", "--seed", "1", "--json", *given)
    names = {check["name"]: check["passed"] for check in strict(out)["ledger"]["checks"]}
    assert (status, names["signatures"]) == (0, True)
    other = ("0" if key[0] != "0" else "1") + key[1:]
    status, out, _ = audit("report", "run", "--seed", "1", "--json", "--statement", path, "--key", other)
    assert status == 1
    assert "Failed" in (here / "run/audit.html").read_text()


def test_what_a_module_prints_goes_to_stderr(audit, here):
    status, out, err = audit("mechanism", "r.toml", "--json", "--set", f"{HEAD}Loud")
    assert status == 2  # no plain linear layer
    status, out, err = audit("membership", "r.toml", "--models", "4", "--json", "--set", f"{HEAD}Loud")
    assert (status, set(err.split())) == (0, {"LOUD"})
    strict(out)


def test_a_head_that_canaries_cannot_reach_leaves_a_page_of_the_ledgers(audit, here):
    result = json.loads((here / "run/result.json").read_text())
    result["config"]["model"]["head"] = {"kind": "module:fedhead_audit_own:unplanted"}
    (here / "run/result.json").write_text(json.dumps(result))
    status, out, _ = audit("report", "run", "--json")
    found = strict(out)
    assert (status, found["mechanism"], found["ledger"]["passed"]) == (0, None, True)
    assert "planted in trained linear layers, and it has none" in found["why_not"]["mechanism"]
    assert "planted in trained linear layers, and it has none" in (here / "run/audit.html").read_text()


# ------------------------------------------------------------------------------------------------------------- findings


def test_one_flipped_bit_is_found_and_its_row_named(audit, here):
    sequence, holder = flip(here / "run/holders/ledgers.sqlite")
    status, out, err = audit("ledger", "run/holders/ledgers.sqlite", "--page", "page.html", "--sign", "signed")
    assert (status, err) == (1, "")
    assert f"{holder}: first bad row {sequence}:" in out
    assert "Failed" in (here / "page.html").read_text()
    assert not (here / "signed").exists()
    status, out, _ = audit("ledger", "run/holders/ledgers.sqlite", "--json")
    found = strict(out)
    assert (status, found["passed"]) == (1, False)
    assert [(one["holder"], one["first_bad"]["sequence"]) for one in found["holders"] if not one["passed"]] == [
        (holder, sequence)
    ]
    status, out, _ = audit("report", "run")
    assert (status, out) == (1, "run/audit.html\n")
    assert "Faults were found in the ledger" in (here / "run/audit.html").read_text()


@pytest.mark.parametrize("content", [b"", b"x0,label\n1,a\n", b"\0" * 5000, b"SQLite format 3\0" + b"\0" * 5000])
def test_a_file_that_is_no_ledger_is_a_finding(audit, here, content):
    (here / "odd").write_bytes(content)
    status, out, err = audit("ledger", "odd", "--json")
    assert (status, err) == (1, "")
    found = strict(out)
    assert not found["passed"]
    assert found["holders"][0]["first_bad"]["check"] == "file"
    assert (here / "odd").read_bytes() == content


def test_every_bit_of_a_page_of_rows_is_guarded(audit, here):
    """Of 40 flipped bits none gives another answer than sound rows or status 1."""
    path, rng = here / "run/holders/holder-00000/ledger.sqlite", np.random.default_rng(3)
    whole = path.read_bytes()
    expected = contents(path)
    failed = 0
    for place in rng.integers(len(whole) * 8, size=40).tolist():
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        status, out, err = audit("ledger", path, "--json")
        assert err == ""
        assert strict(out)["passed"] is (status == 0)
        assert status in {0, 1}
        failed += status
        if status == 0:
            assert contents(path) == expected
    assert failed > 5


@pytest.mark.parametrize(
    "text",
    ["", "x", "{}", "[" * 100_000, '{"a":"\\ud800"}', '{"a":' + "9" * 5000 + "}"],
    ids=["empty", "x", "object", "deep", "surrogate", "number"],
)
def test_garbage_for_a_statement_is_a_finding(audit, here, text):
    (here / "s.json").write_text(text)
    refused(audit("statement", "s.json"), "not what a holder signed", 1)
    status, out, err = audit("ledger", "run", "--statement", "s.json", "--json")
    assert (status, strict(out)["passed"], err) == (1, False, "")


def test_a_changed_statement_or_another_key_is_a_finding(audit, here, statement):
    path, key = statement
    refused(audit("statement", path, "--key", "ab" * 32), "signed with the key", 1)
    for given in ("ab" * 32, f"holder-00001={key}"):
        assert audit("ledger", "run", "--statement", path, "--key", given)[0] == 1
    text = path.read_text()
    path.write_text(text.replace('"released":2', '"released":1'))
    assert path.read_text() != text
    refused(audit("statement", path), "not what a holder signed", 1)
    assert audit("ledger", "run", "--statement", path)[0] == 1


def test_a_mark_that_the_ledger_lacks_is_a_finding(audit, here):
    (here / "marks.json").write_text(json.dumps({"holder-00000": [99, "ab" * 32]}))
    status, out, _ = audit("ledger", "run", "--marks", "marks.json")
    assert status == 1
    assert "holder-00000" in out


# -------------------------------------------------------------------------------------------------------------- startup


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom fedhead.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print([name for name in ('torch', 'scipy', 'numpy', 'flwr') if name in sys.modules], file=sys.stderr)\n"
    )
    for arguments in (["--help"], ["audit", "--help"], ["audit", "mechanism", "--help"]):
        process = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True, cwd=Path.home()
        )
        assert "Usage: " in process.stdout
        assert process.stderr == "[]\n"


# ----------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.slow
def test_from_a_recipe_to_the_page_and_to_a_flipped_bit(tmp_path):
    """As a user types it: every command a process of its own."""
    write_recipe(tmp_path)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "fedhead", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    assert run("simulate", "r.toml", "--out", "run", "--json").returncode == 0
    done = sound(run, "audit", "report", "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "run/audit.html\n", "")
    page = (tmp_path / "run/audit.html").read_text()
    assert "No data holder spent more than" in page
    if PAGES["reading"].CHROMIUM is not None:
        PAGES["look"](tmp_path / "run/audit.html", 1100, 6000, passed=True)
    sequence, holder = flip(tmp_path / "run/holders/ledgers.sqlite", bit=1)
    done = run("audit", "ledger", "run")
    assert done.returncode == 1
    assert f"{holder}: first bad row {sequence}:" in done.stdout
    done = run("audit", "report", "run", "--json")
    found = strict(done.stdout)
    assert (done.returncode, found["passed"], found["ledger"]["passed"]) == (1, False, False)
    assert "Faults were found in the ledger" in (tmp_path / "run/audit.html").read_text()
    if PAGES["reading"].CHROMIUM is not None:
        PAGES["look"](tmp_path / "run/audit.html", 1100, 6000, passed=False)
