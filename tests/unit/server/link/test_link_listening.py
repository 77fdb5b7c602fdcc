"""Sockets and servers: one line where a port is taken, silent connections cut, two servers ended together."""

import asyncio
import contextlib
import socket
import ssl
import time

import pytest

from fedhead.common.errors import InputError
from fedhead.server.keys import make_keys
from fedhead.server.link import listening
from fedhead.server.link.listening import bound, http_server, run_together

PATIENCE = 60.0


def test_a_port_that_is_taken_is_one_line():
    with bound("control", "127.0.0.1:0") as taken:
        text = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=f'control is "{text}": it can\'t be listened on') as caught:
            bound("control", text)
    assert "\n" not in str(caught.value)


def test_an_address_of_another_machine_is_one_line():
    with pytest.raises(InputError, match="it can't be listened on"):
        bound("address", "192.0.2.1:8443")  # a range for documents


async def answer(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(0.5 if scope["path"] == "/slow" else 0)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextlib.asynccontextmanager
async def running(connections=100, tls=None, ciphers=None):
    listener = bound("control", "127.0.0.1:0")
    server = http_server(answer, lifespan=False, connections=connections, tls=tls)
    if ciphers is not None:
        server.config.ssl.set_ciphers(ciphers)
    task = asyncio.create_task(run_together([(server, listener)]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[1], server
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, PATIENCE)


async def read_all(reader):
    try:
        return await asyncio.wait_for(reader.read(), PATIENCE)
    except ConnectionResetError:
        return b""


REQUEST = b"POST /%s HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.parametrize(("first", "then"), [(False, b""), (False, b"P"), (True, b"P")])
def test_a_connection_without_a_whole_request_is_cut(monkeypatch, first, then):
    monkeypatch.setattr(listening, "SILENCE", 0.1)

    async def run():
        async with running() as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            if first:
                writer.write(REQUEST % b"a")
                assert await asyncio.wait_for(reader.readuntil(b"ok"), PATIENCE)
            writer.write(then)
            start = time.monotonic()
            assert await read_all(reader) == b""
            assert time.monotonic() - start < listening.KEEP_ALIVE
            writer.close()

    asyncio.run(run())


def test_who_waits_for_an_answer_is_not_cut(monkeypatch):
    monkeypatch.setattr(listening, "SILENCE", 0.05)

    async def run():
        async with running() as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(2):
                writer.write(REQUEST % b"slow")
                assert await asyncio.wait_for(reader.readuntil(b"ok"), PATIENCE)
            writer.close()

    asyncio.run(run())


def test_more_connections_than_that_are_answered_with_503():
    async def run():
        async with running(connections=3) as (port, _):
            pairs = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            for (reader, writer), status in zip(reversed(pairs), (b"503", b"200"), strict=False):
                writer.write(REQUEST % b"a")
                assert (await asyncio.wait_for(reader.readline(), PATIENCE)).split()[1] == status
            for _, writer in pairs:
                writer.close()

    asyncio.run(run())


def test_idle_connections_do_not_hold_the_end():
    async def run():
        async with running() as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(REQUEST % b"a")
            assert await asyncio.wait_for(reader.readuntil(b"ok"), PATIENCE)
            start = time.monotonic()
        assert time.monotonic() - start < listening.GRACE
        writer.close()

    asyncio.run(run())


def test_when_one_server_ends_both_do():
    async def run():
        pairs = [
            (http_server(answer, lifespan=False, connections=9), bound("control", "127.0.0.1:0")) for _ in range(2)
        ]
        task = asyncio.create_task(run_together(pairs))
        while not all(server.started for server, _ in pairs):
            await asyncio.sleep(0.01)
        pairs[0][0].should_exit = True
        await asyncio.wait_for(task, PATIENCE)

    asyncio.run(run())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))


@pytest.fixture
def tls(tmp_path):
    make_keys(tmp_path / "keys", ["st-mary"])
    return tmp_path / "keys" / "server.crt", tmp_path / "keys" / "server.key"


def test_tls_1_2_is_the_oldest_that_is_configured(tls):
    server = http_server(answer, lifespan=False, connections=9, tls=tls)
    assert server.config.ssl.minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1", "TLSv1_2", "TLSv1_3"])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_older_versions_of_tls_are_refused(tls, version):
    """With ciphers on both sides that older versions could use, it is the version alone that decides."""
    version, ciphers = ssl.TLSVersion[version], "ALL:@SECLEVEL=0"
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.set_ciphers(ciphers)
    client.minimum_version = client.maximum_version = version

    async def run():
        async with running(tls=tls, ciphers=ciphers) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
            writer.write(REQUEST % b"a")
            assert await asyncio.wait_for(reader.readuntil(b"ok"), PATIENCE)
            writer.close()

    if version < ssl.TLSVersion.TLSv1_2:
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            asyncio.run(run())
    else:
        asyncio.run(run())
