"""This machine's clock beside the server's, and whether the server knows this holder's key."""

import re

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from looked_at import HOUR, look, states

from fedhead.client import connection as looked
from fedhead.client.calling import Answer
from fedhead.client.findings import span


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


@pytest.mark.parametrize(("status", "passing"), [(503, True), (500, True), (404, False)])
def test_a_server_that_can_not_answer_now_may_pass_for_who_joins(made, speak, status, passing):
    port, _ = speak(made, status=status, body=b"Service Unavailable")
    for joining in (False, True):
        found = look(made, port, joining=joining)["key"]
        assert found.state == ("warning" if joining and passing else "remedy")
        assert (f"can't answer now (status {status})" in found.text) == passing
        assert found.text.endswith("it will be tried again") == (joining and passing)


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


def test_our_own_servers_gate_tells_known_keys_from_others_and_lets_neither_in(made, gate):
    port, known, reached, off = gate
    found = look(made, port)
    assert (found["key"].state, "doesn't know it" in found["key"].text) == ("remedy", True)
    known[
        made.node.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    ] = "st-mary"
    assert states(look(made, port)) == {"server": "ok", "ca": "ok", "key": "ok", "clock": "ok"}
    off[0] = HOUR
    assert look(made, port)["key"].state == "unknown"
    assert reached == []


def test_the_key_of_another_holder_is_a_remedy_and_says_whose_it_is(made, gate):
    port, known, reached, _ = gate
    pem = made.node.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    known[pem] = "st-john"
    found = look(made, port)["key"]
    assert (found.state, '"st-john"' in found.text, '"st-mary"' in found.text) == ("remedy", True, True)
    known[pem] = "st-mary"
    assert look(made, port)["key"].state == "ok"
    assert reached == []


@pytest.mark.parametrize(
    ("body", "state"),
    [
        (b'{"detail": "Length Required"}', "ok"),
        (b'{"name": 5}', "ok"),
        (b"no json", "ok"),
        (b'{"name": "st-mary"}', "ok"),
        (b'{"name": "st-\\u001b[31mjohn"}', "remedy"),
    ],
)
def test_a_server_may_say_no_name_and_a_strange_one_never_reaches_the_terminal(made, speak, body, state):
    port, _ = speak(made, status=411, body=body)
    found = look(made, port)["key"]
    assert found.state == state
    assert "\x1b" not in found.text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (119, "119 s"), (121, "2 min"), (7199, "2 h"), (3600 * 2.5, "2 h 30 min"), (3600 * 72, "3 days")],
)
def test_how_a_time_is_said(seconds, words):
    assert span(seconds) == words
    assert re.fullmatch(r"[0-9]+ .+", words)
