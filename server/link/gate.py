"""What stands before an HTTP application: an exact list of paths, a proof of who asks, and a limit on what is read.

Nothing of a body is read before the request has passed all of it. What is refused gets a fixed text.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, Protocol

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

NOT_FOUND: Final = "Not Found"
LENGTH_REQUIRED: Final = "Length Required"
TOO_LARGE: Final = "Content Too Large"
BUSY: Final = "Too Many At Once"
MOST_AT_ONCE: Final = 16  # requests of one caller; a node has fewer than five

GONE: Final = "fedhead.gone"  # in the scope: an asyncio.Event, set once the caller has gone away

_OTHER: Final = "other"


class Figures(Protocol):
    """Where the figures of requests go."""

    def request(self, route: str, status: int, received: int, sent: int, seconds: float) -> None:
        """One request has ended; bytes of the bodies alone."""


class Gate:
    """An ASGI application that passes on what may pass.

    Parameters
    ----------
    application : ASGI application
    allowed : function
        Whether a path may be asked for, with POST.
    most_bytes : int
        Largest body; a body without a stated length is refused.
    proof : function, optional
        From the request's headers to None, or to the fixed text of a refusal (401).
    caller : bytes, optional
        Header that says who asks, once it is proved. Nobody then has more than MOST_AT_ONCE requests under way, nor
        bodies of more than `most_bytes` together (503): one caller can't take the memory or the connections of all.
    name_of : function, optional
        From the value of `caller` to the caller's registered name. Whoever is proved and sends no length is told it, so
        that a data holder finds out that it has another's key; nobody else is told any name.
    figures : optional
        Gets every request. Paths that are not allowed are counted under one name, so that nobody can make names.
    """

    def __init__(
        self, application: Application, allowed: Callable[[str], bool], most_bytes: int, *,
        proof: Callable[[dict[bytes, bytes]], str | None] | None = None, caller: bytes | None = None,
        name_of: Callable[[bytes], str | None] | None = None, figures: Figures | None = None,
    ) -> None:  # fmt: skip
        self._application = application
        self._allowed = allowed
        self._most = most_bytes
        self._proof, self._caller, self._name_of = proof, caller, name_of
        self._under_way: dict[bytes, list[int]] = {}  # caller -> lengths of the bodies of its requests
        self._figures = figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
        elif scope["type"] == "http":
            await self._request(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, count = time.monotonic(), _Count(receive, send, self._most)
        allowed = scope["method"] == "POST" and self._allowed(scope["path"])
        who, length = b"", 0
        try:
            refusal = self._refusal(scope, allowed)
            if refusal is None and self._caller is not None:
                headers = dict(scope["headers"])
                length = int(headers[b"content-length"])
                if self._may_begin(headers[self._caller], length):
                    who = headers[self._caller]
                else:
                    refusal = 503, BUSY
            if refusal is not None:
                name = self._name(scope) if refusal[0] == 411 else None
                await _refuse(send if self._figures is None else count.send, *refusal, name)
            else:
                await self._application({**scope, GONE: count.gone}, count.receive, count.send)
        finally:
            count.close()
            if who:
                self._ended(who, length)
            if self._figures is not None:
                route = scope["path"] if allowed else _OTHER
                self._figures.request(route, count.status, count.received, count.sent, time.monotonic() - start)

    def _name(self, scope: Scope) -> str | None:
        """The name of a caller whose proof is good."""
        if self._proof is None or self._caller is None or self._name_of is None:
            return None
        return self._name_of(dict(scope["headers"])[self._caller])

    def _may_begin(self, who: bytes, length: int) -> bool:
        lengths = self._under_way.setdefault(who, [])
        if lengths and (len(lengths) >= MOST_AT_ONCE or sum(lengths) + length > self._most):
            return False
        lengths.append(length)
        return True

    def _ended(self, who: bytes, length: int) -> None:
        self._under_way[who].remove(length)
        if not self._under_way[who]:
            del self._under_way[who]

    def _refusal(self, scope: Scope, allowed: bool) -> tuple[int, str] | None:
        if not allowed or scope.get("query_string"):
            return 404, NOT_FOUND
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if headers.setdefault(name, value) != value:  # of two proofs or lengths each reader may take another
                return 404, NOT_FOUND
        if self._proof is not None:
            text = self._proof(headers)
            if text is not None:
                return 401, text
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or b"transfer-encoding" in headers:
            return 411, LENGTH_REQUIRED
        return (413, TOO_LARGE) if int(length) > self._most else None


class _Count:
    """Counts the bytes of bodies, cuts off what is longer than it says, and notices when the caller goes away.

    The last can't be left to the application: the frameworks in it only look when they read, and nobody reads any more
    once the body is there.
    """

    def __init__(self, receive: Receive, send: Send, most: int) -> None:
        self._receive, self._send, self._most = receive, send, most
        self._watch: asyncio.Task[None] | None = None
        self.gone = asyncio.Event()
        self.received = self.sent = 0
        self.status = 499  # the caller went away before there was an answer

    async def receive(self) -> Message:
        if self._watch is not None:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            if self.received > self._most:
                return {"type": "http.disconnect"}
        if not message.get("more_body", False):
            self._watch = asyncio.create_task(self._until_gone(message))
        return message

    async def _until_gone(self, message: Message) -> None:
        while message["type"] != "http.disconnect":
            message = await self._receive()
        self.gone.set()

    def close(self) -> None:
        """Stop looking."""
        if self._watch is not None:
            self._watch.cancel()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
        await self._send(message)


async def _refuse(send: Send, status: int, text: str, name: str | None = None) -> None:
    body = json.dumps({"detail": text} if name is None else {"detail": text, "name": name}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
