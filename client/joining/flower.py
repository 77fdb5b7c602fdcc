"""Every inner part of Flower's node that join replaces or relies on; made for flwr 1.41.

What a stock node does, and what it does here:

    fetches the run's bundle and reads its settings      never asks for it; of a run only the text `recipe` counts
    waits for the reply to a message that it lost        takes no such message
    follows redirects, decodes compressed answers        neither, and the length of an answer is bounded
    gives up, or ends, at a cut or an error              retry.py
    drops a reply of which the server lacks an object    uploading.py
    loses its heartbeat at an unexpected answer          goes on with it, or ends and is started anew
    waits 3 s after a pull that brought nothing          only where the server answered at once, and didn't wait itself
    says how long training took                          0: a server sees when the reply comes, and nothing finer
    SIGTERM: ends at once                                ends when the reply to the message under way has left; one
                                                         that the server hasn't fetched may be lost to its round
"""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType, SimpleNamespace
from typing import Any, Final

import httpx
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.proto.fab_pb2 import Fab, GetFabRequest, GetFabResponse
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import is_valid_sha256_hash
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from fedhead.client.joining.bounds import LARGEST_ANSWER, LONGEST_RECIPE, MOST_OBJECTS, RECIPE
from fedhead.client.joining.retry import Retry
from fedhead.client.joining.uploading import Upload
from fedhead.client.joining.weighing import TOO_LARGE
from fedhead.common.failpoints import reach

_NO_BUNDLE: Final = hashlib.sha256(b"").hexdigest()
_OBJECT_SECONDS: Final = 600.0  # most that a node waits for the rest of a message that the server has announced
_HELD: Final = 1.0  # seconds; a pull that took longer was held open by the server, which waits for messages itself


def run_node(
    *,
    server: str,
    authority: str,
    key: ec.EllipticCurvePrivateKey,
    secret: bytes,
    told: Callable[[str | None], None],
    fatal: Callable[[str], None],
    listening: Callable[[int], None],
    arrived: Callable[[], None],
) -> None:
    """Be a node of the server until SIGTERM, or until nothing more can be done.

    Parameters
    ----------
    server : str
        `host:port`.
    authority : str
        Certificates in PEM; nothing else is trusted.
    key : EllipticCurvePrivateKey
    secret : bytes
        Without it nobody on this machine can take a task.
    told, fatal : callables
        As `Retry` takes them.
    listening : callable
        Called with the port on 127.0.0.1 at which the executor finds its tasks.
    arrived : callable
        Called when a whole message is there.

    Raises
    ------
    SystemExit
        After SIGTERM or SIGINT, and where Flower gives up; the server has been told that the node is gone.
    """
    states = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    loop = Loop(arrived)
    install(lambda: Retry(told, fatal, RunNotRunningException), loop)
    _keep_durations(states.state())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, loop.interrupt)
    listening(_serve_tasks(states, secret))
    start_client_internal.start_client_internal(
        state_factory=states,
        server_address=server,
        node_config={},
        root_certificates=authority.encode("ascii"),
        insecure=False,
        authentication_keys=(key, key.public_key()),
        isolation="process",
        superexec_auth_secret=secret,
        runtime_dependency_install=False,
    )


def install(make_retry: Callable[[], Retry], loop: Loop) -> None:
    """Put join's parts in place of Flower's, in this process."""
    connection, node = vars(fleet_http_connection), vars(start_client_internal)
    pull = functools.partial(pull_objects, initial_backoff=0.05, backoff_cap=1.0, max_time=_OBJECT_SECONDS)
    to_message = functools.partial(own_message, connection["message_from_proto"])
    parts: Mapping[str, tuple[dict[str, Any], Any]] = {
        "make_simple_http_retry_invoker": (connection, make_retry),
        "FleetHttpClient": (connection, Client),
        "HeartbeatSender": (connection, Heartbeat),
        "message_from_proto": (connection, to_message),
        "run_from_proto": (connection, functools.partial(own_run, connection["run_from_proto"])),
        "get_fused_config_from_fab": (node, own_config),
        "pull_objects": (node, functools.partial(bounded_pull, pull)),
        "register_signal_handlers": (node, lambda **_: None),
        "time": (node, SimpleNamespace(sleep=loop.sleep)),
        "_pull_and_store_message": (node, functools.partial(loop.pull, node["_pull_and_store_message"])),
        "_push_messages": (node, functools.partial(loop.push, node["_push_messages"])),
    }
    for name, (module, part) in parts.items():
        assert name in module, name
        module[name] = part


class Client(FleetHttpClient):
    """Flower's client of the server, which talks to nobody else, takes no answer without bounds, and no bundle."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._client.follow_redirects = False
        self._client.headers["accept-encoding"] = "identity"
        self._client.event_hooks = {"response": [check_answer]}

    def GetFab(self, request: GetFabRequest) -> GetFabResponse:
        """An empty bundle, without asking the server: only the code that is installed here runs."""
        return GetFabResponse(fab=Fab(hash_str=_NO_BUNDLE, content=b""))


def check_answer(response: httpx.Response) -> None:
    """Refuse an answer before it is read: one that is compressed, too long, or doesn't say how long it is.

    Raises
    ------
    ValueError
    """
    length = response.headers.get("content-length", "")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise ValueError("the server's answer is compressed")
    if not (length.isascii() and length.isdigit() and int(length) <= LARGEST_ANSWER):
        raise ValueError("the server's answer is too long, or of no stated length")


class Heartbeat(HeartbeatSender):
    """Flower's heartbeat, whose thread does not end at the first error that Flower didn't think of."""

    def __init__(self, heartbeat_fn: Callable[[], bool]) -> None:
        def beat() -> bool:
            try:
                return heartbeat_fn()
            except (httpx.HTTPError, ValueError):
                return False
            except BaseException:  # RuntimeError: the server doesn't know this node any more: anew, in a new process
                os.kill(os.getpid(), signal.SIGINT)
                return False

        super().__init__(beat)


def own_message(parse: Callable[[Any], Message], proto: Any) -> Message:
    """A message as the server describes it, if the executor would get it.

    Flower's node keeps no message without an id, and gives a reply to nobody; it would wait for the reply for ever.

    Raises
    ------
    ValueError
        The node's loop ends at it, and the node is started again.
    """
    message = parse(proto)
    if not is_valid_sha256_hash(message.metadata.message_id) or message.metadata.reply_to_message_id:
        raise ValueError("what arrived is no message for a holder")
    return message


def bounded_pull(
    pull: Callable[..., dict[str, bytes]], object_ids: list[str], *, pull_object_fn: Callable[[str], bytes]
) -> dict[str, bytes]:
    """Get the objects of a message, in place of `pull_objects`, as long as all of them are no more than one may be.

    Raises
    ------
    ValueError
        The node then gives the message up.
    """
    taken, lock = 0, threading.Lock()

    def get(name: str) -> bytes:
        nonlocal taken
        content = pull_object_fn(name)
        with lock:
            taken += len(content)
            if taken > LARGEST_ANSWER:
                raise ValueError(TOO_LARGE)
        return content

    if len(object_ids) > MOST_OBJECTS:
        raise ValueError(TOO_LARGE)
    return pull(object_ids, pull_object_fn=get)


def own_run(parse: Callable[[Any], Run], proto: Any) -> Run:
    """A run as the server describes it, with no bundle, for the warm executor, and with one setting."""
    run = parse(proto)
    run.fab_hash = _NO_BUNDLE
    run.primary_task_type = TaskType.SERVER_APP  # any other kind would make tasks that nobody here ever takes
    run.override_config = dict(own_config(b"", run))
    return run


def own_config(bundle: Any, run: Run) -> dict[str, Any]:
    """The settings of a run: its recipe. Whatever the bundle is, it is not opened."""
    recipe = run.override_config.get(RECIPE)
    return {RECIPE: recipe} if isinstance(recipe, str) and len(recipe) <= LONGEST_RECIPE else {}


class Loop:
    """What Flower's loop calls, one message after the other, and how it ends.

    Parameters
    ----------
    arrived : callable
        Called when a whole message is there.
    """

    def __init__(self, arrived: Callable[[], None]) -> None:
        self._arrived = arrived
        self._busy = self._leaving = False
        self._held = False

    def pull(self, original: Callable[..., int | None], **kwargs: Any) -> int | None:
        """Get a message, in place of `_pull_and_store_message`."""
        if self._leaving:
            raise SystemExit(0)
        receive = kwargs.pop("receive")

        def timed() -> Any:
            started = time.monotonic()
            got = receive()
            self._held = time.monotonic() - started > _HELD
            self._busy = got is not None
            return got

        run = original(receive=timed, **kwargs)
        self._busy = run is not None
        if self._busy:
            reach("node.received")
            self._arrived()
        return run

    def push(self, original: Callable[..., None], **kwargs: Any) -> None:
        """Wait for the executor's reply and send it, in place of `_push_messages`."""
        upload = Upload(**{name: kwargs.pop(name) for name in ("object_store", "send", "push_object")})
        original(object_store=upload.store, send=upload.send, push_object=upload.push_object, **kwargs)
        self._busy = False

    def sleep(self, seconds: float) -> None:
        """In place of Flower's waits: 0.5 s for a reply, 3 s after a pull that brought nothing."""
        if seconds < 1:
            time.sleep(0.05)
        elif not (self._held or self._leaving):
            time.sleep(seconds)

    def interrupt(self, number: int, _: FrameType | None) -> None:
        """SIGTERM lets a message under way be answered; SIGINT, or a second SIGTERM, does not."""
        if number == signal.SIGTERM and self._busy and not self._leaving:
            self._leaving = True
            return
        raise SystemExit(0)


def _keep_durations(state: Any) -> None:
    """Have the node say 0 for the seconds of each task."""
    measured = state.get_message_processing_duration

    def none(message_id: str) -> float:
        measured(message_id)  # it also forgets old ones
        return 0.0

    state.get_message_processing_duration = none


def _serve_tasks(states: NodeStateFactory, secret: bytes) -> int:
    """Serve the executor on a free port of 127.0.0.1, in a thread that ends with the process."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    app = create_app(state_factory=states, superexec_auth_secret=secret)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", log_config=None, access_log=False))
    threading.Thread(target=server.run, args=([listener],), name="tasks", daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    port: int = listener.getsockname()[1]
    return port
