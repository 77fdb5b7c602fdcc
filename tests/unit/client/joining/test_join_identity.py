"""What a holder joins with: files that are refused, and in which words."""

import os
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from fedhead.client.holder import make_holder
from fedhead.client.joining import join
from fedhead.client.joining.identity import check_given, parse_key, read_authority, read_key
from fedhead.common.errors import ConfigError, InputError
from fedhead.server.keys import make_keys


def write(path, content, mode=0o600):
    path.write_bytes(content)
    path.chmod(mode)
    return path


def pem(key, form=PrivateFormat.PKCS8, protection=None):
    return key.private_bytes(Encoding.PEM, form, protection or NoEncryption())


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.OpenSSH, PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_a_key_is_read_in_each_format(tmp_path, form, curve):
    key = ec.generate_private_key(curve)
    found = parse_key(read_key(write(tmp_path / "north.key", pem(key, form))))
    assert found.private_numbers() == key.private_numbers()


def test_the_files_that_fedhead_makes_are_read(tmp_path):
    make_keys(tmp_path / "keys", ["north"])
    parse_key(read_key(tmp_path / "keys" / "north.key"))
    assert read_authority(tmp_path / "keys" / "ca.crt").count("BEGIN CERTIFICATE") == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_is_open_to_others_is_refused(tmp_path, mode):
    path = write(tmp_path / "north.key", pem(ec.generate_private_key(ec.SECP256R1())), mode)
    with pytest.raises(InputError, match=rf"its mode is {mode:04o}\. Run: chmod 600") as found:
        read_key(path)
    assert "\n" not in str(found.value)


WEAK = ec.generate_private_key(ec.SECP256K1())
GOOD = ec.generate_private_key(ec.SECP256R1())
WRONG_KEYS = {
    "empty": b"",
    "text": b"no key",
    "encrypted": pem(GOOD, protection=BestAvailableEncryption(b"word")),
    "cut": pem(GOOD)[:80],
    "other curve": pem(WEAK),
    "rsa": pem(rsa.generate_private_key(65537, 2048)),
}


@pytest.mark.parametrize("what", WRONG_KEYS)
def test_what_is_no_key_is_refused_in_one_line_without_a_word_of_it(tmp_path, what):
    path = write(tmp_path / "north.key", WRONG_KEYS[what])
    with pytest.raises(InputError, match=r"^key is .*: it must be .*\. Use the file that") as found:
        read_key(path)
    assert "\n" not in str(found.value)
    assert "no key" not in str(found.value)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path, text in (
        (tmp_path / "pipe", "must be a file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such"),
    ):
        with pytest.raises(InputError, match=text):
            read_key(path)


@pytest.mark.parametrize("content", [b"", b"text", "ümlaut".encode(), pem(GOOD)])
def test_what_is_no_certificate_is_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"^ca is .*: it must be a certificate in PEM\."):
        read_authority(write(tmp_path / "ca.crt", content))


def test_comments_in_a_certificate_do_not_reach_flower(tmp_path):
    make_keys(tmp_path / "keys", ["north"])
    content = (tmp_path / "keys" / "ca.crt").read_bytes()
    path = write(tmp_path / "ca.crt", "# für Köln\n".encode() + content)
    assert read_authority(path).encode() == content


def test_all_that_is_missing_is_said_at_once():
    holder = make_holder({"name": "north", "data": {"source": "csv:a.csv"}, "budget": {"epsilon": 1.0}})
    with pytest.raises(ConfigError) as found:
        check_given(holder)
    assert [line.split(" is missing")[0] for line in found.value.faults] == ["server", "ca", "key"]


def test_one_process_at_a_time_joins_with_a_folder(tmp_path):
    holder = make_holder({"name": "north", "data": {"source": "csv:a.csv"}, "budget": {"epsilon": 1.0}}, base=tmp_path)
    with join.only_one(holder):
        assert stat.S_IMODE((holder.folder / join.LOCK).stat().st_mode) == 0o600
        assert stat.S_IMODE(holder.folder.stat().st_mode) == 0o700
        with pytest.raises(InputError, match="another `fedhead join` runs with it"), join.only_one(holder):
            pass
    with join.only_one(holder):
        pass
