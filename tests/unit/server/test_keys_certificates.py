"""Certificates of a deployment: what TLS takes, what it refuses, and what they may be used for."""

import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from runpy import run_path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedhead.server.keys import describe_keys, make_keys
from fedhead.server.keys.making import make_at

FOLDERS = run_path(str(Path(__file__).with_name("key_folders.py")))
connects, now = FOLDERS["connects"], FOLDERS["now"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "keys"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_client_that_trusts_the_authority_connects(folder, host):
    make_keys(folder, ["ann"])
    assert connects(folder, folder / "ca.crt", host)
    assert connects(folder, folder / "ca.crt", host, ssl.TLSVersion.TLSv1_3)


def test_the_server_is_known_by_every_host_given_and_no_other(folder):
    make_keys(folder, ["ann"], hosts=["FL.example.org", "192.0.2.7", "::1", "fl.example.org"])
    for host in ("fl.example.org", "192.0.2.7", "::1"):
        assert connects(folder, folder / "ca.crt", host)
    for host in ("localhost", "127.0.0.1", "example.org", "a.fl.example.org"):
        with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
            connects(folder, folder / "ca.crt", host)


def test_another_authority_is_refused(folder, tmp_path):
    make_keys(folder, ["ann"])
    make_keys(tmp_path / "other", ["ann"])
    names = [
        x509.load_pem_x509_certificate((at / "ca.crt").read_bytes()).subject for at in (folder, tmp_path / "other")
    ]
    assert names[0] != names[1]
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        connects(folder, tmp_path / "other" / "ca.crt", "localhost")


def test_an_ended_certificate_is_refused(folder):
    make_at(folder, ["ann"], None, 3650, now() - timedelta(days=400))
    assert connects(folder, folder / "ca.crt", "localhost")
    (folder / "server.crt").unlink()
    make_at(folder, ["ann"], None, 30, now() - timedelta(days=40))
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
        connects(folder, folder / "ca.crt", "localhost")
    assert describe_keys(folder)["server"]["state"] == "ended"


def test_a_clock_that_is_a_little_behind_is_allowed_for(folder, tmp_path):
    make_at(folder, ["ann"], None, 30, now() + timedelta(minutes=4))
    assert connects(folder, folder / "ca.crt", "localhost")
    make_at(tmp_path / "later", ["ann"], None, 30, now() + timedelta(minutes=20))
    with pytest.raises(ssl.SSLCertVerificationError, match="not yet valid"):
        connects(tmp_path / "later", tmp_path / "later" / "ca.crt", "localhost")


def test_the_chain_holds_by_a_second_implementation(folder, tmp_path):
    make_keys(folder, ["ann"], hosts=["localhost", "10.1.2.3"], days=40)
    make_keys(tmp_path / "other", ["ann"])
    ca, server = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca.crt", "server.crt"))
    other = x509.load_pem_x509_certificate((tmp_path / "other" / "ca.crt").read_bytes())

    def verify(root, subject, at):
        PolicyBuilder().store(Store([root])).time(at).build_server_verifier(subject).verify(server, [])

    for subject in (x509.DNSName("localhost"), x509.IPAddress(ip_address("10.1.2.3"))):
        verify(ca, subject, now())
        for root, wrong, at in (
            (other, subject, now()),
            (ca, x509.DNSName("example.org"), now()),
            (ca, subject, now() + timedelta(days=41)),
            (ca, subject, now() - timedelta(minutes=6)),
        ):
            with pytest.raises(VerificationError):
                verify(root, wrong, at)


def test_the_authority_signs_servers_and_nothing_below_them(folder):
    make_keys(folder, ["ann"])
    ca, server = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca.crt", "server.crt"))
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (True, True, False)
    identity = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    signer = server.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert signer.key_identifier == identity.digest
    purposes = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]
    hosts = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert hosts.get_values_for_type(x509.DNSName) == ["localhost"]
    assert hosts.get_values_for_type(x509.IPAddress) == [ip_address("127.0.0.1")]
    assert ca.public_key().curve.name == server.public_key().curve.name == "secp256r1"
    assert timedelta(minutes=4) < datetime.now(UTC) - ca.not_valid_before_utc < timedelta(minutes=6)
    assert abs(ca.not_valid_after_utc - datetime.now(UTC) - timedelta(days=365)) < timedelta(minutes=1)


def test_a_server_never_outlives_its_authority(folder):
    make_keys(folder, ["ann"], days=10)
    (folder / "server.crt").unlink()
    found = make_keys(folder, ["ann"], days=3650)
    assert found["made"] == ["server.crt"]
    assert found["server"]["ends"] == found["authority"]["ends"]
