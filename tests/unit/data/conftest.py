"""What every test of data holds: nothing here reaches for a network."""

import socket
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    used: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        used.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert used == []  # an attempt counts even where it was swallowed
