"""The endpoint of metrics: on loopback only, one line when it can't be, and the port is free afterwards."""

import socket
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Gauge

from fedhead.common.errors import InputError
from fedhead.common.operations.metrics import OTHER, loopback, one_of, serve_metrics


def free_port(host: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as reply:
        return reply.read().decode()


@pytest.fixture
def registry():
    made = CollectorRegistry()
    Gauge("fedhead_test", "A figure.", registry=made).set(7)
    return made


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("127.0.0.1:9100", ("127.0.0.1", 9100)),
        ("127.8.9.10:1", ("127.8.9.10", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("::1:9100", ("::1", 9100)),
        ("localhost:9100", ("127.0.0.1", 9100)),
        ("LOCALHOST:0", ("127.0.0.1", 0)),
    ],
)
def test_loopback_is_taken(address, found):
    assert loopback(address) == found


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:9100", "[::]:9100", ":9100", "10.0.0.1:9100", "192.0.2.7:9100", "[::ffff:127.0.0.1]:9100",
        "[::ffff:10.0.0.1]:9100", "fl.example.org:9100", "localhost.example.org:9100", "127.0.0.1", "9100",
        "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:９１００", "127.1:9100", "0177.0.0.1:9100", "2130706433:9100",
        "127.0.0.1:9100\n", " 127.0.0.1:9100", "http://127.0.0.1:9100", "",
    ],
)  # fmt: skip
def test_anything_else_is_one_line(address, registry):
    with pytest.raises(InputError) as caught:
        serve_metrics(address, registry)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("metrics is ")
    assert text.endswith("Give one such as 127.0.0.1:9100.")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_metrics_are_served_until_closed(host, registry):
    address = "::1" if host == "[::1]" else "127.0.0.1"
    try:
        port = free_port(address)
    except OSError:
        pytest.skip("no IPv6 here")
    before = threading.active_count()
    close = serve_metrics(f"{host}:{port}", registry)
    try:
        assert "fedhead_test 7.0" in read(f"http://{host}:{port}/metrics")
    finally:
        close()
    close()
    with pytest.raises(urllib.error.URLError):
        read(f"http://{host}:{port}/metrics")
    assert threading.active_count() <= before
    serve_metrics(f"{host}:{port}", registry)()  # free again


def test_a_port_that_is_taken_is_one_line(registry):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(InputError, match="can't be listened on") as caught:
            serve_metrics(address, registry)
        assert "\n" not in str(caught.value)
        assert address in str(caught.value)


def test_only_get_is_answered(registry):
    port = free_port()
    close = serve_metrics(f"127.0.0.1:{port}", registry)
    try:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/metrics", b"x"), timeout=30)
        assert caught.value.code == 405
    finally:
        close()


def test_labels_come_from_a_fixed_set():
    assert one_of("a", {"a", "b"}) == "a"
    assert [one_of(value, {"a"}) for value in ("b", "", None, 1, ["a"])] == [OTHER] * 5
