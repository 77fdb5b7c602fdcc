"""A real `fedhead serve` on loopback, and those who come to its doors; for tests, by runpy."""

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from unittest.mock import patch

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import StartRunRequest, StopRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedhead.server.keys import make_keys

PATIENCE = 180.0  # seconds; on a loaded machine a start takes some
ACQUIRE = {"/flwr.proto.Runtime/AcquireTask"}
PYPROJECT = b"""[project]
name = "doors"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "doors"
[tool.flwr.app.components]
serverapp = "doors:server"
clientapp = "doors:client"
[tool.flwr.app.config]
recipe = ""
"""


def free_ports(number):
    """Ports that nobody uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def until(condition, what):
    """Wait for a condition."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not come within {PATIENCE:g} s"
        time.sleep(0.05)


class Bearer:
    """Shows a token."""

    def __init__(self, token):
        self.token = token

    def intercept(self, context, call_next):
        context.request.headers["authorization"] = f"Bearer {self.token}"
        return call_next(context)


class Serve:
    """A server's folder, and the process when it runs."""

    def __init__(self, folder, holders=("north", "south"), extra=""):
        self.folder, self.ports, self.extra = folder, free_ports(3), extra
        make_keys(folder / "keys", [*holders])
        self.list(holders)
        self.process = None
        self.log = folder / "serve.log"

    def list(self, holders):
        """Write server.toml."""
        text = [f'address = "127.0.0.1:{self.ports[0]}"', f'control = "127.0.0.1:{self.ports[1]}"']
        text += ['certificates = "keys"', f"holders = {[f'keys/{name}.pub' for name in holders]}", "least_holders = 1"]
        text += [f'metrics = "127.0.0.1:{self.ports[2]}"']
        (self.folder / "server.toml").write_text("\n".join([*text, self.extra, ""]))

    def popen(self, log):
        return subprocess.Popen(
            [sys.executable, "-m", "fedhead", "serve", str(self.folder / "server.toml")], stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip

    def start(self):
        """Run it until it says that holders can connect."""
        before = self.said("data holders connect to")
        with open(self.log, "ab") as log:
            self.process = self.popen(log)
        until(lambda: self.process.poll() is not None or self.said("data holders connect to") > before, "the start")
        assert self.process.poll() is None, self.log.read_text()
        return self

    def said(self, text):
        """How many lines of the log have this text."""
        return self.log.read_text().count(text) if self.log.exists() else 0

    def refused(self):
        """Run it where it can't: (status, output)."""
        with open(self.folder / "refused.log", "wb") as log:
            process = self.popen(log)
            try:
                status = process.wait(PATIENCE)
            finally:
                end(process)
        return status, (self.folder / "refused.log").read_text()

    def kill(self):
        self.process.kill()
        self.process.wait(PATIENCE)

    def close(self):
        if self.process is not None:
            end(self.process)

    @property
    def ca(self):
        return str(self.folder / "keys/ca.crt")

    @property
    def public(self):
        return f"127.0.0.1:{self.ports[0]}"

    @property
    def private(self):
        return f"127.0.0.1:{self.ports[1]}"

    @property
    def token(self):
        return (self.folder / "state/control.token").read_text()

    def key(self, holder):
        return load_ssh_private_key((self.folder / f"keys/{holder}.key").read_bytes(), None)

    def clients(self, door, *interceptors):
        """Control and Runtime through one of the doors."""
        address, root = (self.public, self.ca) if door == "public" else (self.private, None)
        chain = [RuntimeVersionHttpInterceptor(component_name="doors"), *interceptors]
        return (
            ControlHttpClient.from_server_address(address, root is None, root, chain),
            RuntimeHttpClient.from_server_address(
                server_address=address, insecure=root is None, root_certificates=root, interceptors=chain
            ),
        )

    def node(self, holder):
        """A data holder's node, not activated yet."""
        return FleetNode(self, self.key(holder))

    def http(self):
        """A client that trusts the server, and nothing else."""
        return httpx.Client(verify=ssl.create_default_context(cafile=self.ca), base_url=f"https://{self.public}")

    def run(self):
        """A run that is under way, and the means to send messages."""
        return Run(self)


class FleetNode:
    """What a node says, step by step."""

    def __init__(self, server, key, signer=None):
        chain = [RuntimeVersionHttpInterceptor(component_name="doors")]
        if signer is not False:
            chain.append(NodeAuthHttpInterceptor(signer or key, key.public_key()))
        self.pem = public_key_to_bytes(key.public_key())
        self.client = FleetHttpClient.from_server_address(server.public, False, server.ca, chain)
        self.node = Node(node_id=0)

    def activate(self):
        request = ActivateNodeRequest(public_key=self.pem, heartbeat_interval=30)
        self.node = Node(node_id=self.client.ActivateNode(request).node_id)
        return self.node.node_id


class Run:
    """The coordinator's side of a run: brings messages, fetches answers."""

    def __init__(self, server):
        self.control, _ = server.clients("private", Bearer(server.token))
        fab, _ = build_fab_from_files({"pyproject.toml": PYPROJECT})
        self.id = self.control.StartRun(StartRunRequest(fab=Fab(hash_str="", content=fab))).run_id
        secret = (server.folder / "state/superexec.secret").read_bytes()
        _, runtime = server.clients(
            "private", SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=ACQUIRE)
        )
        while True:  # earlier runs of this server may have left tasks
            task = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if task.task.run_id == self.id:
                break
        self.grid = HttpGrid(server.private, insecure=True, token=task.token)
        found = self.grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        self.grid.set_run(run_from_proto(found.run))
        self.identity = {"_run_id": self.id, "_node_id": found.context.node_id, "_task_id": found.task_id}

    def send(self, node, text="x", ttl=120.0):
        """Bring a message; returns its id."""
        with patch.multiple(TaskIdentity, **self.identity):
            message = Message(RecordDict({"config": ConfigRecord({"text": text})}), node, "train", ttl=ttl)
            (name,) = self.grid.push_messages([message])
            return name

    def stop(self):
        """End it."""
        self.grid.close()
        self.control.StopRun(StopRunRequest(run_id=self.id))

    def answers(self, *names):
        """What has come for these messages."""
        with patch.multiple(TaskIdentity, **self.identity):
            return list(self.grid.pull_messages(set(names)))


def end(process):
    """End a process by its id."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def refusal(call):
    """The HTTP status that a call is refused with; None when it isn't."""
    try:
        call()
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    return None
