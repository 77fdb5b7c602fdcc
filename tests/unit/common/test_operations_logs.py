"""Logs: one record a line whatever is in it, no secrets, nothing twice, and no call that raises."""

import io
import json
import logging
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhead.common.operations import logs
from fedhead.common.operations.logs import JsonLines, TextLines, safe, set_up_logs, without_secrets

log = logging.getLogger("fedhead.tests")


@pytest.fixture(autouse=True)
def _as_before():
    root, fedhead = logging.getLogger(), logging.getLogger("fedhead")
    handlers, levels = root.handlers[:], (root.level, fedhead.level)
    others = {name: logging.getLogger(name).level for name in (*logs.QUIET, "httpx", "some.library")}
    for name in others:  # whatever a test before has left
        logging.getLogger(name).setLevel(logging.INFO if name in logs.QUIET else logging.NOTSET)
    yield
    for name, level in others.items():
        logging.getLogger(name).setLevel(level)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    fedhead.setLevel(levels[1])
    for name in logs.QUIET:
        quiet = logging.getLogger(name)
        quiet.filters[:] = [one for one in quiet.filters if not isinstance(one, logs._Diverted)]


@pytest.fixture
def text():
    stream = io.StringIO()
    set_up_logs("server", as_json=False, stream=stream)
    return stream


@pytest.fixture
def lines():
    stream = io.StringIO()
    set_up_logs("client", as_json=True, stream=stream)
    return stream


def record(message: object, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("fedhead.tests", logging.INFO, "file.py", 1, message, arguments, None)
    vars(made).update(extra)
    made.created = 1_800_000_000.25
    return made


def test_text_has_time_level_message_and_fields():
    assert TextLines().format(record("round %d is over", 3, holders=2)) == (
        "2027-01-15T08:00:00Z INFO round 3 is over holders=2"
    )


def test_text_is_for_people():
    assert TextLines().format(record("prepared", code=None, seconds=0.0861234, good=True)) == (
        "2027-01-15T08:00:00Z INFO prepared seconds=0.08612 good=True"
    )
    told = record("round 3 released after 0.09 s", event="round", round=3, seconds=0.0861234)
    assert TextLines().format(told) == "2027-01-15T08:00:00Z INFO round 3 released after 0.09 s"
    assert json.loads(JsonLines("client").format(told))["seconds"] == 0.0861234


def test_json_has_time_side_level_logger_message_and_fields():
    found = json.loads(JsonLines("client").format(record("round %d is over", 3, holders=2, share=0.5, why=None)))
    assert found == {
        "time": "2027-01-15T08:00:00.250Z", "side": "client", "level": "INFO", "logger": "fedhead.tests",
        "message": "round 3 is over", "holders": 2, "share": 0.5, "why": None,
    }  # fmt: skip


FORGED = "2027-01-15T08:00:00Z ERROR fedhead: everything is lost"


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_a_message_from_outside_forges_no_line(text, end):
    log.info("peer says: %s", f"hello{end}{FORGED}")
    log.info("field", extra={"peer": f"hello{end}{FORGED}", f"a{end}b": 1})
    assert len(text.getvalue().splitlines()) == 2
    assert not any(line.startswith(FORGED) for line in text.getvalue().splitlines())


@given(st.text(st.characters(codec=None)), st.dictionaries(st.text(min_size=1), st.text(), max_size=3))
def test_any_text_is_one_line_and_one_object(message, extra):
    fields = {f"x{name}": value for name, value in extra.items()}
    made = record("%s", message, **fields)
    shown = TextLines().format(made)
    assert len(shown.splitlines()) == 1
    assert safe(shown) == shown
    assert not [one for one in shown if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp")]
    line = JsonLines("server").format(made)
    assert line.isascii()
    assert len(line.splitlines()) == 1
    assert json.loads(line)["level"] == "INFO"


def test_the_cursor_and_the_direction_of_text_can_not_be_moved(text):
    log.info("\x1b[2J\x1b[1;1H \u202egnp.exe \x9b \x07")
    assert "\\x1b[2J\\x1b[1;1H \\u202egnp.exe \\x9b \\x07" in text.getvalue()


def test_lines_of_a_traceback_are_marked(text):
    try:
        raise ValueError(f"a\n{FORGED}\x1b[2J")
    except ValueError:
        log.exception("it failed")
    first, *rest = text.getvalue().splitlines()
    assert first.endswith(" ERROR it failed")
    assert len(rest) >= 4
    assert all(line.startswith("    | ") for line in rest)
    assert any("everything is lost" in line for line in rest)
    assert "\x1b" not in text.getvalue()


def test_a_traceback_is_one_field_in_json(lines):
    try:
        raise ValueError(f"a\n{FORGED}")
    except ValueError:
        log.exception("it failed")
    found = json.loads(lines.getvalue())
    assert found["message"] == "it failed"
    assert found["exception"].startswith("Traceback")
    assert found["exception"].endswith(FORGED)


def test_fields_can_not_take_the_place_of_our_own():
    found = json.loads(JsonLines("client").format(record("m", time="never", level="none", side="x", exception="e")))
    assert (found["side"], found["level"], "exception" in found) == ("client", "INFO", False)
    assert found["time"].startswith("2027-")


def test_values_that_json_has_not_are_text():
    class Odd:
        def __str__(self):
            raise RuntimeError

    found = json.loads(
        JsonLines("client").format(record("m", a=float("nan"), b=float("-inf"), c=[1, "x"], d=Odd(), e=b"\xff"))
    )
    assert [found[name] for name in "abcde"] == ["nan", "-inf", "[1, 'x']", "<Odd>", "b'\\xff'"]


@pytest.mark.parametrize("as_json", [False, True])
def test_no_secret_is_written(as_json):
    stream = io.StringIO()
    set_up_logs("server", as_json=as_json, stream=stream)
    key = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\n-----END OPENSSH PRIVATE KEY-----\n"
    log.info("headers: authorization: Bearer s3cr3tS3cr3tS3cr3t, flwr-task-token: s3cr3t-s3cr3t-s3cr3t")
    log.info('{"token": "s3cr3ts3cr3ts3cr3t", "superexec_secret": "b3BlbnNzaC1rZXk"} %s', key)
    log.info("http://someone:s3cr3t@localhost:1/", extra={"control_token": "s3cr3t", "note": "Bearer s3cr3tS3cr3t"})
    try:
        raise ValueError(key)
    except ValueError:
        log.exception("it failed")
    assert "s3cr3t" not in stream.getvalue().lower()
    assert "b3BlbnNzaC1rZXk" not in stream.getvalue()
    assert "localhost:1/" in stream.getvalue()


@pytest.mark.parametrize(
    "said",
    [
        "control.token: No such file or directory",
        "server.toml has no token yet; start fedhead serve",
        "holder st-mary: basic checks are done",
        "https://fl.example.org:8443/v1/fleet",
        "round 3 of 20: 2 data holders, 4.5 s",
    ],
)
def test_ordinary_text_stays_as_it_is(said):
    assert without_secrets(said) == said
    assert safe(said) == said


def test_a_flood_is_cut():
    shown = TextLines().format(record("x" * 10**6))
    assert len(shown) < logs.LONGEST_MESSAGE + 100
    assert shown.endswith("... (1000000 characters)")


def test_libraries_speak_from_warning_on_and_in_our_form(lines):
    for name in ("flwr", "uvicorn.error", "uvicorn.access", "httpx", "some.library"):
        logger = logging.getLogger(name)
        own = io.StringIO()
        handler = logging.StreamHandler(own)  # Flower adds its handler when it is imported, later than the set-up
        logger.addHandler(handler)
        try:
            before = lines.getvalue()
            logger.info("not wanted")
            assert lines.getvalue() == before
            logger.warning("from %s", name)
            assert json.loads(lines.getvalue().removeprefix(before))["message"] == f"from {name}"
            if name in logs.QUIET:
                assert own.getvalue() == ""
        finally:
            logger.removeHandler(handler)


def test_flower_does_not_write_past_it(lines, capsys):
    from flwr.common.logger import log as flower_log

    flower_log(logging.WARNING, "a node is gone")
    flower_log(logging.INFO, "a node is here")
    assert [json.loads(line)["message"] for line in lines.getvalue().splitlines()] == ["a node is gone"]
    assert capsys.readouterr().err == ""


def test_a_second_call_replaces_the_first(text, monkeypatch):
    stream = io.StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(sys.stderr))  # as basicConfig of some library does
    set_up_logs("server", as_json=True, stream=stream)
    log.info("once")
    logging.getLogger("flwr").warning("twice")
    assert text.getvalue() == ""
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["once", "twice"]
    ours = [one for one in logging.getLogger().handlers if type(one) is logging.StreamHandler]
    assert ours == []


def test_the_level_is_of_our_own_records():
    stream = io.StringIO()
    set_up_logs("server", as_json=False, level=logging.DEBUG, stream=stream)
    log.debug("ours")
    logging.getLogger("some.library").info("theirs")
    assert "ours" in stream.getvalue()
    assert "theirs" not in stream.getvalue()
    set_up_logs("server", as_json=False, level=logging.ERROR, stream=stream)
    log.warning("quiet")
    assert "quiet" not in stream.getvalue()


def test_no_call_raises_or_prints(monkeypatch, capsys):
    stream = io.StringIO()
    set_up_logs("server", as_json=False, stream=stream)
    (handler,) = [one for one in logging.getLogger().handlers if isinstance(one, logs.LogHandler)]
    handler.handle(record("%d of %d", "x"))  # arguments that don't fit
    assert "%d of %d" in stream.getvalue()
    stream.close()
    log.info("into a closed stream")
    assert capsys.readouterr().err == ""


def test_stderr_is_looked_up_for_each_record(capsys, monkeypatch):
    set_up_logs("server", as_json=False)
    later = io.StringIO()
    monkeypatch.setattr(sys, "stderr", later)
    log.info("here")
    assert later.getvalue().endswith("INFO here\n")
