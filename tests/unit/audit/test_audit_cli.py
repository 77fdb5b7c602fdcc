"""`fedhead audit`: exit status, what goes to stdout and stderr, pages, and bad input of every option and file."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from fedhead.common.privacy.ledger import load_key
from fedhead.common.privacy.ledger.statements import public_key
from fedhead.simulations.simulate import simulate

RECIPE = """
[task]
labels = ["a", "b"]
[model]
backbone = "module:torch.nn:Identity"
[data]
source = "csv:v.csv"
columns = { vector = "x*", label = "label" }
[holders]
count = 2
[privacy]
epsilon = 3.0
[training]
rounds = 2
[run]
baseline = false
"""
OWN = """
from torch import nn
def broken(features, outputs):
    raise ValueError("a private record")
def normed(features, outputs):
    return nn.Sequential(nn.LayerNorm(features), nn.Linear(features, outputs))
class Loud(nn.Linear):
    def forward(self, x):
        print("LOUD")
        return super().forward(x)
class Blind(nn.Module):
    def __init__(self, features, outputs):
        super().__init__()
        self.only = nn.Linear(features, outputs)
    def forward(self, x):
        return self.only(x) * 0.0
"""
FEATURES = 12
HEAD = "model.head.kind=module:fedhead_audit_own:"


def table(path, rows, features=FEATURES, change=None):
    rng = np.random.default_rng(0)
    lines = [",".join([*(f"x{i}" for i in range(features)), "label"])]
    for row in range(rows):
        values = [*(rng.normal(size=features) + row % 2).round(4).astype(str), "ab"[row % 2]]
        lines.append(",".join(values if change is None else change(row, values)))
    path.write_text("\n".join(lines) + "\n")


def write_recipe(folder):
    table(folder / "v.csv", 80)
    (folder / "r.toml").write_text(RECIPE)
    return folder / "r.toml"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a recipe, its run, and a signed privacy statement of the first holder."""
    folder = tmp_path_factory.mktemp("audited")
    simulate(write_recipe(folder), folder / "run")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "fedhead_audit_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(made / "cache"))
    return tmp_path


@pytest.fixture
def fedhead(here, fedhead):
    """`fedhead audit` in that folder."""
    return lambda *arguments: fedhead("audit", *map(str, arguments))


@pytest.fixture
def statement(fedhead, here):
    """A privacy statement of the first holder, and the public key."""
    assert fedhead("ledger", "run", "--sign", "signed")[0] == 0
    return here / "signed" / "holder-00000.privacy.json", public_key(load_key(here / "run/holders/ledger.key"))


def strict(out):
    """The one JSON object on stdout: no NaN, no Infinity, nothing before or after."""
    assert out.count("\n") == 1

    def refuse(constant):
        raise ValueError(constant)

    found = json.loads(out, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def refused(said, words, status=2):
    assert said[0] == status, said
    assert said[1] == ""
    assert re.fullmatch(rf"fedhead: .*{words}.*\n", said[2]), said[2]


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


# ------------------------------------------------------------------------------------------------------------- sound


def test_a_sound_run_passes_and_gets_its_page(fedhead, here):
    status, out, err = fedhead("report", "run")
    assert (status, out, err) == (0, "run/audit.html\n", "")
    page = (here / "run/audit.html").read_text()
    assert "Passed" in page
    assert "Failed" not in page
    status, out, err = fedhead("report", "run", "--out", "page.html", "--recipe", "r.toml", "--seed", "1", "--json")
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
def test_each_command_prints_for_people_and_one_json_object_for_programs(fedhead, here, arguments, keys):
    status, out, err = fedhead(*arguments, "--page", "page.html")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert out.count("\n") > 3
    assert (here / "page.html").read_text().startswith("<!doctype html>")
    status, out, err = fedhead(*arguments, "--json")
    assert (status, err) == (0, "")
    assert keys <= set(strict(out))


def test_statements_are_signed_and_verified(fedhead, here, statement):
    path, key = statement
    for arguments in (["statement", path], ["statement", path, "--key", key.upper()]):
        assert fedhead(*arguments)[0] == 0
    status, out, _ = fedhead("statement", path, "--key", key, "--json")
    assert (status, strict(out)["public_key"]) == (0, key)
    for given in (key, f"holder-00000={key}"):
        status, out, _ = fedhead("ledger", "run", "--statement", path, "--key", given, "--json")
        assert (status, strict(out)["passed"]) == (0, True)


def test_what_a_module_prints_goes_to_stderr(fedhead, here):
    status, out, err = fedhead("mechanism", "r.toml", "--json", "--set", f"{HEAD}Loud")
    assert status == 2  # no plain linear layer
    status, out, err = fedhead("membership", "r.toml", "--models", "4", "--json", "--set", f"{HEAD}Loud")
    assert (status, set(err.split())) == (0, {"LOUD"})
    strict(out)


def test_a_head_that_canaries_cannot_reach_leaves_a_page_of_the_ledgers(fedhead, here):
    result = json.loads((here / "run/result.json").read_text())
    result["config"]["model"]["head"] = {"kind": "module:fedhead_audit_own:normed"}
    (here / "run/result.json").write_text(json.dumps(result))
    status, out, _ = fedhead("report", "run", "--json")
    found = strict(out)
    assert (status, found["mechanism"], found["ledger"]["passed"]) == (0, None, True)
    assert "its first layer must be a trained linear layer" in found["why_not"]["mechanism"]
    assert "its first layer must be a trained linear layer" in (here / "run/audit.html").read_text()


# ------------------------------------------------------------------------------------------------------------ findings


def test_one_flipped_bit_is_found_and_its_row_named(fedhead, here):
    sequence, holder = flip(here / "run/holders/ledgers.sqlite")
    status, out, err = fedhead("ledger", "run/holders/ledgers.sqlite", "--page", "page.html", "--sign", "signed")
    assert (status, err) == (1, "")
    assert f"{holder}: first bad row {sequence}:" in out
    assert "Failed" in (here / "page.html").read_text()
    assert not (here / "signed").exists()
    status, out, _ = fedhead("ledger", "run/holders/ledgers.sqlite", "--json")
    found = strict(out)
    assert (status, found["passed"]) == (1, False)
    assert [(one["holder"], one["first_bad"]["sequence"]) for one in found["holders"] if not one["passed"]] == [
        (holder, sequence)
    ]
    status, out, _ = fedhead("report", "run")
    assert (status, out) == (1, "run/audit.html\n")
    assert "Faults were found in the ledger" in (here / "run/audit.html").read_text()


@pytest.mark.parametrize("content", [b"", b"x0,label\n1,a\n", b"\0" * 5000, b"SQLite format 3\0" + b"\0" * 5000])
def test_a_file_that_is_no_ledger_is_a_finding(fedhead, here, content):
    (here / "odd").write_bytes(content)
    status, out, err = fedhead("ledger", "odd", "--json")
    assert (status, err) == (1, "")
    found = strict(out)
    assert not found["passed"]
    assert found["holders"][0]["first_bad"]["check"] == "file"
    assert (here / "odd").read_bytes() == content


def test_every_bit_of_a_page_of_rows_is_guarded(fedhead, here):
    """Of 40 flipped bits none gives another answer than sound rows or status 1."""
    path, rng = here / "run/holders/holder-00000/ledger.sqlite", np.random.default_rng(3)
    whole = path.read_bytes()
    expected = contents(path)
    failed = 0
    for place in rng.integers(len(whole) * 8, size=40).tolist():
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        status, out, err = fedhead("ledger", path, "--json")
        assert err == ""
        assert strict(out)["passed"] is (status == 0)
        assert status in {0, 1}
        failed += status
        if status == 0:
            assert contents(path) == expected
    assert failed > 5


def contents(path):
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as opened:
        opened.text_factory = bytes
        return [opened.execute(f"SELECT * FROM {name}").fetchall() for name in ("entries", "heads", "payloads")]


@pytest.mark.parametrize(
    "text",
    ["", "x", "{}", "[" * 100_000, '{"a":"\\ud800"}', '{"a":' + "9" * 5000 + "}"],
    ids=["empty", "x", "object", "deep", "surrogate", "number"],
)
def test_garbage_for_a_statement_is_a_finding(fedhead, here, text):
    (here / "s.json").write_text(text)
    refused(fedhead("statement", "s.json"), "not what a holder signed", 1)
    status, out, err = fedhead("ledger", "run", "--statement", "s.json", "--json")
    assert (status, strict(out)["passed"], err) == (1, False, "")


def test_a_changed_statement_or_another_key_is_a_finding(fedhead, here, statement):
    path, key = statement
    refused(fedhead("statement", path, "--key", "ab" * 32), "signed with the key", 1)
    for given in ("ab" * 32, f"holder-00001={key}"):
        assert fedhead("ledger", "run", "--statement", path, "--key", given)[0] == 1
    text = path.read_text()
    path.write_text(text.replace('"released":2', '"released":1'))
    assert path.read_text() != text
    refused(fedhead("statement", path), "not what a holder signed", 1)
    assert fedhead("ledger", "run", "--statement", path)[0] == 1


def test_a_mark_that_the_ledger_lacks_is_a_finding(fedhead, here):
    (here / "marks.json").write_text(json.dumps({"holder-00000": [99, "ab" * 32]}))
    status, out, _ = fedhead("ledger", "run", "--marks", "marks.json")
    assert status == 1
    assert "holder-00000" in out


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such"], "No such command"),
        (["ledger"], "Missing argument"),
        (["ledger", "nothing"], 'LEDGER is "nothing": there is no such file'),
        (["ledger", "folder"], 'LEDGER is "folder": there is no ledger below it'),
        (["ledger", "run", "folder"], 'LEDGER is "folder"'),
        (["ledger", "run", "--delta", "0"], "--delta is 0.0: it must lie between 0 and 1"),
        (["ledger", "run", "--delta", "1"], "--delta is 1.0"),
        (["ledger", "run", "--delta", "nan"], "--delta is nan"),
        (["ledger", "run", "--delta", "-1"], "--delta is -1.0"),
        (["ledger", "run", "--delta", "x"], "not a valid float"),
        (["ledger", "run", "--statement", "nothing"], '--statement is "nothing": it can\'t be read'),
        (["ledger", "run", "--statement", "folder"], '--statement is "folder"'),
        (["ledger", "run", "--statement", "pipe"], '--statement is "pipe"'),
        (["ledger", "run", "--statement", "huge"], '--statement is "huge"'),
        (["ledger", "run", "--statement", "bytes"], '--statement is "bytes"'),
        (["ledger", "run", "--key", "x"], "--key is 'x': it must be 64 hexadecimal digits, or HOLDER=KEY"),
        (["ledger", "run", "--key", "zz" * 32], "--key is 'zz"),
        (["ledger", "run", "--key", "ab " * 32], "--key is 'ab ab"),
        (["ledger", "run", "--key", "ab" * 32], "--key is given without --statement"),
        (["ledger", "run", "--marks", "nothing"], "there is no marks.json"),
        (["ledger", "run", "--marks", "folder"], "there is no marks.json"),
        (["ledger", "run", "--marks", "bytes"], '--marks is "bytes": it can\'t be read'),
        (["ledger", "run", "--sign", "v.csv"], '--sign is "v.csv": it must be a folder'),
        (["ledger", "run", "--sign", "v.csv/x"], '--sign is "v.csv/x": it must be a folder'),
        (["ledger", "run", "--page", "page"], '--page is "page": it must end in .html'),
        (["ledger", "run", "--page", "folder"], '--page is "folder"'),
        (["ledger", "run", "--page", "folder.html"], '--page is "folder.html"'),
        (["ledger", "run", "--page", "none/page.html"], "in a folder that exists"),
        (["statement", "nothing"], 'STATEMENT is "nothing": it can\'t be read'),
        (["statement", "folder"], 'STATEMENT is "folder"'),
        (["statement", "pipe"], 'STATEMENT is "pipe"'),
        (["statement", "v.csv", "--key", "x"], "--key is 'x': it must be 64 hexadecimal digits. Ask"),
        (["statement", "v.csv", "--key", ""], "--key is '': it must be"),
        (["mechanism", "nothing"], 'RECIPE is "nothing"'),
        (["mechanism", "v.csv"], "no valid TOML"),
        (["mechanism", "r.toml", "--page", "folder.html"], '--page is "folder.html"'),
        (["mechanism", "r.toml", "--canaries", "0"], "'--canaries': 0 is not in the range"),
        (["mechanism", "r.toml", "--canaries", "-1"], "'--canaries': -1"),
        (["mechanism", "r.toml", "--canaries", "1000"], f"--canaries is 1000: it must be from 1 to {FEATURES}"),
        (["mechanism", "r.toml", "--records", "0"], "'--records': 0 is not in the range"),
        (["mechanism", "r.toml", "--records", "1e9"], "'--records': '1e9' is not a valid"),
        (["mechanism", "r.toml", "--seed", "-1"], "--seed is -1: it must be at least 0"),
        (["mechanism", "r.toml", "--set", "data.source=csv:gone.csv"], "there is no such file"),
        (["mechanism", "r.toml", "--set", "privacy.unit=holder"], 'privacy.unit is "holder"'),
        (["mechanism", "r.toml", "--set", "model.unfreeze=1"], "model.unfreeze is 1"),
        (["mechanism", "r.toml", "--set", f"{HEAD}normed"], "its first layer must be a trained linear layer"),
        (["mechanism", "r.toml", "--set", f"{HEAD}broken"], "it raised ValueError in line 4 of"),
        (["mechanism", "r.toml", "--set", f"{HEAD}Blind"], "no canary has a gradient in it"),
        (
            ["mechanism", "r.toml", "--set", "privacy.mechanism=none", "--set", "privacy.epsilon="],
            'privacy.mechanism is "none": there is no noise to audit',
        ),
        (
            ["mechanism", "r.toml", "--set", "privacy.epsilon=", "--set", "privacy.noise_multiplier=1e-6"],
            "privacy.noise_multiplier is 1e-06: below 0.001",
        ),
        (["membership", "r.toml", "--models", "1"], "'--models': 1 is not in the range"),
        (["membership", "r.toml", "--models", "3"], "'--models': 3 is not in the range"),
        (["membership", "r.toml", "--models", "1000000000"], "--models is 1000000000: it must be at most"),
        (["membership", "r.toml", "--set", "privacy.unit=holder"], 'privacy.unit is "holder"'),
        (["report", "nothing"], 'RUN_DIR is "nothing": there is no result.json'),
        (["report", "v.csv"], 'RUN_DIR is "v.csv"'),
        (["report", "run", "--out", "folder.html"], '--out is "folder.html"'),
        (["report", "run", "--out", "page"], '--out is "page": it must end in .html'),
        (["report", "run", "--seed", "-1"], "--seed is -1"),
        (["report", "run", "--recipe", "nothing"], '--recipe is "nothing": there is no such file'),
        (["report", "run", "--recipe", "digits"], 'data.source is "csv:v.csv": there is no such file'),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_status_2(fedhead, here, arguments, words):
    (here / "folder").mkdir()
    (here / "folder.html").mkdir()
    (here / "bytes").write_bytes(b"\xff\xfe\0")
    os.mkfifo(here / "pipe")  # a reader that opens it would wait for ever
    with (here / "huge").open("wb") as file:
        file.truncate(2**40)  # a terabyte of nothing
    before = sorted(here.rglob("*.html"))
    said = fedhead(*arguments)
    refused(said, re.escape(words))
    assert "a private record" not in said[2]
    assert sorted(here.rglob("*.html")) == before


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "1", '{"a":1}', '{"a":[1]}', '{"a":[1,2,3]}', '{"a":[Infinity,"x"]}', '{"a":[1e400,"x"]}',
        '{"a":[NaN,"x"]}', "[" * 100_000, '{"a":[' + "9" * 5000 + ',"x"]}',
    ],
    ids=range(11),
)  # fmt: skip
def test_garbage_for_marks_is_one_line(fedhead, here, text):
    (here / "marks.json").write_text(text)
    refused(fedhead("ledger", "run", "--marks", "marks.json"), '--marks is "marks.json": it can\'t be read')


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["config"].pop("data"), "data is missing"),
        (lambda r: r["config"].update(data="x"), 'data is "x": it must be a table'),
        (lambda r: (r.update(name="digits"), r["config"].pop("data")), "data is missing"),
        (lambda r: (r.update(name="digits"), r["config"].update(data="x")), 'data is "x"'),
        (lambda r: (r.update(name="digits"), r["config"]["data"].pop("source")), "data.source is missing"),
        (lambda r: r["config"]["data"].update(source="csv:gone.csv"), "there is no such file"),
        (lambda r: r["config"]["privacy"].update(delta=2), "privacy.delta is 2"),
        (lambda r: r.pop("config"), "result"),
    ],
    ids=range(8),
)
def test_a_result_that_is_broken_is_one_line(fedhead, here, change, words):
    result = json.loads((here / "run/result.json").read_text())
    change(result)
    (here / "run/result.json").write_text(json.dumps(result))
    refused(fedhead("report", "run"), words)
    assert not (here / "run/audit.html").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000], ids=["empty", "cut", "list", "deep"])
def test_a_result_that_is_no_result_is_one_line(fedhead, here, text):
    (here / "run/result.json").write_text(text)
    refused(fedhead("report", "run"), "result is")


def test_a_run_without_its_ledgers_or_with_a_folder_in_the_way(fedhead, here):
    (here / "run/audit.html").mkdir()
    refused(fedhead("report", "run"), re.escape('--out is "run/audit.html": it is a folder'))
    (here / "run/audit.html").rmdir()
    shutil.rmtree(here / "run/holders")
    refused(fedhead("report", "run"), 'LEDGER is "run/holders"')


def test_files_that_may_not_be_read_are_one_line(fedhead, here, statement):
    path, _ = statement
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    refused(fedhead("statement", path), "read")
    refused(fedhead("ledger", "run", "--statement", path), "read")
    ledger = here / "run/holders/ledgers.sqlite"
    ledger.chmod(0)
    refused(fedhead("ledger", ledger), "not readable")
    status, out, err = fedhead("ledger", "run", "--json")  # one of several files: the others are still audited
    assert (status, strict(out)["passed"], err) == (1, False, "")


@pytest.mark.parametrize(
    "settings",
    [
        ["--records", "1"],
        ["--canaries", "1", "--records", "1000000000"],
        ["--seed", str(2**70)],
        ["--set", "data.source=csv:few.csv"],
        ["--set", "data.source=csv:gaps.csv"],
        ["--set", "data.source=csv:narrow.csv"],
        ["--set", "privacy.unit=person", "--set", "privacy.person=x0", "--records", "1"],
    ],
    ids=lambda settings: " ".join(settings)[-30:],
)
def test_few_records_gaps_and_large_numbers_are_audited(fedhead, here, settings):
    table(here / "few.csv", 12)
    table(here / "gaps.csv", 80, change=lambda row, values: ["nan", *values[1:]] if row % 5 == 0 else values)
    table(here / "narrow.csv", 80, features=1)
    status, out, err = fedhead("mechanism", "r.toml", "--json", "--set", "training.rounds=1", *settings)
    assert err == ""
    found = strict(out)
    assert status == (0 if found["passed"] else 1)
    assert {"total-variance", "replay", "largest-contribution"} <= {check["name"] for check in found["checks"]}


# ------------------------------------------------------------------------------------------------------------- startup


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


# ---------------------------------------------------------------------------------------------------------- end to end


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
    done = run("audit", "report", "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "run/audit.html\n", "")
    page = (tmp_path / "run/audit.html").read_text()
    assert "No data holder spent more than" in page
    sequence, holder = flip(tmp_path / "run/holders/ledgers.sqlite", bit=1)
    done = run("audit", "ledger", "run")
    assert done.returncode == 1
    assert f"{holder}: first bad row {sequence}:" in done.stdout
    done = run("audit", "report", "run", "--json")
    found = strict(done.stdout)
    assert (done.returncode, found["passed"], found["ledger"]["passed"]) == (1, False, False)
    assert found["mechanism"]["passed"]
    assert "Faults were found in the ledger" in (tmp_path / "run/audit.html").read_text()
