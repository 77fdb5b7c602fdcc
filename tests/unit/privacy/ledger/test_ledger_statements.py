"""Signed statements: what holds, what a changed text or another key gives."""

import json
import stat
from pathlib import Path

import pytest

from fedhead.common.privacy.events import GaussianEvent, NoPrivacyEvent
from fedhead.common.privacy.ledger import Ledger, LedgerError, Reservation, load_key, statement, verify_statement
from fedhead.common.privacy.ledger.statements import public_key
from fedhead.common.privacy.terms import Terms


@pytest.fixture
def ledger(tmp_path: Path):
    with Ledger(tmp_path / "ledger.sqlite") as made:
        made.declare("ann", "notes", Terms(1.0, 1e-5))
        made.reserve([Reservation("ann", "notes", "run", 1, "d", GaussianEvent(10.0, 1.0, 1), "record", "f", "os")])
        yield made


@pytest.fixture
def key(tmp_path: Path):
    return load_key(tmp_path / "keys" / "ann.key")


def test_a_statement_says_where_the_ledger_stands(ledger: Ledger, key):
    found = verify_statement(statement(ledger, "ann", key), public_key(key))
    assert (found.holder, found.mark) == ("ann", ledger.mark("ann"))
    assert found.domains == ledger.standing("ann")[1]
    assert ledger.has("ann", found.mark)


def test_an_infinite_total(ledger: Ledger, key):
    ledger.reserve([Reservation("bob", "notes", "run", 1, "d", NoPrivacyEvent(1), "record", "f", "os")])
    found = verify_statement(statement(ledger, "bob", key))
    assert found.domains["notes"].mu_squared == float("inf")


def test_every_changed_field_is_noticed(ledger: Ledger, key):
    text = statement(ledger, "ann", key)
    fields = json.loads(text)
    other = {"holder": "bob", "sequence": 1, "hash": "0" * 64, "domains": {}, "time": "now", "schema": 2}
    other |= {"public_key": "0" * 64, "signature": "0" * 128}
    assert set(other) == set(fields)
    for name, value in other.items():
        changed = json.dumps({**fields, name: value}, sort_keys=True, separators=(",", ":"))
        with pytest.raises(LedgerError, match="not what a holder signed"):
            verify_statement(changed)
    for broken in ("", "{}", "[]", "null", text + " ", text[:-1], text.replace(",", ", "), "[" * 100_000):
        with pytest.raises(LedgerError, match="not what a holder signed"):
            verify_statement(broken)


def test_every_flipped_character_is_noticed(ledger: Ledger, key):
    text = statement(ledger, "ann", key)
    for place in range(len(text)):
        changed = text[:place] + ("1" if text[place] != "1" else "2") + text[place + 1 :]
        with pytest.raises(LedgerError):
            verify_statement(changed)


def test_another_key(ledger: Ledger, key, tmp_path: Path):
    text = statement(ledger, "ann", load_key(tmp_path / "other.key"))
    verify_statement(text)
    with pytest.raises(LedgerError, match="signed with the key"):
        verify_statement(text, public_key(key))


def test_nothing_to_state(ledger: Ledger, key):
    with pytest.raises(LedgerError, match="no entry of bob"):
        statement(ledger, "bob", key)


def test_the_key_is_made_once_and_is_the_user_s_own(tmp_path: Path):
    path = tmp_path / "keys" / "ann.key"
    first = public_key(load_key(path))
    assert public_key(load_key(path)) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["ann.key"]
    assert public_key(load_key(tmp_path / "keys" / "bob.key")) != first


def test_no_key(tmp_path: Path):
    path = tmp_path / "ann.key"
    for content in (b"", b"hello", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        path.write_bytes(content)
        with pytest.raises(LedgerError, match="is not an Ed25519 key"):
            load_key(path)
    with pytest.raises(LedgerError, match="failed"):
        load_key(tmp_path)


def test_capitals_are_a_changed_text(ledger: Ledger, key):
    """They mean the same number, but the text is not what was signed."""
    text = statement(ledger, "ann", key)
    for field in ("signature", "public_key"):
        value = json.loads(text)[field]
        with pytest.raises(LedgerError, match="must be unchanged"):
            verify_statement(text.replace(value, value.upper()))
