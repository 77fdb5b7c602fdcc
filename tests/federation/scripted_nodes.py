"""A server in a process of its own, and data holders' nodes that do as a test says, over TLS with their own keys.

The nodes are threads that speak the Fleet API themselves, so that they can be slow, silent or lie at any step.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cryptography.hazmat.primitives import serialization
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedhead.server.keys import make_keys
from fedhead.server.server_file import ServerFile, load_server

PATIENCE = 90.0  # seconds for what takes a few on a quiet machine


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """What `condition` gives once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Served:
    """The files of a federation and its `fedhead serve`."""

    def __init__(self, folder: Path, holders: list[str]) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        make_keys(folder / "keys", holders)
        self.public, control = free_ports(2)
        self.file = folder / "server.toml"
        names = ", ".join(f'"keys/{name}.pub"' for name in holders)
        self.file.write_text(
            f'address = "127.0.0.1:{self.public}"\ncontrol = "127.0.0.1:{control}"\n'
            f'certificates = "keys"\nholders = [{names}]\nleast_holders = 1\n'
        )
        self.server: ServerFile = load_server(self.file)
        self.process: subprocess.Popen | None = None
        self.nodes: list[ScriptedNode] = []

    def start(self) -> None:
        """Start the server; returns once commands can connect."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.folder / "serve.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedhead", "serve", str(self.file)],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
            )  # fmt: skip
        until(self._answers, f"the server listens: {(self.folder / 'serve.log').read_text()[-2000:]}")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "serve.log").read_text()[-2000:]
        for address in (self.server.control, self.server.address):
            host, port = address.split(":")
            try:
                socket.create_connection((host, int(port)), 1).close()
            except OSError:
                return False
        return True

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait(30)

    def node(self, name: str, answer: Callable[["ScriptedNode", Message], None] | None = None) -> "ScriptedNode":
        """Connect a holder's node; it answers every message at once, unless it is told another way."""
        found = ScriptedNode(self, name, answer or ScriptedNode.reply)
        self.nodes.append(found)
        found.start()
        return found

    def close(self) -> None:
        """End everything."""
        for node in self.nodes:
            node.ended.set()
        self.kill()
        for node in self.nodes:
            node.join(40)


class ScriptedNode(threading.Thread):
    """One holder's node."""

    def __init__(self, served: Served, name: str, answer: Callable[["ScriptedNode", Message], None]) -> None:
        super().__init__(daemon=True)
        self.answer, self.ended = answer, threading.Event()
        self.received: list[Message] = []
        self.losing = False  # the answer to every object that it brings, once
        self.dropped: list[str] = []  # replies that the server has not taken
        key = serialization.load_ssh_private_key((served.folder / "keys" / f"{name}.key").read_bytes(), None)
        self.public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.client = FleetHttpClient.from_server_address(
            f"localhost:{served.public}", False, str(served.folder / "keys" / "ca.crt"),
            [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())],
        )  # fmt: skip
        self.node = Node()

    def run(self) -> None:
        active = False
        while not self.ended.is_set():
            try:
                if not active:
                    request = ActivateNodeRequest(public_key=self.public, heartbeat_interval=30)
                    self.node = Node(node_id=self.client.ActivateNode(request).node_id)
                    active = True
                self.client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=30))
                found = self.client.PullMessages(PullMessagesRequest(node=self.node))
                for tree in found.message_object_trees:
                    self._receive(tree, found.messages_list[0].metadata.run_id)
            except httpx.HTTPError:
                self.ended.wait(0.2)
        self.client.close()

    def _receive(self, tree: Any, run: int) -> None:
        contents: dict[str, bytes] = {}
        missing = [part.object_id for part in iterate_object_tree(tree)]
        while missing and not self.ended.is_set():
            request = PullObjectRequest(node=self.node, run_id=run, object_id=missing[0])
            found = self.again(lambda request=request: self.client.PullObject(request))
            if found.object_available:
                contents[missing.pop(0)] = found.object_content
            elif found.object_found:
                self.ended.wait(0.05)
            else:
                return
        if self.ended.is_set():
            return
        self.again(
            lambda: self.client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self.node, run_id=run, message_object_id=tree.object_id)
            )
        )
        message = inflate_object_from_contents(tree.object_id, contents)
        message.metadata.__dict__["_message_id"] = tree.object_id
        self.received.append(message)
        self.answer(self, message)

    def again(self, call: Callable[[], Any]) -> Any:
        """A request, again while the server is away."""
        while True:
            try:
                return call()
            except httpx.TransportError:
                if self.ended.wait(0.2):
                    raise

    def reply(self, message: Message) -> None:
        """Send a plain reply to a message: its own array plus noise, so that no two are alike."""
        self.push(message, self.made(message))

    def silent(self, _: Message) -> None:
        """Train for ever; a node that asked for messages again would be taken for one that was restarted."""
        while self.answer is ScriptedNode.silent and not self.ended.wait(0.05):
            pass

    def made(self, message: Message) -> Message:
        """A plain reply."""
        size = message.content["arrays"].to_numpy_ndarrays()[0].size if "arrays" in message.content else 4
        noise = np.random.default_rng().standard_normal(size).astype(np.float32)
        content = RecordDict({"arrays": ArrayRecord([noise]), "said": ConfigRecord({"at": time.time()})})
        return Message(content, reply_to=message)

    def push(self, message: Message, reply: Message, envelope: Message | None = None, most: int | None = None) -> None:
        """Upload a reply; another `envelope` than its own lies about it, `most` objects leave it incomplete."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        outer = message_to_proto(remove_content_from_message(envelope or reply))
        outer.metadata.message_id = reply.object_id
        request = PushMessagesRequest(
            node=self.node, messages_list=[outer], message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[0.0],
        )  # fmt: skip
        objects = get_all_nested_objects(reply)
        for _ in range(3):
            answer = self.again(lambda: self.client.PushMessages(request))
            wanted = list(answer.objects_to_push)[:most]
            run, session = message.metadata.run_id, answer.session_id
            if all(self._bring(run, session, name, objects[name].deflate()) for name in wanted):
                return
        self.dropped.append(reply.object_id)

    def _bring(self, run: int, session: str, name: str, content: bytes) -> bool:
        """Upload an object; whether the server has taken it."""
        request = PushObjectRequest(
            node=self.node, run_id=run, object_id=name, session_id=session, object_content=content
        )
        for _ in range(1 + self.losing):
            stored = self.again(lambda: self.client.PushObject(request)).stored
        return bool(stored)
