"""What tests of keys share: the time, what lies in a folder, a handshake with its certificates, and one-line errors."""

import socket
import ssl
import threading
from datetime import UTC, datetime
from pathlib import Path


def now() -> datetime:
    """Asked anew: a test may run long after this file was read."""
    return datetime.now(UTC)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert ": " in text
    assert text.endswith(".") or "Run: chmod" in text
    return text


def connects(server: Path, ca: Path, host: str, minimum=ssl.TLSVersion.TLSv1_2) -> bool:
    """A handshake over loopback with the files as they lie there; the client's own error when it refuses."""
    offer = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    offer.load_cert_chain(server / "server.crt", server / "server.key")
    offer.minimum_version = minimum
    trust = ssl.create_default_context(cafile=str(ca))
    trust.verify_flags |= ssl.VERIFY_X509_STRICT  # the default of later versions of Python
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def answer() -> None:
            connection, _ = listener.accept()
            try:
                with offer.wrap_socket(connection, server_side=True) as wrapped:
                    wrapped.sendall(b"hello")
            except (ssl.SSLError, OSError):
                pass  # the client has refused, and says why
            finally:
                connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=10) as plain,
                trust.wrap_socket(plain, server_hostname=host) as wrapped,
            ):
                return wrapped.recv(5) == b"hello"
        finally:
            thread.join(10)
