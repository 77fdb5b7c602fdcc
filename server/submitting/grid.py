"""Messages to the holders' nodes and their replies, over a link that may be away for a while.

A message is named by what it is, so that pushing it again is safe: after a failure half way the server says which of
its objects it still lacks. Objects that several messages share, such as the head, travel once.

A reply comes in two steps: its envelope, which the server hands out once, and its objects, which its sender may still
be uploading. Several replies are fetched side by side, so that one slow sender doesn't hold up the others.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedhead.common.errors import RunError
from fedhead.server.submitting import flower
from fedhead.server.submitting.flower import NodeInfo, Run, RuntimeHttpClient
from fedhead.server.submitting.waiting import TimeUp, Waiting, each

POLL_SECONDS: Final = 0.1
_OBJECT_SECONDS: Final = 0.05  # pause before asking again for an object that isn't uploaded yet
_PUSHES: Final = 60  # of the same messages, about a minute: the disk may be full for a moment, or a restart cost one
_SHARE: Final = 32  # objects of one reply that are fetched before it is the next one's turn
_FETCH_SECONDS: Final = 2.0  # after that the caller may look at its deadline, and at other replies
_FORGOTTEN_SECONDS: Final = 3600.0  # a reply that nobody asks for any more
_MEBIBYTE: Final = 1 << 20


class _Arriving:
    """A reply whose envelope is here."""

    def __init__(self, envelope: flower.MessageProto, tree: flower.ObjectTree) -> None:
        self.envelope = envelope
        self.missing = flower.object_ids(tree)
        self.contents: dict[str, bytes] = {}
        self.size = 0
        self.since = time.monotonic()
        self.blocked = False  # its next object isn't uploaded yet
        self.lost = ""  # why it can't be had

    @property
    def complete(self) -> bool:
        return not self.missing or bool(self.lost)

    def message(self, largest: int) -> Message:
        """The reply, or an error with a fixed text in its place."""
        if self.lost:
            return flower.unavailable(self.envelope, self.lost)
        found = flower.unpacked(self.envelope, self.contents, largest)
        return found or flower.unavailable(self.envelope, "the reply is not what its envelope says")


class DeployedGrid(Grid):
    """The grid of one task.

    Parameters
    ----------
    client : RuntimeHttpClient
        Of the task.
    waiting : Waiting
        The client's rule for a server that is away.
    largest : int
        Most MiB that the objects of one reply may have together.

    Notes
    -----
    Every method raises `Stopped` when somebody stopped the run, and `LinkLost` when the server was away for longer
    than the session's patience or has given the run up. A call is left at once by an exception of a signal; the
    session is to be closed then.
    """

    def __init__(self, client: RuntimeHttpClient, waiting: Waiting, largest: int) -> None:
        super().__init__()
        self._client, self._waiting = client, waiting
        self._largest = largest * _MEBIBYTE
        self._node = flower.Node(node_id=flower.SUPERLINK_NODE_ID)
        self._run: Run | None = None
        self._arriving: dict[str, _Arriving] = {}  # id of the message that is replied to -> the reply

    def set_run(self, run: Run) -> None:
        """The run that this grid belongs to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that this grid belongs to."""
        assert self._run is not None
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node; `ttl` in seconds."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Nodes that are connected."""
        return list(self._client.GetNodes(flower.GetNodesRequest()).nodes)

    def get_node_ids(self) -> Iterable[int]:
        """Numbers of the nodes that are connected."""
        return [node.node_id for node in self.get_nodes()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand messages to the server.

        Parameters
        ----------
        messages : iterable of Message

        Returns
        -------
        ids : list of str
            In the order of the messages; "" for one that the server doesn't take, as its node is not registered, or
            because it was away until the message had expired.

        Raises
        ------
        RunError
            The server can't store them.
        """
        messages = list(messages)
        if not messages:
            return []
        expires = min(message.metadata.created_at + message.metadata.ttl for message in messages)
        try:
            with self._waiting.within(max(0.0, expires - time.time())):
                return self._push(messages)
        except TimeUp:
            if self._waiting.over:
                raise
            return [""] * len(messages)

    def _push(self, messages: Sequence[Message]) -> list[str]:
        packed = flower.packed(messages)
        request = flower.PushAppMessagesRequest(messages_list=packed.messages, message_object_trees=packed.trees)
        for attempt in range(_PUSHES):
            answer = self._client.PushMessages(request)
            if self._push_objects(packed, answer.objects_to_push, answer.session_id):
                return list(answer.message_ids)
            self._waiting.pause(min(1.0, _OBJECT_SECONDS * 2**attempt))
            if self._waiting.over:
                raise TimeUp
        raise RunError("the server can't store the messages of a round. Look at its log and at the space left on disk.")

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to these messages that are complete by now; doesn't wait for others.

        Each reply is given once. An error takes the place of a reply whose node is gone, whose message is past its
        ttl, whose objects its sender never uploaded, or which is not what its envelope says.

        Raises
        ------
        TimeUp
            The server is away at the caller's deadline. Replies that are complete by then are given by the next call.
        """
        wanted = {message for message in message_ids if message}
        self._forget(wanted)
        asked = sorted(wanted - set(self._arriving))
        if asked:
            answer = self._client.PullMessages(flower.PullAppMessagesRequest(message_ids=asked))
            for envelope, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
                if envelope.metadata.reply_to_message_id in wanted:
                    self._arriving[envelope.metadata.reply_to_message_id] = _Arriving(envelope, tree)
        here = [self._arriving[message] for message in sorted(wanted & set(self._arriving))]
        self._fetch(here)
        return self._taken(wanted)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and gather the replies.

        Parameters
        ----------
        messages : iterable of Message
        timeout : float, optional
            Seconds after which those replies are returned that have come, also when the server is away then; None
            waits for all.

        Returns
        -------
        replies : list of Message
            In the order in which they came; at most one a message.

        Notes
        -----
        The server hands a reply's envelope out once. If it dies between that and its answer, the reply is lost there.
        The message is then sent again under another id; its receiver must answer the same content with the same bytes.
        """
        messages, replies = list(messages), list[Message]()
        open_: dict[str, Message] = {}
        with self._waiting.within(timeout):
            failures = self._waiting.failures
            before: dict[str, int] = {}  # message -> failures so far when it was sent: one crash may take many replies
            try:
                open_.update(self._sent(messages))
                before.update(dict.fromkeys(open_, failures))
                while open_:
                    for reply in self.pull_messages(open_):
                        name = reply.metadata.reply_to_message_id
                        message, failures = open_.pop(name), self._waiting.failures
                        copy = flower.copied(message) if failures > before[name] and _missing(reply) else None
                        if copy is None:
                            replies.append(reply)
                        else:
                            again = self._sent([copy])
                            open_.update(again)
                            before.update(dict.fromkeys(again, failures))
                    if not open_ or self._waiting.over:
                        break
                    blocked = any(message in self._arriving for message in open_)
                    self._waiting.pause(_OBJECT_SECONDS if blocked else POLL_SECONDS)
            except TimeUp:
                replies += self._taken(open_, confirm=False)
            finally:
                for name in open_:
                    self._arriving.pop(name, None)
        return replies

    def _sent(self, messages: Sequence[Message]) -> dict[str, Message]:
        """Push messages; gives those that the server took, by their ids."""
        return {name: message for name, message in zip(self.push_messages(messages), messages, strict=True) if name}

    def _push_objects(self, packed: flower.Packed, wanted: Sequence[str], session: str) -> bool:
        """Upload objects; False when the server has not taken all of them, and has to be asked again what it lacks."""
        refused: list[str] = []

        def push(name: str) -> None:
            if refused:
                return
            answer = self._client.PushObject(
                flower.PushObjectRequest(
                    node=self._node, run_id=self.run.run_id, object_id=name, session_id=session,
                    object_content=packed.objects[name].deflate(),
                )
            )  # fmt: skip
            if not answer.stored:  # the answer to an earlier try was lost, or the server was away for minutes
                refused.append(name)

        each(push, wanted)
        return not refused

    def _fetch(self, replies: Sequence[_Arriving]) -> None:
        """Fetch a share of the objects that are missing of each reply."""

        def pull(job: tuple[_Arriving, str]) -> None:
            reply, name = job
            if reply.blocked or reply.lost:
                return
            answer = self._client.PullObject(
                flower.PullObjectRequest(node=self._node, run_id=self.run.run_id, object_id=name)
            )
            if not answer.object_found:
                reply.lost = "the reply was never uploaded as a whole"
            elif not answer.object_available:
                reply.blocked = True
            else:
                reply.contents[name] = answer.object_content
                reply.size += len(answer.object_content)
                if reply.size > self._largest:
                    reply.lost = "the reply is larger than message_megabytes"

        until = time.monotonic() + _FETCH_SECONDS
        while jobs := [(reply, name) for reply in replies if not reply.complete for name in reply.missing[:_SHARE]]:
            for reply in replies:
                reply.blocked = False
            try:
                each(pull, jobs)
            finally:
                for reply in replies:
                    reply.missing = [name for name in reply.missing if name not in reply.contents]
            if any(reply.blocked or reply.complete for reply in replies) or time.monotonic() > until:
                return

    def _taken(self, wanted: Collection[str], *, confirm: bool = True) -> list[Message]:
        """Give the replies out that are complete, and have the server free their space.

        A server that is away at the deadline frees it at the run's end; the replies count all the same.
        """
        found = []
        for name in sorted(wanted):
            reply = self._arriving.get(name)
            if reply is not None and reply.complete:
                found.append(reply.message(self._largest))
                del self._arriving[name]
                confirm = confirm and self._confirmed(reply)
        return found

    def _confirmed(self, reply: _Arriving) -> bool:
        request = flower.ConfirmMessageReceivedRequest(
            node=self._node, run_id=self.run.run_id, message_object_id=reply.envelope.metadata.message_id
        )
        try:
            self._client.ConfirmMessageReceived(request)
        except TimeUp:
            return False
        return True

    def _forget(self, wanted: Collection[str]) -> None:
        """Drop replies that nobody asks for: those of an hour ago, and the oldest while they take too much memory."""
        idle = [message for message in self._arriving if message not in wanted]  # oldest first
        size = sum(self._arriving[message].size for message in idle)
        for message in idle:
            reply = self._arriving[message]
            if size > self._largest or time.monotonic() - reply.since > _FORGOTTEN_SECONDS:
                size -= reply.size
                del self._arriving[message]


def _missing(reply: Message) -> bool:
    return reply.has_error() and reply.error.code == flower.ErrorCode.MESSAGE_UNAVAILABLE
