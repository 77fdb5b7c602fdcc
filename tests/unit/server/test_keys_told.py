"""Keys of a deployment: bad input is one line a fault, and what is there is told to people and to programs."""

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from runpy import run_path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedhead.common.errors import ConfigError, InputError
from fedhead.common.failpoints import installed
from fedhead.server.keys import describe_keys, make_keys, show_keys
from fedhead.server.keys.certificates import host_name
from fedhead.server.keys.making import make_at

FOLDERS = run_path(str(Path(__file__).with_name("key_folders.py")))
contents, now, one_line = (FOLDERS[name] for name in ("contents", "now", "one_line"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "keys"


# Bad input


@pytest.mark.parametrize(
    ("holders", "words"),
    [
        ([], "holders is .*at least one"),
        ("ann", "holders is .*at least one"),
        (["ann", "ann"], 'holder is "ann": .*once'),
        (["ann", "Ann"], 'holder is "Ann": .*once'),
        (["Jos\u00e9", "JOSE\u0301"], "once"),
        (["a b"], "letters, digits"),
        (["../ann"], "letters, digits"),
        (["ann\n"], "letters, digits"),
        ([""], "letters, digits"),
        (["x" * 65], "letters, digits"),
        ([7], "letters, digits"),
        (["ca"], "files of the server's own"),
        (["Server"], "files of the server's own"),
        ([".."], "begin with"),
        (["-rf"], "begin with"),
        (["\U0001d538" * 60], "short"),
    ],
)
def test_odd_holders(folder, holders, words):
    with pytest.raises(InputError, match=words) as caught:
        make_keys(folder, holders)
    one_line(caught)
    assert not folder.exists()


ODD_HOSTS = (
    "", " ", "fl.example.org:8443", "https://fl.example.org", "*.example.org", "a..b", "-a.org", "a-.org", "a_b.org",
    "256.1.1.1", "1.2.3", "0.0.0.0", "::", "[::1]", "fe80::1%eth0", "ünï.org", "a\n", "x" * 64, "example.org.",
    ".".join(["abcdefg"] * 40), 7,
)  # fmt: skip


@pytest.mark.parametrize("host", ODD_HOSTS)
def test_odd_hosts(folder, host):
    with pytest.raises(InputError, match="DNS name or an IP address") as caught:
        make_keys(folder, ["ann"], hosts=["localhost", host])
    one_line(caught)
    assert not folder.exists()


@pytest.mark.parametrize("host", ["localhost", "a", "xn--nxasmq6b.org", "1a.2b", "x" * 63, "192.0.2.1", "2001:DB8::1"])
def test_good_hosts(host):
    assert host_name(host) is not None


@pytest.mark.parametrize("days", [0, -1, 3651, 1.5, True, "7", float("nan")])
def test_odd_days(folder, days):
    with pytest.raises(InputError, match=r"days is .*1 to 3650") as caught:
        make_keys(folder, ["ann"], days=days)
    one_line(caught)


def test_all_faults_come_at_once(folder):
    with pytest.raises(ConfigError) as caught:
        make_keys(folder, ["a b", "ca"], hosts=["a:1"], days=0)
    assert len(caught.value.faults) == 4


def test_folders_that_can_not_be_used(folder, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file", tmp_path / "file" / "keys", tmp_path / "link", Path("/proc/keys"), Path("a\0b")):
        for call in (lambda path: make_keys(path, ["ann"]), describe_keys):
            with pytest.raises(InputError, match="DIR is ") as caught:
                call(path)
            one_line(caught)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no keys"):
        describe_keys(tmp_path / "empty")


def _without_rights(folder: Path) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)  # root may write everywhere
    try:
        make_keys(folder, ["ann"])
    except InputError as error:
        os._exit(7 if "right to write" in str(error) else 1)


def test_a_folder_that_is_not_writable():
    with tempfile.TemporaryDirectory() as outside:  # not below pytest's own folder, which only its owner may enter
        os.chmod(outside, 0o755)
        folder = Path(outside) / "keys"
        folder.mkdir(mode=0o500)
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
        process = multiprocessing.get_context("fork").Process(target=_without_rights, args=(folder,))
        process.start()
        process.join(30)
        assert process.exitcode == 7
        if os.geteuid() == 0:
            os.chown(folder, 0, 0)
        assert not os.listdir(folder)


@pytest.mark.parametrize("point", ["keys.written", "keys.linked"])
def test_a_full_disk_is_one_line(folder, point):
    def fail(name):
        if name == point:
            raise OSError(28, "No space left on device")

    with installed(fail), pytest.raises(InputError, match="No space left") as caught:
        make_keys(folder, ["ann"])
    one_line(caught)
    assert os.listdir(folder) == ([] if point == "keys.written" else ["ca.key"])
    make_keys(folder, ["ann"])


# What is told


def test_what_is_there_is_described(folder):
    make_at(folder, ["ann"], None, 3650, now())
    (folder / "server.crt").unlink()
    found = make_keys(folder, ["ann"], days=29)
    told = describe_keys(folder)
    assert told == {key: value for key, value in found.items() if key not in ("made", "kept")}
    assert json.loads(json.dumps(found)) == found
    assert (told["authority"]["state"], told["server"]["state"]) == ("valid", "ends soon")
    assert told["server"]["hosts"] == ["localhost", "127.0.0.1"]
    assert [line for line in told["warnings"] if "server.crt ends on" in line]
    der = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()).public_bytes(serialization.Encoding.DER)
    assert told["authority"]["sha256"].replace(":", "").lower() == hashlib.sha256(der).hexdigest()


def test_faults_are_warnings_where_keys_are_only_described(folder):
    make_keys(folder, ["ann", "ben"])
    (folder / "ann.key").chmod(0o644)
    (folder / "ben.pub").unlink()
    (folder / "notes.pub").write_text("no key")
    before = contents(folder)
    warnings = describe_keys(folder)["warnings"]
    for word in ("chmod 600", "ben.pub is missing", "notes.pub can't be used"):
        assert sum(word in line for line in warnings) == 1
    assert contents(folder) == before


def test_a_data_holders_own_part_is_described(folder, tmp_path):
    fingerprints = [entry["fingerprint"] for entry in make_keys(folder, ["ann"])["holders"]]
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    for name in ("ca.crt", "ann.key"):
        shutil.copy2(folder / name, own / name)
    found = describe_keys(own)
    assert found["server"] is None
    assert [entry["fingerprint"] for entry in found["holders"]] == fingerprints
    assert not found["warnings"]


def test_the_page_has_80_columns_and_says_who_gets_what(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show_keys(make_keys(folder, ["ann", "x" * 64], days=20))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for words in ("ca.key", "keep it offline", "ann alone", "every data holder", "new", "ends soon", "ends on"):
        assert words in shown
    for entry in describe_keys(folder)["holders"]:
        assert entry["fingerprint"] in shown
    assert "PRIVATE" not in shown


def test_no_private_key_is_in_what_is_told(folder):
    told = json.dumps(make_keys(folder, ["ann"]))
    for path in folder.glob("*.key"):
        for line in path.read_text().splitlines():
            assert line not in told
