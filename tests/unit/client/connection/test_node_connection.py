"""The connection over which a joined holder sends what leaves it: only to the server that its authority vouches for."""

from datetime import UTC, datetime, timedelta

import httpx
import pytest
from looked_at import DAY, HOUR, Credentials

from fedhead.client.joining.flower import Client


def send(authority, port):
    """A request of the node's own client, which trusts one authority; its answer's status."""
    client = Client.from_server_address(
        server_address=f"127.0.0.1:{port}",
        insecure=False,
        root_certificates=(authority.folder / "ca.crt").read_bytes(),
        interceptors=[],
    )
    with client._client as link:
        return link.post(f"https://127.0.0.1:{port}/v1/fleet/push-object", content=b"an update").status_code


def test_an_update_goes_to_the_server_of_the_authority(made, speak):
    port, requests = speak(made, status=411)
    assert send(made, port) == 411
    assert [(method, path) for method, path, _ in requests] == [("POST", "/v1/fleet/push-object")]


def later(folder):
    return Credentials(folder, server_now=datetime.now(UTC) + 2 * DAY)


def expired(folder):
    return Credentials(folder, now=datetime.now(UTC) - 10 * DAY, server_days=5)


def elsewhere(folder):
    return Credentials(folder, hosts=("127.0.0.2", "example.org"))


@pytest.mark.parametrize(
    ("make", "word"), [(Credentials, None), (elsewhere, "mismatch"), (expired, "expired"), (later, "not yet valid")]
)
def test_it_goes_to_nobody_else(tmp_path, made, speak, make, word):
    other = make(tmp_path / "other")
    port, requests = speak(other)
    trusted = made if word is None else other  # another authority's, or a certificate that isn't right for here and now
    with pytest.raises(httpx.ConnectError, match=f"certificate verify failed.*{word or 'local issuer|signature'}"):
        send(trusted, port)
    assert requests == []


def test_the_credentials_of_this_page_are_refused_for_their_fault_alone(tmp_path, speak):
    fine = Credentials(
        tmp_path / "fine", now=datetime.now(UTC) - timedelta(days=10), server_now=datetime.now(UTC) - HOUR
    )
    port, requests = speak(fine)
    assert send(fine, port) == 411
    assert len(requests) == 1
