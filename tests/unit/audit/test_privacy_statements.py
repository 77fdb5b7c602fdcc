"""Signed privacy statements: what they say, and that no other text passes for one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest

from fedhead.common.errors import FedheadError, InputError
from fedhead.common.privacy.audit.statement import sign_privacy_statement, verify_privacy_statement
from fedhead.common.privacy.ledger import (
    Ledger,
    LedgerError,
    load_key,
    statement,
)
from fedhead.common.privacy.ledger.signing import signed_text
from fedhead.common.privacy.ledger.statements import public_key
from fedhead.simulations.audit.ledgers import (
    audit_ledgers,
    read_statement,
    show_statement,
    sign_audit,
)

WORK = run_path(str(Path(__file__).with_name("ledger_work.py")))
bad, checks = (WORK[name] for name in ("bad", "checks"))


@pytest.fixture
def stated(ledger, tmp_path):
    (path,) = sign_audit(audit_ledgers([ledger]), tmp_path / "out")
    assert path.name == "ann.privacy.json"
    return path.read_text().strip()


def test_a_privacy_statement_says_what_the_audit_found(ledger, stated, tmp_path):
    key = public_key(load_key(ledger.with_name("ledger.key")))
    found = verify_privacy_statement(stated, key)
    (holder,) = audit_ledgers([ledger])["holders"]
    assert (found["holder"], found["sequence"], found["hash"]) == ("ann", *holder["mark"].values())
    (domain,) = found["domains"]
    assert domain["first"] == holder["domains"][0]["epsilon"]["first"]
    assert domain["second"] == holder["domains"][0]["epsilon"]["second"]
    assert domain["ledger"] == holder["domains"][0]["epsilon"]["ledger"]
    assert (domain["unit"], domain["released"], domain["reserved"]) == (["record"], 5, 1)
    assert domain["first_time"] < domain["last_time"] < found["time"]
    # it is a mark as well
    path = tmp_path / "ann.json"
    path.write_text(stated)
    assert checks(audit_ledgers([ledger], statements=[path], keys=[key]))["high-water"]


def test_a_statement_is_read_from_its_file(ledger, stated, tmp_path, capsys):
    path = tmp_path / "out" / "ann.privacy.json"
    key = public_key(load_key(ledger.with_name("ledger.key")))
    show_statement(read_statement(path, key))
    assert "compare it" not in capsys.readouterr().out
    show_statement(read_statement(path))
    out = capsys.readouterr().out
    assert "ann states" in out
    assert "compare it" in out
    assert key in out
    assert all(len(line) <= 80 for line in out.splitlines() if key not in line)
    assert "…" not in out
    with pytest.raises(InputError, match="can't be read"):
        read_statement(tmp_path / "none")
    path.write_text(stated + "\n\n")
    with pytest.raises(LedgerError):
        read_statement(path)


def test_another_machine_verifies_it_without_torch(stated):
    script = (
        "import sys\nfrom fedhead.common.privacy.audit.statement import verify_privacy_statement\n"
        "print(verify_privacy_statement(sys.stdin.read())['holder'])\n"
        "assert not {'torch', 'flwr', 'opacus', 'dp_accounting'} & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], input=stated, text=True, capture_output=True, check=False, env=os.environ
    )
    assert (result.stdout, result.stderr) == ("ann\n", "")


def test_every_changed_bit_is_refused(stated):
    data = stated.encode()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 7  # text stays text; capitals in hexadecimal digits are among them
        with pytest.raises(LedgerError) as caught:
            verify_privacy_statement(changed.decode())
        assert "\n" not in str(caught.value)
    for place in [i for i, byte in enumerate(data) if chr(byte) in "abcdef"]:
        changed = bytearray(data)
        changed[place] ^= 0x20
        with pytest.raises(LedgerError):
            verify_privacy_statement(changed.decode())


def test_other_keys_fields_and_texts_are_refused(ledger, stated, tmp_path):
    key, other = load_key(ledger.with_name("ledger.key")), load_key(tmp_path / "other.key")
    with pytest.raises(LedgerError, match="signed with the key"):
        verify_privacy_statement(stated, public_key(other))
    from fedhead.common.privacy.audit import statement as statements

    def signed(changes, by=key):
        fields = {**json.loads(stated), **changes}
        fields.pop("signature")
        return signed_text(fields, by, statements._CONTEXT)

    assert verify_privacy_statement(signed({}))["holder"] == "ann"
    domain = json.loads(stated)["domains"][0]
    for text in (
        signed({}, other),
        signed({"extra": 1}),
        signed({"schema": True}),
        signed({"sequence": 0}),
        signed({"subject": "another"}),
        signed({"relation": "replace one unit"}),
        signed({"domains": [{**domain, "extra": 1}]}),
        signed({"domains": [{**domain, "first": {**domain["first"], "epsilon": -1.0}}]}),
        stated + " ",
        "{}",
        "[]",
        "",
        "nonsense",
    ):
        with pytest.raises(LedgerError, match="not what a holder signed"):
            verify_privacy_statement(text)
    with Ledger(ledger) as opened:  # a statement of the ledger is no privacy statement
        text = statement(opened, "ann", key)
    with pytest.raises(LedgerError):
        verify_privacy_statement(text)


def test_nothing_is_signed_that_did_not_pass(ledger, tmp_path):
    shutil.copy(ledger, tmp_path / "bad.sqlite")
    data = (tmp_path / "bad.sqlite").read_bytes()
    (tmp_path / "bad.sqlite").write_bytes(data.replace(b'"noise_multiplier":30.0', b'"noise_multiplier":60.0'))
    found = audit_ledgers([tmp_path / "bad.sqlite"])
    with pytest.raises(InputError, match="did not pass"):
        sign_audit(found, tmp_path / "out")
    with pytest.raises(FedheadError, match="did not pass"):
        sign_privacy_statement(found["holders"][0], load_key(tmp_path / "key"))
