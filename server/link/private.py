"""The door for the coordinator's own commands: Flower's Control and Runtime, on loopback, with a token."""

from __future__ import annotations

from typing import Final

from fedhead.server.link.bell import Bell
from fedhead.server.link.gate import Application, Gate, Receive, Scope, Send

_PREFIXES: Final = ("/v1/control/", "/v1/runtime/")
_DELIVERIES: Final = frozenset({"/v1/runtime/push-messages", "/v1/runtime/push-object"})


def make_private(inner: Application, bell: Bell, most_bytes: int) -> Gate:
    """The application of the loopback port.

    Parameters
    ----------
    inner : ASGI application
        Flower's own; it looks at the token and at the secret itself.
    bell : Bell
        Rung once a message has been brought.
    most_bytes : int
        Largest body.
    """

    async def ringing(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in _DELIVERIES:
            await inner(scope, receive, send)
            return
        with bell.delivery():
            await inner(scope, receive, send)

    return Gate(ringing, lambda path: path.startswith(_PREFIXES), most_bytes)
