"""Everything of Flower 1.41 that the submit side uses and that is not public; another version is refused in one line.

    control, acquiring, runtime   clients of the server's two loopback APIs: commands, taking a task, a task's own calls
    bundle                        what a run has to bring along: settings, no code
    packed, unpacked              messages as the objects that travel, and back

Nothing outside of this file imports a part of Flower that its documentation doesn't name.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, Final, TypeVar

import httpx

from fedhead.common.errors import RunError
from fedhead.server.link.environment import FLOWER, check_flower
from fedhead.server.submitting.waiting import REQUEST_SECONDS, Waiting

check_flower()
try:
    from flwr.app import Array, Error, Message, Metadata
    from flwr.app.message import make_message, remove_content_from_message
    from flwr.cli.build import build_fab_from_files
    from flwr.common.constant import HEARTBEAT_PATIENCE, SUPERLINK_NODE_ID, ErrorCode, Status, SubStatus
    from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto, user_config_to_proto
    from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, StartRunRequest, StopRunRequest
    from flwr.proto.fab_pb2 import Fab
    from flwr.proto.message_pb2 import (
        ConfirmMessageReceivedRequest,
        ObjectTree,
        PullObjectRequest,
        PushObjectRequest,
    )
    from flwr.proto.message_pb2 import Message as MessageProto
    from flwr.proto.node_pb2 import Node, NodeInfo
    from flwr.proto.run_pb2 import Run as RunProto
    from flwr.proto.runtime_pb2 import (
        AcquireTaskRequest,
        GetNodesRequest,
        PullAppMessagesRequest,
        PullTaskInputRequest,
        PushAppMessagesRequest,
        PushTaskOutputRequest,
        SendTaskHeartbeatRequest,
    )
    from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE, TaskType
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.inflatable.inflatable_object import (
        InflatableObject,
        get_all_nested_objects,
        get_object_body,
        get_object_head_values_from_object_content,
        get_object_tree,
        iterate_object_tree,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClient, ProtobufRequestContext
    from flwr.supercore.run import Run
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supercore.task_identity import TaskIdentity
except ImportError as error:
    raise RunError(
        f'Flower {version("flwr")} lacks a part that fedhead uses: {error.name}. Run: pip install "flwr=={FLOWER}*"'
    ) from error

__all__ = [
    "HEARTBEAT_PATIENCE",
    "SUPERLINK_NODE_ID",
    "AcquireTaskRequest",
    "ConfirmMessageReceivedRequest",
    "ControlHttpClient",
    "ErrorCode",
    "GetNodesRequest",
    "ListNodesRequest",
    "ListRunsRequest",
    "MessageProto",
    "Node",
    "NodeInfo",
    "ObjectTree",
    "Packed",
    "PullAppMessagesRequest",
    "PullObjectRequest",
    "PullTaskInputRequest",
    "PushAppMessagesRequest",
    "PushObjectRequest",
    "PushTaskOutputRequest",
    "Run",
    "RunProto",
    "RuntimeHttpClient",
    "SendTaskHeartbeatRequest",
    "StartRunRequest",
    "Status",
    "StopRunRequest",
    "SubStatus",
    "TaskType",
    "acquiring",
    "bundle",
    "control",
    "copied",
    "enter",
    "object_ids",
    "packed",
    "run_from_proto",
    "runtime",
    "start_request",
    "unavailable",
    "unpacked",
]  # fmt: skip

_ACQUIRE: Final = "/flwr.proto.Runtime/AcquireTask"
_SETTINGS: Final = b"""[project]
name = "fedhead-run"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedhead"

[tool.flwr.app.components]
serverapp = "fedhead.server.app:app"
clientapp = "fedhead.client.app:app"

[tool.flwr.app.config]
recipe = ""
"""

_Client = TypeVar("_Client", bound=ProtobufClient)


class _Bearer:
    """Proves a command to the Control API."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers["authorization"] = f"Bearer {self._token}"
        return call_next(context)


class _Bounded:
    """No request waits longer for an answer than its caller can."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        most = self._seconds()
        limits = context.request.extensions["timeout"]
        context.request.extensions["timeout"] = {name: min(value, most) for name, value in limits.items()}
        return call_next(context)


def control(address: str, token: str, waiting: Waiting) -> ControlHttpClient:
    """A client of the Control API on this machine."""
    return _client(ControlHttpClient, address, waiting, "flwr CLI", _Bearer(token))


def acquiring(address: str, secret: bytes, waiting: Waiting) -> RuntimeHttpClient:
    """A client that may take tasks, and nothing else."""
    proof = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE})
    return _client(RuntimeHttpClient, address, waiting, "SuperExec", proof)


def runtime(address: str, token: str, waiting: Waiting) -> RuntimeHttpClient:
    """A client for the calls of one task."""
    return _client(RuntimeHttpClient, address, waiting, "flwr-serverapp", RuntimeTokenHttpInterceptor(token=token))


def _client(kind: type[_Client], address: str, waiting: Waiting, component: str, proof: Any) -> _Client:
    found = kind(
        f"http://{address}",
        interceptors=[
            _Bounded(waiting.request_seconds),
            RuntimeVersionHttpInterceptor(component_name=component),
            proof,
        ],
        timeout=REQUEST_SECONDS,
        # Flower calls only `invoke`.
        retry_invoker=waiting,  # type: ignore[arg-type]
    )
    # A proxy named in the environment, usual in hospitals, must not come between two processes of one machine.
    found._client.close()
    found._client = httpx.Client(timeout=REQUEST_SECONDS, trust_env=False)
    return found


@cache
def bundle() -> bytes:
    """The bundle of a run: one pyproject.toml, no code."""
    content: bytes = build_fab_from_files({"pyproject.toml": _SETTINGS})[0]
    return content


def start_request(recipe: str) -> StartRunRequest:
    """What starts a run of a recipe."""
    return StartRunRequest(
        fab=Fab(hash_str="", content=bundle()), override_config=user_config_to_proto({"recipe": recipe})
    )


def enter(task: int, run: int, node: int) -> None:
    """Have this process be the ServerApp of a run: messages made from now on carry these numbers."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task, run, node


@dataclass(frozen=True)
class Packed:
    """Messages as they travel.

    Attributes
    ----------
    messages : list of MessageProto
        Without their content.
    trees : list of ObjectTree
        Which objects each consists of.
    objects : mapping
        SHA-256 of an object -> the object; what several messages share is there once.
    """

    messages: list[MessageProto]
    trees: list[ObjectTree]
    objects: Mapping[str, InflatableObject]


def packed(messages: Iterable[Message]) -> Packed:
    """Give every message its id, the SHA-256 of what it is, and take it apart into objects."""
    found, objects = Packed([], [], {}), dict[str, InflatableObject]()
    with no_object_id_recompute():
        for message in messages:
            if message.metadata.ttl <= 0:
                raise ValueError("a message needs a ttl above 0")
            message.metadata.__dict__["_message_id"] = message.object_id
            found.messages.append(message_to_proto(remove_content_from_message(message)))
            found.trees.append(get_object_tree(message))
            objects.update(get_all_nested_objects(message))
    return Packed(found.messages, found.trees, objects)


def copied(message: Message) -> Message | None:
    """The same message under another id, valid until the same time; None when that has come."""
    metadata = message.metadata
    left = metadata.created_at + metadata.ttl - time.time()
    if left <= 0 or not message.has_content():
        return None
    return Message(message.content, metadata.dst_node_id, metadata.message_type, ttl=left, group_id=metadata.group_id)


def object_ids(tree: ObjectTree) -> list[str]:
    """Every object of a message, each once."""
    return list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))


def unpacked(envelope: MessageProto, contents: dict[str, bytes], largest: float = math.inf) -> Message | None:
    """A reply from its objects; None for one that isn't what its envelope says, or is larger than `largest` bytes.

    The server has checked the envelope: who sent it, and what it replies to. The objects are the sender's own, with
    a second copy of both; a sender that writes another's number there must not be taken for the other.
    """
    outer = message_from_proto(envelope).metadata
    with suppress(Exception):  # whatever is wrong with it: a sender's bytes must not end the run
        if _inflated(contents) > largest:
            return None
        found = inflate_object_from_contents(outer.message_id, contents)
        if isinstance(found, Message) and _identity(found.metadata) == _identity(outer):
            found.metadata.__dict__["_message_id"] = outer.message_id
            return found
    return None


def _inflated(contents: Mapping[str, bytes]) -> int:
    """Bytes that all arrays of a reply take: one may name a chunk any number of times, though it travelled once."""
    total = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__name__:
            chunks = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(contents[children[index]]) for index in chunks)
    return total


def _identity(metadata: Metadata) -> tuple[Any, ...]:
    return (
        metadata.run_id, metadata.src_node_id, metadata.dst_node_id, metadata.reply_to_message_id, metadata.group_id,
        metadata.message_type,
    )  # fmt: skip


def unavailable(envelope: MessageProto, reason: str) -> Message:
    """An error in the place of a reply that can't be had."""
    outer = message_from_proto(envelope).metadata
    metadata = Metadata(
        run_id=outer.run_id, message_id="", src_node_id=outer.src_node_id, dst_node_id=outer.dst_node_id,
        message_type=SYSTEM_MESSAGE_TYPE, group_id="", ttl=0, reply_to_message_id=outer.reply_to_message_id,
        created_at=outer.created_at,
    )  # fmt: skip
    return make_message(metadata=metadata, error=Error(code=ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason=reason))
