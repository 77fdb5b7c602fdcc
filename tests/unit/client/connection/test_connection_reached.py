"""Servers that are away, are none, or answer nothing; and what `join` lets pass where `check` does not."""

import select
import socket
import struct
import threading
import time

import pytest
from looked_at import look

from fedhead.client import calling
from fedhead.client import connection as looked
from fedhead.client.checking import check_holder


@pytest.mark.parametrize("joining", [False, True])
def test_a_closed_port_may_pass_for_who_joins_and_not_for_who_checks(made, joining):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    found = look(made, port, joining=joining)
    assert found["server"].state == ("warning" if joining else "remedy")
    assert "nothing listens there" in found["server"].text
    assert "clock" not in found


def wait(_, ended):
    ended.wait(60)


def trickle(link, ended):
    while not ended.wait(0.05):
        link.sendall(b"\x16")


def garbage(link, _):
    link.sendall(b"220 mail.example.org ESMTP\r\n" * 20)
    link.recv(1000)


def ends(link, _):
    link.recv(1000)


@pytest.mark.parametrize(
    ("handle", "words", "passing"),
    [
        (wait, "then says nothing", True),
        (trickle, "", None),
        (garbage, "speaks no TLS", False),
        (ends, "then ends it", True),
    ],
)
def test_a_server_that_is_none(made, raw, monkeypatch, handle, words, passing):
    monkeypatch.setattr(looked, "PATIENCE", 1.0)
    port, started = raw(handle), time.monotonic()
    finding = look(made, port)["server"]
    assert time.monotonic() - started < 20
    assert finding.state == "remedy"
    assert words in finding.text
    if passing is not None:
        assert look(made, port, joining=True)["server"].state == ("warning" if passing else "remedy")


@pytest.mark.parametrize(
    ("says", "words"),
    [(b"220 mail.example.org ESMTP\r\n", "speaks no HTTP"), (b"", "then says nothing"), (None, "then says nothing")],
)
def test_right_certificate_and_no_http(made, raw, monkeypatch, says, words):
    monkeypatch.setattr(looked, "PATIENCE", 1.0)

    def handle(link, ended):
        with made.context().wrap_socket(link, server_side=True) as secure:
            if says:
                secure.sendall(says)
            if says is None:  # a header that never ends, a byte at a time
                secure.sendall(b"HTTP/1.1 200 OK\r\nx: ")
                while not ended.wait(0.05):
                    secure.sendall(b"y")
            ended.wait(60)

    port, started = raw(handle), time.monotonic()
    finding = look(made, port)["server"]
    assert time.monotonic() - started < 20
    assert finding.state == "remedy"
    assert words in finding.text


def reset(link):
    """End a connection as a process that is killed with something unread does."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link.close()


def unasked(secure):
    secure.recv(1000)


def half(secure):
    secure.recv(1000)
    secure.sendall(b"HTTP/1.1 411 Length Required\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n{")


@pytest.mark.parametrize("handle", [lambda _: None, unasked, reset, half], ids=["handshake", "asked", "reset", "half"])
def test_a_server_that_ends_between_its_handshake_and_its_answer_may_come_back(made, raw, handle):
    def serve(link, _):
        with made.context().wrap_socket(link, server_side=True) as secure:
            handle(secure)

    port = raw(serve)
    for joining, state in ((False, "remedy"), (True, "warning")):
        finding = look(made, port, joining=joining)["server"]
        assert (finding.state, "then ends it" in finding.text) == (state, True)


def test_a_server_that_ends_before_tls_begins_may_come_back(made, raw, monkeypatch):
    real = calling._connect

    def ended(*arguments):
        link = real(*arguments)
        assert select.select([link], [], [], 20)[0]
        return link

    monkeypatch.setattr(calling, "_connect", ended)
    finding = look(made, raw(lambda link, _: reset(link)), joining=True)["server"]
    # a reset may also show within the connecting itself, which has words of its own
    assert (finding.state, finding.text.endswith("; it will be tried again")) == ("warning", True), finding.text


def test_a_name_that_leads_nowhere(made, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    finding = look(made, 8443, host="fl.example.org")["server"]
    assert (finding.state, "name isn't known" in finding.text) == ("remedy", True)
    assert "fl.example.org" in finding.remedy


def test_a_name_server_that_does_not_answer_is_not_waited_for(made, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(looked, "PATIENCE", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(60) and [])
    started = time.monotonic()
    assert look(made, 8443, host="fl.example.org")["server"].state == "remedy"
    assert time.monotonic() - started < 20
    ended.set()


def test_what_joining_needs_and_looking_does_not(made):
    none = {"server": None, "ca": None, "key": None}
    found = look(made, 8443, **none)
    assert (list(found), found["server"].state) == (["server"], "unknown")
    assert look(made, 8443, joining=True, **none)["server"].state == "remedy"
    found = look(made, 8443, ca=None)  # begun, and not finished
    assert (found["server"].state, "ca is not given" in found["server"].text) == ("remedy", True)
    assert look(made, 8443, ca=None, key=None)["server"].text.startswith("ca and key are not given")


def test_a_whole_check_is_not_ready_while_the_server_is_away(made, speak, tmp_path):
    (tmp_path / "notes.csv").write_text("text,label\nx,a\ny,b\n")
    port, _ = speak(made)
    toml = '[data]\nsource = "csv:notes.csv"\nlabels = ["a", "b"]\n[budget]\nepsilon = 1.0\n'

    def check(at, **options):
        head = f'name = "st-mary"\nserver = "127.0.0.1:{at}"\nca = "keys/ca.crt"\nkey = "keys/mine.key"\n'
        (tmp_path / "holder.toml").write_text(head + toml)
        return check_holder(tmp_path / "holder.toml", **options)

    assert check(port).good
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    assert not check(closed).good
    assert check(closed, joining=True).good
    assert check(closed, connect=False).good
    busy, _ = speak(made, status=503, body=b"Service Unavailable")
    assert not check(busy).good
    assert check(busy, joining=True).good
