"""A reply's way from a node to its server: again, where an answer of the server was lost on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedhead.common.failpoints import reach

MOST_UPLOADS: Final = 4
"""How often a reply of which the server lacks an object is announced again, after pauses of 1, 2, 3 and 4 seconds."""


class Upload:
    """One reply, announced and brought again where the server doesn't take a part of it.

    Flower's node gives a reply up at the first object that the server doesn't take: the answer to an earlier try was
    lost, or the server was away for minutes and has dropped the rest. The round is paid for by then, and the bytes are
    still here.

    Parameters
    ----------
    object_store : ObjectStore
        Has all objects of the reply.
    send, push_object : callables
        Flower's own: they announce the reply, and bring one object.
    """

    def __init__(
        self,
        object_store: Any,
        send: Callable[[Message, ObjectTree, float], tuple[set[str], str]],
        push_object: Callable[[int, str, str, bytes], None],
    ) -> None:
        self.store = object_store
        self._send, self._push = send, push_object
        self._lock = threading.Lock()
        self._reply: tuple[Message, ObjectTree] | None = None
        self._all_there = self._given_up = False

    def send(self, message: Message, tree: ObjectTree, seconds: float) -> tuple[set[str], str]:
        """Announce a reply; gives the objects that the server lacks, and the session in which to bring them."""
        self._reply, self._all_there, self._given_up = (message, tree), False, False
        announced = self._send(message, tree, seconds)
        reach("node.announced")
        return announced

    def push_object(self, run: int, session: str, name: str, content: bytes) -> None:
        """Bring an object; Flower calls it from several threads.

        Raises
        ------
        ObjectPushError
            The server lacks a part of the reply after `MOST_UPLOADS` more tries.
        """
        if self._all_there:
            return
        try:
            self._push(run, session, name, content)
            reach("node.uploading")
        except ObjectPushError:
            with self._lock:  # a new announcement ends the session of all threads: the first brings all that is missing
                if not self._all_there:
                    self._bring_again(run)

    def _bring_again(self, run: int) -> None:
        assert self._reply is not None
        if self._given_up:
            raise ObjectPushError(self._reply[0].metadata.message_id, run, "")
        message, tree = self._reply
        self._given_up = True
        for wait in range(1, MOST_UPLOADS + 1):
            time.sleep(wait)
            missing, session = self._send(message, tree, 0.0)
            try:
                for part in {part.object_id: None for part in iterate_object_tree(tree)}:
                    if part in missing:
                        self._push(run, session, part, self._content(part, run, session))
            except ObjectPushError:
                if wait == MOST_UPLOADS:
                    raise
            else:  # where nothing is missing the server has it all, or will take no more of it
                self._all_there, self._given_up = True, False
                return

    def _content(self, name: str, run: int, session: str) -> bytes:
        """An object's bytes, once the executor has brought them."""
        content: bytes | None
        while (content := self.store.get(name)) == b"":
            time.sleep(0.05)
        if content is None:
            raise ObjectPushError(name, run, session)
        return content
