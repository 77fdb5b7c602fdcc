"""How `fedhead serve` begins: a signal that comes early, and room for connections; and what a reload takes in."""

import logging
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fedhead.server.keys import make_keys
from fedhead.server.link import serve as module

CODE = """
import os, signal
from fedhead.server.link import serve as module
def load(_):
    os.kill(os.getpid(), signal.SIGHUP)
    print("alive", flush=True)
    raise SystemExit(3)
module.load_server = load
module.serve("server.toml")
"""


def test_a_reload_that_comes_too_early_ends_nothing():
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
    assert (found.stdout, found.returncode) == ("alive\n", 3)


@pytest.mark.parametrize("error", [None, OSError, ValueError])
def test_it_may_open_as_many_files_as_the_system_lets_it(monkeypatch, error):
    given = []

    def limit(what, limits):
        given.append((what, limits))
        if error is not None:
            raise error

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", limit)
    module._allow_connections()
    assert given == [(resource.RLIMIT_NOFILE, (4096, 4096))]


def test_a_limit_that_is_reached_stays(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: pytest.fail("nothing to raise"))
    module._allow_connections()


def test_a_reload_names_the_settings_that_need_a_restart(tmp_path, caplog):
    make_keys(tmp_path / "keys", ["north"])
    path = tmp_path / "server.toml"
    common = 'certificates = "keys"\nholders = ["keys/north.pub"]\nleast_holders = 1\n'
    path.write_text(common)
    taken = []
    link = module._Link.__new__(module._Link)
    link.path, link.server = path, module.load_server(path)
    link.registry = SimpleNamespace(update=taken.append, names={1: "north"})
    link.figures = SimpleNamespace(certificate=lambda _: None)
    link.public = SimpleNamespace(config=SimpleNamespace(ssl=SimpleNamespace(load_cert_chain=lambda *_: None)))

    def reload(more):
        path.write_text(more + common)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fedhead"):
            link.reload()
        return [record.getMessage() for record in caplog.records]

    assert reload("round_deadline = 20\n") == []  # submit reads it
    for _ in range(2):  # it runs with the old ones until it is restarted
        (line,) = reload('address = "127.0.0.1:9443"\nmetrics = "127.0.0.1:9101"\nmessage_megabytes = 9\n')
        assert line == (
            "what changed of address, metrics, message_megabytes counts from the next start on. Restart the server."
        )
    assert len(taken) == 3
