"""`fedhead check` on the connection: whatever is wrong with address, TLS, key or clock has a line of its own.

Every server here is the test's own, on loopback: none is of Flower, but for the gate that looks at keys.
"""

import base64
import contextlib
import re
import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.client import connection as looked
from fedhead.client.calling import Answer
from fedhead.client.checking import check_holder
from fedhead.client.connection import connection
from fedhead.client.findings import span
from fedhead.client.holder import make_holder
from fedhead.server.keys.certificates import host_name, make_authority, make_server_certificate
from fedhead.server.keys.pairs import node_bytes, tls_bytes

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def pem(made) -> bytes:
    return made.public_bytes(serialization.Encoding.PEM)


class Credentials:
    """What `fedhead keys` would make, at a time and for as long as a test wants."""

    def __init__(self, folder, hosts=("127.0.0.1",), now=None, days=365, server_now=None, server_days=None):
        folder.mkdir()
        self.folder = folder
        now = now or datetime.now(UTC)
        authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        authority = make_authority(authority_key, now, days)
        names = [host_name(host) for host in hosts]
        server = make_server_certificate(
            server_key.public_key(), names, authority, authority_key, server_now or now, server_days or days
        )
        self.node = ec.generate_private_key(ec.SECP384R1())
        (folder / "ca.crt").write_bytes(pem(authority))
        (folder / "server.crt").write_bytes(pem(server))
        for name, content in (("server.key", tls_bytes(server_key)), ("mine.key", node_bytes(self.node))):
            (folder / name).touch(mode=0o600)
            (folder / name).write_bytes(content)

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "server.crt", self.folder / "server.key")
        return context


@pytest.fixture
def made(tmp_path):
    """Good credentials for 127.0.0.1."""
    return Credentials(tmp_path / "keys")


@pytest.fixture
def speak():
    """Serve HTTP over TLS, with an answer to every request; gives the port and the requests so far."""
    running = []

    def start(credentials, status=411, body=b'{"detail": "Length Required"}', off=0.0, date=None):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                requests.append((self.command, self.path, dict(self.headers)))
                self.send_response_only(status)
                now = datetime.now(UTC) + timedelta(seconds=off)
                if date != "":
                    self.send_header("Date", date or format_datetime(now, usegmt=True))
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = answer

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.socket = credentials.context().wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        running.append((server, thread))
        return server.server_address[1], requests

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture
def raw():
    """Accept TCP connections and hand each to a function, in a thread; gives the port."""
    ended, sockets = threading.Event(), []

    def start(handle):
        listening = socket.create_server(("127.0.0.1", 0))
        sockets.append(listening)

        def one(link):
            with link, contextlib.suppress(OSError):
                handle(link, ended)

        def run():
            with contextlib.suppress(OSError):
                while True:
                    link, _ = listening.accept()
                    threading.Thread(target=one, args=(link,), daemon=True).start()

        threading.Thread(target=run, daemon=True).start()
        return listening.getsockname()[1]

    yield start
    ended.set()
    for listening in sockets:
        listening.close()


def holder(credentials, port, host="127.0.0.1", **changes):
    raw = {
        "name": "st-mary", "server": f"{host}:{port}",
        "ca": str(credentials.folder / "ca.crt"), "key": str(credentials.folder / "mine.key"),
        "data": {"source": "csv:notes.csv"}, "budget": {"epsilon": 1.0},
    }  # fmt: skip
    raw.update(changes)
    return make_holder({name: value for name, value in raw.items() if value is not None})


def look(*arguments, joining=False, connect=True, **changes):
    found = {one.name: one for one in connection(holder(*arguments, **changes), joining=joining, connect=connect)}
    for one in found.values():
        assert (one.state in ("ok", "unknown")) == (one.remedy == "" and one.state not in ("remedy", "warning")), one
        assert "\n" not in one.text + one.remedy
    return found


def states(found):
    return {name: one.state for name, one in found.items()}


def test_all_is_well_and_one_signed_request_was_sent(made, speak):
    port, requests = speak(made)
    found = look(made, port)
    assert states(found) == {"server": "ok", "ca": "ok", "key": "ok", "clock": "ok"}
    assert "its certificate ends on" in found["server"].text
    assert "known to the server" in found["key"].text
    ((method, path, headers),) = requests
    assert (method, path) == ("POST", "/v1/fleet/send-node-heartbeat")
    sent = {name.lower() for name in headers}
    assert sent == {"host", "connection", "flwr-public-key", "flwr-timestamp", "flwr-signature"}
    assert "mary" not in str(headers)
    public = serialization.load_pem_public_key(base64.b64decode(headers["flwr-public-key"]))
    assert public == made.node.public_key()
    signature, signed = base64.b64decode(headers["flwr-signature"]), headers["flwr-timestamp"]
    public.verify(signature, signed.encode(), ec.ECDSA(hashes.SHA256()))  # raises when it is wrong
    assert abs(datetime.now(UTC) - datetime.fromisoformat(signed)) < timedelta(minutes=1)


def test_nothing_is_sent_when_the_network_is_not_to_be_touched(made, speak):
    port, requests = speak(made)
    assert states(look(made, port, connect=False)) == {"server": "unknown", "ca": "ok", "key": "ok"}
    assert requests == []


def test_another_authority(made, speak, tmp_path):
    other = Credentials(tmp_path / "other")
    port, requests = speak(other)
    found = look(made, port, joining=True)
    assert found["server"].state == "remedy"
    assert "not signed by the authority in ca" in found["server"].text
    assert requests == []  # no signature goes to somebody else
    assert "not shown" in found["key"].text


def test_another_host(tmp_path, speak):
    made = Credentials(tmp_path / "keys", hosts=["fl.example.org", "192.0.2.7"])
    port, requests = speak(made)
    found = look(made, port, joining=True)
    assert found["server"].state == "remedy"
    assert "for fl.example.org, 192.0.2.7, not for 127.0.0.1" in found["server"].text
    assert requests == []


def test_a_name_of_the_certificate_is_taken(tmp_path, speak):
    made = Credentials(tmp_path / "keys", hosts=["localhost"])
    port, _ = speak(made)
    assert look(made, port, host="localhost")["server"].state == "ok"
    assert look(made, port)["server"].state == "remedy"


@pytest.mark.parametrize(
    ("begin", "days", "words"), [(-9 * DAY, 7, "its certificate ended on"), (9 * DAY, 20, "its certificate begins on")]
)
def test_a_certificate_out_of_its_time(tmp_path, speak, begin, days, words):
    now = datetime.now(UTC)
    made = Credentials(tmp_path / "keys", now=now - 20 * DAY, days=90, server_now=now + begin, server_days=days)
    port, requests = speak(made)
    found = look(made, port, joining=True)
    assert (found["server"].state, found["ca"].state) == ("remedy", "ok")
    assert words in found["server"].text
    assert f"the clock here says {now.year}" in found["server"].text
    assert "Set the clock here if it is wrong" in found["server"].remedy
    assert requests == []


@pytest.mark.parametrize(("begin", "words"), [(-20 * DAY, "it ended on"), (20 * DAY, "it begins on")])
def test_an_authority_out_of_its_time(tmp_path, speak, begin, words):
    made = Credentials(tmp_path / "keys", now=datetime.now(UTC) + begin, days=10)
    port, _ = speak(made)
    found = look(made, port)
    assert (found["server"].state, found["ca"].state) == ("remedy", "remedy")
    assert words in found["ca"].text


def test_a_certificate_that_ends_soon_is_told(tmp_path, speak):
    made = Credentials(tmp_path / "keys", days=365, server_days=29)
    port, _ = speak(made)
    assert states(look(made, port)) == {"server": "warning", "ca": "ok", "key": "ok", "clock": "ok"}
    made = Credentials(tmp_path / "soon", days=29)
    port, _ = speak(made)
    assert states(look(made, port)) == {"server": "warning", "ca": "warning", "key": "ok", "clock": "ok"}


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


@pytest.mark.parametrize(
    ("off", "state", "words"),
    [
        (-3600, "remedy", "about 60 min ahead of"),
        (3600, "remedy", "about 60 min behind"),
        (200, "warning", "behind"),
        (0, "ok", "the same as"),
    ],
)
def test_the_clock(made, speak, off, state, words):
    port, _ = speak(made, status=401 if state == "remedy" else 411, body=b'{"detail": "clock"}', off=off)
    found = look(made, port)
    assert found["clock"].state == state
    assert words in found["clock"].text
    assert found["key"].state == ("unknown" if state == "remedy" else "ok")


@pytest.mark.parametrize("date", ["", "yesterday", "Mon, 99 Foo 2026"])
def test_a_server_that_does_not_say_its_time(made, speak, date):
    port, _ = speak(made, date=date)
    assert look(made, port)["clock"].state == "unknown"


@pytest.mark.parametrize(
    ("ahead", "within", "state"),
    [
        (0.0, 1.0, "ok"), (1.9, 1.0, "ok"), (2.1, 1.0, "warning"), (-2.1, 1.0, "warning"), (2.1, 3.0, "ok"),
        (4.0, 1.0, "warning"), (4.1, 1.0, "remedy"), (-300.0, 1.0, "warning"), (-300.1, 1.0, "remedy"),
    ],
)  # fmt: skip
def test_how_far_the_clock_may_be_off(made, ahead, within, state):
    certificate = x509.load_pem_x509_certificate((made.folder / "server.crt").read_bytes())
    assert looked._clock(Answer(certificate, 411, b"", ahead, within)).state == state


@pytest.mark.parametrize(
    ("status", "body", "state", "words"),
    [
        (401, b'{"detail": "unknown key"}', "remedy", "doesn't know it"),
        (401, b'{"detail": "no proof of a node\'s key"}', "remedy", "doesn't take its signature"),
        (401, b"\xff", "remedy", "doesn't take its signature"),
        (401, b"[]", "remedy", "doesn't take its signature"),
        (404, b"", "remedy", "no server of fedhead (status 404)"),
        (200, b"{}", "remedy", "no server of fedhead (status 200)"),
    ],
)
def test_what_the_server_says_to_the_key(made, speak, status, body, state, words):
    port, _ = speak(made, status=status, body=body)
    found = look(made, port)
    assert (found["server"].state, found["clock"].state) == ("ok", "ok")
    assert found["key"].state == state
    assert words in found["key"].text


def test_a_key_that_can_not_be_used_is_told_and_the_clock_is_looked_at_all_the_same(made, speak):
    port, requests = speak(made, status=404)
    key = made.folder / "mine.key"
    key.chmod(0o640)
    found = look(made, port)
    assert states(found) == {"server": "ok", "ca": "ok", "key": "remedy", "clock": "ok"}
    assert f"chmod 600 {key}" in found["key"].remedy
    key.chmod(0o600)
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nnone\n")
    assert look(made, port)["key"].state == "remedy"
    assert [(method, path) for method, path, _ in requests] == [("GET", "/"), ("GET", "/")]
    assert all({name.lower() for name in headers} == {"host", "connection"} for _, _, headers in requests)


@pytest.mark.parametrize("content", [b"", b"none", b"\xff\xfe"])
def test_a_file_that_is_no_certificate(made, speak, content):
    port, requests = speak(made)
    (made.folder / "ca.crt").write_bytes(content)
    assert states(look(made, port)) == {"server": "unknown", "ca": "remedy", "key": "ok"}
    assert requests == []


def test_a_servers_certificate_is_no_authority(made):
    (made.folder / "ca.crt").write_bytes((made.folder / "server.crt").read_bytes())
    found = look(made, 8443)
    assert (found["ca"].state, found["server"].state) == ("remedy", "unknown")
    assert "authority" in found["ca"].text


def test_several_authorities_are_told(made, speak, tmp_path):
    port, _ = speak(made)
    other = Credentials(tmp_path / "other")
    with (made.folder / "ca.crt").open("ab") as file:
        file.write((other.folder / "ca.crt").read_bytes())
    assert states(look(made, port)) == {"server": "ok", "ca": "warning", "key": "ok", "clock": "ok"}


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
    toml = '[data]\nsource = "csv:notes.csv"\n[budget]\nepsilon = 1.0\n'

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


@pytest.fixture
def gate(made):
    """The gate of fedhead's own server, before an application that must not be reached."""
    from fedhead.server.link.gate import Gate
    from fedhead.server.link.proof import node_proof

    known, reached, off = set(), [], [timedelta()]

    async def application(scope, receive, send):
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    proof = node_proof(lambda: known, lambda: datetime.now(UTC) + off[0])
    app = Gate(application, lambda path: path.startswith("/v1/fleet/"), 2**20, proof=proof)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="critical", lifespan="off",
            ssl_certfile=made.folder / "server.crt", ssl_keyfile=made.folder / "server.key",
        )
    )  # fmt: skip
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield listening.getsockname()[1], known, reached, off
    server.should_exit = True
    thread.join(20)
    listening.close()


def test_our_own_servers_gate_tells_known_keys_from_others_and_lets_neither_in(made, gate):
    port, known, reached, off = gate
    found = look(made, port)
    assert (found["key"].state, "doesn't know it" in found["key"].text) == ("remedy", True)
    known.add(
        made.node.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    assert states(look(made, port)) == {"server": "ok", "ca": "ok", "key": "ok", "clock": "ok"}
    off[0] = HOUR
    assert look(made, port)["key"].state == "unknown"
    assert reached == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (119, "119 s"), (121, "2 min"), (7199, "2 h"), (3600 * 2.5, "2 h 30 min"), (3600 * 72, "3 days")],
)
def test_how_a_time_is_said(seconds, words):
    assert span(seconds) == words
    assert re.fullmatch(r"[0-9]+ .+", words)
