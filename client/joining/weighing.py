"""How large a message becomes once it is put together from its objects. Made for flwr 1.41.

An array names its chunks by their place in a list, as often as it likes: chunks that are equal travel once. A few
kilobytes of such places, and one chunk, would so become more than any memory. Here it is counted before it is done.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Final

from flwr.app.message.array import Array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content

from fedhead.client.joining.bounds import LARGEST_PART

TOO_LARGE: Final = "the objects are more than a message may have"


class Scales:
    """Weighs the objects of one message as they come, and the whole before it is put together.

    Parameters
    ----------
    pull : callable
        Name of an object -> its content.
    confirm : callable
        Called with the message's name when all of its objects are there, and before any is made of them.
    largest : int
        Bytes that all arrays may have together.
    """

    def __init__(self, pull: Callable[[str], bytes], confirm: Callable[[str], None], largest: int) -> None:
        self._pull, self._confirm, self._largest = pull, confirm, largest
        self._lock = threading.Lock()  # Flower pulls in several threads
        self._sizes: dict[str, int] = {}
        self._chunks: dict[str, Counter[str]] = {}

    def pull(self, name: str) -> bytes:
        """An object; see `Scales`.

        Raises
        ------
        ValueError
            It is too large for what it is.
        """
        content = self._pull(name)
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind != ArrayChunk.__qualname__ and len(content) > LARGEST_PART:
            raise ValueError(TOO_LARGE)
        with self._lock:
            self._sizes[name] = len(content)
            if kind == Array.__qualname__:
                body = content[content.find(HEAD_BODY_DIVIDER) + 1 :]
                self._chunks[name] = Counter(children[place] for place in json.loads(body)["arraychunk_ids"])
        return content

    def confirm(self, name: str) -> None:
        """All objects are there; see `Scales`.

        Raises
        ------
        ValueError
            Together they would be too large.
        """
        whole = 0
        for chunks in self._chunks.values():
            whole += sum(times * self._sizes.get(chunk, 0) for chunk, times in chunks.items())
        if whole > self._largest:
            raise ValueError(TOO_LARGE)
        self._confirm(name)
