"""A server on loopback that answers as a test says, goes away, and comes back on the same port."""

import contextlib
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from flwr.proto.control_pb2 import (
    ListNodesResponse,
    ListRunsResponse,
    StartRunResponse,
    StopRunRequest,
    StopRunResponse,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run, RunStatus
from flwr.proto.runtime_pb2 import (
    AcquireTaskResponse,
    GetNodesResponse,
    PullTaskInputResponse,
    PushTaskOutputRequest,
    PushTaskOutputResponse,
    SendTaskHeartbeatResponse,
)
from flwr.proto.task_pb2 import Task
from flwr.supercore.task_identity import TaskIdentity

from fedhead.server.keys import make_keys
from fedhead.server.server_file import ServerFile, load_server

CUT = -1  # close the connection without an answer


class FakeLink:
    """Answers by path: bytes, an HTTP status, CUT, or a function of the request's body that gives one of these."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.answers: dict[str, bytes | int | Callable[[bytes], bytes | int]] = {}
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        """Be there."""
        link = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                link.requests.append((self.path, dict(self.headers.items()), body))
                found = link.answers.get(self.path, 404)
                if callable(found):
                    found = found(body)
                if found == CUT:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, content = (200, found) if isinstance(found, bytes) else (found, b"no")
                with contextlib.suppress(OSError):  # the caller didn't wait
                    self.send_response(status)
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Be gone; connections are refused from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def asked(self, path: str) -> int:
        """How often a path was asked for."""
        return sum(one == path for one, _, _ in self.requests)


@pytest.fixture
def link():
    found = FakeLink()
    found.start()
    yield found
    found.stop()


@pytest.fixture
def away(link):
    """A link that isn't there yet."""
    link.stop()
    return link


@pytest.fixture
def server_file(tmp_path, link) -> ServerFile:
    """A server.toml whose control address is the fake's, with the files of a server that was started once."""
    make_keys(tmp_path / "keys", ["north", "south"])
    (tmp_path / "server.toml").write_text(
        f'control = "{link.address}"\ncertificates = "keys"\nholders = ["keys/north.pub", "keys/south.pub"]\n'
    )
    found = load_server(tmp_path / "server.toml")
    found.folder.mkdir(mode=0o700)
    for path in (found.token_file, found.secret_file):
        path.touch(mode=0o600)
        path.write_text("5" * 64)
    return found


@pytest.fixture(autouse=True)
def own_task():
    """Flower keeps the task of a process in a class; each test leaves it as it was."""
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    yield
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


class FakeControl:
    """As much of Flower's server as a session needs: runs, and the task of ours."""

    def __init__(self, link):
        self.link = link
        self.state = ("running", "")
        self.others: dict[int, tuple[str, str]] = {}
        self.tasks = [5]  # runs whose tasks are offered, in turn
        self.ended: list[str] = []
        self.nodes: list[NodeInfo] = []
        link.answers.update(
            {
                "/v1/control/list-runs": self.list_runs,
                "/v1/control/list-nodes": lambda _: ListNodesResponse(nodes_info=self.nodes).SerializeToString(),
                "/v1/control/start-run": StartRunResponse(run_id=5).SerializeToString(),
                "/v1/control/stop-run": self.stop_run,
                "/v1/runtime/acquire-task": self.acquire,
                "/v1/runtime/pull-task-input": self.pull_input,
                "/v1/runtime/push-task-output": self.push_output,
                "/v1/runtime/get-nodes": GetNodesResponse().SerializeToString(),
                "/v1/runtime/send-task-heartbeat": SendTaskHeartbeatResponse(success=True).SerializeToString(),
            }
        )

    def list_runs(self, _):
        runs = {5: self.state, **self.others}
        return ListRunsResponse(
            run_dict={
                number: Run(run_id=number, status=RunStatus(status=status, sub_status=sub, details=""))
                for number, (status, sub) in runs.items()
            }
        ).SerializeToString()

    def stop_run(self, body):
        number = StopRunRequest.FromString(body).run_id
        if number == 5:
            self.state = ("finished", "stopped")
        else:
            self.others[number] = ("finished", "stopped")
        return StopRunResponse(success=True).SerializeToString()

    def acquire(self, _):
        if not self.tasks:
            return AcquireTaskResponse().SerializeToString()
        return AcquireTaskResponse(task=Task(run_id=self.tasks.pop(0)), token="a" * 8).SerializeToString()

    def pull_input(self, _):
        return PullTaskInputResponse(task_id=9, run=Run(run_id=5)).SerializeToString()

    def push_output(self, body):
        self.ended.append(PushTaskOutputRequest.FromString(body).sub_status)
        return PushTaskOutputResponse().SerializeToString()


@pytest.fixture
def control(link, server_file):
    return FakeControl(link)
