"""server.toml: every fault at once, in the words of a person."""

import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedhead.common.errors import ConfigError
from fedhead.server.keys import make_keys
from fedhead.server.server_file import ServerFile, address_of, load_server, make_server


@pytest.fixture
def folder(tmp_path):
    make_keys(tmp_path / "keys", ["north", "south"])
    return tmp_path


@pytest.fixture
def raw():
    return {"certificates": "keys", "holders": ["keys/north.pub", "keys/south.pub"]}


def faults_of(raw, folder):
    with pytest.raises(ConfigError) as caught:
        make_server(raw, base=folder)
    return caught.value.faults


def test_a_file_is_read_with_paths_relative_to_it(folder):
    (folder / "server.toml").write_text('certificates = "keys"\nholders = ["keys/north.pub", "keys/south.pub"]\n')
    server = load_server(folder / "server.toml")
    assert server.public_keys == {name: folder / "keys" / f"{name}.pub" for name in ("north", "south")}
    assert (server.certificate, server.key) == (folder / "keys/server.crt", folder / "keys/server.key")
    assert {path.parent for path in (server.link_database, server.token_file, server.run_file)} == {folder / "state"}
    assert (server.least_holders, server.round_deadline, server.message_megabytes) == (2, 300.0, 512)


def test_public_keys_are_those_that_a_node_proves(folder, raw):
    raw["holders"][1] = "south.pem"  # PEM is taken as well as the line that `fedhead keys` writes
    public = serialization.load_ssh_public_key((folder / "keys/south.pub").read_bytes())
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "south.pem").write_bytes(pem)
    keys = make_server(raw, folder).public_pems()
    assert keys["south"] == pem
    private = serialization.load_ssh_private_key((folder / "keys/north.key").read_bytes(), None).public_key()
    assert serialization.load_pem_public_key(keys["north"]) == private


def test_all_faults_come_at_once_one_line_each(folder, raw):
    raw |= {
        "address": "0.0.0.0:8444", "control": "192.0.2.7:8444", "metrics": "127.0.0.1:70000", "round_deadline": "soon",
        "least_holders": 3, "adress": "x", "message_megabytes": 0,
    }  # fmt: skip
    faults = faults_of(raw, folder)
    assert all("\n" not in line for line in faults)
    starts = sorted(line.split(" is ")[0] for line in faults)
    assert starts == [
        "adress", "control", "control", "least_holders", "message_megabytes", "metrics", "round_deadline",
    ]  # fmt: skip
    assert 'Did you mean "address"?' in next(line for line in faults if line.startswith("adress"))


def test_constants_of_single_holders(folder, raw):
    assert make_server(raw, folder).declared_records is None
    assert make_server(raw | {"declared_records": {"south": 4000}}, folder).declared_records == {"south": 4000}
    counts = {"south": 0, "north": 2.5, "st mary": 10, "west": 2**60}
    faults = faults_of(raw | {"declared_records": counts}, folder)
    assert [line.split(" is ")[0] for line in faults] == [
        "declared_records.south", "declared_records.north", "declared_records.west",
    ]  # fmt: skip
    faults = faults_of(raw | {"declared_records": {"st mary": 10}}, folder)
    assert faults == (
        'declared_records."st mary" is 10: it must be the name of a holder: north, south. '
        "Correct it, or list its public key in holders.",
    )  # fmt: skip
    assert faults_of(raw | {"declared_records": 10}, folder)[0].startswith("declared_records is 10: it must be a table")


def test_missing_settings_name_the_right_page(folder):
    faults = faults_of({}, folder)
    assert [line.split(" ")[0] for line in faults] == ["certificates", "holders"]
    assert all("docs/deploy.md" in line and "docs/recipes.md" not in line for line in faults)


@pytest.mark.parametrize("control", ["0.0.0.0:8444", "fl.example.org:8444", "10.0.0.1:8444", "[::]:8444"])
def test_control_must_be_loopback(folder, raw, control):
    (fault,) = faults_of(raw | {"control": control}, folder)
    assert fault.startswith(f'control is "{control}": it must be an address of this machine alone')


@pytest.mark.parametrize("control", ["127.0.0.1:9000", "localhost:9000", "[::1]:9000", "127.8.9.1:9000"])
def test_loopback_has_many_forms(folder, raw, control):
    assert make_server(raw | {"control": control}, folder).control == control


def test_two_addresses_must_have_two_ports(folder, raw):
    faults = faults_of(raw | {"address": "192.0.2.7:9000", "control": "127.0.0.1:9000"}, folder)
    assert faults == ('control is "127.0.0.1:9000": it must have another port than address. Give another port.',)


def test_certificates_that_are_missing(folder, raw):
    (folder / "keys/server.key").unlink()
    (fault,) = faults_of(raw, folder)
    assert 'certificates is "keys": there is no server.key in it.' in fault


def test_a_certificate_of_another_key(folder, raw):
    other = make_keys(folder / "other", ["north"]) and (folder / "other/server.key")
    (folder / "keys/server.key").write_bytes(other.read_bytes())
    (fault,) = faults_of(raw, folder)
    assert "server.crt must be the certificate of server.key" in fault


def test_a_private_key_that_others_may_read(folder, raw):
    (folder / "keys/server.key").chmod(0o640)
    (fault,) = faults_of(raw, folder)
    assert "server.key must be open to its owner alone, and its mode is 0640" in fault


def test_files_that_are_no_certificate_and_no_key(folder, raw):
    (folder / "keys/server.crt").write_text("nothing")
    assert "server.crt must be a certificate in PEM" in faults_of(raw, folder)[0]
    make_keys(folder / "other", ["north"])
    (folder / "keys/server.crt").write_bytes((folder / "other/server.crt").read_bytes())
    (folder / "keys/server.key").write_text("nothing")
    assert "server.key must be a private key in PEM that is not encrypted" in faults_of(raw, folder)[0]


def _openssh(key):
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"nothing", b"\xff\xfe", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        _openssh(ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()),
        ec.derive_private_key(7, ec.SECP256K1()).public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
    ],
    ids=["empty", "text", "bytes", "broken", "ed25519", "secp256k1"],
)  # fmt: skip
def test_a_file_that_is_no_public_key(folder, raw, content):
    (folder / "keys/south.pub").write_bytes(content)
    (fault,) = faults_of(raw, folder)
    assert fault.startswith('holders[1] is "keys/south.pub": it must be a public key on the curve P-256')


def test_a_private_key_in_place_of_a_public_one(folder, raw):
    (fault,) = faults_of(raw | {"holders": ["keys/north.pub", "keys/south.key"]}, folder)
    assert "this is a private one, which must never leave its holder" in fault


def test_names_and_keys_must_be_different(folder, raw):
    (folder / "more").mkdir()
    (folder / "more/North.pub").write_bytes((folder / "keys/south.pub").read_bytes())
    faults = faults_of(raw | {"holders": [*raw["holders"], "more/North.pub", "keys/north.pub"]}, folder)
    assert len(faults) == 3
    assert "a name must be listed once, and it is that of keys/north.pub" in faults[0]
    assert "its key must be another than that of keys/south.pub" in faults[1]
    assert faults[2].startswith('holders[3] is "keys/north.pub": a name must be listed once')


def test_a_name_must_be_one(folder, raw):
    (folder / "keys/st mary.pub").write_bytes((folder / "keys/south.pub").read_bytes())
    (fault,) = faults_of(raw | {"holders": ["keys/north.pub", "keys/st mary.pub"]}, folder)
    assert "a name must be 1 to 64 letters" in fault


def test_files_that_change_later_are_an_error_in_one_line_each(folder, raw):
    server = make_server(raw, folder)
    for name in ("north", "south"):
        (folder / f"keys/{name}.pub").unlink()
    with pytest.raises(ConfigError) as caught:
        server.public_pems()
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize(
    ("text", "found"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:8443", ("::1", 8443)), ("fl.example.org:1", ("fl.example.org", 1))],
)
def test_host_and_port(text, found):
    assert address_of(text) == found


def test_every_setting_says_what_it_is():
    assert all(field.description for field in ServerFile.model_fields.values())


def test_reading_it_imports_neither_flower_nor_torch(folder):
    (folder / "server.toml").write_text('certificates = "keys"\nholders = ["keys/north.pub", "keys/south.pub"]\n')
    code = (
        "import sys; from fedhead.server.server_file import load_server; load_server(sys.argv[1]).public_pems(); "
        "print(sorted({'flwr', 'torch', 'fastapi'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, folder / "server.toml"], capture_output=True, text=True, timeout=120, check=True
    )
    assert run.stdout == "[]\n"
