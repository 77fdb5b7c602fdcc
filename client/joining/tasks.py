"""The executor's side of the node: take a task, get its message, hand the reply over. Made for flwr 1.41.

What Flower's own client process does is done here without the bundle, and without its process.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final, Self

import httpx
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message

from fedhead.client.joining.bounds import LARGEST_ANSWER, RECIPE
from fedhead.client.joining.weighing import Scales

_ACQUIRE: Final = "/flwr.proto.Runtime/AcquireTask"
_MESSAGE_SECONDS: Final = 30.0  # a message without objects after that never gets them: its run has ended


class Tasks:
    """The tasks of a node.

    Parameters
    ----------
    address : str
        `127.0.0.1:port`.
    secret : bytes
        Of the node.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        self.address = address
        self._client = _connect(
            address,
            "SuperExec",
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE}),
        )

    def take(self) -> str | None:
        """The token of the next task; None where there is none, or the node is gone."""
        with suppress(httpx.HTTPError, ValueError):
            found = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
            if found.HasField("task") and found.token:
                return str(found.token)
        return None

    def close(self) -> None:
        """Free the connection."""
        self._client.close()


class Task:
    """One task, whose claim is kept alive while the context is open.

    Parameters
    ----------
    address : str
    token : str
    """

    def __init__(self, address: str, token: str) -> None:
        self._client = _connect(address, "flwr-clientapp", RuntimeTokenHttpInterceptor(token))
        self._heartbeat = HeartbeatSender(self._beat)
        self._context: Any = None

    def __enter__(self) -> Self:
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._heartbeat.is_running:
            self._heartbeat.stop()
        self._client.close()

    def pull(self, holder: str) -> tuple[Message, Context] | None:
        """The message, and a context of this holder's own; None where the node has given the message up.

        Parameters
        ----------
        holder : str
            Path of the holder's file. Of what the server sent, only the recipe is in the context.
        """
        client = self._client
        found = client.PullTaskInput(PullTaskInputRequest())
        run, node = found.run.run_id, found.context.node_id
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = found.task_id, run, node
        got = client.PullMessages(PullAppMessagesRequest())
        if not got.messages_list:
            return None
        tree, sender = got.message_object_trees[0], Node(node_id=node)
        scales = Scales(
            make_pull_object_fn_protobuf(client.PullObject, sender, run),
            make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, sender, run),
            LARGEST_ANSWER,
        )
        message = pull_and_inflate_object_from_tree(
            tree,
            scales.pull,
            scales.confirm,
            return_type=Message,
            initial_backoff=0.05,
            backoff_cap=1.0,
            max_time=_MESSAGE_SECONDS,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id  # as Flower does it: it isn't in the message
        recipe = found.run.override_config[RECIPE].string if RECIPE in found.run.override_config else ""
        self._context = Context(
            run_id=run,
            node_id=node,
            node_config={"holder": holder},
            state=RecordDict(),
            run_config={RECIPE: recipe},
        )
        return message, self._context

    def push(self, reply: Message) -> None:
        """Hand the reply to the node."""
        push_message(self._client, reply, self._context)

    def finish(self, good: bool) -> None:
        """Say that the task is over; no text, no context."""
        with suppress(httpx.HTTPError):
            status = SubStatus.COMPLETED if good else SubStatus.FAILED
            self._client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))

    def _beat(self) -> bool:
        try:
            self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.TransportError:
            return False
        except (httpx.HTTPError, ValueError):  # the node has dropped the task; the push will show it
            return True
        return True


def _connect(address: str, component: str, *interceptors: Any) -> RuntimeHttpClient:
    # plain HTTP: both ends are processes of one supervisor, on loopback, and the secret is theirs alone
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=component), *interceptors],
    )
