"""What a data holder's node may fetch, confirm and answer, and what becomes of a message that it lost.

A node works on one message at a time: it asks for the next one only after it has answered, or given up, the one before.
A node that asks, or starts anew, while a message to it is open has therefore lost that message.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any, Final

from fedhead.server.link.flower import (
    ObjectTree,
    answer_unavailable,
    give_again,
    is_in_upload,
    node_of_message,
    open_messages,
    tree_of,
    upload_of,
)

MOST_OBJECTS: Final = 4096  # of one message; fedhead's have fewer than ten

_MOST_TRIES: Final = 3
_NAME: Final = 64
_MOST_OPEN: Final = 256  # messages of one node that are remembered; it has two or three at a time


class Post:
    """The messages of all nodes; its methods may be called from any thread.

    Parameters
    ----------
    state : SqlLinkState
    most_bytes : int
        What one answer may have in all.
    """

    def __init__(self, state: Any, most_bytes: int) -> None:
        self._state = state
        self._most = most_bytes
        self._lock = threading.Lock()
        self._fetchable: dict[int, frozenset[str]] = {}
        self._tries: dict[int, dict[str, int]] = defaultdict(dict)
        self._answers: dict[int, dict[str, dict[str, int]]] = {}  # node -> message answered -> object -> bytes
        self._brought: dict[int, dict[str, int]] = defaultdict(dict)  # node -> those of the answer that it brings now
        self._taken: dict[int, set[str]] = defaultdict(set)  # and those of them that were stored

    def settle(self, node: int) -> None:
        """Deal with what a node has lost.

        A message whose delivery it did not confirm is delivered again, three times at most: an answer of this server
        may have been cut off on its way. One that it had in full is answered in its place, so that the coordinator
        need not wait for the deadline: the node was restarted, or could not bring its answer.
        """
        tries: dict[str, int] = {}
        for item in open_messages(self._state, node):
            tries[item.id] = self._tries[node].get(item.id, 1) + 1
            if item.received or tries[item.id] > _MOST_TRIES:
                answer_unavailable(self._state, item.message)
            else:
                give_again(self._state, item.id)
        with self._lock:
            self._tries[node] = tries

    def delivered(self, node: int, trees: Iterable[ObjectTree]) -> None:
        """A node gets these messages: it may fetch their objects."""
        with self._lock:
            self._fetchable[node] = frozenset(name for tree in trees for name in objects_of(tree))

    def may_fetch(self, node: int, name: str) -> bool:
        """Whether an object, or a message, is part of what a node was sent last."""
        if name in self._fetchable.get(node, ()):
            return True
        # This process may be younger than the delivery.
        trees = [tree_of(self._state, item.id) for item in open_messages(self._state, node)]
        found = frozenset(part for tree in trees if tree is not None for part in objects_of(tree))
        with self._lock:
            self._fetchable[node] = self._fetchable.get(node, frozenset()) | found
        return name in found

    def may_confirm(self, node: int, name: str) -> bool:
        """Whether a message is one that a node may have received.

        One that is open but has no objects any more was confirmed already: the answer to that was lost.
        """
        return self.may_fetch(node, name) or any(item.id == name for item in open_messages(self._state, node))

    def may_answer(self, node: int, metadata: Any) -> bool:
        """Whether an answer is a node's own, to a message that was for it; one to no message is dropped later."""
        if metadata.src_node_id != node or not metadata.reply_to_message_id:
            return False
        return node_of_message(self._state, metadata.reply_to_message_id) in (node, None)

    def answered(self, node: int, message: str) -> None:
        """A node begins to bring an answer to a message, or brings more of it: what it has brought still counts."""
        if node_of_message(self._state, message) != node:
            return  # it isn't kept
        with self._lock:
            self._taken[node] = set()
            answers = self._answers.setdefault(node, {})
            self._brought[node] = answers.setdefault(message, {})
            while len(answers) > _MOST_OPEN:
                del answers[next(iter(answers))]

    def may_bring(self, node: int, name: str, size: int) -> bool:
        """Whether an object still fits in a node's answer; the same one may come twice."""
        if len(name) != _NAME:  # a SHA-256 in hexadecimal digits; names are kept, so long ones would fill the memory
            return False
        with self._lock:
            brought = self._brought[node]
            if name not in brought and len(brought) >= MOST_OBJECTS:
                return False
            if sum(brought.values()) - brought.get(name, 0) + size > self._most:
                return False
            brought[name] = size
        return True

    def brought(self, node: int, name: str) -> None:
        """An object of a node's answer was taken."""
        with self._lock:
            self._taken[node].add(name)

    def has_brought(self, node: int, session: str, name: str, content: bytes) -> bool:
        """Whether an object of a node's answer was taken before: it comes again, as the answer to that was lost."""
        if sha256(content).hexdigest() != name:  # what an object is called in Flower's store
            return False
        # This process may be younger than the first try; the session's number is its node's alone.
        return name in self._taken.get(node, ()) or is_in_upload(self._state, session, name)

    def begun(self, name: str) -> tuple[str, list[str]] | None:
        """The session of an answer that was announced before, and what it lacks; None for one that is new, or whole."""
        return upload_of(self._state, name)


def objects_of(tree: ObjectTree) -> Iterator[str]:
    """The ids of a tree of objects; the first is the message's."""
    yield tree.object_id
    for child in tree.children:
        yield from objects_of(child)
