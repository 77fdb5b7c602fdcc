"""Keys of a deployment: what Flower takes, rights of files, and that nothing is overwritten."""

import os
import shutil
import stat
import subprocess
import sys
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from runpy import run_path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from fedhead.client.holder import HolderFile
from fedhead.common.config.names import is_name
from fedhead.common.errors import InputError
from fedhead.server.keys import make_keys
from fedhead.server.keys.files import PUBLIC, KeyFolder
from fedhead.server.keys.making import make_at
from fedhead.server.keys.pairs import fingerprint

FOLDERS = run_path(str(Path(__file__).with_name("key_folders.py")))
connects, contents, now, one_line = (FOLDERS[name] for name in ("connects", "contents", "now", "one_line"))

TLS_FILES = {"ca.key", "ca.crt", "server.key", "server.crt"}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "keys"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Keys of data holders


def test_flower_takes_the_keys_of_a_data_holder(folder):
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, sign_message, verify_signature
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    make_keys(folder, ["ann", "Bö-2.x_y"])
    loaded = {}
    for name in ("ann", "Bö-2.x_y"):
        arguments = Namespace(auth_supernode_private_key=str(folder / f"{name}.key"), auth_supernode_public_key=None)
        private, public = _try_setup_client_authentication(arguments)
        loaded[name] = bytes_to_public_key(try_load_public_key(folder / f"{name}.pub"))
        assert private.curve.name == "secp384r1"
        assert public == loaded[name]
        assert verify_signature(loaded[name], b"round", sign_message(private, b"round"))
    assert not verify_signature(loaded["ann"], b"round", sign_message(private, b"round"))


PUB = (
    "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlzdHAzODQAAABhBA28ZXyFhqFljV4YkFMDF4jnz7Om7yAjzWBCQ0gB"
    "XpgEWRym/UHopz2CrTeflk6iqfcVog96sEN+HNn4SB1FUVpVrvlNpzXjDUd2j3CVkERMOTgFjKaCRRGzY7lnrrBXTw== north\n"
)


def test_fingerprints_are_those_of_ssh_keygen(folder):
    key = serialization.load_ssh_public_key(PUB.encode())
    assert fingerprint(key) == "SHA256:y4MlyJVfiRAx/pzyqXIs/F3GBvjzZisUeVOnhAfGQIA"  # as ssh-keygen -l printed it
    found = make_keys(folder, ["ann", "ben"])
    assert len({entry["fingerprint"] for entry in found["holders"]}) == 2
    if shutil.which("ssh-keygen"):
        for entry in found["holders"]:
            for end in ("pub", "key"):
                arguments = ["ssh-keygen", "-l", "-f", folder / f"{entry['name']}.{end}"]
                printed = subprocess.run(arguments, capture_output=True, text=True, check=True)
                assert entry["fingerprint"] in printed.stdout.split()


def test_names_follow_the_rule_of_holder_toml():
    field = {"data": {"source": "csv:x.csv"}, "budget": {"epsilon": 1.0}}
    for name in ("a", "st-mary", "ünï", "x" * 64, "x" * 65, "", "a b", "a/b", "a\n", "a\0", "..", "-a", 7, None):
        try:
            taken = HolderFile.model_validate({"name": name, **field}).name == name
        except ValueError:
            taken = False
        assert is_name(name) == taken


# What is written, and what stays


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_whatever_the_umask(folder, umask):
    before = os.umask(umask)
    try:
        make_keys(folder, ["ann"])
    finally:
        os.umask(before)
    assert mode(folder) == 0o700
    found = {path.name: mode(path) for path in folder.iterdir()}
    private = dict.fromkeys(("ca.key", "server.key", "ann.key"), 0o600)
    assert found == {**private, **dict.fromkeys(("ca.crt", "server.crt", "ann.pub"), 0o644)}


def test_a_second_call_adds_and_changes_nothing(folder):
    first = make_keys(folder, ["ann"], hosts=["fl.example.org", "192.0.2.7"])
    assert set(first["made"]) == TLS_FILES | {"ann.key", "ann.pub"}
    assert first["kept"] == []
    before = contents(folder)
    second = make_keys(folder, ["ann", "ben"], hosts=["FL.example.org"])
    assert second["made"] == ["ben.key", "ben.pub"]
    assert set(second["kept"]) == set(before)
    assert {name: contents(folder)[name] for name in before} == before
    third = make_keys(folder, ["ann", "ben"])
    assert third["made"] == []
    assert {entry["name"] for entry in third["holders"]} == {"ann", "ben"}


def test_keys_that_went_to_their_owners_are_not_made_again(folder):
    make_keys(folder, ["ann"])
    for name in ("ann.key", "ca.key", "server.key"):
        (folder / name).unlink()
    found = make_keys(folder, ["ann", "ben"])
    assert found["made"] == ["ben.key", "ben.pub"]
    assert [(entry["name"], entry["private"]) for entry in found["holders"]] == [("ann", False), ("ben", True)]
    assert not found["warnings"]


def test_a_public_half_that_is_missing_is_made_from_the_private_one(folder):
    make_keys(folder, ["ann"])
    before = contents(folder)
    for name in ("ann.pub", "server.crt"):
        (folder / name).unlink()
    assert make_keys(folder, ["ann"])["made"] == ["server.crt", "ann.pub"]
    assert contents(folder)["ann.pub"] == before["ann.pub"]
    assert connects(folder, folder / "ca.crt", "localhost")


def change(name, content=None, mode=0o600):
    def apply(folder):
        path = folder / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
            path.chmod(mode)

    return apply


def swap(*names):
    def apply(folder):
        make_keys(folder.parent / "other", ["ann"])
        for name in names:
            shutil.copy(folder.parent / "other" / name, folder / name)

    return apply


def both(*changes):
    return lambda folder: [apply(folder) for apply in changes]


def directory(name):
    return both(change(name), lambda folder: (folder / name).mkdir())


OTHER_KIND = ed25519.Ed25519PrivateKey.generate()
SSH = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
OTHER_PUBLIC = OTHER_KIND.public_key().public_bytes(
    serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
)  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "ann.key").chmod(0o640), "ann.key has mode 0640: .*chmod 600 .*ann.key"),
        (lambda folder: (folder / "ca.key").chmod(0o604), "ca.key has mode 0604: .*chmod 600"),
        (lambda folder: (folder / "server.key").chmod(0o620), "server.key has mode 0620: .*chmod 600"),
        (lambda folder: (folder / "ca.crt").chmod(0o666), "ca.crt has mode 0666: .*chmod 644"),
        (lambda folder: folder.chmod(0o755), "DIR is .*mode is 0755. Run: chmod 700"),
        (swap("ann.pub"), "ann.pub is not the public half of ann.key"),
        (swap("server.key"), "server.crt is not the public half of server.key"),
        (swap("ca.crt"), "server.crt is not signed by ca.crt"),
        (both(swap("ca.crt"), change("server.crt")), "ca.crt is not the public half of ca.key"),
        (change("ca.crt"), "ca.crt is missing"),
        (both(change("ca.key"), change("server.crt")), "ca.key is missing: .*to sign"),
        (change("ann.key", b""), "ann.key can't be used"),
        (change("ann.pub", b"no key\n"), "ann.pub can't be used"),
        (
            change("server.crt", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
            "server.crt can't be",
        ),
        (change("server.key", b"\xff\x00"), "server.key can't be used"),
        (change("ann.key", OTHER_KIND.private_bytes(*SSH)), "ann.key has another kind of key"),
        (change("ann.pub", OTHER_PUBLIC), "ann.pub has another kind of key"),
        (both(change("ann.key"), lambda folder: os.mkfifo(folder / "ann.key", 0o600)), "ann.key is no file"),
        (directory("ann.pub"), "ann.pub is no file"),
        (both(change("ann.pub"), lambda folder: (folder / "ann.pub").symlink_to("nowhere")), "No such file"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(folder, spoil, words):
    make_keys(folder, ["ann"])
    spoil(folder)
    before = sorted(os.listdir(folder)), {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(InputError, match=words) as caught:
        make_keys(folder, ["ann", "ben"])
    one_line(caught)
    after = sorted(os.listdir(folder)), {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after == before


def test_an_ended_authority_signs_nothing(folder):
    make_at(folder, ["ann"], None, 10, now() - timedelta(days=20))
    make_keys(folder, ["ben"])  # needs no signature
    (folder / "server.crt").unlink()
    with pytest.raises(InputError, match=r"ca\.crt ended on") as caught:
        make_keys(folder, ["ann"])
    one_line(caught)


def test_other_hosts_are_refused(folder):
    make_keys(folder, ["ann"])
    before = contents(folder)
    with pytest.raises(
        InputError, match=r"fl\.example\.org.* is for localhost, 127\.0\.0\.1, .*Move it away"
    ) as caught:
        make_keys(folder, ["ben"], hosts=["localhost", "fl.example.org"])
    one_line(caught)
    assert contents(folder) == before
    (folder / "server.crt").unlink()  # the remedy
    assert "server.crt" in make_keys(folder, ["ben"], hosts=["localhost", "fl.example.org"])["made"]
    assert connects(folder, folder / "ca.crt", "fl.example.org")


def test_a_file_is_never_replaced(folder):
    keys = KeyFolder(folder)
    keys.prepare()
    keys.add("x", b"one", PUBLIC)
    keys.add("x", b"two", PUBLIC)
    assert (folder / "x").read_bytes() == b"one"
    assert keys.made == ["x"]


def test_neither_torch_nor_flower_nor_a_program_is_needed(folder):
    code = (
        "import sys, pathlib; from fedhead.server.keys import make_keys; "
        f"make_keys(pathlib.Path({str(folder)!r}), ['ann']); "
        "print([name for name in ('torch', 'flwr', 'numpy', 'typer') if name in sys.modules])"
    )
    environment = {**os.environ, "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "[]", done.stderr
