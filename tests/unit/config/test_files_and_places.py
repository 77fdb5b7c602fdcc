"""Files that people name by mistake, and paths and addresses as they type them: one line each, and no waiting."""

import os

import pytest

from fedhead.client.holder import make_holder
from fedhead.common.config.places import address_of, is_host, path_from
from fedhead.common.config.tables import read_toml
from fedhead.common.errors import ConfigError, InputError
from fedhead.server.credentials import public_key_pem
from fedhead.server.server_file import make_server

HOLDER = {
    "name": "north",
    "data": {"source": "csv:records.csv"},
    "budget": {"epsilon": 4.0, "delta": 1e-5},
}


def fault_of(path):
    with pytest.raises(ConfigError) as caught:
        read_toml(path, "SERVER", "Name one.")
    (line,) = caught.value.faults
    return line


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("a = 1".encode("utf-16"), "it must be text in UTF-8. Save it in that encoding."),
        ('a = "stäte"'.encode("latin-1"), "it must be text in UTF-8. Save it in that encoding."),
        (b"#" * (1 << 20) + b"\na = 1", "it must have at most 1 MiB. Check that it is the right file."),
        (b'a = "\x00"', "it is no valid TOML"),
        (b"a = = 1", "it is no valid TOML"),
    ],
)
def test_a_file_that_is_no_toml(tmp_path, content, rule):
    path = tmp_path / "a b ü.toml"
    path.write_bytes(content)
    assert fault_of(path).startswith(f'SERVER is "{path}": {rule}')


def test_a_folder_and_a_device_without_an_end(tmp_path):
    assert "it can't be read (Is a directory)" in fault_of(tmp_path)
    assert "it must have at most 1 MiB" in fault_of(tmp_path.__class__("/dev/zero"))


def test_a_byte_order_mark_and_other_line_ends_do_no_harm(tmp_path):
    path = tmp_path / "file.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\r\nb = 2\r\n")
    assert read_toml(path, "SERVER", "") == {"a": 1, "b": 2}


def test_patterns_are_said_in_words(tmp_path):
    raw = {**HOLDER, "name": "a b", "server": "no port", "storage": {"folder": "a\0b"}, "data": {"source": "records"}}
    with pytest.raises(ConfigError) as caught:
        make_holder(raw, tmp_path)
    assert len(caught.value.faults) == 4
    assert not any("^" in line or "\\S" in line for line in caught.value.faults)


@pytest.mark.parametrize("host", ["fl.example.org", "localhost", "192.0.2.7", "[2001:db8::7]", "exämple.org", "a_b"])
def test_hosts(host):
    assert is_host(f"{host}:8443")
    assert address_of(f"{host}:8443") == (host.strip("[]"), 8443)


@pytest.mark.parametrize(
    "host", ["", "https://a", "a/b", "a:b", "::1", "[::1", "[a]", "[]", "u@h", "*", "[::1%eth0]x", "[1.2.3.4]"]
)
def test_what_is_no_host_is_a_fault_of_both_files(tmp_path, host):
    assert not is_host(f"{host}:8443")
    if host:
        with pytest.raises(ConfigError, match=r"server is .*: it must be a host name or an address"):
            make_holder({**HOLDER, "server": f"{host}:8443"}, tmp_path)
        with pytest.raises(ConfigError) as caught:
            make_server({"address": f"{host}:8443"}, tmp_path)
        assert any(line.startswith(f'address is "{host}:8443": it must be a host name') for line in caught.value.faults)


def test_the_home_of_nobody_is_a_name_like_any_other(tmp_path):
    assert path_from("~nobody-is-called-so/x", tmp_path) == tmp_path / "~nobody-is-called-so/x"
    with pytest.raises(ConfigError, match=r"ca is .*there is no such file"):
        make_holder({**HOLDER, "ca": "~nobody-is-called-so/ca.crt", "key": "x" * 5000}, tmp_path)


def test_a_pipe_in_the_place_of_a_key_is_not_waited_for(tmp_path):

    os.mkfifo(tmp_path / "north.pub")
    with pytest.raises(InputError, match="it must be a file"):
        public_key_pem(tmp_path / "north.pub")
