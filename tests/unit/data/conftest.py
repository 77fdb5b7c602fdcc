"""What every test of data holds: nothing here reaches for a network."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image


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


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with six pictures of cats and dogs in it."""
    for i in range(6):
        path = tmp_path / "images" / ("cat" if i < 4 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (5, 4), i).save(path)
    return tmp_path
