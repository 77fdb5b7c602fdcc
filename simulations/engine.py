"""Many data holders in one process: a Grid of our own under the very same server and client apps.

One Python process runs every holder in turn, without serialising, so a round costs what its training costs. Two things
of Flower's are touched that are not public: the identity of the running task (`Message()` asks for it) and the ids in
a message's metadata; `tests/unit/test_engine.py` notices when they change.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

Expect = Callable[[Sequence[tuple[Message, Context]]], None]

SERVER_NODE = 1
FIRST_NODE = 1000
APP_RAISED = 2  # flwr's code for an app that raised


class InProcessGrid(Grid):
    """Delivers messages by calling the client app.

    Parameters
    ----------
    client : ClientApp
    contexts : dict of int to Context
        By node id; each keeps its state over rounds.
    run_id : int
    expect : callable, optional
        Told of all messages of a batch, with their contexts, before the first is delivered.
    """

    def __init__(
        self, client: ClientApp, contexts: dict[int, Context], run_id: int, expect: Expect | None = None
    ) -> None:
        self.client, self.contexts, self.run_id, self.expect = client, contexts, run_id, expect
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Accept Flower's description of the run; nothing here needs it."""
        self._run = run

    @property
    def run(self) -> Any:
        """Flower's description of the run, an empty one by default."""
        if not hasattr(self, "_run"):
            from flwr.supercore.run import Run

            self._run = Run.create_empty(self.run_id)
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Every holder's node."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages one after another and keep the replies."""
        ids, messages = [], list(messages)
        if self.expect is not None:
            self.expect([(message, self.contexts[message.metadata.dst_node_id]) for message in messages])
        for message in messages:
            metadata = message.metadata.__dict__
            metadata["_message_id"] = uuid.uuid4().hex
            metadata["_run_id"], metadata["_src_node_id"] = self.run_id, SERVER_NODE
            reply = self._deliver(message)
            reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            self._replies[message.metadata.message_id] = reply
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages."""
        return [self._replies.pop(one) for one in message_ids if one in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver messages and give their replies; nothing is ever late in one process."""
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> Message:
        # A strategy puts one RecordDict into all messages; a real node would get its own copy. The values of a record
        # are never changed in place, so new dictionaries are enough.
        own = copy.copy(message)
        own.content = RecordDict({name: record.copy() for name, record in message.content.items()})
        try:
            return self.client(own, self.contexts[message.metadata.dst_node_id])
        except Exception:  # as a node: the text of an exception may hold private data and stays here
            return Message(Error(APP_RAISED, "the client app raised an exception"), reply_to=message)


def run_in_process(
    server: ServerApp, client: ClientApp, holders: int, run_config: Mapping[str, Any], expect: Expect | None = None
) -> None:
    """Run both apps to the end in this process.

    Parameters
    ----------
    holders : int
        Number of nodes; node i gets `partition-id = i`, as under Flower's own simulation.
    run_config : mapping
        As a user of Flower would give it.
    expect : callable, optional
        Told of all messages of a round before the first is delivered.
    """
    run_id = uuid.uuid4().int >> 65
    config = dict(run_config)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SERVER_NODE
    contexts = {
        FIRST_NODE + i: Context(
            run_id=run_id,
            node_id=FIRST_NODE + i,
            node_config={"partition-id": i, "num-partitions": holders},
            state=RecordDict(),
            run_config=config,
        )
        for i in range(holders)
    }
    grid = InProcessGrid(client, contexts, run_id, expect)
    context = Context(run_id=run_id, node_id=SERVER_NODE, node_config={}, state=RecordDict(), run_config=config)
    server(grid, context)
