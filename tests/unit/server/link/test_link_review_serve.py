"""How `fedhead serve` begins: a signal that comes early, and room for connections."""

import resource
import subprocess
import sys

import pytest

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
