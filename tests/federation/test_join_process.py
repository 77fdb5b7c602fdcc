"""`fedhead join` as processes against `fedhead serve`: TLS, node keys, a warm executor, and what kills its parts."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.cli.build import build_fab_from_files

from fedhead.common.config import make_config, to_json
from fedhead.server.keys import make_keys
from fedhead.server.server_file import load_server
from fedhead.server.submitting import flower as submitting
from fedhead.server.submitting.session import Session

pytestmark = pytest.mark.slow

SECONDS = 120.0  # for anything that takes a few on a machine with nothing else to do
LABELS = [str(digit) for digit in range(10)]
SERVER = """
address = "127.0.0.1:{public}"
control = "127.0.0.1:{control}"
certificates = "keys"
holders = [{holders}]
least_holders = 1
"""
HOLDER = """
name = "{name}"
server = "127.0.0.1:{public}"
ca = "../keys/ca.crt"
key = "../keys/{name}.key"
[data]
source = "sklearn:digits"
labels = {labels}
[budget]
domain = "wards"
epsilon = 3.0
delta = 1e-5
[limits]
modules = ["torch.nn:Identity"]
[storage]
folder = "state"
"""


def until(condition, what):
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {SECONDS:.0f} s: {what}"
        time.sleep(0.05)
    return found


def free_ports(count):
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [one.getsockname()[1] for one in listeners]
    finally:
        for one in listeners:
            one.close()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Federation:
    """A server and two data holders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen] = {}
        self.seen: set[int] = set()
        public, control = free_ports(2)
        self.ports = {"public": public, "control": control}
        make_keys(folder / "keys", ["north", "south"])
        self.name_holders("north", "south")
        for name in ("north", "south"):
            (folder / name).mkdir()
            (folder / name / "holder.toml").write_text(HOLDER.format(name=name, labels=LABELS, **self.ports))
        recipe = {
            "task": {"labels": LABELS}, "model": {"backbone": "module:torch.nn:Identity"},
            "data": {"source": "sklearn:digits", "declared_records": 1500}, "privacy": {"epsilon": 1.0},
        }  # fmt: skip
        self.recipe = to_json(make_config(recipe, base=folder))

    def name_holders(self, *names):
        holders = ", ".join(f'"keys/{name}.pub"' for name in names)
        (self.folder / "server.toml").write_text(SERVER.format(holders=holders, **self.ports))

    def start(self, name, *command):
        log = self.folder / f"{name}.log"
        with log.open("a") as file:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "fedhead", *map(str, command)], stdin=subprocess.DEVNULL, stdout=file,
                stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            )  # fmt: skip
        return self.processes[name]

    def log(self, name):
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def serve(self):
        self.start("serve", "serve", self.folder / "server.toml")
        until(lambda: "data holders connect to" in self.log("serve"), "the server is ready")

    def join(self, name):
        return self.start(name, "join", self.folder / name / "holder.toml")

    def child(self, name, module):
        """Process id of a holder's child; None where there is none."""
        supervisor = self.processes[name].pid
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes()
                    parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                except OSError:
                    continue
                if parent == supervisor and f"fedhead.client.joining.{module}".encode() in command:
                    self.seen.add(int(entry.name))
                    return int(entry.name)
        return None

    def session(self):
        return Session(load_server(self.folder / "server.toml"), self.recipe)

    def received(self):
        """Whether a message has been handed out, and its node has confirmed that it is whole."""
        with contextlib.closing(sqlite3.connect(self.folder / "state" / "link.sqlite", timeout=60)) as database:
            handed_out = database.execute("SELECT count(*) FROM message_ins WHERE delivered_at != ''").fetchone()[0]
            return handed_out == 1 and database.execute("SELECT count(*) FROM objects").fetchone()[0] == 0

    def online(self, session):
        return {one.name: one.node for one in session.registered() if one.online}

    def all_online(self, session):
        return until(lambda: len(found := self.online(session)) == 2 and found, "both holders are connected")

    def hello(self, session, nodes, seconds=SECONDS):
        """What each of some nodes answers to "who is there?"."""
        messages = [Message(RecordDict(), node, "query", ttl=seconds) for node in nodes.values()]
        replies = session.grid.send_and_receive(messages, timeout=seconds)
        return sorted(str(one.error) if one.has_error() else one.content["release"]["holder"] for one in replies)

    def close(self):
        for name in self.processes:
            for module in ("node", "executor"):
                self.child(name, module)
        for process in self.processes.values():
            process.kill()
            process.wait(30)
        for pid in self.seen:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def federation(tmp_path):
    made = Federation(tmp_path)
    yield made
    made.close()


@pytest.fixture
def joined(federation):
    federation.serve()
    for name in ("north", "south"):
        federation.join(name)
    return federation


def test_holders_answer_from_one_warm_process_and_come_back_when_parts_are_killed(joined):
    with joined.session() as session:
        nodes = joined.all_online(session)
        executors = {name: joined.child(name, "executor") for name in nodes}
        processes = {name: joined.child(name, "node") for name in nodes}
        assert all(executors.values())
        for _ in range(2):
            assert joined.hello(session, nodes) == ["north", "south"]
        assert {name: joined.child(name, "executor") for name in nodes} == executors
        assert {name: joined.child(name, "node") for name in nodes} == processes

        os.kill(processes["north"], signal.SIGKILL)
        another = until(
            lambda: (pid := joined.child("north", "node")) != processes["north"] and pid, "another node process"
        )
        until(lambda: joined.log("north").count("connected to") == 2, "the holder is connected again")
        assert joined.hello(session, joined.all_online(session)) == ["north", "south"]
        assert joined.child("north", "executor") == executors["north"]  # it stayed warm

        os.kill(executors["north"], signal.SIGKILL)
        until(lambda: joined.log("north").count("connected to") == 3, "the holder is connected again")
        assert joined.child("north", "executor") not in (None, executors["north"])
        assert joined.child("north", "node") not in (None, another)
        assert joined.hello(session, joined.all_online(session)) == ["north", "south"]


def test_a_bundle_with_a_package_of_its_own_is_never_run(joined, monkeypatch):
    trace = joined.folder / "trace"
    code = f"open({str(trace)!r}, 'a').write(__name__)\n".encode() + b"#" + os.urandom(100_000).hex().encode() + b"\n"
    names = ("__init__", "client/__init__", "client/app", "client/joining/executor", "server/__init__", "server/app")
    files = {"pyproject.toml": submitting._SETTINGS, "sitecustomize.py": code}
    files.update({f"fedhead/{name}.py": code for name in names})
    bundle = build_fab_from_files(files)[0]
    assert len(bundle) > 64 * 1024
    monkeypatch.setattr(submitting, "bundle", lambda: bundle)
    with joined.session() as session:
        assert joined.hello(session, joined.all_online(session)) == ["north", "south"]
        executor = joined.child("north", "executor")
        os.kill(executor, signal.SIGKILL)  # nor by a process that starts while the bundle is there
        until(lambda: joined.log("north").count("connected to") == 2, "the holder is connected again")
        assert joined.hello(session, joined.all_online(session)) == ["north", "south"]
    assert not trace.exists()
    for name in ("north", "south"):
        home = joined.folder / name / "state" / "flower"
        assert home.stat().st_mode & 0o777 == 0o700
        assert [path for path in home.rglob("*") if path.suffix in (".py", ".fab", ".zip")] == []


def test_a_holder_leaves_in_order_and_takes_its_children_along_when_killed(joined):
    with joined.session() as session:
        joined.all_online(session)
        again = subprocess.run(
            [sys.executable, "-m", "fedhead", "join", joined.folder / "north" / "holder.toml"],
            capture_output=True, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip
        assert again.returncode == 2
        assert "another `fedhead join` runs with it" in again.stderr
        assert "Traceback" not in again.stderr

        # a message that is under way when SIGTERM comes is still answered
        nodes, executor = joined.all_online(session), joined.child("south", "executor")
        os.kill(executor, signal.SIGSTOP)
        asked = list(session.grid.push_messages([Message(RecordDict(), nodes["south"], "query", ttl=SECONDS)]))
        until(joined.received, "the message has arrived")
        joined.processes["south"].send_signal(signal.SIGTERM)
        os.kill(executor, signal.SIGCONT)
        (reply,) = until(lambda: list(session.grid.pull_messages(asked)), "the reply")
        assert reply.content["release"]["holder"] == "south"
        assert joined.processes["south"].wait(SECONDS) == 0
        joined.join("south")
        joined.all_online(session)

        children = {
            name: [joined.child(name, module) for module in ("node", "executor")] for name in ("north", "south")
        }
        north, south = joined.processes["north"], joined.processes["south"]
        started = time.monotonic()
        north.send_signal(signal.SIGTERM)
        assert north.wait(SECONDS) == 0
        assert time.monotonic() - started < 60
        assert not any(map(alive, children["north"]))
        until(lambda: set(joined.online(session)) == {"south"}, "the server has heard that the holder left")
        assert "Traceback" not in joined.log("north")

        south.kill()
        south.wait(30)
        until(lambda: not any(map(alive, children["south"])), "no child is left")


def test_a_holder_whose_key_was_taken_away_ends_with_a_remedy(joined):
    with joined.session() as session:
        joined.all_online(session)
    joined.name_holders("south")
    joined.processes["serve"].send_signal(signal.SIGHUP)
    assert joined.processes["north"].wait(SECONDS) == 1
    assert "the server does not know this holder's key. Send the coordinator" in joined.log("north")
    assert joined.processes["south"].poll() is None


def test_a_holder_with_another_authority_ends_with_a_remedy(federation):
    federation.serve()
    make_keys(federation.folder / "others", ["north"])
    text = (federation.folder / "north" / "holder.toml").read_text()
    (federation.folder / "north" / "holder.toml").write_text(text.replace("../keys/ca.crt", "../others/ca.crt"))
    assert federation.join("north").wait(SECONDS) == 1
    assert "ca.crt" in federation.log("north")
    assert "Traceback" not in federation.log("north")
