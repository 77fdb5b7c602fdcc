"""What stops `fedhead join` before anything is started or sent: the findings of `fedhead check`."""

import json
import logging
import subprocess

import pytest

from fedhead.client.joining import join as module
from fedhead.common.operations import logs
from fedhead.server.keys import make_keys

HOLDER = """
name = "west"
server = "127.0.0.1:9"
ca = "keys/ca.crt"
key = "keys/west.key"
[data]
source = "json:notes.json"
labels = ["no", "yes"]
[budget]
epsilon = 2.0
[limits]
least_records = {least}
[storage]
folder = "state"
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A holder with 40 records, whose server is not asked and whose processes are not started."""
    make_keys(tmp_path / "keys", ["west"])
    rows = [{"vector": [0.1, float(number)], "label": ("no", "yes")[number % 2]} for number in range(40)]
    (tmp_path / "notes.json").write_text("\n".join(map(json.dumps, rows)))
    started = []
    monkeypatch.setattr(module, "_supervise", lambda *_: started.append(True) or 0)
    monkeypatch.setattr(module, "environment", lambda _: {})  # of the processes, not of this one
    monkeypatch.setattr(logs, "set_up_logs", lambda *_, **__: None)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))

    def join(least):
        (tmp_path / "holder.toml").write_text(HOLDER.format(least=least))
        return module.join(tmp_path / "holder.toml"), bool(started)

    return join


def test_too_few_records_stop_it_before_it_joins(here, caplog):
    caplog.set_level(logging.INFO, "fedhead.client")
    assert here(41) == (1, False)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert told[0].startswith("least records: there are 40 records, and limits.least_records is 41.")
    assert told[-1].startswith("west does not join")


def test_enough_records_and_a_server_that_is_down_do_not(here):
    assert here(40) == (0, True)


def test_every_finding_to_change_stops_it(here, monkeypatch):
    from fedhead.client.findings import Finding

    wrong = [Finding("clock", "remedy", "it is an hour off", "Set it.")]
    monkeypatch.setattr("fedhead.client.checking.connection", lambda *_, **__: wrong)
    assert here(1) == (1, False)
