"""A network that is cut for 30 s, and connections that can't be: nothing hangs, and a holder is told what is wrong."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from deployment_processes import until

from fedhead.server.keys import make_keys

pytestmark = pytest.mark.slow
CUT = 30.0


def test_a_run_goes_on_while_a_holder_is_cut_off_for_30_s_and_takes_it_back(federation):
    """Cut twice: first every packet is lost and neither end is told, then connections are dropped and refused."""
    slowly = {"limits": {"reply_at": 1.5}}  # until it is back: however busy the machine is, rounds are left by then
    ours = federation(recipe={"training": {"rounds": 60}}, server={"round_deadline": 8.0}, holder=slowly)
    proxy = ours.through_proxy("south", slowly)
    joined = ours.up()
    submit = ours.submit()
    until(lambda: ": 2 updates in " in submit.text(), what="a round of both")
    time.sleep(0.7)  # within the next round
    whole = ours.rounds_done(submit)
    proxy.silence()
    before = max(ours.charges("south"))
    ours.after_round(submit, ours.rounds_done(submit) + 3)  # one deadline, and then without it
    assert max(ours.charges("south")) <= before + 1, "it was not cut off"
    proxy.mend()
    until(lambda: max(ours.charges("south")) > before + 1, what="it is back after the silence")
    ours.after_round(submit, max(ours.charges("south")))
    time.sleep(0.7)
    proxy.cut()
    number = ours.rounds_done(submit)
    time.sleep(CUT)
    there = ours.rounds_done(submit)
    assert there - number >= 2, "the run stood still"
    of_both = submit.text().count(": 2 updates in ")
    proxy.mend()
    until(lambda: submit.text().count(": 2 updates in ") > of_both, what="it is back after the cut")
    for name in ours.holders:
        ours.write_holder(name, {"limits": {"reply_at": 0.0}})
    assert submit.wait() == 0, submit.text()
    holders = [row["holders"] for row in ours.result()["rounds"]]
    assert 2 in holders[:whole]
    assert 1 in holders[whole:there]
    assert 2 in holders[there:]
    until(lambda: ours.online() == 2, what="both are online")
    assert all(process.alive for process in joined.values())
    # nothing is charged twice, and what was charged is at most the plan
    assert all(count["reserve"] == 1 for count in ours.charges("south").values())
    assert all(row["epsilon"] <= 3.0 for row in ours.result()["privacy"])
    ours.audited()


def test_who_can_not_be_trusted_is_told_so_and_nothing_hangs(federation):
    ours = federation(["north", "south", "stranger"])
    ours.write_server({"holders": ["keys/north.pub", "keys/south.pub"]})
    ours.serve()
    make_keys(ours.folder / "others", ["south"])

    def refused(name: str, *words: str) -> str:
        """What a join that ends with status 1 said, in one line for each fault."""
        process = ours.join(name)[0]
        assert process.wait() == 1, process.text()
        said = process.text()
        assert "Traceback" not in said
        assert any(word in said.lower() for word in words), said
        return said

    ours.write_holder("south", {"ca": "../others/ca.crt"})
    refused("south", "certificate", "authority")
    ours.write_holder("south")
    refused("stranger", "key")
    for role in ("join", "node", "executor"):
        (ours.folder / "orders" / "south").mkdir(parents=True, exist_ok=True)
        (ours.folder / "orders" / "south" / f"{role}.clock").write_text("60")
    refused("south", "clock")
    (ours.folder / "orders" / "south" / "join.clock").write_text("-600")
    refused("south", "clock")
    # the same where only the node finds out: a clock that was put wrong after the look before joining
    (ours.folder / "orders" / "south" / "join.clock").unlink()
    ours.order("south", "executor", "light")
    refused("south", "clock")
    assert ours.online() == 0


def test_a_certificate_that_has_expired_is_neither_shown_nor_believed(federation):
    ours = federation(["north"])
    expire(ours.folder / "keys")
    refused = ours.start("serve", "serve", ours.server_file)
    assert refused.wait() == 2
    assert "it ended on" in refused.text()
    with shown(ours.folder / "keys") as port:  # a server that doesn't look at its own
        ours.write_holder("north", {"server": f"127.0.0.1:{port}"})
        process = ours.join("north")[0]
        assert process.wait() == 1, process.text()
    assert "expired" in process.text() or "ended" in process.text()
    assert "Traceback" not in process.text()


@contextlib.contextmanager
def shown(keys: Path) -> Iterator[int]:
    """A TLS server that shows the certificate, and says nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "server.crt", keys / "server.key")
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as one:
                    one.recv(1)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(10)


def expire(keys: Path) -> None:
    """Put a certificate in place of the server's that ended yesterday; everything else of it stays."""
    authority = x509.load_pem_x509_certificate((keys / "ca.crt").read_bytes())
    signer = serialization.load_pem_private_key((keys / "ca.key").read_bytes(), None)
    old = x509.load_pem_x509_certificate((keys / "server.crt").read_bytes())
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(authority.subject)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=3))
        .not_valid_after(now - timedelta(days=1))
    )
    for extension in old.extensions:
        made = made.add_extension(extension.value, extension.critical)
    text = made.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (keys / "server.crt").write_bytes(text)
