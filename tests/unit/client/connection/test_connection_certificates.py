"""Authority, certificate and names: each fault has a line of its own, and a server that is not ours is sent nothing."""

import base64
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from looked_at import DAY, Credentials, look, states


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
