"""Servers of the tests' own, on loopback: none is of Flower, but for the gate that looks at keys."""

import contextlib
import socket
import sys
import threading
from base64 import b64decode
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import uvicorn

sys.path.insert(0, str(Path(__file__).parent))

from looked_at import Credentials


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


@pytest.fixture
def gate(made):
    """The gate of fedhead's own server, before an application that must not be reached."""
    from fedhead.server.link.gate import Gate
    from fedhead.server.link.proof import node_proof

    known, reached, off = {}, [], [timedelta()]

    async def application(scope, receive, send):
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    proof = node_proof(lambda: known, lambda: datetime.now(UTC) + off[0])
    app = Gate(
        application, lambda path: path.startswith("/v1/fleet/"), 2**20, proof=proof, caller=b"flwr-public-key",
        name_of=lambda caller: known.get(b64decode(caller)),
    )  # fmt: skip
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
