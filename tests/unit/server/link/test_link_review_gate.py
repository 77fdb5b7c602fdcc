"""One data holder can't take the memory, or all connections, of the server."""

import asyncio

import pytest

from fedhead.server.link.gate import MOST_AT_ONCE, Gate
from fedhead.server.link.post import MOST_OBJECTS, Post


class Slow:
    """Answers once it may."""

    def __init__(self):
        self.open = asyncio.Event()

    async def __call__(self, scope, receive, send):
        await receive()
        await self.open.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def ask(gate, who, length):
    sent, never = [], asyncio.Event()

    async def receive():
        if sent or getattr(receive, "read", False):
            await never.wait()
        receive.read = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    headers = [(b"key", who), (b"content-length", str(length).encode())]
    await gate({"type": "http", "path": "/a", "method": "POST", "headers": headers, "query_string": b""}, receive, send)
    return sent[0]["status"]


async def at_once(lengths, most=100):
    """The states of requests of one caller that are under way together, then of one more, and of another caller."""
    slow = Slow()
    gate = Gate(slow, lambda _: True, most, proof=lambda _: None, caller=b"key")
    tasks = [asyncio.create_task(ask(gate, b"mine", length)) for length in lengths]
    for _ in range(10):
        await asyncio.sleep(0)
    other = asyncio.create_task(ask(gate, b"other", most))
    for _ in range(10):
        await asyncio.sleep(0)
    slow.open.set()
    found = [await task for task in tasks]
    return found, await other, await ask(gate, b"mine", most), gate


@pytest.mark.parametrize(
    ("lengths", "good"),
    [([1] * (MOST_AT_ONCE + 3), MOST_AT_ONCE), ([60, 40, 1], 2), ([100, 1, 0], 2), ([0, 100], 2)],
)
def test_one_caller_has_a_share(lengths, good):
    found, other, later, gate = asyncio.run(at_once(lengths))
    assert sorted(found) == [200] * good + [503] * (len(lengths) - good)
    assert (other, later) == (200, 200)
    assert not gate._under_way


class Nothing:
    object_store = None


def test_names_of_objects_take_no_memory():
    post = Post(Nothing(), 10)
    assert not post.may_bring(7, "a" * 65, 0)
    assert not post.may_bring(7, "", 0)
    names = [f"{number:064x}" for number in range(MOST_OBJECTS)]
    assert all(post.may_bring(7, name, 0) for name in names)
    assert not post.may_bring(7, "f" * 64, 0)
    assert post.may_bring(7, names[0], 0)
    assert post.may_bring(8, "f" * 64, 0)
