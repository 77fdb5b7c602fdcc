"""`fedhead audit`: bad input of every option and file is one line, and odd data is still audited."""

import json
import os
import re
import shutil
from pathlib import Path
from runpy import run_path

import pytest

COMMANDS = run_path(str(Path(__file__).with_name("audit_commands.py")))
FEATURES, HEAD = COMMANDS["FEATURES"], COMMANDS["HEAD"]
refused, strict, write_table = (COMMANDS[name] for name in ("refused", "strict", "write_table"))


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
        (["mechanism", "r.toml", "--set", f"{HEAD}unplanted"], "planted in trained linear layers, and it has none"),
        (["mechanism", "r.toml", "--set", f"{HEAD}normed", "--canaries", "1000"], "each takes a trained number"),
        (["mechanism", "r.toml", "--set", f"{HEAD}broken"], "it raised ValueError in line 4 of"),
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
def test_bad_input_is_one_line_on_stderr_and_status_2(audit, here, arguments, words):
    (here / "folder").mkdir()
    (here / "folder.html").mkdir()
    (here / "bytes").write_bytes(b"\xff\xfe\0")
    os.mkfifo(here / "pipe")  # a reader that opens it would wait for ever
    with (here / "huge").open("wb") as file:
        file.truncate(2**40)  # a terabyte of nothing
    before = sorted(here.rglob("*.html"))
    said = audit(*arguments)
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
def test_garbage_for_marks_is_one_line(audit, here, text):
    (here / "marks.json").write_text(text)
    refused(audit("ledger", "run", "--marks", "marks.json"), '--marks is "marks.json": it can\'t be read')


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
def test_a_result_that_is_broken_is_one_line(audit, here, change, words):
    result = json.loads((here / "run/result.json").read_text())
    change(result)
    (here / "run/result.json").write_text(json.dumps(result))
    refused(audit("report", "run"), words)
    assert not (here / "run/audit.html").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000], ids=["empty", "cut", "list", "deep"])
def test_a_result_that_is_no_result_is_one_line(audit, here, text):
    (here / "run/result.json").write_text(text)
    refused(audit("report", "run"), "result is")


def test_a_run_without_its_ledgers_or_with_a_folder_in_the_way(audit, here):
    (here / "run/audit.html").mkdir()
    refused(audit("report", "run"), re.escape('--out is "run/audit.html": it is a folder'))
    (here / "run/audit.html").rmdir()
    shutil.rmtree(here / "run/holders")
    refused(audit("report", "run"), 'LEDGER is "run/holders"')


def test_files_that_may_not_be_read_are_one_line(audit, here, statement, unprivileged):
    path, _ = statement
    path.chmod(0)
    with unprivileged():
        refused(audit("statement", path), "read")
        refused(audit("ledger", "run", "--statement", path), "read")
        ledger = here / "run/holders/ledgers.sqlite"
        ledger.chmod(0)
        status, out, err = audit("ledger", ledger)
        told = " ".join((out + err).split())
        if status == 2:  # seen before it is opened, where this user is not root
            assert "is not readable" in told
        else:
            assert (status, err) == (1, "")
            assert "can't be read (unable to open database file). Give this user the right to read it." in told
        status, out, err = audit("ledger", "run", "--json")  # one of several files: the others are still audited
    assert (status, strict(out)["passed"], err) == (1, False, "")


@pytest.mark.parametrize(
    "settings",
    [
        ["--records", "1"],
        ["--canaries", "1", "--records", "1000000000"],
        ["--seed", str(2**70)],
        ["--set", f"{HEAD}normed", "--records", "3"],
        ["--set", "model.backbone=module:fedhead_audit_own:net", "--set", "model.unfreeze=2"],
        ["--set", "data.source=csv:few.csv"],
        ["--set", "data.source=csv:gaps.csv"],
        ["--set", "data.source=csv:narrow.csv"],
        ["--set", "privacy.unit=person", "--set", "privacy.person=x0", "--records", "1"],
    ],
    ids=lambda settings: " ".join(settings)[-30:],
)
def test_few_records_gaps_and_large_numbers_are_audited(audit, here, settings):
    write_table(here / "few.csv", 12, FEATURES)
    write_table(here / "gaps.csv", 80, FEATURES, lambda row, values: ["nan", *values[1:]] if row % 5 == 0 else values)
    write_table(here / "narrow.csv", 80, 1)
    status, out, err = audit("mechanism", "r.toml", "--json", "--set", "training.rounds=1", *settings)
    assert err == ""
    found = strict(out)
    assert status == (0 if found["passed"] else 1)
    assert {"total-variance", "replay", "largest-contribution"} <= {check["name"] for check in found["checks"]}
