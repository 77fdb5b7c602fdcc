"""What a stranger's certificate can do to the terminal of whoever runs `fedhead check`."""

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedhead.client.calling import Silence
from fedhead.client.connection import _said, _silent


def certificate_for(names):
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    shown = x509.SubjectAlternativeName([x509.DNSName(one) for one in names])
    return builder.add_extension(shown, critical=False).sign(key, hashes.SHA256())


def test_names_of_a_certificate_that_was_not_accepted_move_no_cursor():
    hostile = certificate_for(["\x1b[2J\x1b]0;ready\x07good.example.org", "\nok", "a" * 5000])
    found = _silent(Silence("host", "", hostile), "fl.example.org:8443", datetime.now(UTC), True)
    assert found.text.isprintable()
    assert found.text.isascii()
    assert len(found.text) < 600
    assert "good.example.org" in found.text


def test_an_answer_that_nests_too_deep_says_nothing():
    assert _said(b"[" * 65_536, "detail") is None
    assert _said(b'{"detail": "clock"}', "detail") == "clock"
