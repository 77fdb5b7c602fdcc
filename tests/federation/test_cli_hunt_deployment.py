"""Slips at the deployment's commands, as real processes: a line with a remedy, nothing started or overwritten."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from fedhead.server.keys import make_keys

LIMIT = 120  # seconds for a command that takes a few

RECIPE = """
[task]
labels = ["a", "b"]
[model]
backbone = "module:torch.nn:Identity"
[data]
source = "json:elsewhere.json"
declared_records = 10
test = { source = "json:test.json" }
[privacy]
epsilon = 1.0
"""


@pytest.fixture
def folder(tmp_path):
    make_keys(tmp_path / "keys", ["north"])
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        public, control = (one.getsockname()[1] for one in sockets)
    (tmp_path / "server.toml").write_text(
        f'address = "127.0.0.1:{public}"\ncontrol = "127.0.0.1:{control}"\ncertificates = "keys"\n'
        'holders = ["keys/north.pub"]\nleast_holders = 1\n'
    )
    rows = [{"vector": [float(i), 1.0], "label": "ab"[i % 2]} for i in range(20)]
    (tmp_path / "test.json").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def fedhead(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "fedhead", *arguments], cwd=folder, capture_output=True, text=True, check=False,
        timeout=LIMIT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr + done.stdout
    return done


def submit(folder, *arguments):
    done = fedhead(folder, "submit", "recipe.toml", "--server", "server.toml", *arguments)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_resuming_a_run_that_never_was_does_not_begin_another(folder):
    status, said = submit(folder, "--out", "slip", "--resume")
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith('fedhead: --out is "slip": there is no run to go on with.')
    assert not (folder / "slip").exists()


def test_resuming_a_run_that_has_ended_says_so(folder):
    (folder / "done").mkdir()
    (folder / "done" / "result.json").write_text("{}")
    assert submit(folder, "--out", "done", "--resume") == (
        2, 'fedhead: --out is "done": its run has ended. Leave out --resume, and choose another folder.\n'
    )  # fmt: skip


@pytest.mark.parametrize("out", ["state", "state/runs", "keys/../state"])
def test_results_do_not_go_where_the_server_keeps_its_state(folder, out):
    """A run that fails tidies its folder up: there, that would be the server's."""
    (folder / "state").mkdir(mode=0o700)
    status, said = submit(folder, "--out", out)
    assert (status, said.count("\n")) == (2, 1)
    assert f'--out is "{out}": it lies in the server\'s state folder' in said
    assert list((folder / "state").iterdir()) == []


@pytest.mark.slow
def test_a_server_that_does_not_run_is_told_once_and_leaves_the_last_run_as_it_was(folder):
    state = folder / "state"
    state.mkdir(mode=0o700)
    for name in ("control.token", "superexec.secret"):
        (state / name).write_text("a" * 64)
        (state / name).chmod(0o600)
    (state / "run.json").write_text('{"schema": 1, "state": "finished"}')
    status, said = submit(folder, "--out", "out")
    assert status == 1
    assert [line.partition(" at ")[0] for line in said.splitlines()] == ["fedhead: no server answers"]
    assert json.loads((state / "run.json").read_text()) == {"schema": 1, "state": "finished"}
    assert not (folder / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"no database" * 500, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_database_is_a_line_with_a_remedy(folder, content):
    (folder / "state").mkdir(mode=0o700)
    database = folder / "state" / "link.sqlite"
    database.write_bytes(content)
    done = fedhead(folder, "serve", "server.toml")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fedhead: ")]
    assert f'state is "{folder / "state"}": its link.sqlite can\'t be used' in line
    assert database.read_bytes() == content


def test_a_pipe_or_a_folder_in_the_place_of_a_key_or_file(folder):
    (folder / "keys/north.pub").unlink()
    os.mkfifo(folder / "keys/north.pub")
    done = fedhead(folder, "status", "--server", "server.toml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert 'holders[0] is "keys/north.pub": it must be a file' in done.stderr


@pytest.mark.parametrize("seconds", [0.1, 0.2, 0.4, 0.8])
def test_ctrl_c_while_a_command_is_loaded(folder, seconds):
    """The interpreter's own start is not ours; from the first line of fedhead on there is no traceback."""
    script = (
        "import os, runpy, signal, sys, threading, time\n"
        "def press():\n"
        f"    time.sleep({seconds})\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=press, daemon=True).start()\n"
        "import fedhead.__main__\n"
        "sys.argv = ['fedhead', 'status', '--server', 'server.toml']\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the first line of main\n"
        "fedhead.__main__.main()\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert done.returncode in (-signal.SIGINT, 130, 1)  # 1: it had ended by itself
    assert "Traceback" not in done.stderr, (done.stderr, time.monotonic() - started)
