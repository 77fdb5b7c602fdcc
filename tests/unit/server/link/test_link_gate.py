"""What passes the gate, and what of it reaches the application."""

import asyncio
import json

import pytest

from fedhead.server.link.gate import GONE, Gate


class Inner:
    """Reads the whole body and says how long it is."""

    def __init__(self):
        self.paths = []

    async def __call__(self, scope, receive, send):
        self.paths.append(scope["path"])
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message["body"]), message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})


class Figures:
    def __init__(self):
        self.seen = []

    def request(self, route, status, received, sent, seconds):
        assert seconds >= 0
        self.seen.append((route, status, received, sent))


def ask(gate, path="/v1/a", method="POST", body=(b"12345",), headers=None, query=b"", reads=None):
    chunks, sent = list(body), []

    async def receive():
        if reads is not None:
            reads.append(1)
        part = chunks.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(chunks)}

    async def send(message):
        sent.append(message)

    if headers is None:
        headers = [(b"content-length", str(sum(map(len, body))).encode())]
    scope = {"type": "http", "path": path, "method": method, "headers": headers, "query_string": query}
    asyncio.run(gate(scope, receive, send))
    return (sent[0]["status"], sent[1]["body"]) if sent else None


def make(inner=None, most=10, **more):
    return Gate(inner or Inner(), {"/v1/a"}.__contains__, most, **more)


def test_what_is_allowed_passes():
    assert ask(make()) == (200, b"5")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/a"), ("PUT", "/v1/a"), ("POST", "/v1/b"), ("POST", "/v1/a/"), ("POST", "//v1/a"),
        ("POST", "/v1/A"), ("POST", "/v1/x/../a"), ("POST", "/docs"), ("GET", "/openapi.json"), ("GET", "/health"),
        ("POST", ""), ("OPTIONS", "*"),
    ],
)  # fmt: skip
def test_anything_else_is_not_there(method, path):
    inner, reads = Inner(), []
    status, body = ask(make(inner), path, method, reads=reads)
    assert (status, json.loads(body)) == (404, {"detail": "Not Found"})
    assert (inner.paths, reads) == ([], [])


def test_a_query_is_not_there():
    assert ask(make(), query=b"a=1")[0] == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 411),
        ([(b"transfer-encoding", b"chunked")], 411),
        ([(b"content-length", b"5"), (b"transfer-encoding", b"chunked")], 411),
        ([(b"content-length", b"-1")], 411),
        ([(b"content-length", b"5"), (b"content-length", b"6")], 404),
        ([(b"content-length", b"11")], 413),
        ([(b"content-length", b"9" * 30)], 413),
    ],
)
def test_a_body_must_say_how_long_it_is_and_not_be_too_long(headers, status):
    inner, reads = Inner(), []
    assert ask(make(inner), headers=headers, reads=reads)[0] == status
    assert (inner.paths, reads) == ([], [])


def test_a_body_that_is_longer_than_it_says_is_cut_off():
    headers = [(b"content-length", b"10")]
    assert ask(make(), body=(b"x" * 10,), headers=headers) == (200, b"10")
    assert ask(make(), body=(b"x" * 6, b"x" * 6), headers=headers) is None


def test_no_body_is_read_without_a_proof():
    inner, reads = Inner(), []
    gate = make(inner, proof=lambda headers: None if headers.get(b"who") == b"me" else "unknown key")
    assert ask(gate, reads=reads) == (401, b'{"detail": "unknown key"}')
    assert (inner.paths, reads) == ([], [])
    assert ask(gate, headers=[(b"content-length", b"5"), (b"who", b"me")]) == (200, b"5")


def test_of_two_proofs_none_counts():
    gate = make(proof=lambda headers: None)
    assert ask(gate, headers=[(b"content-length", b"5"), (b"who", b"me"), (b"who", b"you")])[0] == 404


def test_every_request_is_counted_and_nobody_makes_names():
    figures = Figures()
    gate = make(figures=figures)
    ask(gate)
    ask(gate, "/v1/evil")
    ask(gate, headers=[(b"content-length", b"999")])
    assert figures.seen == [("/v1/a", 200, 5, 1), ("other", 404, 0, 23), ("/v1/a", 413, 0, 31)]


def test_other_protocols_get_nothing():
    async def never(*_):
        raise AssertionError("nothing may be read or sent")

    asyncio.run(make(never)({"type": "websocket", "path": "/v1/a"}, never, never))


def test_the_application_learns_that_the_caller_has_gone():
    seen, left = [], asyncio.Event()

    async def waits(scope, receive, send):
        await receive()
        assert not scope[GONE].is_set()
        left.set()
        await asyncio.wait_for(scope[GONE].wait(), 60)
        seen.append((await receive())["type"])

    async def run():
        parts = [{"type": "http.request", "body": b"12345", "more_body": False}]

        async def receive():
            if parts:
                return parts.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(_):
            raise AssertionError("nobody is there")

        scope = {"type": "http", "path": "/v1/a", "method": "POST", "headers": [(b"content-length", b"5")]}
        await make(waits)(scope, receive, send)

    asyncio.run(run())
    assert seen == ["http.disconnect"]


def test_a_proved_caller_without_a_length_is_told_its_registered_name_and_nobody_else_is_told_any():
    names = {b"me": "north"}
    gate = make(
        proof=lambda headers: None if headers.get(b"who") in (b"me", b"you") else "unknown key",
        caller=b"who", name_of=names.get,
    )  # fmt: skip
    told = {}
    for who in (b"me", b"you", b"stranger"):
        status, body = ask(gate, headers=[(b"who", who)])
        told[who] = (status, json.loads(body))
    assert told == {
        b"me": (411, {"detail": "Length Required", "name": "north"}),
        b"you": (411, {"detail": "Length Required"}),
        b"stranger": (401, {"detail": "unknown key"}),
    }
    status, body = ask(gate, headers=[(b"who", b"me"), (b"content-length", b"9" * 30)])
    assert (status, json.loads(body)) == (413, {"detail": "Content Too Large"})
