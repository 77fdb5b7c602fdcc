"""Credentials for as long as a test wants, and what `fedhead check` finds with them."""

import ssl
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.client.connection import connection
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
