"""A request must be signed with a registered key, now."""

from base64 import b64encode
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import sign_message

from fedhead.server.link.proof import CLOCK, NO_PROOF, UNKNOWN_KEY, node_proof

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
KEY, OTHER = (ec.derive_private_key(number, ec.SECP384R1()) for number in (5, 6))


def pem(key):
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def headers(key=KEY, at=NOW, signer=None, **changes):
    text = at.isoformat()
    found = {
        b"flwr-public-key": b64encode(pem(key)), b"flwr-timestamp": text.encode(),
        b"flwr-signature": b64encode(sign_message(signer or key, text.encode())),
    }  # fmt: skip
    return found | {f"flwr-{name}".replace("_", "-").encode(): value for name, value in changes.items()}


check = node_proof(lambda: {pem(KEY)}, lambda: NOW)


def test_a_good_proof():
    assert check(headers()) is None


@pytest.mark.parametrize(("seconds", "text"), [(4, None), (-304, None), (6, CLOCK), (-306, CLOCK), (86_400, CLOCK)])
def test_a_proof_must_be_of_now(seconds, text):
    assert check(headers(at=NOW + timedelta(seconds=seconds))) == text


def test_an_unknown_key():
    assert check(headers(key=OTHER)) == UNKNOWN_KEY


def test_a_key_that_somebody_else_has():
    assert check(headers(signer=OTHER)) == NO_PROOF


@pytest.mark.parametrize(
    "changes",
    [
        {"signature": b"AAAA"}, {"signature": b"?"}, {"signature": b""}, {"timestamp": b"now"},
        {"timestamp": b"\xff"}, {"timestamp": b"2026-05-01T12:00:00"}, {"timestamp": b"2026-05-01T12:00:01+00:00"},
        {"public_key": b"?"},
    ],
)  # fmt: skip
def test_anything_else_is_no_proof(changes):
    assert check(headers(**changes)) == NO_PROOF


def test_a_time_without_a_zone_is_no_proof():
    assert check(headers(at=NOW.replace(tzinfo=None))) == NO_PROOF


@pytest.mark.parametrize("name", [b"flwr-public-key", b"flwr-signature", b"flwr-timestamp"])
def test_nothing_may_be_missing(name):
    found = headers()
    del found[name]
    assert check(found) == NO_PROOF


def test_a_clock_is_only_told_to_those_who_have_a_key():
    late = NOW + timedelta(days=1)
    assert check(headers(key=OTHER, at=late)) == UNKNOWN_KEY
    assert check(headers(signer=OTHER, at=late)) == NO_PROOF


def test_keys_are_looked_up_anew_for_each_request():
    keys = {pem(KEY)}
    fresh = node_proof(lambda: keys, lambda: NOW)
    assert fresh(headers()) is None
    keys.clear()
    assert fresh(headers()) == UNKNOWN_KEY
